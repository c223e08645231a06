"""Duplicates: the smallest row wins, whatever the order of arrival, and however the work is dealt out."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.stages.pairs.publishing import duplicate_search
from pipelines.stages.pairs.publishing.duplicate_search import DuplicateSearch, ShardsOfRun
from pipelines.stages.pairs.shard.duplicate_tokens import find_duplicates, merge, split
from pipelines.stages.pairs.shard.files import write_table
from pipelines.store.storage import Storage

ROWS_A_SHARD = 50


def digest(content: int) -> str:
    return hashlib.sha256(str(content).encode()).hexdigest()


def write_tables(folder: Storage, rows: list[dict[str, Any]]) -> ShardsOfRun:
    """Write tables of shards with these rows (`sha`, and if they have them `url`, `phash`, `status`)."""
    count = -(-len(rows) // ROWS_A_SHARD)
    for shard in range(count):
        numbers = range(shard * ROWS_A_SHARD, min((shard + 1) * ROWS_A_SHARD, len(rows)))
        write_table(
            folder,
            shard,
            pa.table(
                {
                    "row": pa.array(list(numbers), pa.int64()),
                    "status": pa.array([rows[n].get("status", "ok") for n in numbers], pa.string()),
                    "url": pa.array([rows[n].get("url") for n in numbers], pa.string()),
                    "sha256": pa.array([digest(rows[n]["sha"]) for n in numbers], pa.string()),
                    "phash": pa.array([rows[n].get("phash") for n in numbers], pa.int64()),
                }
            ),
        )
    return ShardsOfRun(folder, range(count))


def random_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows with copies, copies by URL, and hashes that differ in a few bits or, some, are missing."""
    random = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        row: dict[str, Any] = {"sha": int(random.integers(1, 1 << 62)) << 190, "url": f"http://a/{number}"}
        row["phash"] = int(random.integers(-(1 << 63), 1 << 63, dtype=np.int64))
        if rows and random.random() < 0.5:
            other = rows[int(random.integers(len(rows)))]
            kind = random.integers(4)
            if kind == 0:
                row["sha"] = other["sha"]
            elif kind == 1:
                row["url"] = other["url"]
            else:
                flips = np.bitwise_or.reduce(np.uint64(1) << random.choice(64, int(random.integers(7))).astype("u8"))
                row["phash"] = int((np.int64(other["phash"] or 0).view("u8") ^ flips).view("i8"))
        if random.random() < 0.1:
            row["phash"] = None
        if random.random() < 0.1:
            row["status"] = "http_404"
        rows.append(row)
    return rows


def expected(rows: list[dict[str, Any]], distance: int) -> dict[int, tuple[int, bool]]:
    """Find duplicates by comparing every row with every row before it."""
    found = {}
    for number, row in enumerate(rows):
        if row.get("status", "ok") != "ok":
            continue
        before = [(n, r) for n, r in enumerate(rows[:number]) if r.get("status", "ok") == "ok"]
        same = [n for n, r in before if r["sha"] == row["sha"] or r["url"] == row["url"]]
        near = [
            n
            for n, r in before
            if None not in (r["phash"], row["phash"])
            and ((r["phash"] ^ row["phash"]) & ((1 << 64) - 1)).bit_count() <= distance
        ]
        if same or near:
            found[number] = (min(same), False) if same else (min(near), True)
    return found


def as_dict(verdicts: Any) -> dict[int, tuple[int, bool]]:
    return {int(v["row"]): (int(v["of"]), bool(v["near"])) for v in verdicts}


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 7])
def test_every_pair_that_is_near_is_found_and_no_other(tmp_path: Path, distance: int) -> None:
    rows = random_rows(400, seed=distance)
    tokens = write_tables(Storage(str(tmp_path)), rows).read_tokens(distance)
    found = as_dict(find_duplicates(tokens, distance))
    assert found == expected(rows, distance)
    assert len({near for _, near in found.values()}) == 2


def test_parts_and_the_order_of_tokens_do_not_matter(tmp_path: Path) -> None:
    rows = random_rows(400)
    tokens = write_tables(Storage(str(tmp_path)), rows).read_tokens(4)
    whole = find_duplicates(tokens, 4)
    shuffled = np.random.default_rng(1).permutation(tokens)
    parts = split(shuffled, 7)
    assert sum(map(len, parts)) == len(tokens)
    assert min(map(len, parts)) > 0
    assert np.array_equal(merge([find_duplicates(part, 4) for part in parts]), whole)


def test_without_a_distance_hashes_do_not_count(tmp_path: Path) -> None:
    rows = [{"sha": 1, "phash": 5, "url": "a"}, {"sha": 2, "phash": 5, "url": "b"}, {"sha": 1, "phash": 9, "url": "c"}]
    shards = write_tables(Storage(str(tmp_path)), rows)
    assert as_dict(find_duplicates(shards.read_tokens(None), None)) == {2: (0, False)}
    assert as_dict(find_duplicates(shards.read_tokens(0), 0)) == {1: (0, True), 2: (0, False)}


def test_rows_without_urls_are_not_copies_of_each_other(tmp_path: Path) -> None:
    shards = write_tables(Storage(str(tmp_path)), [{"sha": n + 1, "url": None} for n in range(5)])
    assert len(find_duplicates(shards.read_tokens(None), None)) == 0


def test_a_thousand_copies_are_one_comparison(tmp_path: Path) -> None:
    rows = [{"sha": n + 1, "phash": 77, "url": str(n)} for n in range(3000)]
    found = as_dict(find_duplicates(write_tables(Storage(str(tmp_path)), rows).read_tokens(5), 5))
    assert found == dict.fromkeys(range(1, 3000), (0, True))


def test_what_is_committed_wins_over_a_retried_row_of_a_smaller_number(tmp_path: Path) -> None:
    first = write_tables(Storage(str(tmp_path / "a")), [{"sha": 1, "status": "timeout"}, {"sha": 2}])
    later = write_tables(Storage(str(tmp_path / "b")), [{"sha": 2}])
    tokens = [first.read_tokens(None), ShardsOfRun(later.folder, later.numbers, run=1).read_tokens(None)]
    assert as_dict(find_duplicates(np.concatenate(tokens), None)) == {0: (1, False)}


def test_dealing_out_over_files_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(600)
    shards = write_tables(Storage(str(tmp_path / "shards")), rows)
    calls = []

    def for_each(function: Any, items: Any) -> Any:
        calls.append(len(items))
        # Later ones first: the order must not matter.
        return [function(item) for item in reversed(items)]

    monkeypatch.setattr(duplicate_search, "ROWS_PER_RANGE", 150)
    whole = DuplicateSearch(Storage(str(tmp_path / "one")), (shards,), len(rows), 4)
    whole.run(for_each)
    assert not calls
    monkeypatch.setattr(duplicate_search, "TOKENS_IN_DRIVER", 100)
    monkeypatch.setattr(duplicate_search, "TOKENS_PER_PART", 800)
    monkeypatch.setattr(duplicate_search, "SHARDS_PER_TASK", 5)
    dealt = DuplicateSearch(Storage(str(tmp_path / "many")), (shards,), len(rows), 4)
    dealt.run(for_each)
    assert calls == [3, dealt.parts, 4]
    assert dealt.parts > 3
    assert as_dict(dealt.verdicts(0, 599)) == as_dict(whole.verdicts(0, 599)) == expected(rows, 4)
    assert as_dict(dealt.verdicts(100, 150)) == {n: v for n, v in expected(rows, 4).items() if 100 <= n <= 150}
    # Whoever publishes some rows reads what concerns them, and nothing else.
    for part in range(dealt.parts):
        dealt.work.remove(f"verdicts/{part:05d}")
    for number in (0, 2, 3):
        dealt.work.remove(f"duplicates/{number:05d}.npy")
    assert as_dict(dealt.verdicts(160, 299)) == {n: v for n, v in expected(rows, 4).items() if 160 <= n < 300}
    # Started again, nothing is looked for twice.
    dealt.run(for_each)
    assert len(calls) == 3


def test_a_search_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(300)
    for name, size in (("TOKENS_IN_DRIVER", 100), ("TOKENS_PER_PART", 800), ("SHARDS_PER_TASK", 2)):
        monkeypatch.setattr(duplicate_search, name, size)
    shards = write_tables(Storage(str(tmp_path / "shards")), rows)
    search = DuplicateSearch(Storage(str(tmp_path / "work")), (shards,), len(rows), 4)
    for step in range(3):
        steps = iter(range(3))

        def killed(function: Any, items: Any, *, last: int = step, steps: Iterator[int] = steps) -> Any:
            is_last = next(steps) == last
            for item in items:
                function(item)
                if is_last:
                    raise KeyboardInterrupt
            return ()

        with pytest.raises(KeyboardInterrupt):
            search.run(killed)
        assert not search.work.exists("duplicates/done")
    # What is there is not made again.
    for shard in shards.numbers:
        shards.folder.remove(f"{shard:06d}.parquet")
    search.run(map)
    assert as_dict(search.verdicts(0, 299)) == expected(rows, 4)
