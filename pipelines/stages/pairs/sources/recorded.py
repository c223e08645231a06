"""Digests that lie beside a source's files, for recipes that say they are to be believed."""

from __future__ import annotations

import contextlib
import re
from typing import NamedTuple

from pipelines.errors import UserError
from pipelines.store.failures import readable
from pipelines.store.ledger import Artifact
from pipelines.store.location import Location
from pipelines.store.manifest import MANIFEST, read_manifest
from pipelines.store.storage import Storage

# What sha256sum writes: a digest, a space, a space or an asterisk, a name. (Names with line feeds begin with `\\`.)
_LINE = re.compile(r"([0-9a-f]{64}) [ *](?:\./)?(.+)")
_NAMES = ("SHA256SUMS", "sha256sums.txt", "sha256sum.txt")
_MOST_BYTES = 2**30


class _Record(NamedTuple):
    """A file's digest, its size (None if that is not recorded), and when the record was written."""

    sha256: str
    size: int | None
    written: float


class Records:
    """The digests recorded in a folder: by `sha256sum`, or by the manifest of one of our artifacts.

    Args:
        folder: where they lie; None for no records.

    Attributes:
        some: whether there are any.
    """

    def __init__(self, folder: str | None) -> None:
        self._by_path: dict[str, _Record] = {}
        if folder is not None:
            self._read(Location.of(folder))
        self.some = bool(self._by_path)

    def sha256(self, file: Location, size: int, written: float) -> str | None:
        """Return what is recorded of a file; None if nothing is, or if the file is newer than its record."""
        record = self._by_path.get(file.path)
        fits = record is not None and record.size in (None, size) and 0 < written <= record.written
        return record.sha256 if record is not None and fits else None

    def _read(self, folder: Location) -> None:
        for name in _NAMES:
            sums = folder / name
            with readable(sums.url):
                facts = sums.facts(forbidden_is_missing=True)
                if facts is None or facts.size > _MOST_BYTES:
                    continue
                for line in sums.read().decode("utf-8", "surrogateescape").splitlines():
                    if found := _LINE.fullmatch(line):
                        self._by_path[(folder / found[2]).path] = _Record(found[1], None, facts.written)
        manifest = (folder / MANIFEST).facts(forbidden_is_missing=True)
        # Another program's file of that name is none of ours.
        with contextlib.suppress(UserError):
            if manifest is not None:
                storage = Storage(folder.url)
                artifact = Artifact("pairs", read_manifest(storage).key, storage)
                for each in artifact.shards():
                    self._by_path[(folder / each.name).path] = _Record(each.sha256, each.bytes, manifest.written)
