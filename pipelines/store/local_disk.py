"""Local files that appear whole or not at all: written beside their place, synced, then renamed or linked into it."""

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What file systems answer that have no hard links (FAT, some network mounts), or none between these two folders.
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)


# As `_beside` names them; a root may lie among other programs' files.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path to write to; what it holds replaces the target when the block ends without an error."""
    with _beside(target) as temporary:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)


def create(target: Path, data: bytes) -> bool:
    """Write a file unless it exists. Of several callers that create one file, exactly one is told True."""
    with creating(target) as created:
        created.temporary.write_bytes(data)
    return created.ours


@dataclass
class Created:
    """A file that is written unless there is one: `temporary` is written to, `ours` tells afterwards what stands."""

    temporary: Path
    ours: bool = False


@contextlib.contextmanager
def creating(target: Path) -> Iterator[Created]:
    """Yield a path to write to; what it holds becomes the target when the block ends, unless there is one by then."""
    with _beside(target) as temporary:
        created = Created(temporary)
        yield created
        _sync(temporary)
        try:
            # Unlike a rename, a link fails if the target exists: it is the test and the act in one.
            os.link(temporary, target)
        except FileExistsError:
            return
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            if target.exists():
                return
            os.replace(temporary, target)
        created.ours = True


def link(source: Path, target: Path) -> None:
    """Give a file a second place: a hard link where the file system has them, else a copy."""
    with _beside(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            shutil.copyfile(source, temporary)
            _sync(temporary)
        os.replace(temporary, target)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed; nobody may be writing below the folder."""
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def leftovers(folder: Path, before: float) -> list[tuple[Path, int]]:
    """Return path and bytes of the temporary files of writers below a folder that were last written before a time.

    Args:
        folder: whatever else lies below it.
        before: in seconds since 1970.
    """
    found = []
    for parent, _, names in os.walk(folder):
        for name in filter(_TEMPORARY.fullmatch, names):
            path = Path(parent, name)
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                if status.st_mtime < before:
                    found.append((path, status.st_size))
    return found


def files_below(folder: Path, beginning: str) -> dict[str, os.stat_result]:
    """Return the state of every file of a folder, at any depth, whose path in it begins so; by that path."""
    top = folder / beginning.rpartition("/")[0]
    found = {}
    for parent, folders, names in os.walk(top):
        inside = os.path.relpath(parent, folder)
        prefix = "" if inside == "." else f"{inside}/"
        # What cannot begin so is not walked through.
        folders[:] = [name for name in folders if f"{prefix}{name}/".startswith(beginning[: len(prefix + name) + 1])]
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                if f"{prefix}{name}".startswith(beginning):
                    found[f"{prefix}{name}"] = os.lstat(os.path.join(parent, name))
    return found


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder (a rename is atomic only within a file system); remove it after."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    # Without it, a power cut can leave the new name with none of the bytes.
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # A rename survives a power cut only once its folder is on disk too.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
