"""What became of an input row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.stages.pairs.pictures.decode import Picture
    from pipelines.stages.pairs.shard.spool import Spooled

OK = "ok"
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near_duplicate"
# Failures that another day may not meet.
PASSING = frozenset({"timeout", "dns_error", "connection_error", "incomplete_body", "unreadable_file"})
_PASSING_HTTP = frozenset({"http_408", "http_425", "http_429"})


def may_pass(status: str) -> bool:
    """Whether fetching the row again, later, may give another status."""
    return status in PASSING or status in _PASSING_HTTP or status.startswith("http_5")


@dataclass(frozen=True)
class Outcome:
    """A status, and where it is `ok` the picture.

    Attributes:
        sha256: of the source's bytes, where they were got.
        picture: what is known of the picture, without its bytes.
        stored: the encoded picture.
    """

    status: str
    sha256: str | None = None
    picture: Picture | None = None
    stored: Spooled | None = None
