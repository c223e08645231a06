"""Tables of an artifact's files: the same in memory and on disk."""

import contextlib
import hashlib
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.errors import UserError
from pipelines.store import file_table
from pipelines.store.file_table import FileRecord, FileTable


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def record(name: str, number: int) -> FileRecord:
    content = digest(f"content {name}") if number % 2 else None
    return FileRecord(name=name, rows=number, bytes=100 + number, sha256=digest(name), content=content)


RECORDS = [
    record(name, number)
    for number in range(100)
    for name in (f"{number:06d}.tar", f"index/{number:06d}.arrow", f"stats/{number:06d}.json")
]


@pytest.fixture(params=["in memory", "on disk"])
def table(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileTable:
    if request.param == "on disk":
        monkeypatch.setattr(file_table, "_MOST_IN_MEMORY", 50)
        monkeypatch.setattr(file_table, "_UNPACKED_AT_ONCE", 7)
    (tmp_path / "files.parquet").write_bytes(FileTable.of(RECORDS).encode())
    return FileTable.open(tmp_path / "files.parquet")


def test_of_many_names_it_says_at_once_which_are_there(table: FileTable) -> None:
    assert table.holds(["000007.tar", "missing.tar", "stats/000099.json", ""]) == [True, False, True, False]
    assert table.holds([]) == []
    assert FileTable.of([]).holds(["000007.tar"]) == [False]


def test_it_is_the_table_that_was_written(table: FileTable) -> None:
    whole = FileTable.of(RECORDS)
    assert list(table) == list(whole) == sorted(RECORDS, key=lambda each: each.name)
    assert [table.at(position) for position in range(len(table))] == list(whole)
    assert (len(table), table.rows, table.bytes, table.digest()) == (300, whole.rows, whole.bytes, whole.digest())
    assert table.encode() == whole.encode()


def test_every_file_is_found_by_its_name_and_no_other(table: FileTable) -> None:
    for each in RECORDS:
        assert table[each.name] == each
    for name in ("", "000000", "000100.tar", "zzz", "index/000000.arrow "):
        assert name not in table
        assert table.position(name) is None


def test_shards_are_in_order(table: FileTable) -> None:
    assert [table.at(int(position)) for position in table.positions()] == list(table.shards())
    np.testing.assert_array_equal(table.positions(".tar"), np.arange(100))
    added = FileTable.of([record("000050.tar", 7), record("000500.tar", 7)])
    again = FileTable.of([record("000500.tar", 8), record("000501.tar", 8)])
    union = table.union(added, again)
    assert len(union) == 302
    assert union.names == sorted(union.names)
    assert (union["000050.tar"].rows, union["000500.tar"].rows, union["000501.tar"].rows) == (50, 7, 8)
    assert len(table.without([f"{number:06d}.tar" for number in range(100)])) == 200


def test_an_empty_table_has_no_file(tmp_path: Path) -> None:
    (tmp_path / "files.parquet").write_bytes(FileTable.of([]).encode())
    table = FileTable.open(tmp_path / "files.parquet")
    assert (len(table), "a" in table, table.positions().tolist(), list(table)) == (0, False, [], [])


def test_a_table_of_many_files_takes_no_memory_and_leaves_nothing_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_table, "_MOST_IN_MEMORY", 50)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "files.parquet").write_bytes(FileTable.of(RECORDS).encode())
    before = pa.total_allocated_bytes()
    table = FileTable.open(tmp_path / "files.parquet")
    assert pa.total_allocated_bytes() == before
    assert list((tmp_path / "tmp").iterdir()) == []
    assert table["000099.tar"].rows == 99


def test_no_room_for_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_table, "_MOST_IN_MEMORY", 50)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    (tmp_path / "files.parquet").write_bytes(FileTable.of(RECORDS).encode())
    with pytest.raises(
        UserError, match=r"cannot write to .*none \(No such file or directory\): make room there, or set"
    ):
        FileTable.open(tmp_path / "files.parquet")


@pytest.mark.parametrize("most", [50, 10_000])
def test_a_damaged_table_is_told_from_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(file_table, "_MOST_IN_MEMORY", most)
    data = bytearray(FileTable.of(RECORDS).encode())
    for place in range(4, len(data) - 8, 997):
        damaged = bytes(data[:place]) + bytes(64) + bytes(data[place + 64 :])
        (tmp_path / "files.parquet").write_bytes(damaged)
        with contextlib.suppress(ValueError):
            FileTable.open(tmp_path / "files.parquet")
    (tmp_path / "files.parquet").write_bytes(bytes(data[:1000]))
    with pytest.raises(ValueError, match="Parquet"):
        FileTable.open(tmp_path / "files.parquet")
    with pytest.raises(FileNotFoundError):
        FileTable.open(tmp_path / "none.parquet")
