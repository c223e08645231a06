"""The outcome of an input row: a status and, if the row gives a sample, its picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # The statuses are read by `ldm plan` and `ldm inspect`, which have no use for picture codecs.
    from pipelines.stages.pairs.pictures.transcode import Picture
    from pipelines.stages.pairs.shard.files import Spooled

OK = "ok"
# Decoding its picture kills the worker each time.
POISON = "poison"
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near_duplicate"
# Transient failures, retried by `pairs.retry=failed`.
_TRANSIENT = frozenset(
    {
        "timeout",
        "dns_error",
        "connection_error",
        "incomplete_body",
        "unreadable_file",
        # The client was too slow, came too early, or asked too often.
        "http_408",
        "http_425",
        "http_429",
    }
)


def is_transient(status: str) -> bool:
    """Tell whether fetching the row again later may give another status."""
    return status in _TRANSIENT or status.startswith("http_5")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one row.

    Attributes:
        status: `ok`, or the reason why the row gives no sample.
        sha256: hexadecimal digest of the source's bytes, if they were read.
        picture: size, format and hash of the stored picture, without its bytes; None unless `ok`.
        stored: the encoded picture in its shard's spool; None unless `ok`.
    """

    status: str
    sha256: str | None = None
    picture: Picture | None = None
    stored: Spooled | None = None
