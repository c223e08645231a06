"""Duplicates: which rows stay is decided by row numbers alone, whatever the shards they are in."""

import io
from pathlib import Path

import pyarrow.parquet as pq

from pipelines.pairs.config import PairsConfig
from pipelines.pairs.deduplicate import find_duplicates, finish_shard
from pipelines.pairs.rows import Row
from pipelines.pairs.shard import process_rows, write_outcomes
from pipelines.pairs.tables import TableSource
from pipelines.records import read_shard
from pipelines.storage import Storage
from tests.pipelines.pairs.web import picture


def make_work(folder: Path, pictures: list[tuple[str | None, bytes]], order: list[int]) -> Storage:
    """Shards of two rows each, of pairs of URL and bytes, written in the given order."""
    table = folder / "t.csv"
    table.write_text("file,text\n")
    source = TableSource((str(table),), PairsConfig(source="x").columns, str(folder))
    config = PairsConfig.model_validate({"source": "x", "image_size": 16, "rows_per_shard": 2})
    work = Storage(str(folder / "work"))
    rows = [
        Row(index=i, captions=("c",), url=url, load=lambda limit, data=data: data)  # type: ignore[misc]
        for i, (url, data) in enumerate(pictures)
    ]
    for shard in order:
        chosen = rows[2 * shard : 2 * shard + 2]
        outcomes = process_rows(chosen, config, downloads=False, tasks=1)
        write_outcomes(work, shard, chosen, outcomes, source, config)
    return work


PICTURES = [
    ("http://a/1", picture(1)),
    ("http://a/2", b"no picture"),
    (None, picture(2)),
    ("http://a/2", picture(3)),
    ("http://a/5", picture(1)),
    ("http://a/2", picture(4)),
    (None, picture(5)),
    (None, picture(2)),
]


def test_the_smallest_row_of_equal_bytes_or_equal_url_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    work = make_work(tmp_path / "a", PICTURES, [0, 1, 2, 3])
    # Row 1 gave no sample, so row 3 is the first of its URL; rows without a URL have none in common.
    assert find_duplicates(work, 4) == [4, 5, 7]
    assert find_duplicates(make_work(tmp_path / "b", PICTURES, [3, 1, 0, 2]), 4) == [4, 5, 7]


def test_finished_shards_lack_the_duplicates_and_say_so(tmp_path: Path) -> None:
    work = make_work(tmp_path, PICTURES, [0, 1, 2, 3])
    final = Storage(str(tmp_path / "final"))
    for shard, duplicates in enumerate([[], [], [4, 5], [7]]):
        finish_shard(work, shard, duplicates, final)
        finish_shard(work, shard, duplicates, final)
    assert final.read_bytes("000000.tar") == work.read_bytes("000000.tar")
    assert final.read_bytes("000001.parquet") == work.read_bytes("000001.parquet")
    keys = [[s["__key__"] for s in read_shard(Path(final.path(f"{n:06d}.tar")))] for n in range(4)]
    assert keys == [["000000000"], ["000010000", "000010001"], [], ["000030000"]]
    tables = [pq.read_table(io.BytesIO(final.read_bytes(f"{n:06d}.parquet"))) for n in range(4)]
    assert tables[2].column("status").to_pylist() == ["duplicate", "duplicate"]
    assert tables[3].column("status").to_pylist() == ["ok", "duplicate"]
    assert tables[3].schema == pq.read_table(io.BytesIO(work.read_bytes("000003.parquet"))).schema


def test_nothing_to_compare_is_no_duplicate(tmp_path: Path) -> None:
    assert find_duplicates(make_work(tmp_path, [("http://a", b"x")], [0]), 1) == []
