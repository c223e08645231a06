"""Files of others: read with the retries and the explanations that our own storage has."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from pipelines import patience
from pipelines.errors import UserError
from pipelines.store import filesystems
from pipelines.store.failures import readable
from pipelines.store.location import Location
from tests.pipelines.store.s3 import BUCKET, S3, SECRET, Plan

DATA = random.Random(0).randbytes(300_000)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(patience, "FIRST_CONTACT_S", 2.0)


@pytest.fixture(params=["local", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "local":
        (tmp_path / "a").write_bytes(DATA)
        return Location.of(str(tmp_path / "a"))
    server: S3 = request.getfixturevalue("s3")
    server.client.put_object(Bucket=BUCKET, Key="location/a", Body=DATA)
    return Location.of(f"s3://{BUCKET}/location/a")


def test_any_part_of_a_file_can_be_read(location: Location) -> None:
    assert location.read() == DATA
    assert location.size() == len(DATA)
    assert location.read_range(7, 1007) == DATA[7:1007]
    assert location.read_range(len(DATA) - 5, len(DATA) + 5) == DATA[-5:]
    assert location.read_ranges([(0, 3), (100, 100_000), (5, 6)]) == [DATA[0:3], DATA[100:100_000], DATA[5:6]]
    assert location.read_ranges([]) == []
    with location.open() as file:
        assert file.read() == DATA
    with location.open_by_ranges() as raw:
        assert raw.seek(-10, io.SEEK_END) == len(DATA) - 10
        assert raw.read(100) == DATA[-10:]
        assert raw.read(1) == b""


def test_what_is_not_there_is_a_missing_file(location: Location) -> None:
    none = Location(location.filesystem, f"{location.path}-none")
    assert (none.exists(), none.facts(), location.exists()) == (False, None, True)
    for read in (none.read, none.size, lambda: none.read_range(0, 5), none.open_by_ranges):
        with pytest.raises(FileNotFoundError):
            getattr(read(), "read", str)()
    with pytest.raises(UserError, match=r"a-none is missing"), readable(none.url):
        none.read()


def test_reads_through_a_nasty_network_are_repeated_until_they_are_whole(
    s3_server: S3, use_s3: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # s3fs's own retries would hide ours.
    monkeypatch.setattr(filesystems, "REQUEST_ATTEMPTS", 1)
    s3_server.client.put_object(Bucket=BUCKET, Key="nasty/a", Body=DATA)
    trouble = {"error": 0.1, "slow_down": 0.1, "cut_answer": 0.1, "lose_answer": 0.1}
    with s3_server.behind(Plan(trouble, seed=2)) as proxy:
        use_s3(proxy.url)
        location = Location.of(f"s3://{BUCKET}/nasty/a")
        for start in range(0, 10_000, 1000):
            assert location.read_range(start, start + 1000) == DATA[start : start + 1000]
        for _ in range(5):
            assert location.read_ranges([(0, 10), (20, 30)]) == [DATA[:10], DATA[20:30]]
        with location.open() as file:
            assert file.read() == DATA
        assert location.size() == len(DATA)
        assert list(Location.of(f"s3://{BUCKET}/nasty").files_below()) == [location.path]
        assert sum(count for kind, count in proxy.done.items() if kind != "pass") > 3


def test_a_store_that_refuses_or_never_answers_is_one_line(s3_server: S3, use_s3: Callable[[str], None]) -> None:
    location = f"s3://{BUCKET}/refused/a"
    with s3_server.behind(Plan({"forbidden": 1.0})) as proxy:
        use_s3(proxy.url)
        with pytest.raises(UserError) as caught:
            Location.of(location).read_range(0, 5)
        assert str(caught.value) == f"no permission for {location} (AccessDenied): it takes the right to list and read"
        with pytest.raises(UserError, match=r"no permission for s3://bucket/refused/a \(403\): .* list and read"):
            Location.of(location).facts()
        assert Location.of(location).facts(forbidden_is_missing=True) is None
    use_s3("http://127.0.0.1:9")
    with pytest.raises(UserError, match=rf"{location} cannot be reached \(EndpointConnectionError at 127") as caught:
        Location.of(location).size()
    assert SECRET not in str(caught.value)


@pytest.fixture
def web() -> Iterator[tuple[str, list[int]]]:
    """A plain web server that answers with the statuses in the list, one after the other, then with the file."""
    statuses: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = statuses.pop(0) if statuses else 200
            self.send_response(status)
            self.send_header("Content-Length", "3" if status == 200 else "0")
            self.end_headers()
            if status == 200:
                self.wfile.write(b"abc")

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/a.jsonl", statuses
    server.shutdown()
    server.server_close()


def test_a_web_server_is_asked_again_only_if_that_can_help(web: tuple[str, list[int]]) -> None:
    url, statuses = web
    statuses += [503, 500, 429]
    assert Location.of(url).read() == b"abc"
    statuses += [403]
    with pytest.raises(UserError, match=rf"no permission for {url} \(403\): it takes the right to list and read"):
        Location.of(url).read()
    statuses += [410]
    with pytest.raises(UserError, match=rf"the store of {url} refuses the request \(410\): check the URL"):
        Location.of(url).read()
    assert statuses == []
    statuses += [404]
    with pytest.raises(FileNotFoundError):
        Location.of(url).read()


def test_a_local_name_may_hold_what_fsspec_takes_for_a_chain(tmp_path: Path) -> None:
    (tmp_path / "zip::a").write_bytes(b"1")
    assert Location.of(str(tmp_path / "zip::a")).read() == b"1"


def test_a_remote_file_is_read_to_its_end_in_large_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 4096
    with fsspec.open("memory://large/a.bin", "wb") as file:
        file.write(data)
    asked: list[int] = []
    original = Location.read_range
    monkeypatch.setattr(
        Location, "read_range", lambda self, start, stop: asked.append(stop - start) or original(self, start, stop)
    )
    with Location.of("memory://large/a.bin").open() as opened:
        assert opened.read() == data
    assert len(asked) <= 2
