"""File systems by URL: the one module that builds them, with the timeouts and retries that every access shares."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any, TypeAlias, cast

import fsspec

from pipelines.errors import UserError
from pipelines.store.failures import is_transient

FileSystem: TypeAlias = fsspec.AbstractFileSystem

# s3fs waits 0.1 s * 1.7^n between two requests: 1.1 s in all. Some of its operations are seven requests, one after the
# other, and are repeated as a whole by `object_store.attempt`.
REQUEST_ATTEMPTS = 4
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 30
HASTY_TIMEOUT_S = 4
CONNECTIONS = 64
RANGE_BYTES = 8 << 20
PARTS_AT_ONCE = 4


def filesystem_of(url: str, *, hasty: bool = False) -> tuple[FileSystem, str]:
    """Return the file system of a local path or URL, and the path in it.

    Args:
        url: the path or URL.
        hasty: have requests fail within seconds, and not be repeated, for who tries again soon anyway.

    Raises:
        UserError: an unknown protocol.
    """
    if "://" not in url:
        # Twelve times faster than letting fsspec take the URL apart, and a file name may hold its `::`.
        local = fsspec.filesystem("file")
        return local, str(local._strip_protocol(url))
    try:
        store, path = fsspec.core.url_to_fs(url, **_options(url.partition("://")[0], hasty))
    except (ValueError, ImportError) as error:
        raise UserError(f"no file system for {url}: {error}") from error
    if is_s3(store):
        _set_up_s3(store, hasty)
    return store, str(path)


def is_local(store: FileSystem) -> bool:
    return "file" in store.protocol


def is_s3(store: FileSystem) -> bool:
    return "s3" in store.protocol


def _options(protocol: str, hasty: bool) -> dict[str, Any]:
    if protocol == "file":
        return {}
    # Other processes write too: a listing that is remembered would hide their files.
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        options |= {
            "default_block_size": RANGE_BYTES,
            "max_concurrency": PARTS_AT_ONCE,
            "config_kwargs": {
                "connect_timeout": HASTY_TIMEOUT_S if hasty else CONNECT_TIMEOUT_S,
                "read_timeout": HASTY_TIMEOUT_S if hasty else READ_TIMEOUT_S,
                "max_pool_connections": CONNECTIONS,
                # botocore's own retries would multiply with those of s3fs.
                "retries": {"total_max_attempts": 1, "mode": "standard"},
            },
        }
    return options


def _set_up_s3(store: FileSystem, hasty: bool) -> None:
    import s3fs.core  # lazy: it imports botocore, which local storage does without

    s3fs.core.set_custom_error_handler(is_transient)
    store.retries = 1 if hasty else REQUEST_ATTEMPTS
    if store.session is None:
        store.session = _session()
    # At DEBUG botocore logs every header, session tokens among them.
    for library in ("botocore", "aiobotocore"):
        logging.getLogger(library).setLevel(logging.INFO)


def _session() -> Any:
    """Return a session of aiobotocore that reads times by the C parser: otherwise they are most of a listing's work."""
    from aiobotocore.session import AioSession
    from botocore.utils import parse_timestamp

    def parse(value: Any) -> datetime:
        try:
            return datetime.fromisoformat(value)
        except (TypeError, ValueError):
            # The headers of an answer have another form.
            return cast(datetime, parse_timestamp(value))

    session = AioSession()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=parse)
    return session
