"""Lines for the person who watches a command, beside its progress and its result: what it waits for, and why."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

_log = logging.getLogger("ldm")
_tellers: list[Callable[[str], None]] = []


def tell(line: str) -> None:
    """Show a line: to whom `told_to` says, else on stderr (in a worker, which has none, in its log on its node)."""
    (_tellers[-1] if _tellers else _log.warning)(line)


@contextlib.contextmanager
def told_to(teller: Callable[[str], None]) -> Iterator[None]:
    """Pass the lines of this process on to `teller` while the block runs; it is called from any thread."""
    _tellers.append(teller)
    try:
        yield
    finally:
        _tellers.remove(teller)
