"""A root with artifacts of many shards, put straight into the S3 server: what the stages would have written.

The data are zeros that nobody stores. What the ledger writes is made by the ledger's own code, and a test compares it
with what `ArtifactWriter` writes for the same files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from pipelines import __version__
from pipelines.run.plan import PlannedStage, Selection, plan
from pipelines.run.recipe import Recipe
from pipelines.store.commits import COMMITS, SEGMENTS, ArtifactWriter
from pipelines.store.file_table import FileRecord, FileTable
from pipelines.store.ledger import Artifact, Ledger
from pipelines.store.storage import Storage, encode_json
from tests.benchmarks.bare_listing import Numbered
from tests.s3 import FastS3

ROWS_PER_SHARD = 10_000
_GATHERED_AT_ONCE = 500
# The last ones that workers committed before the driver was killed, and did not hear of.
_UNHEARD_OF = 1000


@dataclass(frozen=True)
class Layout:
    """The files of a stage's artifact.

    Attributes:
        shard: folder, ending, rows and bytes of each file that there is once a shard.
        others: names and bytes of the rest.
    """

    shard: tuple[tuple[str, str, int, int], ...] = ()
    others: tuple[tuple[str, int], ...] = ()

    def records(self, shards: int) -> Iterator[FileRecord]:
        """Yield the records of the files of that many shards."""
        for name, size in self.others:
            yield _record(name, 0, size)
        for number in range(shards):
            for folder, ending, rows, size in self.shard:
                yield _record(f"{folder}{number:06d}{ending}", rows, size)

    def numbered(self, shards: int, *, records: bool = False) -> list[Numbered]:
        """Return how the objects of that many shards are named, with or without a record of each."""
        folders = [folder for folder, *_ in self.shard]
        groups = [(folder, folders.count(folder)) for folder in dict.fromkeys(folders)]
        data = [Numbered(folder, shards, files) for folder, files in groups]
        of_records = [
            Numbered(f"{COMMITS}/{folder.replace('/', '__')}", shards, files) for folder, files in groups if records
        ]
        return data + of_records


# As the stages lay them out, with 10,000 pictures of 256 px a shard.
LAYOUTS = {
    "pairs": Layout(shard=(("", ".tar", ROWS_PER_SHARD, 700 << 20), ("", ".parquet", 0, 3 << 20))),
    "autoencoder": Layout(
        others=(("first_stage/model.safetensors", 300 << 20), ("first_stage/config.json", 800), ("history.json", 900))
    ),
    "latents": Layout(
        shard=(
            ("", ".tar", ROWS_PER_SHARD, 160 << 20),
            ("index/", ".arrow", 0, 620_000),
            ("stats/", ".json", 0, 700),
        ),
        others=(("vocab.txt", 30_000),),
    ),
}


def _record(name: str, rows: int, size: int) -> FileRecord:
    digest = hashlib.sha256(name.encode()).hexdigest()
    # Of files with samples the contents have a digest of their own.
    return FileRecord(name=name, rows=rows, bytes=size, sha256=digest, content=digest if rows else None)


def add_files(server: FastS3, storage: Storage, records: Iterable[FileRecord]) -> None:
    """Put files into an artifact's folder."""
    prefix = storage.path("").partition("/")[2].rstrip("/")
    server.add_objects((f"{prefix}/{record.name}", record.bytes) for record in records)


def add_records(server: FastS3, storage: Storage, records: Iterable[FileRecord]) -> None:
    """Put the record that a worker writes of each file into an artifact's folder."""
    prefix = (storage / COMMITS).path("").partition("/")[2].rstrip("/")
    server.add_objects(
        (f"{prefix}/{record.name.replace('/', '__')}.json", encode_json(record.model_dump()).decode())
        for record in records
    )


def write_segments(writer: ArtifactWriter, records: Iterable[FileRecord]) -> None:
    """Leave the segments that a driver has written when it is killed, and no others."""
    writer.storage.remove(SEGMENTS)
    remaining = iter(list(records)[:-_UNHEARD_OF])
    while batch := list(islice(remaining, _GATHERED_AT_ONCE)):
        writer.gather(batch)


def finish(planned: PlannedStage, storage: Storage, records: Iterable[FileRecord]) -> Artifact:
    """Finish an artifact whose files are there."""
    # A segment instead of a record for each file: they are removed at the end, one way or the other.
    storage.write_bytes(f"{SEGMENTS}/all.parquet", FileTable.of(records).encode())
    ArtifactWriter(planned.stage.name, planned.key, storage).finish(
        format_version=planned.stage.format_version,
        config=planned.config.model_dump(mode="json"),
        identity=planned.identity,
        upstream={},
        details={},
        seconds=1.0,
        code_version=__version__,
    )
    return Artifact(planned.stage.name, planned.key, storage)


@dataclass(frozen=True)
class Root:
    """A root with three finished artifacts, and one of latents that is half committed.

    Attributes:
        url: of the root.
        shards: of each finished artifact; the other one has half as many.
        keys: of the finished artifacts, by stage.
        half: key of the one that is not finished.
    """

    url: str
    shards: int
    keys: dict[str, str]
    half: str

    @property
    def finished_objects(self) -> list[Numbered]:
        return LAYOUTS["pairs"].numbered(self.shards)

    @property
    def half_objects(self) -> list[Numbered]:
        return LAYOUTS["latents"].numbered(self.shards // 2, records=True)

    def half_writer(self) -> ArtifactWriter:
        """Return the writer of the artifact that is not finished."""
        return ArtifactWriter("latents", self.half, Storage(self.url) / "latents" / self.half)

    def reset_half(self) -> None:
        """Undo what a run that went on has gathered in segments."""
        write_segments(self.half_writer(), LAYOUTS["latents"].records(self.shards // 2))


def make_root(server: FastS3, recipe: Recipe, shards: int) -> Root:
    """Fill the recipe's root, which is empty and lies in the server's bucket."""
    root, keys = Storage(recipe.root), {}
    Ledger(root).mark_version()
    for planned in plan(recipe):
        name = planned.stage.name
        if name in LAYOUTS:
            keys[name], storage = planned.key, root / name / planned.key
            add_files(server, storage, LAYOUTS[name].records(shards))
            finish(planned, storage, LAYOUTS[name].records(shards))
    # As if the latents were being made again.
    half = next(each.key for each in plan(recipe, Selection(force=("latents",))) if each.stage.name == "latents")
    for add in (add_files, add_records):
        add(server, root / "latents" / half, LAYOUTS["latents"].records(shards // 2))
    return Root(recipe.root, shards, keys, half)
