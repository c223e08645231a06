"""Storage: whole files or none, on local disks and on any fsspec store."""

import errno
import os
import pickle
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from pipelines.errors import UserError
from pipelines.store.storage import Storage, sha256_file


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "local":
        yield Storage(str(tmp_path / "root"))
        return
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    yield storage
    storage.remove()


def test_files_are_written_listed_read_and_removed(storage: Storage) -> None:
    assert storage.names() == []
    (storage / "sub").write_bytes("b.bin", b"123")
    storage.write_json("a.json", {"ü": [1, None]})
    assert storage.names() == ["a.json", "sub"]
    assert (storage / "sub").read_bytes("b.bin") == b"123"
    assert storage.read_json("a.json") == {"ü": [1, None]}
    assert (storage.size("a.json") > 0, storage.size("none")) == (True, -1)
    storage.remove("sub")
    storage.remove("sub")
    assert storage.names() == ["a.json"]
    assert not (storage / "sub").exists("b.bin")


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(storage: Storage) -> None:
    storage.write_bytes("a", b"old")

    def fail() -> None:
        with storage.writer("a") as path:
            path.write_bytes(b"half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert storage.read_bytes("a") == b"old"
    assert storage.names("*") == ["a"]
    if storage.is_local:
        assert [p.name for p in Path(storage.path()).iterdir()] == ["a"]


def test_a_file_is_not_visible_before_the_block_ends(storage: Storage) -> None:
    with storage.writer("a") as path:
        path.write_bytes(b"new")
        assert not storage.exists("a")
        assert storage.names() == []
    assert storage.read_bytes("a") == b"new"


def test_local_copy_holds_the_contents(storage: Storage) -> None:
    storage.write_bytes("a.tar", b"abc")
    with storage.local_copy("a.tar") as path:
        assert path.read_bytes() == b"abc"


def test_of_many_that_create_one_file_one_is_told_so(storage: Storage) -> None:
    with ThreadPoolExecutor(1 if not storage.is_local else 8) as threads:
        told = list(threads.map(lambda i: storage.create("sub/a", f"{i}".encode()), range(8)))
    assert sum(told) == 1
    assert storage.read_bytes("sub/a") == f"{told.index(True)}".encode()
    assert (storage / "sub").sizes() == {"a": 1}


def test_a_copy_is_whole_and_does_not_follow_its_source(storage: Storage, tmp_path: Path) -> None:
    other = Storage(str(tmp_path / "other"))
    storage.write_bytes("a.tar", b"old")
    for source, target in ((storage, storage / "sub"), (storage, other), (other, storage / "back")):
        source.copy("a.tar", target)
        source.copy("a.tar", target, "b.tar")
        source.copy("a.tar", target, "b.tar")
        assert target.names() == ["a.tar", "b.tar"]
    storage.write_bytes("a.tar", b"new")
    assert (storage / "sub").read_bytes("b.tar") == other.read_bytes("a.tar") == b"old"
    for target in (storage, other):
        with pytest.raises(UserError, match="none is missing"):
            storage.copy("none", target)
    assert other.sizes() == {"a.tar": 3, "b.tar": 3}


def test_local_copies_share_their_bytes(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("a.tar", b"data")
    storage.copy("a.tar", storage / "sub")
    assert (tmp_path / "a.tar").samefile(tmp_path / "sub" / "a.tar")


def test_creating_and_copying_work_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    storage = Storage(str(tmp_path))
    assert (storage.create("a", b"1"), storage.create("a", b"2")) == (True, False)
    storage.copy("a", storage / "sub")
    assert (storage / "sub").read_bytes("a") == b"1"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a"]


def test_missing_and_damaged_files_are_user_errors(storage: Storage) -> None:
    with pytest.raises(UserError, match="none is missing"):
        storage.read_bytes("none")
    storage.write_bytes("bad.json", b'{"a": ')
    with pytest.raises(UserError, match=r"bad\.json is not valid JSON"):
        storage.read_json("bad.json")


def test_a_storage_travels_between_processes(storage: Storage) -> None:
    storage.write_bytes("a", b"1")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("a") == b"1"


def test_local_paths_do_not_depend_on_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("runs/demo")
    assert (storage.url, storage.name) == (str(tmp_path / "runs/demo"), "demo")
    assert Storage(f"file://{tmp_path}/x").is_local


def test_an_unknown_protocol_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no file system for nonsense://x"):
        _ = Storage("nonsense://x").filesystem


def test_sha256_of_paths_urls_and_open_files_agree(tmp_path: Path) -> None:
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "a").write_bytes(b"abc")
    with fsspec.open("memory://sha/a", "wb") as file:
        file.write(b"abc")
    with open(tmp_path / "a", "rb") as opened:
        assert sha256_file(opened) == expected
    assert sha256_file(tmp_path / "a") == sha256_file("memory://sha/a") == expected
    with pytest.raises(UserError, match="is missing"):
        sha256_file(tmp_path / "b")


def test_a_file_is_written_once_by_the_first_of_its_writers(storage: Storage) -> None:
    def write(text: str) -> str | None:
        return storage.write_once("sub/a", lambda path: text if path.write_text(text) else None)

    with ThreadPoolExecutor(8) as threads:
        written = [text for text in threads.map(write, [f"writer {n}" for n in range(8)]) if text]
    if storage.is_local:
        assert len(written) == 1
    assert storage.read_bytes("sub/a").decode() in written
    assert write("too late") is None
    assert storage.read_bytes("sub/a").decode() in written

    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        storage.write_once("sub/b", fail)
    assert storage.names() == ["sub"]
    assert (storage / "sub").names() == ["a"]
