"""Files that look as if they had been written a while ago."""

import os
from pathlib import Path

NS_PER_S = 10**9


def aged(path: Path, age_s: int = 10) -> Path:
    """Set a file's time back.

    One written this very moment is not remembered between two readings: it could be written again without its time
    telling.
    """
    written = path.stat().st_mtime_ns - age_s * NS_PER_S
    os.utime(path, ns=(written, written))
    return path
