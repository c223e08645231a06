"""What a process remembers of a file lasts as long as the file does not change."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.store import remembered
from pipelines.store.location import Location
from pipelines.store.remembered import remember_by_stamp
from tests.aged import aged


def counted(most: int = 10, *, unstamped: bool = False) -> tuple[Callable[[Location], bytes], list[str]]:
    """Return a remembered function that reads a file, and the paths that it was really called with."""
    calls: list[str] = []

    @remember_by_stamp(most, unstamped=unstamped)
    def read(location: Location) -> bytes:
        calls.append(location.path)
        return location.read()

    return read, calls


def settled(path: Path, data: bytes, age_s: int = 10) -> Location:
    """Write a file that looks as if it had been written a while ago."""
    path.write_bytes(data)
    return Location.of(str(aged(path, age_s)))


def test_an_unchanged_file_is_read_once(tmp_path: Path) -> None:
    read, calls = counted()
    location = settled(tmp_path / "a", b"1")
    assert [read(each) for each in (location, Location.of(f"file://{tmp_path}/a"), location)] == [b"1"] * 3
    assert len(calls) == 1


def test_a_file_of_another_size_time_or_inode_is_read_again(tmp_path: Path) -> None:
    read, calls = counted()
    location = settled(tmp_path / "a", b"1", 10)
    read(location)
    assert read(settled(tmp_path / "a", b"22", 10)) == b"22"
    assert read(settled(tmp_path / "a", b"33", 20)) == b"33"
    when = (tmp_path / "a").stat().st_mtime_ns
    (tmp_path / "b").write_bytes(b"44")
    os.utime(tmp_path / "b", ns=(when, when))
    os.replace(tmp_path / "b", tmp_path / "a")
    assert read(location) == b"44"
    assert len(calls) == 4


def test_a_file_written_a_moment_ago_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A moment that even a slow machine does not miss.
    monkeypatch.setattr(remembered, "_FRESH_S", 600)
    read, calls = counted()
    path, now = tmp_path / "a", time.time_ns()
    for data in (b"1", b"2", b"3"):
        path.write_bytes(data)
        # As if the clock of the file system had not ticked in between.
        os.utime(path, ns=(now, now))
        assert read(Location.of(str(path))) == data
    assert len(calls) == 3


def test_remote_files_are_remembered_only_if_asked_for() -> None:
    location = Location.of("memory://remembered/a")
    location.filesystem.pipe_file(location.path, b"1")
    for unstamped, expected in ((False, 2), (True, 1)):
        read, calls = counted(unstamped=unstamped)
        read(location)
        read(location)
        assert len(calls) == expected


def test_the_file_asked_for_longest_ago_is_forgotten_first(tmp_path: Path) -> None:
    read, calls = counted(2)
    a, b, c = (settled(tmp_path / name, b"x") for name in "abc")
    for location in (a, b, a, c, a, b):
        read(location)
    assert [Path(path).name for path in calls] == ["a", "b", "c", "b"]


def test_a_failure_is_not_remembered(tmp_path: Path) -> None:
    attempts: list[Location] = []

    @remember_by_stamp(1)
    def fail(location: Location) -> None:
        attempts.append(location)
        raise ValueError("no")

    location = settled(tmp_path / "a", b"")
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            fail(location)
    assert len(attempts) == 2


def test_threads_that_ask_at_the_same_time_share_one_call(tmp_path: Path) -> None:
    calls: list[Location] = []
    begun, go = threading.Event(), threading.Event()

    @remember_by_stamp(1)
    def slow(location: Location) -> int:
        calls.append(location)
        begun.set()
        go.wait(30)
        return len(calls)

    location = settled(tmp_path / "a", b"")
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(slow, location)
        assert begun.wait(30)
        second = threads.submit(slow, location)
        go.set()
        assert (first.result(30), second.result(30)) == (1, 1)
