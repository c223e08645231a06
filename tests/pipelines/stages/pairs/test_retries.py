"""`pairs.retry=failed`: rows whose failure may have passed are tried again; shards are added, none is touched."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.run.plan import Selection, plan
from pipelines.run.recipe import Recipe
from pipelines.run.walk import run
from pipelines.shards.format import read_shard
from pipelines.stages.pairs import retries
from pipelines.stages.pairs.assignment import Assignment
from pipelines.stages.pairs.making.worker import read_rows
from pipelines.stages.pairs.retries import PastRuns, failed_rows, replaced_rows
from pipelines.stages.pairs.rows import Row
from pipelines.stages.pairs.rows_file import RowsFile
from pipelines.stages.pairs.shard.files import write_table
from pipelines.stages.pairs.shard.outcome import is_transient
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from tests.pipelines.stages.pairs.web_server import Web, picture
from tests.tiny import tiny_recipe


@pytest.mark.parametrize(
    ("status", "transient"),
    [
        ("timeout", True),
        ("dns_error", True),
        ("http_503", True),
        ("http_429", True),
        ("incomplete_body", True),
        ("http_404", False),
        ("ok", False),
        ("duplicate", False),
        ("opt_out", False),
        ("decode_error", False),
        ("filtered:similarity", False),
    ],
)
def test_only_transient_failures_are_tried_again(status: str, transient: bool) -> None:
    assert is_transient(status) is transient


def test_the_last_run_of_a_row_decides_what_has_failed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    tables = [
        [(0, "ok"), (1, "timeout"), (2, "http_404")],
        [(3, "http_503"), (4, "timeout")],
        [(1, "ok"), (3, "http_503")],
        [(3, "ok")],
    ]
    for shard, rows in enumerate(tables):
        table = {"row": pa.array([r for r, _ in rows], pa.int64()), "status": pa.array([s for _, s in rows])}
        write_table(storage, shard, pa.table(table))
    assert failed_rows(storage, [range(2)]).tolist() == [1, 3, 4]
    assert failed_rows(storage, [range(2), range(2, 3)]).tolist() == [3, 4]
    assert failed_rows(storage, [range(2), range(2, 3), range(3, 4)]).tolist() == [4]
    replaced = replaced_rows(storage, [range(2), range(2, 3), range(3, 4)])
    assert [rows and rows.part(0, rows.count).tolist() for rows in replaced] == [[1, 3], [3], None]
    assert replaced_rows(storage, [range(4)]) == [None]


def test_rows_that_failed_are_the_same_however_the_tables_are_dealt_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, draw = Storage(str(tmp_path)), np.random.default_rng(0)
    runs, latest = [range(12), range(12, 17), range(17, 19)], dict[int, str]()
    rows = np.arange(0, 240 * 1_000_003, 1_000_003)
    for shards in runs:
        for shard, numbers in zip(shards, np.array_split(rows, len(shards))):
            statuses = draw.choice(["ok", "timeout", "http_404"], len(numbers)).tolist()
            latest |= dict(zip(numbers.tolist(), statuses))
            write_table(storage, shard, pa.table({"row": numbers, "status": statuses}))
        rows = np.array([row for row, status in latest.items() if status == "timeout"])
    assert len(rows) > 3
    assert failed_rows(storage, runs).tolist() == rows.tolist()
    monkeypatch.setattr(retries, "SHARDS_PER_TASK", 5)
    assert failed_rows(storage, runs).tolist() == rows.tolist()


def test_a_retry_that_goes_on_does_not_read_all_tables_again(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    write_table(storage, 0, pa.table({"row": [0, 1], "status": ["timeout", "ok"]}))
    past = PastRuns((0,), 1)
    assert past.rows_to_retry(storage).part(0, 1).tolist() == [0]
    storage.remove("000000.parquet")
    assert past.rows_to_retry(storage).part(0, 1).tolist() == [0]


def test_a_file_of_rows_is_read_in_part(tmp_path: Path) -> None:
    rows = np.arange(0, 100_000, 7)
    written = RowsFile.write(Storage(str(tmp_path)), "x.rows", rows)
    for file in (written, pickle.loads(pickle.dumps(RowsFile.open(Storage(str(tmp_path)), "x.rows")))):
        assert file.count == len(rows)
        assert file.part(5000, 5003).tolist() == rows[5000:5003].tolist()
        assert file.part(3, 3).tolist() == []
        for first in (0, 3, 7 * 4095, 7 * 4096 - 1, 7 * 4096, 99_000, 10**6):
            wanted = np.arange(first, first + 600)
            assert file.holds(wanted).tolist() == np.isin(wanted, rows).tolist()
        assert file.holds(rows[:0]).tolist() == []
    # 32 KiB of what may be hundreds of megabytes.
    assert len(pickle.dumps(written)) < 1000


class Numbers:
    """A source of numbered rows that remembers what was read."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> list[Row]:
        self.reads.append((start, stop))
        return [Row(index=index, captions=("a",)) for index in range(start, stop)]


def test_scattered_rows_are_read_in_few_pieces(tmp_path: Path) -> None:
    source: Any = Numbers()
    rows = np.array([3, 5, 90, 100_000, 100_001, 500_000])
    retried = RowsFile.write(Storage(str(tmp_path)), "retry.rows", rows)
    assignment = Assignment.of_retry(retried, rows_per_shard=4, first_shard=7)
    assert (assignment.rows, assignment.shards) == (6, range(7, 9))
    read = [row.index for shard in assignment.shards for row in read_rows(source, assignment.rows_of(shard))]
    assert read == rows.tolist()
    assert source.reads == [(3, 91), (100_000, 100_001), (100_001, 100_002), (500_000, 500_001)]


def final_statuses(pairs: Artifact) -> dict[int, str]:
    """Return the status of every row, as the last shard that has it says."""
    found: dict[int, str] = {}
    for name in pairs.storage.names("[0-9]*.parquet"):
        table = pq.read_table(io.BytesIO(pairs.storage.read_bytes(name)))
        found |= dict(zip(table.column("row").to_pylist(), table.column("status").to_pylist()))
    return found


def test_a_retry_adds_shards_and_changes_the_keys_of_later_stages(
    ray_cluster: None, server: Web, tmp_path: Path
) -> None:
    names = [f"{i}.jpg" for i in range(20)]
    server.files |= {name: picture(i) for i, name in enumerate(names) if i % 4}
    # Row 3 shows what row 12, which will come back only later, shows too: committed first, it stays.
    server.files["3.jpg"] = picture(12)
    urls = [server.url(name if i % 4 else f"{name}/503") for i, name in enumerate(names)]
    server.refused = {f"{name}/503": 503 for name in names[::4]} | {"19.jpg": 404}
    pq.write_table(pa.table({"url": urls, "text": names}), tmp_path / "t.parquet")
    values = tiny_recipe(tmp_path / "t.parquet", tracking={"enabled": False}, root=str(tmp_path / "root"))
    values["pairs"] |= {"columns": {}, "rows_per_shard": 8, "download": {"connect_to": server.connect_to, "retries": 0}}

    def walk(**pairs: Any) -> tuple[Artifact, str, str]:
        recipe = Recipe.model_validate({**values, "pairs": values["pairs"] | pairs})
        result = run(recipe, Selection(only="pairs"))
        latents = next(
            planned for planned in plan(recipe, Selection(only="latents")) if planned.stage.name == "latents"
        )
        return result.artifacts["pairs"], result.rows[0].state, latents.key

    first, state, latents = walk()
    assert (state, first.details["statuses"]) == ("run", {"ok": 14, "http_503": 5, "http_404": 1})
    before = {file.name: file for file in first.files}

    # Nothing has changed on the web: the retry is recorded, and later stages have nothing new to do.
    same, state, latents_then = walk(retry="failed")
    assert (state, latents_then, same.details["samples"]) == ("retried", latents, 14)

    server.refused = {}
    server.files |= {f"{names[i]}/503": picture(i) for i in (0, 4, 12)}
    grown, state, latents_now = walk(retry="failed")
    assert (state, grown.details["samples"]) == ("retried", 16)
    assert latents_now != latents
    after = {file.name: file for file in grown.files}
    assert {name: after[name] for name in before} == before
    assert (first.details["held_out"], grown.details["held_out"]) == ("held_out/0.parquet", "held_out/2.parquet")
    assert grown.details["held_out"] in after
    assert final_statuses(grown) == {
        i: "http_404" if i == 19 or i in (8, 16) else "duplicate" if i == 12 else "ok" for i in range(20)
    }
    assert grown.details["statuses"] == {"ok": 16, "http_404": 3, "duplicate": 1}
    keys = [s["__key__"] for r in grown.shards() for s in read_shard(Path(grown.storage.path(r.name)))]
    assert len(set(keys)) == len(keys) == 16
    # No transient failure is left: the artifact is finished for good.
    assert walk(retry="failed")[1] == "cached"
