"""Requests to object stores: retried while they can succeed later, then explained on one line without credentials.

Two layers of retries. s3fs repeats one request, so that a part of an upload or a range of a download is repeated, not
the file; `attempt` repeats the whole operation, more patiently. botocore's own retries are off: they would multiply.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from pipelines.errors import UserError
from pipelines.store.failures import code_and_status, explain_failure, is_transient, must_restart

T = TypeVar("T")

# s3fs waits 0.1 s * 1.7^n between two requests: 3.3 s in all.
REQUEST_ATTEMPTS = 6
PAUSES_S = (1.0, 3.0, 9.0)
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 30
CONNECTIONS = 64
# Files of two parts and more go up part by part; a part that fails is sent again alone.
PART_BYTES = 16 << 20
PARTS_AT_ONCE = 4
MAX_PARTS = 10_000
RANGE_BYTES = 8 << 20

_jitter = random.Random()


def filesystem(url: str) -> fsspec.AbstractFileSystem:
    """The file system of a URL, set up to see what other processes write and to retry requests.

    Raises:
        UserError: an unknown protocol.
    """
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        options |= {
            "default_block_size": RANGE_BYTES,
            "max_concurrency": PARTS_AT_ONCE,
            "config_kwargs": {
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "max_pool_connections": CONNECTIONS,
                "retries": {"total_max_attempts": 1, "mode": "standard"},
            },
        }
    try:
        store: fsspec.AbstractFileSystem = fsspec.core.url_to_fs(url, **options)[0]
    except (ValueError, ImportError) as error:
        raise UserError(f"no file system for {url}: {error}") from error
    if is_s3(store):
        import s3fs.core

        s3fs.core.set_custom_error_handler(is_transient)
        store.retries = REQUEST_ATTEMPTS
        # At DEBUG botocore logs every header, session tokens among them.
        for library in ("botocore", "aiobotocore"):
            logging.getLogger(library).setLevel(logging.INFO)
    return store


def is_s3(store: fsspec.AbstractFileSystem) -> bool:
    return "s3" in store.protocol


def attempt(url: str, operation: Callable[[], T]) -> T:
    """What `operation` returns; it is repeated after failures that may pass, so it must be idempotent.

    Raises:
        UserError: the store refused for good, or did not recover; names `url` and what to do.
        Exception: what the operation raises that is no failure of a store, FileNotFoundError among it, unchanged.
    """
    for pause in (*PAUSES_S, None):
        try:
            return operation()
        except Exception as error:
            if (failure := explain_failure(url, error)) is None:
                raise
            if pause is None or not (is_transient(error) or must_restart(error)):
                # Without the libraries' own errors, which hold whole requests.
                raise failure from None
            time.sleep(pause * _jitter.uniform(0.5, 1.0))
    raise AssertionError


def upload(store: fsspec.AbstractFileSystem, local: Path, path: str) -> None:
    """Put a local file under `path`, where it appears whole or not at all."""
    if not is_s3(store):
        store.put_file(str(local), path)
        return
    part_bytes = max(PART_BYTES, math.ceil(local.stat().st_size / MAX_PARTS))
    store.put_file(str(local), path, chunksize=part_bytes, max_concurrency=PARTS_AT_ONCE)


def download(url: str, store: fsspec.AbstractFileSystem, path: str, local: Path) -> None:
    """Fetch a file by ranges, a few at once; each of them is retried alone."""
    size = attempt(url, lambda: store.size(path))
    starts = list(range(0, size, RANGE_BYTES))
    with open(local, "wb") as file:
        for first in range(0, len(starts), PARTS_AT_ONCE):
            batch = starts[first : first + PARTS_AT_ONCE]
            for data in attempt(url, partial(_ranges, store, path, batch, size)):
                file.write(data)


def _ranges(store: fsspec.AbstractFileSystem, path: str, starts: list[int], size: int) -> list[bytes]:
    ends = [min(start + RANGE_BYTES, size) for start in starts]
    found: list[bytes] = store.cat_ranges([path] * len(starts), starts, ends, on_error="raise")
    if [len(data) for data in found] != [end - start for start, end in zip(starts, ends, strict=True)]:
        raise ConnectionError("an answer ended early")
    return found


def read(store: fsspec.AbstractFileSystem, path: str) -> bytes:
    """A whole file at once."""
    # s3fs asks for the size first where it may read in parallel.
    data: bytes = store.cat_file(path, max_concurrency=1) if is_s3(store) else store.cat_file(path)
    return data


def abort_uploads(store: fsspec.AbstractFileSystem, path: str, *, below: bool = False) -> None:
    """Abort the unfinished uploads of a file, or of every file `below` a folder; what is finished stays."""
    if not is_s3(store):
        return
    bucket, key, _ = store.split_path(path)
    page: dict[str, str] = {}
    while True:
        found = store.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key + "/" * (below and key != ""), **page)
        for each in found.get("Uploads", []):
            if below or each["Key"] == key:
                _abort(store, bucket, each["Key"], each["UploadId"])
        if not found.get("IsTruncated"):
            return
        page = {"KeyMarker": found["NextKeyMarker"], "UploadIdMarker": found["NextUploadIdMarker"]}


def _abort(store: fsspec.AbstractFileSystem, bucket: str, key: str, upload_id: str) -> None:
    try:
        store.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id)
    except FileNotFoundError:
        # It ended in between.
        return


def version(store: fsspec.AbstractFileSystem, path: str) -> str | None:
    """What names a file's present contents (its ETag; "" where the store has none); None where there is no file."""
    try:
        return str(store.info(path).get("ETag", ""))
    except FileNotFoundError:
        return None


def put_if(
    store: fsspec.AbstractFileSystem, path: str, data: bytes, *, expected: str | None, writer: str
) -> str | None:
    """Put a small file if what is there is `expected`: a version, or None for nothing.

    Stores other than S3 cannot do both at once; there, only the absence of a file is checked, beforehand.

    Args:
        writer: a token of this call, kept with the object, so that the call knows its own work when an answer was lost.

    Returns:
        The new version, or None where something else is there.
    """
    if not is_s3(store):
        return _put_checked(store, path, data, expected)
    bucket, key, _ = store.split_path(path)
    condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
    try:
        put = store.call_s3("put_object", Bucket=bucket, Key=key, Body=data, Metadata={"writer": writer}, **condition)
    except OSError as error:
        code, status = code_and_status(error)
        if code == "NotImplemented":
            return _put_checked(store, path, data, expected)
        if status == 404 and code != "NoSuchBucket":
            return None
        if status != 412:
            raise
        found = store.call_s3("head_object", Bucket=bucket, Key=key)
        return str(found["ETag"]) if found.get("Metadata", {}).get("writer") == writer else None
    return str(put["ETag"])


def _put_checked(store: fsspec.AbstractFileSystem, path: str, data: bytes, expected: str | None) -> str | None:
    if expected is None and store.exists(path):
        return None
    store.pipe_file(path, data)
    return version(store, path)
