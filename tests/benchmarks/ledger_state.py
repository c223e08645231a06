"""A root with artifacts of many shards, put straight into the S3 server: what the stages would have written.

The data are zeros that nobody stores. What the ledger writes is made by the ledger's own code, and a test compares it
with what `ArtifactWriter` writes for the same files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines import __version__
from pipelines.run.plan import PlannedStage, Selection, plan
from pipelines.run.recipe import Recipe
from pipelines.store.ledger import COMMITS, MANIFEST, FileRecord, Manifest
from pipelines.store.storage import Storage, encode_json
from tests.benchmarks.bare_listing import Numbered
from tests.s3 import FastS3

ROWS_PER_SHARD = 10_000


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

    def numbered(self, shards: int, *, records: bool) -> list[Numbered]:
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
        shard=(("", ".tar", ROWS_PER_SHARD, 160 << 20), ("stats/", ".json", 0, 400)), others=(("vocab.txt", 30_000),)
    ),
}


def _record(name: str, rows: int, size: int) -> FileRecord:
    return FileRecord(name=name, rows=rows, bytes=size, sha256=hashlib.sha256(name.encode()).hexdigest())


def add_committed(server: FastS3, storage: Storage, records: Iterator[FileRecord]) -> None:
    """Put committed files, and the record of each, into an artifact's folder."""
    prefix = storage.path().partition("/")[2]

    def objects() -> Iterator[tuple[str, int | str]]:
        for record in records:
            yield f"{prefix}/{record.name}", record.bytes
            commit = encode_json(record.model_dump()).decode()
            yield f"{prefix}/{COMMITS}/{record.name.replace('/', '__')}.json", commit

    server.add_objects(objects())


def write_manifest(planned: PlannedStage, storage: Storage, records: Iterator[FileRecord]) -> None:
    """Finish an artifact."""
    manifest = Manifest(
        stage=planned.stage.name,
        key=planned.key,
        format_version=planned.stage.format_version,
        code_version=__version__,
        config=planned.config.model_dump(mode="json"),
        identity=planned.identity,
        upstream={},
        files=sorted(records, key=lambda record: record.name),
        details={},
        seconds=1.0,
    )
    storage.write_json(MANIFEST, manifest.model_dump(mode="json"))


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
        return LAYOUTS["pairs"].numbered(self.shards, records=True)

    @property
    def half_objects(self) -> list[Numbered]:
        return LAYOUTS["latents"].numbered(self.shards // 2, records=True)


def make_root(server: FastS3, recipe: Recipe, shards: int) -> Root:
    """Fill the recipe's root, which is empty and lies in the server's bucket."""
    root, keys = Storage(recipe.root), {}
    for planned in plan(recipe):
        name = planned.stage.name
        if name in LAYOUTS:
            keys[name], storage = planned.key, root / name / planned.key
            add_committed(server, storage, LAYOUTS[name].records(shards))
            write_manifest(planned, storage, LAYOUTS[name].records(shards))
    # As if the latents were being made again.
    half = next(each.key for each in plan(recipe, Selection(force=("latents",))) if each.stage.name == "latents")
    add_committed(server, root / "latents" / half, LAYOUTS["latents"].records(shards // 2))
    return Root(recipe.root, shards, keys, half)
