"""The whole stage on a real Ray: real HTTP, real tars, the same bytes however often it is killed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import webdataset

from pipelines.errors import UserError, explain
from pipelines.shards.format import read_shard
from pipelines.stages.pairs.artifact import decode_image
from pipelines.stages.pairs.inputs import count_rows
from pipelines.stages.pairs.shard.staged import StagedShard
from pipelines.stages.pairs.stage import STAGE
from pipelines.store.file_table import FileRecord
from pipelines.store.storage import Storage
from tests.pipelines.stages.pairs.conftest import RunPairs
from tests.pipelines.stages.pairs.web_server import Web, picture

REPOSITORY = Path(__file__).resolve().parents[4]


def contents(storage: Storage) -> dict[str, bytes]:
    """Return every shard file's bytes, by name."""
    return {name: storage.read_bytes(name) for name in storage.names("0*")}


def statuses(storage: Storage) -> list[str]:
    tables = [pq.read_table(io.BytesIO(storage.read_bytes(name))) for name in storage.names("*.parquet")]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["row"] for row in rows] == list(range(len(rows)))
    return [row["status"] for row in rows]


def samples(storage: Storage) -> list[dict[str, Any]]:
    return [sample for name in storage.names("*.tar") for sample in read_shard(Path(storage.path(name)))]


def local_set(folder: Path, count: int) -> Path:
    """Write a table of small local pictures, every seventh a copy of the one before."""
    folder.mkdir()
    lines = []
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(picture(i - (i % 7 == 6)))
        lines.append(json.dumps({"file_name": f"{i}.jpg", "text": f"picture {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder / "metadata.jsonl"


@pytest.fixture
def laion(server: Web, tmp_path: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """Write a LAION-style parquet of what the web really serves; return options to fetch it, and statuses to expect."""
    server.files.update({f"{i}.jpg": picture(i, (100, 80)) for i in range(30)})
    server.files["truncated.jpg"] = picture(77)[:-100]
    server.files["tiny.jpg"] = picture(78, (9, 9))
    server.files["copy.jpg"] = server.files["3.jpg"]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../evil.sh", "rm -rf /")
    server.files["polyglot.jpg"] = picture(79) + archive.getvalue()
    expected = [(f"{i}.jpg", f"picture {i} café\n", "ok") for i in range(30)] + [
        ("gone.jpg", "a", "http_404"),
        ("truncated.jpg", "a", "decode_error"),
        ("page.jpg", "a", "not_an_image"),
        ("tiny.jpg", "a", "too_small"),
        ("copy.jpg", "a", "duplicate"),
        ("3.jpg", "the same URL", "duplicate"),
        ("slow/1", "a", "timeout"),
        ("loop/1", "a", "too_many_redirects"),
        ("endless", "a", "too_large"),
        ("flaky", "back again", "ok"),
        ("gzip", "compressed in transit", "not_an_image"),
        ("inside?", "a redirect to a private address", "refused_address"),
        ("short", "a", "incomplete_body"),
        ("noai", "a", "opt_out"),
        ("5.jpg?", "x" * 10_000_000, "caption_too_long"),
        ("6.jpg?", "../../etc/passwd\x00/\\", "duplicate"),
        ("7.jpg?ü", "a path/with\x00 all sorts\n", "duplicate"),
        ("polyglot.jpg", "../../../tmp/x", "ok"),
        ("4.jpg", "  ", "empty_caption"),
        ("5.jpg", None, "empty_caption"),
        ("6.jpg", "a", "filtered:similarity"),
        ("reset", "a", "connection_error"),
        ("inside", "a", "refused_address"),
    ]
    table = pa.table(
        {
            "URL": [server.url(path) for path, _, _ in expected] + ["http://127.0.0.1/x.jpg", None, "nonsense"],
            "TEXT": [text for _, text, _ in expected] + ["a"] * 3,
            "similarity": [0.1 if status.startswith("filtered") else 0.5 for *_, status in expected] + [0.5] * 3,
            "NSFW": ["UNLIKELY"] * (len(expected) + 3),
        }
    )
    pq.write_table(table, tmp_path / "laion.parquet")
    options = {
        "source": str(tmp_path / "laion.parquet"),
        "rows_per_shard": 16,
        "min_size": 10,
        "filters": {"similarity": {"min": 0.3}},
        "max_image_bytes": 100_000,
        "download": {"connect_to": server.connect_to, "timeout_s": 1.0, "retries": 1},
    }
    more = ["refused_address", "missing_url", "bad_url"]
    return tmp_path / "laion.parquet", options, [status for *_, status in expected] + more


def test_every_row_of_a_real_web_gets_its_status_and_its_bytes_are_reproducible(
    laion: tuple[Path, dict[str, Any], list[str]], run_pairs: RunPairs, server: Web
) -> None:
    _, options, expected = laion
    details, storage = run_pairs("first", **options, workers=2)
    assert statuses(storage) == expected
    assert details["statuses"] == dict(Counter(expected))
    assert (details["samples"], details["input_rows"]) == (32, 56)
    assert sum(details["caption_words"]["counts"]) == sum(details["aspect"]["counts"]) == 32
    assert not storage.exists("work")

    found = samples(storage)
    assert [sample["txt"].decode() for sample in found[:3]] == [f"picture {i} café\n" for i in range(3)]
    assert found[17]["__key__"] == "000010001"
    assert json.loads(found[2]["json"]) == {
        "NSFW": "UNLIKELY",
        "captions": ["picture 2 café\n"],
        "height": 32,
        "original_height": 80,
        "original_width": 100,
        "sha256": json.loads(found[2]["json"])["sha256"],
        "similarity": 0.5,
        "url": "http://pictures.example/2.jpg",
        "width": 32,
    }
    assert decode_image(found[2]["jpg"]).shape == (32, 32, 3)

    # Again, with other parallelism and another speed of the answers.
    server.requests.clear()
    server.delay_s = 0.02
    _, again = run_pairs("second", **options, workers=1)
    assert contents(again) == contents(storage)
    assert len(contents(storage)) == 8


def test_webdataset_and_ray_data_read_the_output_and_captions_are_bit_for_bit(
    tmp_path: Path, run_pairs: RunPairs
) -> None:
    captions = ["naïve\x00 café", "two\r\nlines ", "🐈‍⬛", '{"a": 1}']
    rows = [{"image": picture(i), "text": [text, "second"]} for i, text in enumerate(captions)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    _, storage = run_pairs(source=str(tmp_path / "t.parquet"), encode="webp", deduplicate=False)
    dataset = webdataset.WebDataset(storage.path("000000.tar"), shardshuffle=False, empty_check=False)
    found = list(dataset.decode("rgb8"))
    assert [sample["txt"] for sample in found] == captions
    assert [sample["json"]["captions"] for sample in found] == [[text, "second"] for text in captions]
    assert found[0]["webp"].shape == (32, 32, 3)
    assert storage.names("work") == []
    rows = ray.data.read_webdataset(storage.path("000000.tar")).take_all()
    assert [row["__key__"] for row in rows] == [sample["__key__"] for sample in found]
    assert [row["txt"] for row in rows] == captions


def test_a_second_run_does_nothing_and_says_the_same(tmp_path: Path, run_pairs: RunPairs) -> None:
    table = local_set(tmp_path / "set", 10)
    first, storage = run_pairs(source=str(table), rows_per_shard=4)
    written = {name: os.stat(storage.path(name)).st_mtime_ns for name in storage.names("0*")}
    second, _ = run_pairs(source=str(table), rows_per_shard=4)
    assert second == first
    assert {name: os.stat(storage.path(name)).st_mtime_ns for name in storage.names("0*")} == written


def test_a_limit_counts_input_rows(tmp_path: Path, run_pairs: RunPairs) -> None:
    table = local_set(tmp_path / "set", 10)
    details, storage = run_pairs(source=str(table), rows_per_shard=4, limit=7)
    assert (details["input_rows"], details["samples"], details["statuses"]["duplicate"]) == (7, 6, 1)
    assert storage.names("*.tar") == ["000000.tar", "000001.tar"]


def start(folder: Path, options: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start the stage in a process group of its own, on this session's Ray."""
    address = ray.get_runtime_context().gcs_address
    script = Path(__file__).with_name("killed_run.py")
    command = [sys.executable, str(script), address, str(folder), json.dumps({"image_size": 32, **options})]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, start_new_session=True, env=environment, stderr=subprocess.DEVNULL)


def kill_when(process: subprocess.Popen[bytes], folder: Path, pattern: str) -> None:
    """Kill -9 as soon as a file appears (or let it finish, where it is faster than we look)."""
    deadline = time.monotonic() + 240
    while not any(folder.glob(pattern)) and process.poll() is None:
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.001)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() in (0, -signal.SIGKILL)


def test_a_run_that_publishes_as_it_goes_ends_with_the_same_bytes_after_a_kill(
    tmp_path: Path, run_pairs: RunPairs
) -> None:
    """With deduplication, in which shards are published at the end, see test_pairs_killed.py."""
    source = str(local_set(tmp_path / "set", 60))
    options = {"source": source, "rows_per_shard": 4, "workers": 1, "deduplicate": False}
    _, whole = run_pairs("whole", **options)
    folder = tmp_path / "killed"
    kill_when(start(folder, options), folder, "commits/*.tar.json")
    details, resumed = run_pairs("killed", **options)
    assert contents(resumed) == contents(whole)
    assert len(resumed.names("0*")) == 30
    assert details["samples"] == 60


def test_a_shard_that_was_made_but_not_committed_whole_is_not_made_again(tmp_path: Path, run_pairs: RunPairs) -> None:
    options = {"source": str(local_set(tmp_path / "set", 8)), "rows_per_shard": 4, "deduplicate": False}
    details, storage = run_pairs(**options)
    # Killed between the commits of the tar and of the parquet.
    storage.remove("commits/000001.parquet.json")
    storage.remove("commits/segments")
    names = ["000001.tar", "000001.parquet"]
    files = [FileRecord(name=name, rows=0, bytes=storage.size(name), sha256="0" * 64) for name in names]
    for name in names:
        storage.copy(name, storage / "work" / "attempt")
    StagedShard.record(storage / "work", 1, "attempt", files, {"ok": 4})
    assert run_pairs(**options)[0] == details
    assert storage.read_json("commits/000001.parquet.json")["sha256"] == "0" * 64
    assert not storage.exists("work")


def test_of_two_that_make_one_shard_the_first_is_published(tmp_path: Path) -> None:
    work = Storage(str(tmp_path))
    (tmp_path / "a").mkdir()
    first = StagedShard.record(work, 3, "a", [FileRecord(name="x", rows=1, bytes=1, sha256="1" * 64)], {"ok": 1})
    second = StagedShard.record(work, 3, "b", [FileRecord(name="x", rows=0, bytes=2, sha256="2" * 64)], {"timeout": 1})
    assert second == first
    assert second.folder == work / "a"


def test_a_column_of_the_source_never_names_a_file(tmp_path: Path, run_pairs: RunPairs) -> None:
    table = local_set(tmp_path / "set", 8)
    rows = [
        json.loads(line) | {"bucket": "x/../../../../evil", "phash": "1"} for line in table.read_text().splitlines()
    ]
    table.write_text("\n".join(map(json.dumps, rows)))
    details, storage = run_pairs(source=str(table))
    assert details["statuses"] == {"ok": 7, "duplicate": 1}
    assert not list(tmp_path.rglob("*evil*"))
    assert json.loads(samples(storage)[0]["json"])["source_bucket"] == "x/../../../../evil"


def test_a_run_without_a_single_sample_fails_and_can_be_tried_again(
    server: Web, tmp_path: Path, run_pairs: RunPairs
) -> None:
    pq.write_table(pa.table({"url": [server.url("a.jpg")], "text": ["a"]}), tmp_path / "t.parquet")
    options = {"source": str(tmp_path / "t.parquet"), "download": {"connect_to": server.connect_to}}
    with pytest.raises(UserError, match=r"no row of .* gave a sample \(1 http_404\)"):
        run_pairs(**options)
    server.files["a.jpg"] = picture(1)
    details, _ = run_pairs(**options)
    assert details["samples"] == 1


def test_mistakes_are_explained_in_one_line(tmp_path: Path, run_pairs: RunPairs) -> None:
    table = local_set(tmp_path / "set", 2)
    with pytest.raises(UserError, match=r"has no column `similarity`, which pairs\.filters\.similarity needs"):
        run_pairs(source=str(table), filters={"similarity": {"min": 0.3}})
    pq.write_table(
        pa.table({"url": pa.array([], pa.string()), "text": pa.array([], pa.string())}), tmp_path / "e.parquet"
    )
    with pytest.raises(UserError, match="has no rows"):
        run_pairs(source=str(tmp_path / "e.parquet"))


def test_damage_met_by_a_worker_is_explained_too(tmp_path: Path, run_pairs: RunPairs) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(
        pa.table({"url": ["http://a"] * 300, "text": [str(i) for i in range(300)]}), path, use_dictionary=False
    )
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    with pytest.raises(Exception) as caught:
        run_pairs(source=str(path))
    explained = explain(caught.value)
    assert explained is not None
    assert "t.parquet is not a readable parquet file" in str(explained)


def test_the_key_follows_the_contents_and_nothing_else(tmp_path: Path) -> None:
    def identity(**options: Any) -> dict[str, Any]:
        from pipelines.stages.pairs.config import PairsConfig

        return STAGE.identity(PairsConfig.model_validate(options), 0, {})

    first = local_set(tmp_path / "first", 3)
    second = local_set(tmp_path / "second", 3)
    assert identity(source=str(first)) == identity(source=str(second), workers=3, download={"retries": 7})
    assert identity(source=str(first)) != identity(source=str(first), image_size=64)
    (tmp_path / "second" / "1.jpg").write_bytes(picture(99))
    assert identity(source=str(first)) != identity(source=str(second))


def test_rows_are_counted_for_estimates(tmp_path: Path) -> None:
    from pipelines.stages.pairs.config import PairsConfig

    table = str(local_set(tmp_path / "set", 5))
    assert count_rows(PairsConfig(source=table)) == 5
    assert count_rows(PairsConfig(source=table, limit=3)) == 3


@pytest.mark.shared
def test_hostile_files_cross_the_whole_stage(shared_data: Path, tmp_path: Path, run_pairs: RunPairs) -> None:
    folder = shared_data / "hostile"
    files = [json.loads(line)["file"] for line in (folder / "manifest.jsonl").read_text().splitlines()]
    table = tmp_path / "t.jsonl"
    table.write_text("\n".join(json.dumps({"file": str(folder / name), "text": name}) for name in files))
    details, storage = run_pairs(source=str(table), rows_per_shard=100, deduplicate=False, upscale=True)
    assert details["input_rows"] == len(files) == len(statuses(storage))
    assert details["statuses"]["ok"] >= 100
