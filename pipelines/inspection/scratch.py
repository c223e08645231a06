"""Local folders of processes that were killed: in the folder for temporary files, and the node's cache of shards."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipelines.shards.node_cache import cache_folder, is_used, remove_unused

PREFIX = "ldm-"


class Abandoned(NamedTuple):
    """A file or folder that no process needs, and how much it holds."""

    path: Path
    files: int
    bytes: int


def abandoned(before: float) -> Iterator[Abandoned]:
    """Yield what killed processes of this user have left.

    A name does not tell whose it is. What was last written before `before` (in seconds since 1970), and before every
    Python process of this user that lives began, is nobody's. Where `/proc` does not tell when those began, nothing is
    yielded, except a cache of shards, which tells itself whether anybody uses it.
    """
    cache = cache_folder()
    with contextlib.suppress(FileNotFoundError, PermissionError):
        facts = _facts(cache)
        if facts is not None and not is_used(cache):
            yield Abandoned(cache, *facts[:2])
    if (oldest := _oldest_process()) is None:
        return
    before = min(before, oldest)
    for path in sorted(Path(tempfile.gettempdir()).glob(f"{PREFIX}*")):
        if path == cache:
            continue
        with contextlib.suppress(FileNotFoundError, PermissionError):
            facts = _facts(path)
            if facts is not None and facts[2] < before:
                yield Abandoned(path, *facts[:2])


def remove_abandoned(path: Path) -> None:
    """Remove what `abandoned` has found."""
    if path == cache_folder():
        remove_unused(path)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _facts(path: Path) -> tuple[int, int, float] | None:
    """Return files, bytes and the newest time of a file or folder; None if it is another user's, or a link."""
    status = path.lstat()
    if status.st_uid != os.getuid() or not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
        return None
    inside = [Path(parent, name).lstat() for parent, folders, names in os.walk(path) for name in (*folders, *names)]
    files = [each for each in (status, *inside) if not stat.S_ISDIR(each.st_mode)]
    newest = max(each.st_mtime for each in (status, *inside))
    return len(files), sum(each.st_size for each in files), newest


def _oldest_process() -> float | None:
    """Return when the oldest living Python process of this user began; None if nothing tells."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        booted = next(int(line.split()[1]) for line in lines if line.startswith("btime "))
        return booted + min(_ticks_of_processes()) / os.sysconf("SC_CLK_TCK")
    return None


def _ticks_of_processes() -> Iterator[int]:
    for process in Path("/proc").glob("[0-9]*"):
        # It may end meanwhile; links of other users' processes cannot be read.
        with contextlib.suppress(OSError):
            if process.stat().st_uid == os.getuid() and "python" in os.readlink(process / "exe"):
                # After the name, in parentheses, come fields 3 and on; field 22 is when it began (proc(5)).
                yield int((process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
