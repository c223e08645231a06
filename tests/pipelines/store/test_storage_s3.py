"""Storage on S3: a real server, and a network before it that does everything wrong."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines import patience
from pipelines.errors import MisuseError, UserError
from pipelines.store import filesystems, object_store
from pipelines.store.commits import ArtifactWriter
from pipelines.store.storage import Storage
from tests.pipelines.store.s3 import BUCKET, S3, SECRET, SESSION, Plan, environment

MIB = 1 << 20
NASTY = {
    "error": 0.04,
    "slow_down": 0.04,
    "too_many": 0.02,
    "delay": 0.02,
    "cut_request": 0.03,
    "cut_answer": 0.03,
    "lose_answer": 0.03,
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.2)
    monkeypatch.setattr(object_store, "PART_BYTES", 5 * MIB)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


@pytest.fixture
def root(request: pytest.FixtureRequest) -> Storage:
    return Storage(f"s3://{BUCKET}/{request.node.name}")


def data_of(index: int, size: int) -> bytes:
    return random.Random(index).randbytes(size)


def test_what_a_writer_reported_through_a_nasty_network_is_there_whole_and_nothing_else(
    s3_server: S3, use_s3: Callable[[str], None], root: Storage, scratch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    draw = random.Random(4)
    sizes = [draw.choice((0, 1, 500, 40_000, 300_000)) for _ in range(88)] + [10 * MIB, 20 * MIB + 7, 11 * MIB] * 2
    digests = {f"{i:03}.bin": hashlib.sha256(data_of(i, size)).hexdigest() for i, size in enumerate(sizes)}
    given_up = {f"{i:03}.bin" for i in range(0, len(sizes), 10)}

    def write(name: str) -> None:
        index = int(name[:3])
        try:
            with root.writer(name) as path:
                path.write_bytes(data_of(index, sizes[index]))
                if name in given_up:
                    raise KeyError(name)
        except KeyError:
            return

    def read(name: str) -> str:
        with root.local_copy(name) as path:
            copied = path.read_bytes()
        with root.open(name) as file:
            opened = file.read()
        assert copied == opened == root.read_bytes(name)
        return hashlib.sha256(copied).hexdigest()

    with s3_server.behind(Plan(NASTY, seed=1)) as proxy, ThreadPoolExecutor(4) as threads:
        use_s3(proxy.url)
        list(threads.map(write, digests))
        reported = sorted(digests.keys() - given_up)
        assert dict(zip(reported, threads.map(read, reported), strict=True)) == {n: digests[n] for n in reported}
        assert root.names() == reported
        assert set(proxy.done) == {*NASTY, "pass"}
    found = s3_server.objects(root.name)
    assert found == {f"{root.name}/{name}": sizes[int(name[:3])] for name in reported}
    for name in reported:
        assert hashlib.sha256(s3_server.read(f"{root.name}/{name}")).hexdigest() == digests[name]
    assert s3_server.uploads(root.name) == []
    assert list(scratch.iterdir()) == []
    assert SECRET not in caplog.text
    assert SESSION not in caplog.text


def test_a_write_that_fails_for_good_leaves_nothing_anywhere_and_one_line(
    s3_server: S3, use_s3: Callable[[str], None], root: Storage, scratch: Path
) -> None:
    with s3_server.behind(Plan({"forbidden": 1.0}, only="partNumber=3")) as proxy:
        use_s3(proxy.url)
        with pytest.raises(UserError, match=r"no permission for s3://bucket/.*/a\.tar .AccessDenied.") as caught:
            root.write_bytes("a.tar", data_of(0, 16 * MIB))
    assert "\n" not in str(caught.value)
    assert s3_server.objects(root.name) == {}
    assert s3_server.uploads(root.name) == []
    assert list(scratch.iterdir()) == []


def test_an_upload_whose_beginning_nobody_heard_of_is_aborted(
    s3_server: S3, use_s3: Callable[[str], None], root: Storage
) -> None:
    with s3_server.behind(Plan({"lose_answer": 0.6}, seed=1, only="POST")) as proxy:
        use_s3(proxy.url)
        root.write_bytes("a.tar", data_of(0, 11 * MIB))
        assert proxy.done["lose_answer"] > 0
    assert s3_server.objects(root.name) == {f"{root.name}/a.tar": 11 * MIB}
    assert s3_server.uploads(root.name) == []


def test_a_process_killed_in_the_middle_of_an_upload_leaves_nothing_under_the_name(
    s3_server: S3, root: Storage, use_s3: Callable[[str], None]
) -> None:
    program = (
        "import sys; from pipelines.store import object_store; from pipelines.store.storage import Storage; "
        f"object_store.PART_BYTES = {5 * MIB}; Storage(sys.argv[1]).write_bytes('a.tar', bytes({32 * MIB}))"
    )
    with s3_server.behind(Plan({"delay": 1.0}, delay_s=60.0, only="partNumber=3")) as proxy:
        process = subprocess.Popen(
            [sys.executable, "-c", program, root.url], env={**os.environ, **environment(proxy.url)}
        )
        try:
            wait_for(lambda: proxy.done["delay"] == 1)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert s3_server.objects(root.name) == {}
    assert s3_server.uploads(root.name) == [f"{root.name}/a.tar"]
    use_s3(s3_server.url)
    root.remove_leftovers()
    assert s3_server.uploads(root.name) == []


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("kind", ["error", "slow_down", "too_many", "cut_request", "cut_answer", "lose_answer"])
def test_of_many_that_create_one_file_one_is_told_so_whatever_gets_lost(
    kind: str, s3_server: S3, use_s3: Callable[[str], None], root: Storage
) -> None:
    root = root / kind
    with s3_server.behind(Plan({kind: 0.4}, seed=3, only="PUT")) as proxy, ThreadPoolExecutor(4) as threads:
        use_s3(proxy.url)
        for round_ in range(3):
            told = list(threads.map(lambda i, name=f"{round_}": root.create(name, f"{i}".encode()), range(4)))
            assert sum(told) == 1
            assert root.read_bytes(f"{round_}") == f"{told.index(True)}".encode()
        assert proxy.done[kind] > 0


def test_replacing_needs_the_version_last_seen(s3: S3, root: Storage) -> None:
    assert root.version("a") is None
    assert root.replace("a", b"0", '"of-nothing"') is None
    first = root.replace("a", b"1", None)
    assert first == root.version("a")
    second = root.replace("a", b"2", first)
    assert second is not None
    assert root.replace("a", b"3", first) is None
    assert root.read_bytes("a") == b"2"


def test_copies_are_made_by_the_store_where_it_can_and_are_whole(s3: S3, root: Storage, tmp_path: Path) -> None:
    local, data = Storage(str(tmp_path / "local")), data_of(0, 6 * MIB)
    root.write_bytes("a.tar", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(object_store, "download")
        root.copy("a.tar", root / "sub", "b.tar")
    root.copy("a.tar", local)
    local.copy("a.tar", root / "up")
    assert local.read_bytes("a.tar") == (root / "up").read_bytes("a.tar") == (root / "sub").read_bytes("b.tar") == data
    with pytest.raises(UserError, match=r"none is missing"):
        root.copy("none", root, "other")


def test_listings_sizes_and_removal(s3: S3, root: Storage) -> None:
    assert root.names() == []
    for name, data in (("a", b"1"), ("sub/b", b"22")):
        root.write_bytes(name, data)
    assert (root.names(), root.sizes(), root.size("sub/b"), root.size("c")) == (["a", "sub"], {"a": 1}, 2, -1)
    with pytest.raises(UserError, match="c is missing"):
        root.read_bytes("c")
    with pytest.raises(UserError, match="c is missing"), root.open("c"):
        pass
    root.remove("sub")
    root.remove("sub")
    assert root.names() == ["a"]
    root.remove()
    assert not root.exists()


def test_the_first_commit_of_a_race_stands_and_commits_are_read_together(s3: S3, root: Storage) -> None:
    writer = ArtifactWriter("toy", "k", root)
    for i in range(40):
        root.write_bytes(f"{i:02}.tar", bytes(i))
    with ThreadPoolExecutor(8) as threads:
        raced = list(threads.map(lambda rows: writer.commit("07.tar", rows=rows, sha256="0" * 64), range(8)))
        list(threads.map(lambda i: writer.commit(f"{i:02}.tar", rows=1), range(40)))
    committed = writer.committed()
    assert {record.rows for record in raced} == {committed["07.tar"].rows}
    assert [record.bytes for record in committed] == list(range(40))


def fail(root: Storage) -> str:
    """Return the traceback of a write that is refused, as --debug prints it; the error is one line."""
    with pytest.raises(UserError) as caught:
        root.write_bytes("a", b"1")
    assert "\n" not in str(caught.value)
    return "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [("http://127.0.0.1:9", r"EndpointConnectionError at 127\.0\.0\.1:9"), ("http://user:hidden@127.0.0.1:9", r"\w+")],
    ids=["plain", "with_password"],
)
def test_no_endpoint_is_one_line_without_what_its_url_hides(
    endpoint: str, reason: str, root: Storage, use_s3: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystems, "REQUEST_ATTEMPTS", 2)
    monkeypatch.setattr(patience, "FIRST_CONTACT_S", 1.0)
    use_s3(endpoint)
    text = fail(root)
    assert re.search(
        rf"TransientError: {re.escape(root.url)}/a cannot be reached \({reason}\): check the network", text
    )
    assert "hidden" not in text
    assert SECRET not in text


def test_no_bucket_no_credentials_and_wrong_ones_are_one_line(
    s3: S3, root: Storage, monkeypatch: pytest.MonkeyPatch, use_s3: Callable[[str], None]
) -> None:
    assert "the bucket of s3://nowhere-at-all/x/a does not exist" in fail(Storage("s3://nowhere-at-all/x"))
    with s3.behind(Plan({"forbidden": 1.0})) as proxy:
        use_s3(proxy.url)
        assert f"no permission for {root.url}/a (AccessDenied)" in fail(root)
    use_s3("not a url")
    assert "AWS_ENDPOINT_URL is not a URL" in fail(root)
    use_s3(s3.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    text = fail(root)
    assert f"no credentials for {root.url}/a: set AWS_PROFILE" in text
    assert SECRET not in text


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(MisuseError, match=r"must not hold a password, .* in a profile \(AWS_PROFILE\)") as caught:
        Storage(f"s3://key:{SECRET}@bucket/x")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("size", [1000, 11 * MIB], ids=["one_request", "in_parts"])
def test_of_writers_of_one_file_the_first_one_stands(s3: S3, root: Storage, size: int) -> None:
    def write(fill: int) -> int | None:
        return root.write_once("000000.tar", lambda path: fill if path.write_bytes(bytes([fill]) * size) else None)

    assert write(1) == 1
    assert write(2) is None
    assert set(root.read_bytes("000000.tar")) == {1}
