"""Digests are remembered between commands, by processes that know nothing of each other, and never wrongly."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.store import known_digests
from pipelines.store.home import home
from pipelines.store.known_digests import KnownDigests, kept_with
from pipelines.store.storage import Storage
from tests.pipelines.store.s3 import BUCKET, S3

KEYS = [f"{number:064x}" for number in range(40)]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LDM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(known_digests, "_unwritten", {})
    return tmp_path / "home"


def remember(place: str, *keys: str) -> None:
    known = KnownDigests(place)
    for key in keys:
        known.add(key, key[::-1])
    known.save()


def test_what_one_command_learns_the_next_one_knows(own_home: Path) -> None:
    assert KnownDigests("/data/a").get(KEYS[1]) is None
    remember("/data/a", KEYS[1])
    assert KnownDigests("/data/a").get(KEYS[1]) == KEYS[1][::-1]
    assert KnownDigests("/data/b").get(KEYS[1]) is None
    assert home() == own_home


def test_without_a_home_of_its_own_it_is_where_programs_keep_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LDM_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert home() == Path("/home/somebody/.local/share/ldm")


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "nonsense"])
def test_a_damaged_file_counts_as_none_and_is_replaced(own_home: Path, damage: str) -> None:
    remember("/data", *KEYS[:3])
    (path,) = (own_home / "digests").iterdir()
    data = path.read_bytes()
    digit = b"1" if data[70:71] == b"0" else b"0"
    damaged = {"cut": data[:130], "flipped": data[:70] + digit + data[71:], "emptied": b"", "nonsense": b"\xff" * 99}
    path.write_bytes(damaged[damage])
    assert [KnownDigests("/data").get(key) for key in KEYS[:3]] == [None] * 3
    remember("/data", KEYS[0])
    assert KnownDigests("/data").get(KEYS[0]) == KEYS[0][::-1]


def test_where_nothing_can_be_written_it_lasts_as_long_as_the_process(own_home: Path) -> None:
    own_home.write_text("a file in the place of the folder")
    remember("/data", KEYS[0])
    assert KnownDigests("/data").get(KEYS[0]) == KEYS[0][::-1]


def test_it_does_not_grow_for_ever(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_digests, "_MOST_UNUSED", 5)
    monkeypatch.setattr(known_digests, "_MOST_PLACES", 3)
    for key in KEYS:
        remember("/data", key)
    known = KnownDigests("/data")
    assert sum(known.get(key) is not None for key in KEYS) == 6
    assert known.get(KEYS[-1])
    for number in range(10):
        remember(f"/data/{number}", KEYS[0])
    assert len(list((own_home / "digests").iterdir())) == 3
    assert KnownDigests("/data/9").get(KEYS[0])


def test_processes_that_write_at_the_same_time_leave_a_whole_file() -> None:
    program = (
        "import sys; from pipelines.store.known_digests import KnownDigests\n"
        "for round in range(30):\n"
        "    known = KnownDigests('/data')\n"
        "    known.add(f'{int(sys.argv[1]) * 100 + round:064x}', '0' * 64)\n"
        "    known.save()\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, str(number)]) for number in range(3)]
    known = 0
    while any(process.poll() is None for process in processes):
        seen = len(KnownDigests("/data")._before)
        # A reader sees a whole file at any moment: once something is known, something always is.
        assert seen or not known
        known = seen
    assert [process.returncode for process in processes] == [0] * 3
    found = KnownDigests("/data")
    # The newest entry of the one that wrote last is never lost.
    assert any(found.get(f"{number * 100 + 29:064x}") for number in range(3))


def test_a_remote_root_keeps_them_where_they_survive_the_pod(s3: S3, own_home: Path) -> None:
    root = Storage(f"s3://{BUCKET}/known/run")
    with kept_with(root):
        remember("s3://data", KEYS[0])
        assert KnownDigests("s3://data").get(KEYS[0]) == KEYS[0][::-1]
    assert KnownDigests("s3://data").get(KEYS[0]) is None
    assert [key.startswith("known/run/.digests/") for key in s3.objects("known/")] == [True]
    assert not own_home.exists()
    # Who lists the root for stages does not see them.
    assert root.names() == []
