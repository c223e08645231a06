"""What a pairs artifact says of itself: counted by columns, in parts, and equal to counting row by row."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.compute.tasks import for_each
from pipelines.inspection.inspect import inspect_path
from pipelines.stages.pairs.making.progress import RecentRate
from pipelines.stages.pairs.shard.files import write_table
from pipelines.stages.pairs.shard.staged import StagedShard
from pipelines.stages.pairs.summary import summary
from pipelines.stages.pairs.summary.hosts import HostCounts
from pipelines.stages.pairs.summary.summary import EDGES, summarise
from pipelines.stages.pairs.summary.unfinished import write_plan
from pipelines.store.storage import Storage

CAPTIONS = ["a cat", "  two\u3000words ", "one\u00a0two\x1cthree\x85four", "日本語", "x " * 200, "café\x00 \u202eabc\n"]
STATUSES = ["ok", "ok", "ok", "http_404", "timeout", "duplicate"]


def make_table(storage: Storage, shard: int, rows: Sequence[int], *, seed: int = 0) -> list[dict[str, Any]]:
    """Write a made-up table of these rows; returns its lines."""
    draw = random.Random(f"{seed} {shard}")
    lines: list[dict[str, Any]] = []
    for row in rows:
        status = draw.choice(STATUSES)
        known = status in ("ok", "duplicate")
        lines.append(
            {
                "row": row,
                "key": f"{shard:05d}{len(lines):04d}",
                "status": status,
                "url": draw.choice([None, f"https://Host{draw.randrange(5)}.example:8080/{row}.jpg"]),
                "caption": draw.choice(CAPTIONS) if known else draw.choice([None, "gone"]),
                "width": draw.randint(8, 5000) if known else None,
                "height": draw.randint(8, 5000) if known else None,
                "bucket": draw.choice(["64x64", "96x32"]) if known else None,
            }
        )
    types = {"row": pa.int64(), "width": pa.int32(), "height": pa.int32()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in lines[0]])
    write_table(storage, shard, pa.Table.from_pylist(lines, schema))
    return lines


def place(value: float, edges: Sequence[float]) -> int:
    return max(index for index, edge in enumerate(edges) if value >= edge)


def test_counting_by_columns_gives_what_counting_row_by_row_gives(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    first = [line for shard in range(3) for line in make_table(storage, shard, range(200 * shard, 200 * shard + 200))]
    retried = [line for shard in (3, 4) for line in make_table(storage, shard, range(7 + shard, 600, 3 * shard))]
    # Shards 3 and 4 are a retry each: row 23 is in both.
    lines = list({line["row"]: line for line in first + retried}.values())
    details = summarise(storage, [range(3), range(3, 4), range(4, 5)], image_size=64, stored_bytes=50_000)

    assert details["statuses"] == dict(Counter(line["status"] for line in lines).most_common())
    good = [line for line in lines if line["status"] == "ok"]
    assert (details["samples"], details["input_rows"], details["bytes"]) == (len(good), 600, 50_000)
    values: dict[str, Callable[[dict[str, Any]], float]] = {
        "caption_words": lambda line: len(line["caption"].split()),
        "caption_characters": lambda line: len(line["caption"]),
        "aspect": lambda line: line["width"] / line["height"],
        "source_size": lambda line: min(line["width"], line["height"]),
    }
    for name, value in values.items():
        places = Counter(place(value(line), EDGES[name]) for line in good)
        assert details[name]["counts"] == [places[index] for index in range(len(EDGES[name]))], name
    assert details["buckets"] == dict(Counter(line["bucket"] for line in good))
    hosts = Counter(line["url"].split("/")[2].split(":")[0].lower() for line in lines if line["url"])
    assert {host["host"]: host["rows"] for host in details["hosts"]} == dict(hosts)
    assert details["hosts_exact"]
    assert details["failures"].keys() == {"http_404", "timeout", "duplicate"}
    assert len(details["examples"]) == 12


def test_parts_counted_one_by_one_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    for shard in range(7):
        make_table(storage, shard, range(50 * shard, 50 * shard + 50))
    whole = summarise(storage, [range(5), range(5, 7)], image_size=64, stored_bytes=50_000)
    monkeypatch.setattr(summary, "SHARDS_PER_TASK", 2)
    assert summarise(storage, [range(5), range(5, 7)], image_size=64, stored_bytes=50_000) == whole


def test_parts_counted_by_tasks_of_ray_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    storage = Storage(str(tmp_path))
    for shard in range(4):
        make_table(storage, shard, range(50 * shard, 50 * shard + 50))
    whole = summarise(storage, [range(3), range(3, 4)], image_size=64, stored_bytes=50_000)
    monkeypatch.setattr(summary, "SHARDS_PER_TASK", 1)
    assert summarise(storage, [range(3), range(3, 4)], image_size=64, stored_bytes=50_000, for_each=for_each) == whole


def test_a_shard_without_rows_or_pictures_counts_too(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    make_table(storage, 0, range(4))
    empty = pq.read_table(storage.path("000000.parquet")).slice(0, 0)
    write_table(storage, 1, empty)
    assert summarise(storage, [range(2)], image_size=64, stored_bytes=50_000)["input_rows"] == 4


def test_hosts_are_told_without_users_passwords_ports_and_cases() -> None:
    urls = [
        "https://user:secret@A.example:99/x?q=//b.example/",
        "http://a.example",
        "http://a.example?x=1",
        "//a.example/x",
        "http://[2001:db8::1]:80/x",
        "http:///x",
        "nonsense",
        "a/b",
        None,
        "http://" + "x" * 10_000,
    ]
    hosts = HostCounts()
    hosts.add(pa.array(urls), pa.array(["ok", "http_404", "timeout", "timeout"] + ["ok"] * 6))
    first, *others = hosts.top()
    assert first == {"host": "a.example", "rows": 4, "ok": 0.25, "failure": "timeout"}
    assert [host["host"] for host in others] == ["[2001:db8::1]", "x" * 255]
    assert others[0]["failure"] is None


def test_examples_show_no_password_and_no_signature(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    make_table(storage, 0, range(3))
    secret = "https://user:p@ss@a.example/x.jpg?X-Amz-Signature=abc"
    changes = {"key": ["0", "1", "2"], "status": ["ok", "ok", "timeout"], "url": [secret, None, secret]}
    changes |= {"caption": ["a", "b", "c"]}
    known: dict[str, Any] = {"width": [64] * 3, "height": [64] * 3, "bucket": ["64x64"] * 3}
    table = pq.read_table(storage.path("000000.parquet"))
    for name, values in {**changes, **known}.items():
        column = table.column_names.index(name)
        table = table.set_column(column, name, pa.array(values, table.schema.field(name).type))
    write_table(storage, 0, table)
    details = summarise(storage, [range(1)], image_size=64, stored_bytes=50_000)
    shown = {"url": "https://a.example/x.jpg"}
    assert details["examples"] == [{"key": "0", "caption": "a", **shown}, {"key": "1", "caption": "b"}]
    assert details["failures"] == {"timeout": {"key": "2", "caption": "c", **shown}}


def test_more_hosts_than_are_kept_leave_the_frequent_ones_and_say_so() -> None:
    hosts = HostCounts(most=10)
    for part in range(20):
        more = HostCounts(most=10)
        urls = [f"http://rare{part}-{i}.example/" for i in range(30)] + ["http://often.example/"] * 5
        more.add(pa.array(urls), pa.array(["ok"] * len(urls)))
        hosts.merge(HostCounts.from_json(more.to_json()))
    assert hosts.top(1) == [{"host": "often.example", "rows": 100, "ok": 1.0, "failure": None}]
    assert not hosts.exact
    assert len(set(hosts.to_json()["counts"]["host"])) <= 20
    one = HostCounts(most=10)
    one.merge(more)
    assert not one.exact


def test_an_unfinished_artifact_tells_how_far_it_is(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "pairs" / "0123"))
    work = storage / "work"
    write_plan(work, 950, 10)
    for shard in range(5):
        make_table(work / "attempt", shard, range(100 * shard, 100 * shard + 100))
        StagedShard.record(work, shard, "attempt", [], {})
    make_table(work / "attempt", 5, range(500, 600))  # not whole: it has no record
    make_table(storage, 0, range(100))
    storage.write_json("commits/000000.parquet.json", {})

    facts = inspect_path(storage.url)
    assert (facts["kind"], facts["stage"], facts["key"], facts["committed_files"]) == ("unfinished", "pairs", "0123", 1)
    details = facts["details"]
    assert details["shards"] == {"committed": 1, "made": 4, "planned": 10}
    assert (details["planned_rows"], details["input_rows"], details["tables_read"]) == (950, 500, 5)
    assert sum(details["statuses"].values()) == 500
    assert inspect_path(str(tmp_path))["unfinished"] == [storage.url]


def test_the_rate_is_of_the_last_seconds_and_not_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rate = RecentRate(window_s=10)
    assert rate.update(0) == 0

    def after(seconds: int, count_per_s: int, count: int) -> float:
        found = 0.0
        for _ in range(seconds):
            now[0] += 1
            count += count_per_s
            found = rate.update(count)
        return found

    assert after(30, 0, 0) == 0
    assert after(5, 100, 0) == pytest.approx(100), "the seconds in which workers started do not count"
    assert after(11, 20, 500) == pytest.approx(20)
    assert after(11, 0, 720) == 0


def test_numbers_in_the_summary_are_plain_json(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    make_table(storage, 0, range(20))

    def kinds(value: Any) -> set[type]:
        if isinstance(value, dict):
            return set().union(*map(kinds, value.values()))
        if isinstance(value, list):
            return set().union(*map(kinds, value))
        return {type(value)}

    assert not [
        kind
        for kind in kinds(summarise(storage, [range(1)], image_size=64, stored_bytes=50_000))
        if issubclass(kind, np.generic)
    ]
