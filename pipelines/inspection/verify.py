"""Verify what lies in storage: artifacts against their manifests, shards member by member and against their indexes.

Of an artifact whose files are whole, its stage then holds a few samples against what they were made from.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from pipelines.errors import UserError
from pipelines.run.plan import STAGES
from pipelines.shards.format import decode_json, decode_npy
from pipelines.shards.index import IndexBuilder, ShardIndex, Span, index_name
from pipelines.shards.samples import contents, shard_samples
from pipelines.shards.tar_headers import FileBytes, Member, TarError, shown
from pipelines.stages.pairs.artifact import IMAGE_EXTENSIONS, decode_image
from pipelines.store.failures import MissingFileError
from pipelines.store.file_table import FileRecord
from pipelines.store.ledger import Artifact
from pipelines.store.manifest import MANIFEST, read_files, read_manifest
from pipelines.store.storage import Storage, sha256_file

MAX_PROBLEMS_PER_SHARD = 5
# Of an artifact, held against what they were made from: a minute or two for latents of a large first stage on a CPU.
SAMPLES = 16


@dataclass
class VerifyReport:
    """Result of verifying one artifact or shard.

    Attributes:
        url: the artifact or shard.
        files, rows, bytes: how much was looked at.
        problems: one line each, naming the file; empty if everything is whole.
        notes: lines that say what was measured of a few samples, and what could not be checked.
        samples: what was measured of them, as JSON values.
    """

    url: str
    files: int = 0
    rows: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_path(url: str, *, samples: int = SAMPLES) -> list[VerifyReport]:
    """Verify a shard, an artifact, or every finished artifact of a run's root.

    Args:
        url: where it lies.
        samples: of each artifact of latents, how many samples are decoded and encoded again.

    Raises:
        UserError: there is nothing there, or nothing that this can verify.
    """
    storage = Storage(url)
    if url.endswith(".tar"):
        return [verify_shard(url)]
    if not storage.exists():
        raise UserError(f"nothing at {storage.url}: give a shard (.tar), an artifact's folder or a run's root")
    if storage.exists(MANIFEST):
        return [verify_artifact(storage, samples=samples)]
    artifacts = finished_artifacts(storage)
    if not artifacts:
        raise UserError(
            f"{storage.url} is neither a shard, nor a finished artifact ({MANIFEST} is missing), nor a run's root"
        )
    return [verify_artifact(artifact, samples=samples) for artifact in artifacts]


def finished_artifacts(root: Storage) -> list[Storage]:
    """Return the folders `STAGE/KEY` under a root that hold a manifest."""
    return [
        root / stage / key
        for stage in root.names("*")
        for key in (root / stage).names("*")
        if (root / stage / key).exists(MANIFEST)
    ]


def verify_artifact(storage: Storage, *, samples: int = SAMPLES) -> VerifyReport:
    """Verify that every file of the manifest has the recorded size and sha256, and every shard its number of samples
    and, if it has an index, every file at the place and with the checksum that this says; then a few samples.

    Raises:
        UserError: there is no manifest, or it is not one.
    """
    manifest = read_manifest(storage)
    report, files = VerifyReport(storage.url), read_files(storage, manifest.table)
    for record in files:
        report.files += 1
        report.problems += _verify_file(storage, record, files.get(index_name(record.name)), report)
    # Of damaged files nothing is to be learned.
    if samples and report.ok:
        _verify_samples(Artifact(manifest.stage, manifest.key, storage), samples, report)
    return report


def _verify_samples(artifact: Artifact, count: int, report: VerifyReport) -> None:
    """Add what the artifact's stage finds when it looks at a few samples."""
    stage = next((stage for stage in STAGES if stage.name == artifact.stage), None)
    # Of another version nobody knows how to read its samples.
    if stage is None or stage.verify is None or stage.format_version != artifact.manifest.format_version:
        return
    try:
        found = stage.verify(artifact, count)
    except UserError as error:
        report.notes.append(f"samples not looked at: {error}")
        return
    report.problems += found.problems
    report.notes += found.notes
    report.samples = found.facts


def verify_shard(url: str) -> VerifyReport:
    """Verify that a single tar is readable to its end mark, and that arrays, pictures, JSON and text in it are too.

    Raises:
        UserError: there is no such file.
    """
    folder, _, name = Storage(url).url.rpartition("/")
    storage = Storage(folder)
    report = VerifyReport(Storage(url).url, files=1)
    with storage.open(name) as file:
        report.bytes = storage.size(name)
        report.rows, problems = _read_shard(file, None)
    report.problems = [f"{name}: {problem}" for problem in problems]
    return report


def _verify_file(storage: Storage, record: FileRecord, index: FileRecord | None, report: VerifyReport) -> list[str]:
    size = storage.size(record.name)
    if size < 0:
        return [f"{record.name}: missing"]
    report.bytes += size
    problems = []
    with storage.open(record.name) as file:
        if size != record.bytes:
            problems.append(f"{size} bytes instead of {record.bytes}")
        elif (digest := sha256_file(file)) != record.sha256:
            problems.append(f"sha256 {digest[:12]}… instead of {record.sha256[:12]}…")
        if record.name.endswith(".tar"):
            file.seek(0)
            found = IndexBuilder() if index else None
            rows, damage = _read_shard(file, found)
            report.rows += rows
            problems += damage
            if index and found:
                problems += _differences(storage, record, index, found.index())
            if rows != record.rows:
                problems.append(f"{rows} samples instead of {record.rows}")
    return [f"{record.name}: {problem}" for problem in problems]


class _Problems:
    """The first few problems of a shard, and how many more there are: a hostile tar can have millions."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._count = 0

    def add(self, problem: str) -> None:
        self._count += 1
        if self._count <= MAX_PROBLEMS_PER_SHARD:
            self._first.append(problem)

    def lines(self) -> list[str]:
        more = self._count - len(self._first)
        return [*self._first, f"and {more} more problems"] if more else self._first


def _differences(storage: Storage, record: FileRecord, index: FileRecord, found: ShardIndex) -> list[str]:
    """List where a shard is not as its index says."""
    problems = _Problems()
    try:
        written = ShardIndex.decode(storage.read_bytes(index.name), shard_bytes=record.bytes, facts=True)
    except MissingFileError:
        # Said of the index itself.
        return []
    except ValueError as error:
        return [f"its index {index.name} cannot be read ({error})"]
    for difference in found.differences(written):
        problems.add(shown(difference))
    for row in range(len(written) if written.has_facts else 0):
        if problem := _unreadable(decode_json, written.facts(row)):
            problems.add(f"the json of {shown(written.key(row))} in its index {index.name} {problem}")
    return problems.lines()


def _read_shard(file: BinaryIO, index: IndexBuilder | None) -> tuple[int, list[str]]:
    """Count a shard's samples and list what is wrong with it, decoding every file as its readers do.

    Args:
        file: the shard.
        index: told of each sample, if the shard is to be held against its index.
    """
    count, problems = 0, _Problems()
    tar = FileBytes(file)

    def look(member: Member) -> Span:
        if problem := _damage(tar, member):
            problems.add(f"{shown(member.name)} {problem}")
        checksum = zlib.crc32(contents(tar, member)) if index else None
        return Span(member.offset, member.size or 0, checksum)

    try:
        for sample in shard_samples(tar, look, problems.add):
            count += 1
            if index:
                index.add(sample.key, sample.files)
    except TarError as error:
        problems.add(f"truncated or damaged after {count} samples ({error})")
    return count, problems.lines()


def _damage(tar: FileBytes, member: Member) -> str | None:
    """Return what is wrong with a file's contents; None if it is fine or of a kind that has no structure."""
    check = _CHECKS.get(member.name.rpartition(".")[2].lower())
    if check is None:
        return None
    return _unreadable(check, contents(tar, member))


def _unreadable(check: Callable[[bytes], object], data: bytes) -> str | None:
    try:
        check(data)
    # Decoders raise anything on hostile bytes; whatever it is, the shard is damaged there.
    except Exception as error:
        return f"is unreadable ({' '.join(str(error).split())[:120]})"
    return None


def _check_text(data: bytes) -> None:
    data.decode("utf-8")


_CHECKS: dict[str, Callable[[bytes], object]] = {
    "npy": decode_npy,
    "json": decode_json,
    "txt": _check_text,
    **dict.fromkeys(IMAGE_EXTENSIONS, decode_image),
}
