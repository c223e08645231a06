"""The artifact ledger: where artifacts live, how they are named, and when they count as finished.

An artifact is a folder `ROOT/STAGE/KEY/`. Its key is a hash of everything that can change its contents; its
`manifest.json`, written last, says that it is finished. A sharded artifact is committed shard by shard: first the
data, then a small record `commits/NAME.json`. Nothing committed is ever replaced: a forced re-run builds a new
*generation* beside the old one, and only if its contents differ does the old folder get a `superseded.json` that points
to the new one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.errors import UserError
from pipelines.store.storage import Storage, encode_json, sha256_file

MANIFEST = "manifest.json"
SUPERSEDED = "superseded.json"
COMMITS = "commits"
# Files of a stage that are not published yet; removed when all are.
WORK = "work"
# What a training stage writes last, before its manifest.
DETAILS = "details.json"
# Commit records read at once from an object store.
READERS = 32


class FileRecord(BaseModel):
    """One committed file: a shard, a weights file, a grid.

    Attributes:
        rows: number of samples (0 for files that hold none).
        content: digest of what the file holds, without what depends on its place (sample keys, shard number); equal
            for files that are interchangeable. None for files that never are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    rows: int = 0
    bytes: int
    sha256: str
    content: str | None = None


class Manifest(BaseModel):
    """Contents of `manifest.json`: the proof that an artifact is finished, and all that a reader must know of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    key: str
    format_version: int
    code_version: str
    config: dict[str, Any]
    identity: dict[str, Any]
    upstream: dict[str, str]
    files: list[FileRecord]
    details: dict[str, Any]
    seconds: float

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def content(self, logs: tuple[str, ...] = ()) -> str:
        """Return a digest of the contents, equal for two artifacts that hold the same bytes under the same names.

        Args:
            logs: files, or folders ending in "/", that are left out.
        """
        files = sorted((f for f in self.files if not any(_is_in(f.name, log) for log in logs)), key=lambda f: f.name)
        return digest_json([[file.name, file.sha256] for file in files])


def _is_in(name: str, place: str) -> bool:
    return name.startswith(place) if place.endswith("/") else name == place


def digest_json(value: Any) -> str:
    """Return the hexadecimal sha256 of the canonical JSON (sorted keys, no spaces) of a value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def artifact_key(identity: Mapping[str, Any]) -> str:
    """Return the first 16 hexadecimal digits of sha256 over an identity's canonical JSON."""
    # 64 bits: short enough for folder names, and no two of a root's artifacts will ever meet.
    return digest_json(dict(identity))[:16]


@dataclass(frozen=True)
class Artifact:
    """A finished artifact, as later stages see it."""

    stage: str
    key: str
    storage: Storage

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.storage)

    @property
    def details(self) -> dict[str, Any]:
        return self.manifest.details

    @property
    def reference(self) -> str:
        """Key plus growth counter. Downstream keys hash this, so they change when samples are added."""
        additions = self.details.get("additions", 0)
        return f"{self.key}+{additions}" if additions else self.key

    def shards(self, suffix: str = ".tar") -> list[FileRecord]:
        """Return the committed shards whose names end with `suffix`, in order."""
        return sorted((f for f in self.manifest.files if f.name.endswith(suffix)), key=lambda f: f.name)

    def check_sizes(self) -> None:
        """Refuse an artifact whose files are missing or not of the size that the manifest says; read no data.

        Raises:
            UserError: a file is missing or damaged; names the first one and the command that mends it.
        """
        for record in self.manifest.files:
            if (size := self.storage.size(record.name)) != record.bytes:
                found = "is missing" if size < 0 else f"has {size} bytes"
                raise UserError(
                    f"{self.storage.url}/{record.name} {found} but was committed with {record.bytes} bytes: "
                    f"it was damaged afterwards; rebuild it with `ldm run RECIPE --force {self.stage}`"
                )

    def require(self, stage: str, format_version: int) -> "Artifact":
        """Refuse an artifact of another stage or of a format that this code does not read.

        Raises:
            UserError: it is of another stage, format or key; names both sides and the command that mends it.
        """
        found = self.manifest
        if found.stage != stage or found.format_version != format_version:
            raise UserError(
                f"{self.storage.url} holds {found.stage} of format {found.format_version}, but {stage} of format "
                f"{format_version} is needed: run `ldm run RECIPE --force {stage}`"
            )
        if found.key != self.key:
            raise UserError(
                f"{self.storage.url} says its key is {found.key}, but {self.key} was asked for: the folder was copied "
                f"or renamed; move it away and run `ldm run RECIPE --from {stage}`"
            )
        return self


def read_manifest(storage: Storage) -> Manifest:
    """Read the manifest of an artifact's folder. Raises UserError if it is missing or not a manifest."""
    try:
        return Manifest.model_validate(storage.read_json(MANIFEST))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{storage.url}/{MANIFEST} is not a manifest ({place}: {first['msg']})") from error


def _record_name(name: str) -> str:
    # All records lie in one folder, so that one listing finds them.
    return f"{COMMITS}/{name.replace('/', '__')}.json"


class ArtifactWriter:
    """The folder of an artifact that is not finished: commits files one by one, then the manifest.

    Safe to pickle into Ray tasks. Two writers that race on one file may both write it, each whole; the first commit
    stands.
    """

    def __init__(self, stage: str, key: str, storage: Storage) -> None:
        self.stage, self.key, self.storage = stage, key, storage

    def committed(self) -> dict[str, FileRecord]:
        """Return every file committed so far, by name.

        Raises:
            UserError: a committed file has another size now; it is never redone silently.
        """
        folder = self.storage / COMMITS
        names = folder.names("*.json")
        with ThreadPoolExecutor(READERS) as readers:
            # Object stores answer slowly, but many at once; on a local disk threads only cost.
            read = map if folder.is_local else readers.map
            records = [FileRecord.model_validate(record) for record in read(folder.read_json, names)]
        # One listing tells the sizes of all shards; only files in folders of their own cost a request each.
        sizes = self.storage.sizes() if records else {}
        for record in records:
            self._check_size(record, sizes[record.name] if record.name in sizes else self.storage.size(record.name))
        return {record.name: record for record in records}

    def is_committed(self, name: str) -> bool:
        """Tell whether a file is committed, by its own record alone.

        Raises:
            UserError: it is, but has another size now; it is never redone silently.
        """
        if not self.storage.exists(_record_name(name)):
            return False
        self._check_size(self._earlier(name), self.storage.size(name))
        return True

    def commit(self, name: str, *, rows: int = 0, sha256: str | None = None, content: str | None = None) -> FileRecord:
        """Record a file that is already in place as committed; an earlier record of it stands.

        Args:
            name: the file's path in the artifact's folder.
            rows: samples in the file.
            sha256: digest of its contents, if the caller has computed it; else the file is read once more.
            content: `FileRecord.content`.

        Raises:
            UserError: the file is missing.
        """
        if sha256 is None:
            if self.storage.exists(_record_name(name)):
                return self._earlier(name)
            with self.storage.open(name) as file:
                sha256 = sha256_file(file)
        if (size := self.storage.size(name)) < 0:
            raise UserError(f"{self.storage.url}/{name} is missing: it cannot be committed")
        record = FileRecord(name=name, rows=rows, bytes=size, sha256=sha256, content=content)
        # Of several writers exactly one creates the record. The others take its rows and digest for theirs, also if
        # they wrote other bytes: what the record says is what later stages have been promised.
        if self.storage.create(_record_name(name), encode_json(record.model_dump())):
            return record
        return self._earlier(name)

    def commit_once(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file and commit it, unless it is committed already: a run that goes on does not write it again.

        Args:
            name: the file's path in the artifact's folder.
            write: writes the contents to the local path that it is given.

        Raises:
            UserError: the file is committed but has another size now.
        """
        if self.is_committed(name):
            return
        with self.storage.writer(name) as path:
            write(path)
        self.commit(name)

    def _earlier(self, name: str) -> FileRecord:
        return FileRecord.model_validate(self.storage.read_json(_record_name(name)))

    def _check_size(self, record: FileRecord, size: int) -> None:
        if size != record.bytes:
            commit = _record_name(record.name).removeprefix(f"{COMMITS}/")
            raise UserError(
                f"{self.storage.url}/{record.name} was committed with {record.bytes} bytes but has {max(size, 0)}: "
                f"it was damaged afterwards; remove {record.name.partition('.')[0]}.* and "
                f"{COMMITS}/{commit.partition('.')[0]}.* there, then run the same command again to rebuild them"
            )

    def finish(
        self,
        *,
        format_version: int,
        config: dict[str, Any],
        identity: dict[str, Any],
        upstream: dict[str, str],
        details: dict[str, Any],
        seconds: float,
        code_version: str,
    ) -> Manifest:
        """Write the manifest over every committed file: from now on the artifact is finished.

        Args:
            format_version: version of the stage's files.
            config: the stage's section of the recipe.
            identity: what the key is the hash of.
            upstream: keys of the artifacts it was made from, by stage.
            details: the stage's own facts about its result.
            seconds: how long the stage took.
            code_version: version of this package.
        """
        manifest = Manifest(
            stage=self.stage,
            key=self.key,
            format_version=format_version,
            code_version=code_version,
            config=config,
            identity=identity,
            upstream=upstream,
            files=sorted(self.committed().values(), key=lambda f: f.name),
            details=details,
            seconds=round(seconds, 3),
        )
        self.storage.write_json(MANIFEST, manifest.model_dump(mode="json"))
        return manifest


class Ledger:
    """All artifacts under one root."""

    def __init__(self, root: Storage) -> None:
        self.root = root

    def storage(self, stage: str, key: str) -> Storage:
        return self.root / stage / key

    def resolve(self, stage: str, identity: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the key that stands for an identity today, and the identity of that generation."""
        # Not by what `superseded.json` says: the keys of generations follow from the identity, so that a root that was
        # copied in part, or two machines, agree on them.
        key = artifact_key(identity)
        while self.storage(stage, key).exists(SUPERSEDED):
            identity = {**identity, "generation": identity.get("generation", 0) + 1}
            key = artifact_key(identity)
        return key, identity

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return the finished artifact of that key, or None."""
        storage = self.storage(stage, key)
        return Artifact(stage, key, storage) if storage.exists(MANIFEST) else None

    def started(self, stage: str, key: str) -> bool:
        return bool((self.storage(stage, key)).names("*"))

    def supersede(self, old: Artifact, new: Artifact, *, logs: tuple[str, ...] = ()) -> Artifact:
        """Settle a forced re-run, and return the artifact that stands.

        If the contents are equal, the old artifact stays (healed where a file of it was damaged) and the new one goes.
        Otherwise the old one stays on disk, and its key points to the new one from now on.

        Args:
            old: the artifact before the re-run.
            new: what the re-run has made.
            logs: files, or folders ending in "/", that may differ.
        """
        try:
            same = old.manifest.content(logs) == new.manifest.content(logs)
        except UserError:
            same = False
        if not same:
            old.storage.write_json(SUPERSEDED, {"by": new.key})
            return new
        for record in old.manifest.files:
            if not self._intact(old.storage, record):
                with new.storage.local_copy(record.name) as good, old.storage.writer(record.name) as target:
                    target.write_bytes(good.read_bytes())
        # In this order, so that what is left after a kill is an unfinished artifact, never one that looks whole.
        for name in (MANIFEST, DETAILS, COMMITS, ""):
            new.storage.remove(name)
        return old

    @staticmethod
    def _intact(storage: Storage, record: FileRecord) -> bool:
        if storage.size(record.name) != record.bytes:
            return False
        with storage.open(record.name) as file:
            return sha256_file(file) == record.sha256
