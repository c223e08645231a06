"""The folder of an artifact that is not finished: files are committed one by one, then the manifest says that all are.

NNNNNN.tar …                  the files
commits/NNNNNN.tar.json       one small record a file, created by whoever wrote the file: the first one stands
commits/segments/ID.parquet   many records in one, gathered by the driver, so that going on needs few requests
files-DIGEST.parquet          the table of all files, once the artifact is finished
manifest.json                 written last, names the table; then `commits/` is removed
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.store.file_table import FileRecord, FileTable
from pipelines.store.manifest import MANIFEST, Manifest, read_files, read_manifest, write_files
from pipelines.store.storage import Storage, encode_json, sha256_file
from pipelines.store.threads import map_in_threads

COMMITS = "commits"
SEGMENTS = f"{COMMITS}/segments"
# Records that are read one by one; beyond it the next run should not have to.
_WORTH_A_SEGMENT = 256
_RECORDS_A_SEGMENT = 2000
_SEGMENT_EVERY_S = 30.0
_MOST_SEGMENTS = 64
# Small files read at once from an object store.
_READERS = 32


class ArtifactWriter:
    """Commits the files of one artifact, then finishes it.

    Safe to pickle into Ray tasks. Of two writers that race on one file the first one's record stands, and with
    `Storage.write_once` the first one's bytes.

    Args:
        stage: the stage's name.
        key: the artifact's key.
        storage: its folder.
        grows: whether files are added to an artifact that is finished already.
    """

    def __init__(self, stage: str, key: str, storage: Storage, *, grows: bool = False) -> None:
        self.stage, self.key, self.storage, self.grows = stage, key, storage, grows
        self._gathered: list[FileRecord] = []
        self._segments: list[tuple[str, FileTable]] = []
        self._gathered_at = time.monotonic()

    def __reduce__(self) -> tuple[Any, ...]:
        # What a driver has gathered is its own.
        return _writer, (self.stage, self.key, self.storage, self.grows)

    def committed(self) -> FileTable:
        """Return every file committed so far. For the driver alone: it tidies up the records.

        Raises:
            UserError: a committed file has another size now; it is never redone silently.
        """
        self._flush()
        table = self.recorded(tidy=True)
        if len(table):
            sizes = file_sizes(self.storage, table.names)
            for record in table:
                self._check_size(record, sizes.get(record.name, -1))
        return table

    def is_committed(self, name: str) -> bool:
        """Tell whether a file is committed, by its own record alone.

        Raises:
            UserError: it is, but has another size now; it is never redone silently.
        """
        if (record := self._earlier(name)) is None:
            return False
        self._check_size(record, self.storage.size(name))
        return True

    def commit(
        self,
        name: str,
        *,
        rows: int = 0,
        sha256: str | None = None,
        content: str | None = None,
        origin: str | None = None,
    ) -> FileRecord:
        """Record a file that is already in place as committed; an earlier record of it stands.

        Args:
            name: the file's path in the artifact's folder.
            rows: samples in the file.
            sha256: digest of its bytes, if the caller has computed it; else the file is read once more.
            content, origin: digests of what it holds and of what it was made from, see `FileRecord`.

        Raises:
            UserError: the file is missing.
        """
        if sha256 is None:
            if (earlier := self._earlier(name)) is not None:
                return earlier
            with self.storage.open(name) as file:
                sha256 = sha256_file(file)
        if (size := self.storage.size(name)) < 0:
            raise UserError(f"{self.storage.url}/{name} is missing: it cannot be committed")
        record = FileRecord(name=name, rows=rows, bytes=size, sha256=sha256, content=content, origin=origin)
        # Of several writers exactly one creates the record. The others take its rows and digest for theirs, also if
        # they wrote other bytes: what the record says is what later stages have been promised.
        if self.storage.create(_record_name(name), encode_json(record.model_dump())):
            return record
        earlier = self._earlier(name)
        assert earlier is not None
        return earlier

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

    def discard(self, names: Iterable[str]) -> None:
        """Remove files that are there without a record, of attempts that died before they could commit them.

        For the driver, before any of its workers writes: these then use `Storage.write_once`.
        """
        wanted = list(names)
        there = file_sizes(self.storage, wanted)
        self.storage.remove_files([name for name in wanted if name in there])

    def gather(self, records: Iterable[FileRecord]) -> None:
        """Keep records that workers have committed in segments, many in one object. For the driver alone.

        Without it a run that goes on has to read them one by one.
        """
        self._gathered += records
        if len(self._gathered) >= _RECORDS_A_SEGMENT or time.monotonic() - self._gathered_at > _SEGMENT_EVERY_S:
            self._flush()

    def _flush(self) -> None:
        """Write what was gathered."""
        if self._gathered:
            table = FileTable.of(self._gathered)
            self._segments.append((self._write_segment(table), table))
            self._gathered, self._gathered_at = [], time.monotonic()
            if len(self._segments) > _MOST_SEGMENTS // 2:
                self._merge_segments()

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
        logs: tuple[str, ...] = (),
        made_from: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Write the table of all committed files and the manifest: from now on the artifact is finished.

        Args:
            format_version: version of the stage's files.
            config: the stage's section of the recipe.
            identity: what the key is the hash of.
            upstream: references of the artifacts it was made from, by stage.
            details: the stage's own facts about its result.
            seconds: how long the stage took.
            code_version: version of this package.
            logs: files, or folders ending in "/", that do not count for its content.
            made_from: contents of the artifacts it was made from, by stage.
        """
        files = self.committed()
        if not len(files):
            raise ValueError(f"{self.storage.url} has no committed file: an artifact must have one")
        manifest = Manifest(
            stage=self.stage,
            key=self.key,
            format_version=format_version,
            code_version=code_version,
            config=config,
            identity=identity,
            upstream=upstream,
            details=details,
            seconds=round(seconds, 3),
            content=files.digest(logs),
            made_from=dict(made_from or {}),
            **write_files(self.storage, files),
        )
        self.storage.write_json(MANIFEST, manifest.model_dump(mode="json"))
        # Whoever dies here leaves records that say what the table says.
        self.storage.remove(COMMITS)
        return manifest

    def recorded(self, *, tidy: bool = False) -> FileTable:
        """Return all records, without a look at the files: of the manifest if the artifact grows, and of `commits/`.

        Args:
            tidy: put what had to be read one by one into a segment, and many segments into one; for the artifact's
                driver alone.
        """
        tables = [read_files(self.storage, read_manifest(self.storage).table)] if self.grows else []
        segments = self.storage / SEGMENTS
        names = segments.names("*.parquet")
        tables += map_in_threads(lambda name: _decode(segments, name), names, _READERS)
        known = FileTable.of([]).union(*tables)
        records = self.storage / COMMITS
        fresh = sorted(set(records.names("*.json")) - {_record_name(name).rpartition("/")[2] for name in known.names})
        # On a local disk threads only cost.
        read = map(records.read_json, fresh) if records.is_local else map_in_threads(records.read_json, fresh, _READERS)
        found = FileTable.of(FileRecord.model_validate(record) for record in read)
        merged = known.union(found)
        if not tidy:
            return merged
        if len(names) > _MOST_SEGMENTS:
            self._write_segment(merged)
            segments.remove_files(names)
        elif len(found) > _WORTH_A_SEGMENT:
            self._write_segment(found)
        return merged

    def _write_segment(self, table: FileTable) -> str:
        name = f"{uuid.uuid4().hex}.parquet"
        self.storage.write_bytes(f"{SEGMENTS}/{name}", table.encode())
        return name

    def _merge_segments(self) -> None:
        """Put the segments that this driver has written into one."""
        names = [name for name, _ in self._segments]
        merged = FileTable.of([]).union(*(table for _, table in self._segments))
        self._segments = [(self._write_segment(merged), merged)]
        (self.storage / SEGMENTS).remove_files(names)

    def _earlier(self, name: str) -> FileRecord | None:
        if self.storage.exists(_record_name(name)):
            return FileRecord.model_validate(self.storage.read_json(_record_name(name)))
        if self.grows:
            return read_files(self.storage, read_manifest(self.storage).table).get(name)
        return None

    def _check_size(self, record: FileRecord, size: int) -> None:
        if size != record.bytes:
            if self.grows and not self.storage.exists(_record_name(record.name)):
                raise UserError(
                    f"{self.storage.url}/{record.name} was committed with {record.bytes} bytes but has {max(size, 0)}: "
                    f"it was damaged afterwards; rebuild it with `ldm run RECIPE --force {self.stage}`"
                )
            commit = _record_name(record.name).removeprefix(f"{COMMITS}/")
            raise UserError(
                f"{self.storage.url}/{record.name} was committed with {record.bytes} bytes but has {max(size, 0)}: "
                f"it was damaged afterwards; remove {record.name.partition('.')[0]}.*, {SEGMENTS} and "
                f"{COMMITS}/{commit.partition('.')[0]}.* there, then run the same command again to rebuild them"
            )


def _writer(stage: str, key: str, storage: Storage, grows: bool) -> ArtifactWriter:
    return ArtifactWriter(stage, key, storage, grows=grows)


def file_sizes(storage: Storage, names: Iterable[str]) -> dict[str, int]:
    """Return the bytes of the files of an artifact that are there, by name: a listing for each folder that they lie in.

    Args:
        storage: the artifact's folder.
        names: paths in it; files that are not among them may be in the result.
    """
    folders = Counter(name.rpartition("/")[0] for name in names)
    found: dict[str, int] = {}
    for folder in sorted(folders):
        listed = (storage / folder if folder else storage).sizes()
        found |= {f"{folder}/{name}": size for name, size in listed.items()} if folder else listed
    return found


def _record_name(name: str) -> str:
    # All records lie in one folder, so that one listing finds them.
    return f"{COMMITS}/{name.replace('/', '__')}.json"


def _decode(folder: Storage, name: str) -> FileTable:
    try:
        return FileTable.decode(folder.read_bytes(name))
    except ValueError as error:
        raise UserError(
            f"{folder.url}/{name} is damaged ({error}): remove it and run the same command again; each file's own "
            "record is still there"
        ) from error
