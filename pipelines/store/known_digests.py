"""Digests of files that were read before, kept between commands, so that a plan need not read a data set again.

One small file for each place that was read, which is replaced as a whole: it needs no lock, and therefore also works on
network file systems and in buckets. Of two processes that read one place at the same time the later one adds to what
the other wrote, or at worst replaces it; what is lost is read once more. A file that is damaged counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from pipelines.errors import UserError
from pipelines.store.home import home
from pipelines.store.storage import Storage

_FOLDER = "digests"
# A folder that listings of a root pass over.
_FOLDER_OF_ROOTS = ".digests"
# Of a place, how many entries are kept that this reading had no use for: another glob's, or those of changed files.
_MOST_UNUSED = 2**14
_MOST_PLACES = 256
_LINE_BYTES = 2 * 64 + 2

_root: ContextVar[Storage | None] = ContextVar("root", default=None)
# What could not be written lasts as long as the process.
_unwritten: dict[str, dict[str, str]] = {}


@contextlib.contextmanager
def kept_with(root: Storage) -> Iterator[None]:
    """Keep digests under a run's root while the block runs, if the root is remote: a job's home goes with its pod."""
    token = _root.set(None if root.is_local else root)
    try:
        yield
    finally:
        _root.reset(token)


class KnownDigests:
    """Digests by what their files looked like when they were read.

    Args:
        place: the folder or the file that they are of; one that holds others need not know what these are.
    """

    def __init__(self, place: str) -> None:
        root = _root.get()
        self._folder = root / _FOLDER_OF_ROOTS if root else Storage(str(home() / _FOLDER))
        self._name = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        self._before = self._read()
        self._used: dict[str, str] = {}
        self._changed = False

    def get(self, key: str) -> str | None:
        """Return a digest by its key, both 64 hexadecimal digits. Safe to call from several threads."""
        return self._before.get(key)

    def add(self, key: str, digest: str) -> None:
        """Remember a digest, be it new or still of use."""
        self._changed |= self._before.get(key) != digest
        self._used[key] = digest

    def save(self) -> None:
        """Write down what was added. Does nothing if there is nothing new; a place that cannot be written to is no
        failure.
        """
        if not self._changed:
            return
        entries = dict(self._used)
        for key, digest in self._read().items():
            if len(entries) >= len(self._used) + _MOST_UNUSED:
                break
            entries.setdefault(key, digest)
        body = "".join(f"{key} {digest}\n" for key, digest in entries.items()).encode()
        self._before, self._changed = entries, False
        try:
            self._folder.write_bytes(self._name, body + hashlib.sha256(body).hexdigest().encode())
            self._remove_oldest()
        except (OSError, UserError):
            _unwritten[self._path] = entries

    def _read(self) -> dict[str, str]:
        found = dict(_unwritten.get(self._path, {}))
        with contextlib.suppress(OSError, UserError, UnicodeDecodeError):
            data = self._folder.read_bytes(self._name)
            body, check = data[:-64], data[-64:]
            if len(body) % _LINE_BYTES == 0 and hashlib.sha256(body).hexdigest().encode() == check:
                found |= dict(line.split(" ") for line in body.decode("ascii").splitlines())
        return found

    @property
    def _path(self) -> str:
        return f"{self._folder.url}/{self._name}"

    def _remove_oldest(self) -> None:
        """Keep a person's folder small; a root's holds only that root's sources."""
        if not self._folder.is_local:
            return
        files = [path for path in Path(self._folder.path()).iterdir() if not path.name.startswith(".")]
        if len(files) > _MOST_PLACES:
            for path in sorted(files, key=lambda path: path.stat().st_mtime)[:-_MOST_PLACES]:
                path.unlink(missing_ok=True)
