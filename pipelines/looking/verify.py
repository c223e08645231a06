"""Whether what lies in storage is whole and true: artifacts against their manifests, shards member by member."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

from pipelines.errors import UserError
from pipelines.shards.format import decode_npy
from pipelines.shards.samples import contents, samples
from pipelines.shards.tar_headers import FileBytes, Member, TarError, members
from pipelines.stages.pairs.artifact import IMAGE_EXTENSIONS
from pipelines.store.ledger import MANIFEST, FileRecord, read_manifest
from pipelines.store.storage import Storage, sha256_file

MAX_PROBLEMS_PER_SHARD = 5


@dataclass
class VerifyReport:
    """What was looked at, and what is wrong with it.

    Attributes:
        url: the artifact or shard.
        files, rows, bytes: how much was looked at.
        problems: one line each, naming the file; empty where everything is whole.
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
    """Folders `STAGE/KEY` under a root that hold a manifest."""
    return [
        root / stage / key
        for stage in root.names("*")
        for key in (root / stage).names("*")
        if (root / stage / key).exists(MANIFEST)
    ]


def verify_artifact(storage: Storage) -> VerifyReport:
    """Every file of the manifest: there, of the size and sha256 recorded; shards readable, with as many samples.

    Raises:
        UserError: there is no manifest, or it is not one.
    """
    manifest = read_manifest(storage)
    report = VerifyReport(storage.url)
    for record in manifest.files:
        report.files += 1
        report.problems += _verify_file(storage, record, report)
    return report


def verify_shard(url: str) -> VerifyReport:
    """A single tar: readable to its end mark; arrays, pictures and JSON in it readable too.

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
            if member.is_file and member.size is not None:
                yield member
            else:
                problems.append(f"{member.name} is not a regular file")

    def look(tar: FileBytes, member: Member) -> None:
        if problem := _damage(member.name.rpartition(".")[2], contents(tar, member)):
            problems.append(f"{member.name} {problem}")

    try:
        tar = FileBytes(file)
        for _ in samples(files(tar), partial(look, tar)):
            count += 1
    except TarError as error:
        problems.append(f"truncated or damaged after {count} samples ({error})")
    more = len(problems) - MAX_PROBLEMS_PER_SHARD
    return count, problems if more <= 0 else [*problems[:MAX_PROBLEMS_PER_SHARD], f"and {more} more problems"]


def _damage(extension: str, data: bytes) -> str | None:
    """What is wrong with a member's contents; None where it is fine or of a kind that has no structure."""
    check = _CHECKS.get(extension)
    if check is None:
        return None
    try:
        check(data)
    # Whatever a decoder answers to hostile bytes, the shard is damaged there.
    except Exception as error:
        return f"is unreadable ({' '.join(str(error).split())[:120]})"
    return None


def _check_image(data: bytes) -> None:
    from PIL import Image

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
