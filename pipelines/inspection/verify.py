"""Verify what lies in storage: artifacts against their manifests, shards member by member."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from PIL import Image

from pipelines.errors import UserError
from pipelines.shards.format import decode_npy
from pipelines.shards.samples import contents, samples
from pipelines.shards.tar_headers import FileBytes, Member, TarError, members
from pipelines.stages.pairs.artifact import IMAGE_EXTENSIONS
from pipelines.store.file_table import FileRecord
from pipelines.store.manifest import MANIFEST, read_files, read_manifest
from pipelines.store.storage import Storage, sha256_file

MAX_PROBLEMS_PER_SHARD = 5


@dataclass
class VerifyReport:
    """Result of verifying one artifact or shard.

    Attributes:
        url: the artifact or shard.
        files, rows, bytes: how much was looked at.
        problems: one line each, naming the file; empty if everything is whole.
    """

    url: str
    files: int = 0
    rows: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_path(url: str) -> list[VerifyReport]:
    """Verify a shard, an artifact, or every finished artifact of a run's root.

    Raises:
        UserError: there is nothing there, or nothing that this can verify.
    """
    storage = Storage(url)
    if url.endswith(".tar"):
        return [verify_shard(url)]
    if not storage.exists():
        raise UserError(f"nothing at {storage.url}: give a shard (.tar), an artifact's folder or a run's root")
    if storage.exists(MANIFEST):
        return [verify_artifact(storage)]
    artifacts = finished_artifacts(storage)
    if not artifacts:
        raise UserError(
            f"{storage.url} is neither a shard, nor a finished artifact ({MANIFEST} is missing), nor a run's root"
        )
    return [verify_artifact(artifact) for artifact in artifacts]


def finished_artifacts(root: Storage) -> list[Storage]:
    """Return the folders `STAGE/KEY` under a root that hold a manifest."""
    return [
        root / stage / key
        for stage in root.names("*")
        for key in (root / stage).names("*")
        if (root / stage / key).exists(MANIFEST)
    ]


def verify_artifact(storage: Storage) -> VerifyReport:
    """Verify that every file of the manifest has the recorded size and sha256, and every shard its number of samples.

    Raises:
        UserError: there is no manifest, or it is not one.
    """
    table = read_manifest(storage).table
    report = VerifyReport(storage.url)
    for record in read_files(storage, table):
        report.files += 1
        report.problems += _verify_file(storage, record, report)
    return report


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
        report.rows, problems = _read_shard(file)
    report.problems = [f"{name}: {problem}" for problem in problems]
    return report


def _verify_file(storage: Storage, record: FileRecord, report: VerifyReport) -> list[str]:
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
            rows, damage = _read_shard(file)
            report.rows += rows
            problems += damage
            if rows != record.rows:
                problems.append(f"{rows} samples instead of {record.rows}")
    return [f"{record.name}: {problem}" for problem in problems]


def _read_shard(file: BinaryIO) -> tuple[int, list[str]]:
    """Count a shard's samples and list what is wrong with it, reading every member."""
    count = 0
    problems: list[str] = []

    def files(tar: FileBytes) -> Iterator[Member]:
        for member in members(tar):
            if not member.is_file or member.size is None:
                problems.append(f"{member.name} is not a regular file")
                continue
            # Here and not for each sample: members that belong to none are looked into as well.
            if problem := _damage(member.name.rpartition(".")[2], contents(tar, member)):
                problems.append(f"{member.name} {problem}")
            yield member

    try:
        tar = FileBytes(file)
        for _ in samples(files(tar), lambda member: None):
            count += 1
    except TarError as error:
        problems.append(f"truncated or damaged after {count} samples ({error})")
    more = len(problems) - MAX_PROBLEMS_PER_SHARD
    return count, problems if more <= 0 else [*problems[:MAX_PROBLEMS_PER_SHARD], f"and {more} more problems"]


def _damage(extension: str, data: bytes) -> str | None:
    """Return what is wrong with a file's contents; None if it is fine or of a kind that has no structure."""
    check = _CHECKS.get(extension)
    if check is None:
        return None
    try:
        check(data)
    # Decoders raise anything on hostile bytes; whatever it is, the shard is damaged there.
    except Exception as error:
        return f"is unreadable ({' '.join(str(error).split())[:120]})"
    return None


def _check_image(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        image.verify()


def _check_text(data: bytes) -> None:
    data.decode("utf-8")


_CHECKS: dict[str, Callable[[bytes], object]] = {
    "npy": decode_npy,
    "json": json.loads,
    "txt": _check_text,
    **dict.fromkeys(IMAGE_EXTENSIONS, _check_image),
}
