"""How long requests to a store are repeated while it does not answer, and what is said meanwhile.

A store that has answered this process once, and then does not, will answer again: requests are repeated for minutes.
One that has never answered may not exist (a mistyped endpoint): for it the patience is short. Workers are patient from
the start, since their driver has spoken with the store before them.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from pipelines.errors import MisuseError
from pipelines.notices import tell

VARIABLE = "LDM_STORE_PATIENCE_S"
DEFAULT_S = 600.0
FIRST_CONTACT_S = 13.0
# The pauses between two tries double from the first to the longest.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0
# Most failures pass sooner, and are nobody's concern.
TELL_AFTER_S = 10.0
# The store of local paths.
LOCAL = "://"

_jitter = random.Random()
_thread = threading.local()
_expecting_answers = False


def patience_s() -> float:
    """Return for how many seconds a request is repeated: LDM_STORE_PATIENCE_S, or ten minutes.

    Raises:
        MisuseError: the variable is no number of seconds.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text or DEFAULT_S)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise MisuseError(f"{VARIABLE} must be a number of seconds, got {text!r}: set it to one such as 600")
    return seconds


def expect_answers() -> None:
    """Have this process be patient with every store from the first request on; to be called once in each worker."""
    global _expecting_answers
    _expecting_answers = True


@contextlib.contextmanager
def impatient(limit_s: float) -> Iterator[None]:
    """Give up after `limit_s` seconds in this thread while the block runs, for whoever has a deadline of its own."""
    before = getattr(_thread, "limit_s", None)
    _thread.limit_s = limit_s
    try:
        yield
    finally:
        _thread.limit_s = before


def give_up_at(end: threading.Event) -> None:
    """Have this thread wait for no store any longer once `end` is set: nobody wants its result then."""
    _thread.end = end


class Waiting:
    """The pauses of one operation, which begin with its first failure.

    Args:
        url: the file or folder it is about.
    """

    def __init__(self, url: str) -> None:
        self._outage = outage_of(url)
        self._pause_s = FIRST_PAUSE_S
        self._until: float | None = None

    def pause(self, reason: str) -> bool:
        """Wait before the next try; return False if there should be none.

        Args:
            reason: why the last one failed, for the notice.
        """
        now = time.monotonic()
        if self._until is None:
            limit_s = getattr(_thread, "limit_s", None)
            self._until = now + (self._outage.patience_s() if limit_s is None else limit_s)
        self._outage.failed(reason)
        if now >= self._until:
            return False
        # Workers that one outage stopped at the same moment should not all come back at the same moment.
        seconds = min(self._pause_s * _jitter.uniform(0.5, 1.0), self._until - now)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        end: threading.Event | None = getattr(_thread, "end", None)
        if end is not None:
            return not end.wait(seconds)
        time.sleep(seconds)
        return True


class Outage:
    """What this process knows of one store: whether it has ever answered, and since when it does not."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._has_answered = False
        self._since: float | None = None
        self._told = False

    def patience_s(self) -> float:
        # A disk that is busy is no store that will answer again.
        patient = self._store != LOCAL and (self._has_answered or _expecting_answers)
        return patience_s() if patient else min(FIRST_CONTACT_S, patience_s())

    def failed(self, reason: str) -> None:
        """Note that a request failed; tell of an outage once it has lasted a while."""
        with self._lock:
            now = time.monotonic()
            self._since = self._since or now
            lasted_s = now - self._since
            # Whoever has a deadline of its own tries for less long, and is not what people wait for.
            left_s = self.patience_s() - lasted_s
            if self._told or lasted_s < TELL_AFTER_S or left_s <= 0:
                return
            self._told = True
        tell(f"{self._store} has not answered for {lasted_s:.0f} s ({reason}): still trying, for {left_s:.0f} s more")

    def answered(self) -> None:
        """Note that the store has answered, be it with a refusal; tell of it if an outage was told of."""
        # Without the lock: the usual case, after every request.
        self._has_answered = True
        if self._since is None:
            return
        with self._lock:
            since, told = self._since, self._told
            self._since, self._told = None, False
        if told and since is not None:
            tell(f"{self._store} answers again, after {time.monotonic() - since:.0f} s")


_outages: dict[str, Outage] = {}


def outage_of(url: str) -> Outage:
    """Return what is known of the store of a URL: a bucket, or a web server."""
    parts = urlsplit(url)
    # The host alone: what stands before an @ may be a password.
    store = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return _outages.setdefault(store, Outage(store))
