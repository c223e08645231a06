"""Which rows make which shard: large files of a source begin and end shards, so that files may come and move."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.shards.format import write_shard
from pipelines.stages.pairs.assignment import Assignment
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.making.worker import ShardMaker
from pipelines.stages.pairs.publishing.duplicate_search import DuplicateSearch, ShardsOfRun
from pipelines.stages.pairs.publishing.publish import publish
from pipelines.stages.pairs.rows_file import RowsFile
from pipelines.stages.pairs.shard.staged import StagedShard
from pipelines.stages.pairs.sources.open import open_source
from pipelines.store.commits import ArtifactWriter
from pipelines.store.storage import Storage
from tests.pipelines.stages.pairs.picture_files import encoded, scene


def spans(assignment: Assignment) -> list[tuple[int, int]]:
    """Return the first row of each shard and the row after its last."""
    rows = [assignment.rows_of(shard) for shard in assignment.shards]
    assert all(np.array_equal(numbers, np.arange(numbers[0], numbers[-1] + 1)) for numbers in rows)
    assert [len(numbers) for numbers in rows] == [assignment.count_rows([shard]) for shard in assignment.shards]
    return [(int(numbers[0]), int(numbers[-1]) + 1) for numbers in rows]


@pytest.mark.parametrize(
    ("parts", "limit", "expected"),
    [
        ([10], None, [(0, 4), (4, 8), (8, 10)]),
        ([10], 5, [(0, 4), (4, 5)]),
        ([8], 100, [(0, 4), (4, 8)]),
        # Small parts together, a large one alone.
        ([3, 3, 1], None, [(0, 4), (4, 7)]),
        ([3, 3, 5, 1, 4, 2], None, [(0, 4), (4, 6), (6, 10), (10, 11), (11, 12), (12, 16), (16, 18)]),
        ([5, 5], None, [(0, 4), (4, 5), (5, 9), (9, 10)]),
        # A part that the limit cuts is as large as it is.
        ([3, 5], 6, [(0, 3), (3, 6)]),
        ([3, 5], 3, [(0, 3)]),
        ([0, 5, 0, 2, 0], None, [(0, 4), (4, 5), (5, 7)]),
    ],
)
def test_shards_are_cut_at_large_parts(parts: list[int], limit: int | None, expected: list[tuple[int, int]]) -> None:
    assignment = Assignment.of_parts(parts, rows_per_shard=4, limit=limit)
    assert spans(assignment) == expected
    assert assignment.rows == assignment.count_rows(assignment.shards) == expected[-1][1]


def test_a_retry_without_rows_has_no_shards(tmp_path: Path) -> None:
    none = RowsFile.write(Storage(str(tmp_path)), "none.rows", np.empty(0, np.int64))
    assert (Assignment.of_retry(none, 4, 7).shards, Assignment.of_retry(none, 4, 7).rows) == (range(7, 7), 0)


def test_what_a_worker_is_sent_grows_with_neither_rows_nor_retried_rows(tmp_path: Path) -> None:
    assert len(pickle.dumps(Assignment.of_parts([400_000_000], 1000))) < 2000
    retried = RowsFile.write(Storage(str(tmp_path)), "retry.rows", np.arange(1_000_000))
    assert len(pickle.dumps(Assignment.of_retry(retried, 1000, 400_000))) < 5000


def write_part(path: Path, first: int, rows: int) -> None:
    """Write a table, or a tar, of `rows` pictures that no other part has."""
    pictures = [encoded(scene(number, (40, 40)), "JPEG") for number in range(first, first + rows)]
    captions = [f"scene {number}" for number in range(first, first + rows)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"image": pictures, "text": captions}), path)
    else:
        samples = [{"jpg": image, "txt": caption.encode()} for image, caption in zip(pictures, captions)]
        write_shard(path, [(f"{first + i:04d}", files) for i, files in enumerate(samples)])


def make_pairs(source: Path, root: Path, **options: Any) -> dict[str, str | None]:
    """Make all shards as the stage does, without a cluster; returns the contents of the tars by name."""
    config = PairsConfig.model_validate(
        {"source": str(source), "image_size": 32, "rows_per_shard": 4, "deduplicate": False, **options}
    )
    opened, work = open_source(config), Storage(str(root / "work"))
    writer = ArtifactWriter("pairs", "0" * 16, Storage(str(root)))
    assignment = Assignment.of_parts(opened.parts, config.rows_per_shard)
    stages = config.deduplicate
    maker = ShardMaker(
        source=opened, config=config, assignment=assignment, work=work, writer=None if stages else writer, board=None
    )
    for shard in assignment.shards:
        maker({"shard": shard})
    if stages:
        search = DuplicateSearch(work / "run-0", (ShardsOfRun(work, assignment.shards, staged=True),), 1000, None)
        search.run(map)
        publish([StagedShard.open(work, shard) for shard in assignment.shards], config, writer, search)
    return {record.name: record.content for record in writer.committed().shards()}


@pytest.mark.parametrize(
    ("suffix", "options"),
    [("parquet", {}), ("parquet", {"deduplicate": True}), ("parquet", {"resize": "buckets"}), ("tar", {})],
)
def test_files_that_move_or_come_leave_the_contents_of_all_other_shards(
    tmp_path: Path, suffix: str, options: dict[str, Any]
) -> None:
    parts = {"red": (0, 5), "green": (100, 6), "blue": (200, 9), "new": (300, 7)}
    options = {"buckets": {"step": 16}, **options}

    def contents_of(name: str, *order: str) -> dict[str, str | None]:
        (tmp_path / name).mkdir()
        for position, part in enumerate(order):
            write_part(tmp_path / name / f"{position}.{suffix}", *parts[part])
        return make_pairs(tmp_path / name, tmp_path / f"{name}-made", **options)

    first = contents_of("first", "red", "green", "blue")
    assert len(set(first.values()) - {None}) == len(first) == 7
    moved = contents_of("moved", "blue", "red", "green")
    assert set(moved.values()) == set(first.values())
    assert moved != first
    grown = contents_of("grown", "red", "new", "green", "blue")
    assert set(grown.values()) > set(first.values())
    assert len(grown) == len(first) + 2
    assert set(contents_of("new", "new").values()) == set(grown.values()) - set(first.values())


def test_what_duplicates_leave_of_a_shard_has_a_content_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    write_part(tmp_path / "source" / "a.parquet", 0, 4)
    alone = make_pairs(tmp_path / "source", tmp_path / "alone", deduplicate=True)
    # Its first row shows what the last row of the other shows.
    write_part(tmp_path / "source" / "b.parquet", 3, 4)
    both = make_pairs(tmp_path / "source", tmp_path / "both", deduplicate=True)
    kept = make_pairs(tmp_path / "source", tmp_path / "kept")
    assert both["000000.tar"] == alone["000000.tar"] == kept["000000.tar"]
    assert both["000001.tar"] != kept["000001.tar"]
