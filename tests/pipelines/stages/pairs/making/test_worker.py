"""One worker without a cluster: it stages shards with their duplicate tokens, and ends its threads when closed."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

from pipelines.stages.pairs.assignment import Assignment
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.making.progress_board import ShardCounts
from pipelines.stages.pairs.making.worker import Processor, ShardMaker
from pipelines.stages.pairs.publishing.duplicate_search import ShardsOfRun
from pipelines.stages.pairs.rows import Row
from pipelines.stages.pairs.shard.duplicate_tokens import Tokens, tokens_of_table
from pipelines.stages.pairs.shard.files import CAPTION_COLUMNS, sample_captions_of
from pipelines.stages.pairs.shard.staged import StagedShard, staged_shards
from pipelines.stages.pairs.sources.open import open_source
from pipelines.store.storage import Storage
from tests.pipelines.stages.pairs.picture_files import encoded, scene
from tests.pipelines.stages.pairs.web_server import Web, picture


def ordered(tokens: Tokens) -> list[tuple[int, ...]]:
    return sorted(tokens.tolist())


def stage_two_shards(folder: Path) -> Storage:
    """Stage shards of seven local pictures, one of which is damaged and one flat; returns the work folder."""
    files = [encoded(scene(seed, (60, 40)), "JPEG") for seed in range(5)] + [b"damaged", picture(0, mode="L")]
    for number, data in enumerate(files):
        (folder / f"{number}.jpg").write_bytes(data)
    lines = [json.dumps({"file_name": f"{number}.jpg", "text": "a"}) for number in range(len(files))]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    config = PairsConfig(source=str(folder / "metadata.jsonl"), image_size=32, rows_per_shard=4, near_duplicates=2)
    work = Storage(str(folder / "work"))
    source = open_source(config)
    maker = ShardMaker(
        source=source,
        config=config,
        assignment=Assignment.of_parts(source.parts, 4),
        work=work,
        writer=None,
        board=None,
    )
    made = [maker({"shard": number}) for number in range(2)]
    assert [each["shard"] for each in made] == [0, 1]
    assert [each["statuses"] for each in made] == [{"ok": 4}, {"not_an_image": 1, "ok": 2}]
    assert sum(each["bytes"] for each in made) == sum(map(len, files))
    return work


def test_the_tokens_that_a_worker_writes_are_those_of_the_table(tmp_path: Path) -> None:
    work = stage_two_shards(tmp_path)
    assert staged_shards(work) == [0, 1]
    for number in range(2):
        shard = StagedShard.open(work, number)
        assert shard.has_tokens
        assert ordered(shard.tokens) == ordered(tokens_of_table(shard.table, 2))
        assert len(shard.tokens)


def test_shards_that_an_earlier_version_staged_without_tokens_are_searched_too(tmp_path: Path) -> None:
    work = stage_two_shards(tmp_path)
    staged = ShardsOfRun(work, range(2), staged=True)
    tokens = staged.read_tokens(2)
    record = work.read_json("000000.json")
    del record["has_tokens"]
    work.write_json("000000.json", record)
    (Path(work.path(record["folder"])) / "000000.tokens.npy").unlink()
    assert ordered(staged.read_tokens(2)) == ordered(tokens)
    assert np.array_equal(
        ShardsOfRun(work, range(2), run=1, staged=True).read_tokens(2)["rank"] >> 48, [1] * len(tokens)
    )


def test_tables_tell_all_captions_of_the_samples(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(b"damaged" if number == 1 else picture(number))
    texts = ["one", ["gone", "too"], ["two", "deux"], "three", "four", "five"]
    lines = [json.dumps({"file_name": f"{number}.jpg", "text": text}) for number, text in enumerate(texts)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    config = PairsConfig(source=str(tmp_path / "metadata.jsonl"), image_size=32, deduplicate=False)
    work, source = Storage(str(tmp_path / "work")), open_source(config)
    maker = ShardMaker(
        source=source,
        config=config,
        assignment=Assignment.of_parts(source.parts, 4),
        work=work,
        writer=None,
        board=None,
    )
    tables = []
    for number in range(2):
        maker({"shard": number})
        tables.append(StagedShard.open(work, number).read_columns(CAPTION_COLUMNS))
    assert [sample_captions_of(table) for table in tables] == [["one", "two", "deux", "three"], ["four", "five"]]
    # Where each row has one caption, it is not written twice.
    assert ["captions" in table.column_names for table in tables] == [True, False]


def test_a_closed_worker_leaves_no_threads_behind(server: Web) -> None:
    before = set(threading.enumerate())
    server.files["a.jpg"] = picture(1)
    config = PairsConfig.model_validate(
        {"source": "x", "image_size": 32, "download": {"connect_to": server.connect_to}}
    )
    processor, counts = Processor(config, downloads=True, remote=False), ShardCounts()
    with processor.spool() as spool:
        rows = [Row(index=0, captions=("a",), url=server.url("a.jpg")), Row(index=1, captions=())]
        assert [outcome.status for outcome in processor.process(rows, spool, counts)] == ["ok", "empty_caption"]
    assert counts.now() == {"rows": 2, "bytes": len(picture(1)), "status:ok": 1, "status:empty_caption": 1}
    started = set(threading.enumerate()) - before
    assert {thread.name for thread in started} >= {"decode", "downloads"}
    processor.close()
    for thread in started:
        thread.join(10)
    assert not [thread for thread in started if thread.name in ("decode", "downloads") and thread.is_alive()]


CRASHING = """
import os, sys
from pipelines.stages.pairs.assignment import Assignment
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.making import worker
from pipelines.stages.pairs.sources.open import open_source
from pipelines.store.storage import Storage

folder = sys.argv[1]
whole = worker.make_picture
worker.make_picture = lambda data, config: os._exit(9) if data.endswith(b"poison") else whole(data, config)
config = PairsConfig(source=f"{folder}/metadata.jsonl", image_size=32, rows_per_shard=8)
source = open_source(config)
maker = worker.ShardMaker(source=source, config=config, assignment=Assignment.of_parts(source.parts, 8, None),
                          work=Storage(f"{folder}/work"), writer=None, board=None)
print(maker({"shard": 0, "alone": True})["statuses"], flush=True)
"""


def test_rows_that_kill_their_worker_are_found_and_the_others_of_their_shard_live(tmp_path: Path) -> None:
    for row in range(6):
        data = encoded(scene(row, (60, 40)), "JPEG")
        (tmp_path / f"{row}.jpg").write_bytes(data + b"poison" if row in (1, 4) else data)
    lines = [json.dumps({"file_name": f"{row}.jpg", "text": "a"}) for row in range(6)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))

    def make() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", CRASHING, tmp_path], capture_output=True, text=True, check=False)

    # Twice for each of the two; a first death, of the worker that makes several shards at once, came before.
    assert [make().returncode for _ in range(4)] == [9, 9, 9, 9]
    assert make().stdout == "{'ok': 4, 'poison': 2}\n"
    table = StagedShard.open(Storage(str(tmp_path / "work")), 0).table
    assert table.column("status").to_pylist() == ["ok", "poison", "ok", "ok", "poison", "ok"]
