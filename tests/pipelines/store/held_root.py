"""A root that a test holds by a real lease, until another driver takes it over."""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipelines.errors import UserError
from pipelines.store.lock import LEASE, exclusive
from pipelines.store.storage import Storage

# A busy machine may stop a test for seconds: a lease that is not renewed for 60 beats counts as lost too.
BEAT_S = 0.5
TAKEN_OVER = r"was taken over by pid 2 on other"


@dataclass
class HeldRoot:
    """A held root; `check` is what stages are given as `StageContext.check`."""

    storage: Storage
    check: Callable[[], None]
    lost: bool = False

    def lose(self) -> None:
        """Write another driver's lease over ours, and return when the holder knows."""
        lease = {"holder": "pid 2 on other", "token": "other", "beat": 0, "beat_s": BEAT_S}
        with contextlib.suppress(UserError):
            while True:
                # Again and again: in memory, a renewal that is under way may write over it.
                self.storage.write_json(LEASE, lease)
                self.check()
                time.sleep(0.1)
        self.lost = True


@contextlib.contextmanager
def held_root() -> Iterator[HeldRoot]:
    """Hold a new root in memory; local folders cannot be taken over from a living process."""
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    with exclusive(storage, BEAT_S) as hold:
        yield HeldRoot(storage, hold.check)
