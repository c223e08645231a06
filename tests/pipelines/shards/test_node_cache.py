"""One cache of fetched shards a node: shared, bounded, and gone with its users, however these died."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.errors import MisuseError, UserError, explain, raised_as_user_error
from pipelines.notices import told_to
from pipelines.shards import node_cache
from pipelines.shards.format import write_shard
from pipelines.shards.node_cache import NodeCache
from pipelines.shards.reader import ShardReader
from pipelines.store.commits import ArtifactWriter
from pipelines.store.file_table import FileRecord, FileTable
from pipelines.store.storage import Storage
from tests.s3 import BUCKET, FastS3, fast_s3

SHARDS = 6


@pytest.fixture(scope="module")
def server() -> Iterator[FastS3]:
    with fast_s3() as running:
        yield running


def write(storage: Storage, shards: int = SHARDS) -> list[FileRecord]:
    """Commit shards of one size, each with one sample."""
    writer = ArtifactWriter("latents", "key", storage)
    for shard in range(shards):
        with storage.writer(f"{shard:06d}.tar") as path:
            write_shard(path, [(f"{shard:05d}", {"txt": f"shard {shard}".encode(), "npy": bytes(20_000)})])
        writer.commit(f"{shard:06d}.tar", rows=1)
    return list(writer.committed())


@pytest.fixture
def remote(request: pytest.FixtureRequest) -> tuple[Storage, list[FileRecord]]:
    storage = Storage(f"memory://{request.node.name}")
    return storage, write(storage)


def wait_until(holds: Callable[[], bool]) -> None:
    """Return when a condition holds; the test's own time limit ends it otherwise."""
    while not holds():
        time.sleep(0.02)


def names(folder: Path, suffix: str) -> set[str]:
    return {path.name.partition(".")[0] for path in folder.glob(f"*{suffix}")}


class Process:
    """A process that reads shards."""

    def __init__(self, storage: Storage, records: Path) -> None:
        command = [sys.executable, "-m", "tests.pipelines.shards.cache_user", storage.url, str(records)]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{line}\n")
        self.popen.stdin.flush()

    def answer(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def end(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        assert self.popen.wait() == 0


Starter = Callable[[], Process]


@pytest.fixture
def in_bucket(
    server: FastS3, use_s3: Callable[[str], None], tmp_path: Path
) -> Iterator[tuple[Starter, list[FileRecord]]]:
    """Yield what starts a process that reads the shards of a bucket, and their records."""
    use_s3(server.url)
    storage = Storage(f"s3://{BUCKET}/{tmp_path.name}")
    records, processes = write(storage), list[Process]()
    file = tmp_path / "records.json"
    file.write_text(json.dumps([record.model_dump() for record in records]))

    def start() -> Process:
        processes.append(Process(storage, file))
        return processes[-1]

    yield start, records
    server.set_delay(0)
    for process in processes:
        process.kill()


def test_processes_share_one_fetch_of_each_shard_and_the_last_one_tidies_up(
    in_bucket: tuple[Starter, list[FileRecord]], server: FastS3, cache: Path
) -> None:
    start, records = in_bucket
    processes = [start() for _ in range(4)]
    assert [process.answer() for process in processes] == ["ready"] * 4
    server.take_figures()
    server.set_delay(0.05)
    for process in processes:
        process.ask("ahead 0 1 2 3 4 5")
        process.ask("read 5 4 3 2 1 0")
    for process in processes:
        assert process.answer() == "asked"
        assert process.answer() == ", ".join(f"shard {shard}" for shard in reversed(range(SHARDS)))
    assert server.take_figures().requests["GetObject"] == SHARDS
    assert names(cache, ".file") == {record.sha256 for record in records}
    for process in processes:
        assert cache.exists()
        process.end()
    assert not cache.exists()


def test_a_process_that_is_killed_while_it_fetches_keeps_nobody_waiting(
    in_bucket: tuple[Starter, list[FileRecord]], server: FastS3, cache: Path
) -> None:
    start, records = in_bucket
    processes = [start() for _ in range(4)]
    assert [process.answer() for process in processes] == ["ready"] * 4
    server.set_delay(30)
    processes[0].ask("read 0")
    wait_until(lambda: names(cache, ".partial") == {records[0].sha256})
    server.set_delay(0)
    for process in processes[1:]:
        process.ask("read 0")
    processes[0].kill()
    assert [process.answer() for process in processes[1:]] == ["shard 0"] * 3
    assert names(cache, ".file") == {records[0].sha256}
    assert names(cache, ".partial") == set()


def test_whoever_comes_after_killed_processes_finds_their_whole_shards_and_nothing_else(
    in_bucket: tuple[Starter, list[FileRecord]], server: FastS3, cache: Path
) -> None:
    start, records = in_bucket
    killed = [start() for _ in range(2)]
    for process in killed:
        assert process.answer() == "ready"
        process.ask("read 0 1")
        assert process.answer() == "shard 0, shard 1"
    server.set_delay(30)
    killed[0].ask("read 2")
    wait_until(lambda: names(cache, ".partial") == {records[2].sha256})
    for process in killed:
        process.kill()
    server.set_delay(0)
    # As after a loss of power.
    (cache / f"{records[1].sha256}.file").write_bytes(b"")
    following = start()
    assert following.answer() == "ready"
    assert sorted(path.suffix for path in cache.iterdir() if path.name != "lock") == [".file", ".file", ".user"]
    server.take_figures()
    following.ask("read 0 1 2")
    assert following.answer() == "shard 0, shard 1, shard 2"
    assert server.take_figures().requests["GetObject"] == 2
    following.end()
    assert not cache.exists()


def test_what_somebody_has_in_use_stays_and_what_was_used_longest_ago_goes(
    remote: tuple[Storage, list[FileRecord]], cache: Path
) -> None:
    storage, records = remote
    most = 3 * records[0].bytes
    with (
        contextlib.closing(ShardReader(storage, FileTable.of(records), cache_bytes=most)) as reader,
        contextlib.closing(ShardReader(storage, FileTable.of(records), cache_bytes=most)) as other,
    ):
        reader.fetch_ahead([0])
        reader.read(0, 0)
        for shard in range(1, SHARDS):
            other.read(shard, 0)
            assert len(names(cache, ".file")) <= 3
            assert {records[0].sha256, records[shard].sha256} <= names(cache, ".file")
        assert names(cache, ".file") == {records[shard].sha256 for shard in (0, 4, 5)}
        reader.fetch_ahead([5])
        with contextlib.closing(ShardReader(storage, FileTable.of(records), cache_bytes=most)) as third:
            third.read(1, 0)
        assert records[0].sha256 not in names(cache, ".file"), "nobody needs it now, and it was used longest ago"


def test_what_is_needed_soon_is_not_fetched_beyond_the_bound_and_what_is_needed_now_is(
    remote: tuple[Storage, list[FileRecord]], cache: Path
) -> None:
    storage, records = remote
    with contextlib.closing(NodeCache(storage, 2 * records[0].bytes)) as shards:
        shards.fetch_ahead(records)
        wait_until(lambda: not shards._fetches)
        assert names(cache, ".file") <= {record.sha256 for record in records}
        assert len(names(cache, ".file")) <= 2
        for record in records:
            with shards.open(record) as file:
                assert len(file.read()) == record.bytes
        assert len(names(cache, ".file")) == SHARDS


def test_what_had_no_room_is_fetched_once_there_is_some_and_somebody_is_told_what_is_needed(
    remote: tuple[Storage, list[FileRecord]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, records = remote
    monkeypatch.setattr(node_cache, "RETRY_S", 0.01)
    lines: list[str] = []
    table, most = FileTable.of(records), 3 * records[0].bytes
    with (
        told_to(lines.append),
        contextlib.closing(ShardReader(storage, table, cache_bytes=most)) as reader,
        contextlib.closing(ShardReader(storage, table, cache_bytes=most)) as other,
    ):
        other.fetch_ahead([0, 1, 2])
        wait_until(lambda: len(names(cache, ".file")) == 3)
        reader.fetch_ahead([3, 4])
        reader.read(0, 0)
        wait_until(lambda: bool(lines))
        other.fetch_ahead([2])
        wait_until(
            lambda: (
                reader.fetch_ahead([3, 4]) is None
                and names(cache, ".file") == {records[shard].sha256 for shard in (2, 3, 4)}
            )
        )
    (line,) = lines
    assert line.startswith(f"{cache} on ")
    assert line.endswith("but LDM_CACHE_GIB is 0.0: training waits for shards until it is 1")


def test_what_could_not_be_fetched_ahead_is_tried_again(
    remote: tuple[Storage, list[FileRecord]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, records = remote
    monkeypatch.setattr(node_cache, "RETRY_S", 0.01)
    whole = storage.read_bytes("000001.tar")
    storage.remove_object("000001.tar")
    with contextlib.closing(ShardReader(storage, FileTable.of(records))) as reader:
        reader.fetch_ahead([1, 2])
        wait_until(lambda: names(cache, ".file") == {records[2].sha256})
        storage.write_bytes("000001.tar", whole)
        wait_until(
            lambda: (
                reader.fetch_ahead([1, 2]) is None
                and names(cache, ".file") == {records[shard].sha256 for shard in (1, 2)}
            )
        )


def test_a_cache_of_many_files_is_looked_through_seldom_and_never_grows_beyond_its_size(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage("memory://many-files")
    records = write(storage, shards=60)
    monkeypatch.setattr(node_cache, "MANY_FILES", 10)
    monkeypatch.setattr(node_cache, "ROOM_AT_ONCE", 0.5)
    monkeypatch.setattr(node_cache, "PART_OF_ROOM", 0.5)
    looks, used_shards = list[int](), node_cache._used_shards

    def looked(folder: Path) -> dict[str, int]:
        looks.append(len(list(folder.glob("*.file"))))
        return used_shards(folder)

    monkeypatch.setattr(node_cache, "_used_shards", looked)
    with contextlib.closing(NodeCache(storage, 20 * records[0].bytes)) as shards:
        for record in records:
            shards.open(record).close()
            assert len(names(cache, ".file")) <= 20
        # Those read last are there, but for a part of the room that was made.
        assert {record.sha256 for record in records[-10:]} <= names(cache, ".file")
    assert len(looks) < 40


def test_a_shard_with_other_bytes_than_were_committed_is_named_and_not_kept(
    remote: tuple[Storage, list[FileRecord]], cache: Path
) -> None:
    storage, records = remote
    storage.write_bytes("000001.tar", storage.read_bytes("000002.tar"))
    with contextlib.closing(ShardReader(storage, FileTable.of(records))) as reader:
        reader.fetch_ahead([0, 1])
        message = (
            rf"000001\.tar has the sha256 {records[2].sha256[:12]}… instead of {records[1].sha256[:12]}…: `ldm ver"
        )
        with pytest.raises(UserError, match=message):
            reader.read(1, 0)
        assert reader.read(0, 0)["txt"] == b"shard 0"
        assert names(cache, ".file") == {records[0].sha256}
        assert names(cache, ".partial") == set()


def fill_disk(monkeypatch: pytest.MonkeyPatch, is_full: Callable[[], bool]) -> None:
    download = Storage.download

    def download_to_full_disk(storage: Storage, name: str, local: Path, size: int) -> None:
        if is_full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(local))
        download(storage, name, local, size)

    monkeypatch.setattr(Storage, "download", download_to_full_disk)


def test_a_full_disk_is_one_line_and_no_end_of_the_run(
    remote: tuple[Storage, list[FileRecord]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, lambda: True)
    with contextlib.closing(ShardReader(remote[0], FileTable.of(remote[1]))) as reader:
        with pytest.raises(OSError) as raised:
            reader.read(0, 0)
        # Ray Train replaces the worker, which another node may have room for.
        assert raised_as_user_error(raised.value) is None
        assert re.fullmatch(
            rf"disk full at {cache} on .* \(shards are fetched to it; LDM_CACHE names another\): free some space .*",
            str(explain(raised.value)),
        )
        assert names(cache, ".partial") == set()


def test_on_a_full_disk_what_is_in_use_is_noted_once_there_is_room_and_never_half(
    remote: tuple[Storage, list[FileRecord]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, records = remote
    allocate, full = os.posix_fallocate, list[bool]()

    def allocate_on_full_disk(file: int, start: int, size: int) -> None:
        if full and full.pop():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(file, start, size)

    with contextlib.closing(NodeCache(storage)) as shards:
        shards.fetch_ahead(records[:1])
        used = node_cache._used_shards(cache)
        assert used == {records[0].sha256: records[0].bytes}
        monkeypatch.setattr(os, "posix_fallocate", allocate_on_full_disk)
        full[:] = [True, True]
        with pytest.raises(OSError, match="No space left on device"):
            shards.fetch_ahead(records)
        assert node_cache._used_shards(cache) == used
        full[:] = [True]
        shards.fetch_ahead(records)
        assert node_cache._used_shards(cache) == {record.sha256: record.bytes for record in records}


def test_on_a_full_disk_what_nobody_needs_makes_room(
    remote: tuple[Storage, list[FileRecord]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, records = remote
    fill_disk(monkeypatch, lambda: len(names(cache, ".file")) >= 3)
    with contextlib.closing(ShardReader(storage, FileTable.of(records))) as reader:
        reader.fetch_ahead([0])
        for shard in range(SHARDS):
            assert reader.read(shard, 0)["txt"] == f"shard {shard}".encode()
        assert records[0].sha256 in names(cache, ".file")


def test_a_cache_that_is_removed_while_it_is_used_is_filled_again(
    remote: tuple[Storage, list[FileRecord]], cache: Path
) -> None:
    storage, records = remote
    with contextlib.closing(NodeCache(storage)) as shards:
        shards.open(records[0]).close()
        for path in cache.iterdir():
            path.unlink()
        cache.rmdir()
        shards.open(records[0]).close()


def test_whoever_keeps_removing_what_is_fetched_is_told_of(
    remote: tuple[Storage, list[FileRecord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, records = remote
    with contextlib.closing(NodeCache(storage)) as shards:
        monkeypatch.setattr(shards, "_fetch", lambda record, ahead: None)
        with pytest.raises(UserError, match=r"are removed from it while they are needed: .*set LDM_CACHE to another"):
            shards.open(records[0])


def test_nobody_else_may_look_into_the_cache(remote: tuple[Storage, list[FileRecord]], cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o755)
    with contextlib.closing(NodeCache(remote[0])):
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_place_that_is_no_folder_of_ones_own_is_refused(
    remote: tuple[Storage, list[FileRecord]], cache: Path, tmp_path: Path
) -> None:
    cache.parent.mkdir()
    cache.symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"ldm-cache-\d+ must be a folder of your own.*set LDM_CACHE to a folder of"):
        NodeCache(remote[0])
    cache.unlink()
    cache.parent.rmdir()
    cache.parent.write_bytes(b"a file")
    with pytest.raises(UserError, match=r"cannot be made \(File exists\): set LDM_CACHE to a folder that you can"):
        NodeCache(remote[0])


def test_the_size_is_that_of_the_environment(
    remote: tuple[Storage, list[FileRecord]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, records = remote
    monkeypatch.setenv("LDM_CACHE_GIB", str(1.5 * records[0].bytes / 2**30))
    with contextlib.closing(NodeCache(storage)) as shards:
        for record in records:
            shards.open(record).close()
        assert names(cache, ".file") == {records[-1].sha256}
    monkeypatch.setenv("LDM_CACHE_GIB", "much")
    with pytest.raises(MisuseError, match="LDM_CACHE_GIB must be a number of GiB, got 'much': set it to one such as"):
        NodeCache(storage)


def test_an_unused_cache_can_be_told_and_removed(remote: tuple[Storage, list[FileRecord]], cache: Path) -> None:
    with contextlib.closing(NodeCache(remote[0])):
        assert node_cache.is_used(cache)
        node_cache.remove_unused(cache)
        assert node_cache.is_used(cache)
    cache.mkdir()
    (cache / "left.user").write_bytes(b"")
    assert not node_cache.is_used(cache)
    node_cache.remove_unused_here()
    assert not cache.exists()
    node_cache.remove_unused_here()
    assert not cache.exists()


def test_a_cache_that_nobody_closed_is_left_by_the_garbage_collector_at_any_moment(
    remote: tuple[Storage, list[FileRecord]], cache: Path
) -> None:
    forgotten = ShardReader(remote[0], FileTable.of(remote[1]))
    forgotten.read(0, 0)
    with node_cache._alone(cache):
        del forgotten
        gc.collect()
    assert not node_cache.is_used(cache)
    NodeCache(remote[0]).close()
    assert not cache.exists()
