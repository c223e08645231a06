"""Sources at the size of LAION: memory that does not grow, any range of rows at any time, on any store."""

import json
import pickle
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import UserError
from pipelines.shards.format import write_shard
from pipelines.stages.pairs.rows import RejectedError, Row
from pipelines.stages.pairs.sources import parquet_parts, text_tables
from pipelines.stages.pairs.sources.columns import find_column
from tests.aged import aged
from tests.pipelines.stages.pairs.sources.test_sources import load, opened, rows_of, write_parquet
from tests.pipelines.stages.pairs.web_server import picture
from tests.pipelines.store.s3 import BUCKET, S3


def laion(path: Path, rows: int, group: int) -> Path:
    urls = [f"http://a.example/{i}" for i in range(rows)]
    return write_parquet(path, group, URL=urls, TEXT=[f"text {i}" for i in range(rows)], n=list(range(rows)))


@pytest.mark.parametrize("group", [7, 500, 20_000])
def test_threads_read_every_row_of_a_large_group_once_each(
    tmp_path: Path, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_parts, "_BATCH_ROWS", 100)
    source = opened(laion(tmp_path / "t.parquet", 20_000, group))
    starts = list(range(0, 20_000, 130))
    nearly = sorted(starts, key=lambda start: start + random.Random(start).randrange(1500))
    with ThreadPoolExecutor(8) as pool:
        shards = dict(zip(nearly, pool.map(lambda start: source.read(start, start + 130), nearly)))
    assert [row.extra["n"] for start in starts for row in shards[start]] == list(range(20_000))


def test_a_huge_row_group_is_read_once_and_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_parts, "_WINDOW_BYTES", 2 * 2**20)
    pictures = [random.Random(i).randbytes(200_000) for i in range(200)]
    path, table = tmp_path / "t.parquet", pa.table({"jpg": pictures, "text": ["a"] * 200})
    # Pages are what Arrow reads at once.
    pq.write_table(table, path, row_group_size=200, write_batch_size=5, use_dictionary=False)
    del table
    source, before, most = opened(aged(path)), pa.total_allocated_bytes(), 0
    assert not source.downloads
    started: list[int] = []
    batches = parquet_parts._batches

    def counted(file: Any, group: int, columns: list[str] | None) -> Iterator[Any]:
        started.append(group)
        return batches(file, group, columns)

    monkeypatch.setattr(parquet_parts, "_batches", counted)
    for start in range(0, 200, 5):
        assert [load(row) for row in source.read(start, start + 5)] == pictures[start : start + 5]
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 15 * 2**20
    assert len(started) == 1
    assert load(source.read(0, 1)[0]) == pictures[0]


def test_what_grows_with_the_files_of_a_source_is_shared_by_the_workers_of_a_node(tmp_path: Path) -> None:
    def own_bytes(files: int) -> int:
        """Return the bytes of a pickled source that each worker has for itself, without those of arrays."""
        folder = tmp_path / str(files)
        folder.mkdir()
        for number in range(files):
            write_shard(folder / f"{number:05d}.tar", [(f"{number}", {"jpg": b"x", "txt": b"a"})])
        source, arrays = opened(folder), list[pickle.PickleBuffer]()
        own = pickle.dumps(source, protocol=5, buffer_callback=arrays.append)
        received = pickle.loads(own, buffers=arrays)
        assert [row.index for row in received.read(0, files)] == list(range(files))
        return len(own)

    # Eight bytes a file: where its rows end.
    assert own_bytes(300) - own_bytes(100) <= 200 * 10


def test_a_part_that_changes_under_a_run_is_noticed(tmp_path: Path) -> None:
    source = opened(laion(tmp_path / "t.parquet", 10, 10))
    assert source.total == 10
    laion(tmp_path / "t.parquet", 5, 10)
    with pytest.raises(UserError, match=r"t\.parquet has changed since it was first read: run again"):
        source.read(0, 10)
    (tmp_path / "t.jsonl").write_text('{"url": "http://a", "text": "b"}\n' * 3)
    source = opened(tmp_path / "t.jsonl")
    assert source.total == 3
    (tmp_path / "t.jsonl").write_text('{"url": "http://a"')
    with pytest.raises(UserError, match="has changed since"):
        source.read(0, 3)


def test_parts_are_in_order_and_their_columns_are_joined(tmp_path: Path) -> None:
    for i in range(30):
        write_parquet(
            tmp_path / f"part-{i:05d}.parquet", URL=[f"http://a/{i}"], TEXT=["a"], similarity=[1, 0.5][i % 2 :][:1]
        )
    write_parquet(tmp_path / "part-00030.parquet", URL=["http://a/30"], TEXT=["a"], nsfw=["NSFW"])
    (tmp_path / "_temporary").mkdir()
    write_parquet(tmp_path / "_temporary" / "part-00000.parquet", URL=["http://twice"], TEXT=["a"])
    for place in (tmp_path, tmp_path / "**" / "*.parquet"):
        source = pickle.loads(pickle.dumps(opened(place)))
        assert [row.url for row in source.read(0, 31)] == [f"http://a/{i}" for i in range(31)]
        assert source.extra_types == {"similarity": pa.float64(), "nsfw": pa.string()}


TEXTS = ["plain", 'two\nlines "quoted"', "tab\tand,comma", "", "é\u2028猫", " x ", "last"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_any_range_of_a_text_table_is_what_a_whole_reading_gives(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import csv

    monkeypatch.setattr(text_tables, "_STEP_ROWS", 3)
    path = tmp_path / f"t.{kind}"
    rows = [{"url": f"http://a/{i}", "text": TEXTS[i % len(TEXTS)]} for i in range(20)]
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        if kind == "jsonl":
            file.write("\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        else:
            writer = csv.DictWriter(file, ["url", "text"], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    source = pickle.loads(pickle.dumps(opened(path)))
    for start in range(20):
        for stop in range(start, 21):
            found = source.read(start, stop)
            assert [(r.index, r.url) for r in found] == [(i, rows[i]["url"]) for i in range(start, stop)]
            assert [r.captions for r in found] == [(t,) if (t := rows[i]["text"]) else () for i in range(start, stop)]


@pytest.mark.parametrize(("first", "second"), [("caption", "url"), ("url", "caption")])
def test_conceptual_captions_need_no_header(tmp_path: Path, first: str, second: str) -> None:
    rows = [{"url": f"http://a/{i}", "caption": f'"{i} says\rhi'} for i in range(3)]
    path = tmp_path / "cc.tsv"
    path.write_bytes("".join(f"{row[first]}\t{row[second]}\n" for row in rows).encode())
    found = rows_of(path)
    assert [(row.url, row.captions) for row in found] == [(row["url"], (row["caption"],)) for row in rows]


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_tables, "_MAX_LINE_BYTES", 1000)
    (tmp_path / "t.tsv").write_text("url\ttext\n" + "x" * 2000)
    with pytest.raises(UserError, match=r"t\.tsv line 2 is longer than 1000 bytes: remove it"):
        rows_of(tmp_path / "t.tsv")


def one(path: Path, **cells: Any) -> Row:
    return rows_of(write_parquet(path, 1, **{name: [value] for name, value in cells.items()}))[0]


def test_hostile_cells_become_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    long = "x" * 10_000_000
    assert one(path, url="http://a", text=long).captions == (long,)
    odd = one(path, url=" http://münchen.example/\x00../a\n", text="a\x00/../b")
    assert (odd.url, odd.captions) == ("http://münchen.example/\x00../a", ("a\x00/../b",))
    assert one(path, url="data:image/png;base64,AAAA", text="a").url == "data:image/png;base64,AAAA"
    assert one(path, url=b"http://a", text=b"caf\xe9").captions == ("caf\ufffd",)
    assert one(path, url="  ", text=[]).url is None
    for value, captions in ((None, ()), (float("nan"), ()), (3, ("3",)), ({"a": 1}, ()), (["a", None, " "], ("a",))):
        assert one(path, url="http://a", text=value).captions == captions
    broken = pa.array([b"fine", b"bad \xff\xed\xa0\x80"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"url": ["http://a"] * 2, "text": broken}), path)
    assert [row.captions[0][:4] for row in rows_of(path)] == ["fine", "bad "]
    late = pa.array([2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"url": ["http://a"], "text": ["a"], "when": late}), path)
    json.dumps(rows_of(path)[0].extra)
    deep = '{"url": "http://a", "text": "b", "deep": ' + "[" * 500 + "]" * 500 + "}"
    (tmp_path / "t.jsonl").write_text(deep)
    json.dumps(rows_of(tmp_path / "t.jsonl")[0].extra)


def test_a_filter_finds_the_column_that_other_data_sets_call_otherwise() -> None:
    coyo = [
        "url",
        "text",
        "clip_similarity_vitb32",
        "clip_similarity_vitl14",
        "watermark_score",
        "aesthetic_score_laion_v2",
    ]
    assert find_column(coyo, "similarity") == "clip_similarity_vitl14"
    assert find_column(coyo, "aesthetic") == "aesthetic_score_laion_v2"
    assert find_column(coyo, "pwatermark") == "watermark_score"
    assert find_column(["SIMILARITY", "clip_similarity_vitl14"], "similarity") == "SIMILARITY"
    assert find_column(["source_status"], "status") == "source_status"
    assert find_column(coyo, "punsafe") is None


def test_what_img2dataset_writes_without_tars_is_read_too(tmp_path: Path) -> None:
    facts = {"url": ["http://a/1", "http://a/2"], "key": ["000000000", "000000001"], "caption": ["one", "two"]}
    folder = tmp_path / "parquet"
    folder.mkdir()
    write_parquet(
        folder / "00000.parquet", 2, jpg=[None, picture(1)], status=["failed_to_download", "success"], **facts
    )
    (folder / "00000_stats.json").write_text("{}")
    first, second = rows_of(folder)
    assert (load(second), second.url, second.captions) == (picture(1), "http://a/2", ("two",))
    assert second.extra["source_status"] == "success"
    with pytest.raises(RejectedError, match="missing_file"):
        load(first)
    files = tmp_path / "files"
    (files / "00000").mkdir(parents=True)
    (files / "00000" / "000000001.jpg").write_bytes(picture(1))
    (files / "00000" / "000000001.txt").write_text("two")
    write_parquet(files / "00000.parquet", 2, **facts)
    (row,) = rows_of(files)
    assert (load(row), row.captions) == (picture(1), ("two",))


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3]:
    server = S3()
    yield server
    server.close()


def test_parts_and_tars_on_s3_are_read(tmp_path: Path, s3_server: S3, use_s3: Callable[[str], None]) -> None:
    use_s3(s3_server.url)
    for i in range(20):
        path = write_parquet(tmp_path / "t.parquet", URL=[f"http://a/{i}"] * 50, TEXT=[str(i)] * 50, s=[0.5] * 50)
        s3_server.client.upload_file(str(path), BUCKET, f"laion/part-{i:05d}.parquet")
    samples = [(f"{i}", {"jpg": picture(i), "txt": b"%d" % i, "json": b'{"n": 1}'}) for i in range(5)]
    write_shard(tmp_path / "0.tar", samples)
    for i in range(3):
        s3_server.client.upload_file(str(tmp_path / "0.tar"), BUCKET, f"tars/{i}.tar")
    s3_server.client.put_object(Bucket=BUCKET, Key="cc.tsv", Body=b"a caption\thttp://a/1\n" * 3000)
    for place in ("laion", "laion/*.parquet", "la*/**/part-*.parquet"):
        source = pickle.loads(pickle.dumps(opened(f"s3://{BUCKET}/{place}")))
        assert source.total == 1000
        assert [row.captions[0] for row in source.read(495, 505)] == ["9"] * 5 + ["10"] * 5
    assert len(source.digest()) == 64
    source = pickle.loads(pickle.dumps(opened(f"s3://{BUCKET}/tars")))
    found = source.read(3, 12)
    assert [(load(row), row.captions, row.extra["n"]) for row in found] == [
        (picture(i % 5), (str(i % 5),), 1) for i in range(3, 12)
    ]
    assert [row.url for row in opened(f"s3://{BUCKET}/cc.tsv").read(2990, 3000)] == ["http://a/1"] * 10
    with pytest.raises(UserError, match=r"no file, folder or match at s3://bucket/none\*"):
        opened(f"s3://{BUCKET}/none*")
