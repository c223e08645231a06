"""The artifact ledger: where artifacts live, how they are named, and when they count as finished.

An artifact is a folder `ROOT/STAGE/KEY/`. Its key is a hash of everything that can change its contents; its
`manifest.json`, written last, says that it is finished. A sharded artifact is committed shard by shard. Nothing
committed is ever replaced: a forced re-run builds a new *generation* beside the old one, and only if its contents
differ does the old folder get a `superseded.json` that points to the new one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from pipelines.errors import TransientError, UserError
from pipelines.store.commits import COMMITS, ArtifactWriter, file_sizes
from pipelines.store.file_table import FileRecord, FileTable
from pipelines.store.manifest import LEDGER_VERSION, MANIFEST, TOO_OLD, Manifest, read_files, read_manifest, write_files
from pipelines.store.storage import Storage, encode_json, sha256_file

SUPERSEDED = "superseded.json"
# Files of a stage that are not published yet; removed when all are.
WORK = "work"
# What a training stage writes last, before its manifest.
DETAILS = "details.json"
# Which MLflow run an unfinished stage goes on in.
TRACKING = "tracking.json"
# Says which version of the ledger a root is of.
LEDGER = "ledger.json"
# A lock for each artifact and each run that somebody works on.
LOCKS = ".locks"
# Files of an old generation that one task holds against their digests.
_FILES_A_TASK = 256
_KEY = re.compile(r"[0-9a-f]{16}")
_MOST_TASKS = 512

ForEach = Callable[[Callable[[int], Any], Sequence[int]], Iterable[Any]]


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
    """A finished artifact, as later stages see it.

    Where it is sent to another process, its manifest goes with it, so that all see the same files even if samples are
    added meanwhile; the table of files does not: each process that needs it reads it.
    """

    stage: str
    key: str
    storage: Storage

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "files"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.storage)

    @cached_property
    def files(self) -> FileTable:
        """All its files."""
        return read_files(self.storage, self.manifest.table)

    @property
    def details(self) -> dict[str, Any]:
        return self.manifest.details

    @property
    def reference(self) -> str:
        """Key plus growth counter. Downstream keys hash this, so they change when samples are added."""
        additions = self.details.get("additions", 0)
        return f"{self.key}+{additions}" if additions else self.key

    def upstream(self, stage: str) -> Artifact | None:
        """Return the artifact of a stage that this one was made from; None if it is not under the same root any more.

        Samples may have been added to it since.
        """
        key = self.manifest.upstream.get(stage, "").partition("+")[0]
        root = self.storage.url.rstrip("/").rsplit("/", 2)[0]
        return Ledger(Storage(root)).find(stage, key) if key else None

    def shards(self, suffix: str = ".tar") -> FileTable:
        """Return the committed shards whose names end with `suffix`, in order."""
        return self.files.shards(suffix)

    def check_sizes(self) -> None:
        """Refuse an artifact whose files are missing or not of the size that its table says; read no data.

        Raises:
            UserError: a file is missing or damaged; names the first one and the command that mends it.
        """
        sizes = file_sizes(self.storage, self.files.names)
        for record in self.files:
            if (size := sizes.get(record.name, -1)) != record.bytes:
                found = "is missing" if size < 0 else f"has {size} bytes"
                raise UserError(
                    f"{self.storage.url}/{record.name} {found} but was committed with {record.bytes} bytes: "
                    f"it was damaged afterwards; rebuild it with `ldm run RECIPE --force {self.stage}`"
                )

    def require(self, stage: str, format_version: int) -> Artifact:
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


def artifact_at(url: str, stage: str) -> Artifact:
    """Return the finished artifact in a folder, wherever that is; `require` tells whether it is one of the stage.

    Raises:
        UserError: there is none, or its manifest is damaged.
        MisuseError: the URL holds a password or token.
    """
    storage = Storage(url)
    if not storage.exists(MANIFEST):
        raise UserError(
            f"{storage.url} is no finished artifact ({MANIFEST} is missing): give the folder ROOT/{stage}/KEY; "
            "`ldm inspect ROOT` lists them"
        )
    # The key as the manifest has it: a data set that was copied to a folder of another name is as good.
    return Artifact(stage, read_manifest(storage).key, storage)


class Ledger:
    """All artifacts under one root."""

    def __init__(self, root: Storage) -> None:
        self.root = root

    def require_version(self, stages: Iterable[str]) -> None:
        """Refuse a root that another version of the ledger has written.

        Args:
            stages: names of stages, the folders of artifacts.

        Raises:
            UserError: says which version, and what to do.
        """
        if self.root.exists(LEDGER):
            found = self.root.read_json(LEDGER).get("version")
            if found != LEDGER_VERSION:
                raise UserError(
                    f"root {self.root.url} is of ledger version {found}, but this is ldm of version {LEDGER_VERSION}: "
                    "use the ldm that wrote it, or choose another --root"
                )
            return
        for stage in sorted(set(stages) & set(self.root.names())):
            for key in filter(_KEY.fullmatch, (self.root / stage).names()):
                folder = self.storage(stage, key)
                if folder.exists(MANIFEST):
                    # Refuses one of version 0.1. A root that was copied in part may lack the file that says so.
                    read_manifest(folder)
                elif folder.exists(COMMITS) or folder.exists(WORK):
                    raise UserError(f"{folder.url} was begun by ldm 0.1: {TOO_OLD}")

    def mark_version(self) -> None:
        """Write down which version of the ledger the root is of."""
        if not self.root.exists(LEDGER):
            self.root.create(LEDGER, encode_json({"version": LEDGER_VERSION}))

    def storage(self, stage: str, key: str) -> Storage:
        return self.root / stage / key

    def lock(self, stage: str, key: str) -> Storage:
        """Return the folder that whoever makes an artifact holds."""
        return self.root / LOCKS / f"{stage}-{key}"

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

    def finished(self, stage: str) -> list[Artifact]:
        """Return the finished artifacts of a stage, by key."""
        keys = (self.root / stage).names()
        return [artifact for key in keys if (artifact := self.find(stage, key)) is not None]

    def siblings(self, stage: str, key: str) -> Iterator[tuple[Storage, FileTable]]:
        """Yield folder and committed files of every other artifact of a stage, finished or not."""
        for other in (self.root / stage).names():
            if other != key:
                storage = self.storage(stage, other)
                try:
                    artifact = self.find(stage, other)
                    files = artifact.files if artifact else ArtifactWriter(stage, other, storage).recorded()
                    # Finished meanwhile, and its records removed.
                    if artifact is None and (artifact := self.find(stage, other)) is not None:
                        files = artifact.files
                except TransientError:
                    raise
                except UserError:
                    # From one that is damaged, or being removed, nothing is taken.
                    continue
                yield storage, files

    def started(self, stage: str, key: str) -> bool:
        return self.storage(stage, key).exists()

    def supersede(
        self, old: Artifact, new: Artifact, *, logs: tuple[str, ...] = (), for_each: ForEach = map
    ) -> Artifact:
        """Settle a forced re-run, and return the artifact that stands.

        If the contents are equal, the old artifact stays (healed where a file of it was damaged) and the new one goes.
        Otherwise the old one stays on disk, and its key points to the new one from now on. A damaged log that the new
        one wrote otherwise cannot be healed from it, and is taken out of the old one.

        Args:
            old: the artifact before the re-run.
            new: what the re-run has made.
            logs: files, or folders ending in "/", that may differ.
            for_each: spreads the comparison of the old files with their digests over tasks.
        """
        try:
            # Not by what the manifests say: the old one's may be of a time when other files counted as logs.
            same = old.files.digest(logs) == new.files.digest(logs)
        except UserError:
            same = False
        if not same:
            old.storage.write_json(SUPERSEDED, {"by": new.key})
            return new
        step = max(_FILES_A_TASK, -(-len(old.files) // _MOST_TASKS))
        groups = range(0, len(old.files), step)
        lost = [name for names in for_each(partial(_heal, old, new, step), groups) for name in names]
        if lost:
            kept = write_files(old.storage, old.files.without(lost))
            old.storage.write_json(MANIFEST, old.manifest.model_copy(update=kept).model_dump(mode="json"))
            for name in lost:
                old.storage.remove(name)
            old = Artifact(old.stage, old.key, old.storage)
        # In this order, so that what is left after a kill is settled again, or an artifact of which nothing is done.
        for name in (DETAILS, MANIFEST, COMMITS, ""):
            new.storage.remove(name)
        return old


def _heal(old: Artifact, new: Artifact, count: int, first: int) -> list[str]:
    """Replace what is damaged of `count` files of the old artifact, from the `first` one on, by the new one's.

    Returns:
        Names of the damaged logs: what the new run logged is not what the old one's record says.
    """
    lost = []
    for record in FileTable(old.files.table.slice(first, count)):
        if not _intact(old.storage, record):
            if new.files.get(record.name) == record:
                new.storage.copy(record.name, old.storage)
            else:
                lost.append(record.name)
    return lost


def _intact(storage: Storage, record: FileRecord) -> bool:
    if storage.size(record.name) != record.bytes:
        return False
    with storage.open(record.name) as file:
        return sha256_file(file) == record.sha256
