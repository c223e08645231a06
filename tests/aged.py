"""Files that look as if they had been written a while ago."""

import os
import time
from pathlib import Path

from pipelines.store.remembered import is_settled

NS_PER_S = 10**9


def aged(path: Path, age_s: int = 10) -> Path:
    """Set a file's time back, and wait for the clock of the time that cannot be set to tick.

    One written this very moment is not remembered between two readings: it could be written again without its time
    telling.
    """
    written = path.stat().st_mtime_ns - age_s * NS_PER_S
    os.utime(path, ns=(written, written))
    return settled(path)


def settled(path: Path) -> Path:
    """Wait until a change of a file would show in its times."""
    while not is_settled(path.stat()):
        time.sleep(0.005)
    return path
