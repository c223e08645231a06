"""One driver a root, with real processes that are killed and suspended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import patience
from pipelines.errors import UserError
from pipelines.store import filesystems, lock
from pipelines.store.lock import LEASE, HeldError, Hold, Record, discard, exclusive, find_holder
from pipelines.store.storage import Storage
from tests.pipelines.store.s3 import BUCKET, S3, Plan, environment

# A holder that lives must not pass for a dead one on a machine that stops for seconds.
BEAT_S = 1.5
# Of a holder that is dead or suspended anyway.
QUICK_BEAT_S = 0.3
# Holds the root, checks it whenever it is asked to, and tells what it is given to tell.
HOLDER = """
import json, sys
from pipelines.errors import UserError
from pipelines.store.lock import exclusive
from pipelines.store.storage import Storage
with exclusive(Storage(sys.argv[1]), beat_s=float(sys.argv[2])) as hold:
    print("held", flush=True)
    for line in sys.stdin:
        if line != "?\\n":
            hold.tell(**json.loads(line))
            continue
        try:
            hold.check()
            print("ours", flush=True)
        except UserError as error:
            print(error, flush=True)
"""
# Waits for the root.
WAITER = """
import sys
from pipelines.store.lock import exclusive
from pipelines.store.storage import Storage
with exclusive(Storage(sys.argv[1]), wait=lambda record: print("waits", flush=True)):
    print("held", flush=True)
    sys.stdin.read()
"""
# Waits for one long result, as a run that a script has put into the background.
BUSY_HOLDER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
from pipelines.errors import UserError
from pipelines.store.lock import exclusive
from pipelines.store.storage import Storage
with exclusive(Storage(sys.argv[1]), beat_s=float(sys.argv[2]), interrupt=True) as hold:
    try:
        print("held", flush=True)
        time.sleep(600)
    except KeyboardInterrupt:
        try:
            hold.check()
        except UserError as error:
            print(error, flush=True)
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def holder(s3_server: S3) -> Iterator[Start]:
    """Starts a process that holds a root; ended after the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(root: Storage, script: str = HOLDER, *, beat_s: float = BEAT_S) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script, root.url, str(beat_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment(s3_server.url)},
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def root(s3: S3, request: pytest.FixtureRequest) -> Storage:
    return Storage(f"s3://{BUCKET}/{request.node.name}")


@pytest.fixture(params=["local", "s3"])
def place(root: Storage, tmp_path: Path, request: pytest.FixtureRequest) -> Storage:
    """A folder of each kind, so that both locks are tried."""
    return Storage(str(tmp_path / "root")) if request.param == "local" else root


def send(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def check_again_and_again(hold: Hold, *, before: Callable[[], None] = lambda: None) -> None:
    """Check a hold until that raises, for two minutes at most; call `before` each time."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        before()
        hold.check()
        time.sleep(0.05)


def ask(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    send(process, "?")
    return process.stdout.readline().strip()


def test_a_local_root_in_use_names_its_holder_and_is_free_once_that_is_killed(holder: Start, tmp_path: Path) -> None:
    root = Storage(str(tmp_path / "root"))
    first = holder(root)
    with (
        pytest.raises(UserError, match=rf"is in use by pid {first.pid} on .*, since 20.*: wait for it"),
        exclusive(root),
    ):
        pass
    first.kill()
    first.wait()
    with exclusive(root) as hold:
        hold.check()


def test_a_root_on_s3_in_use_names_its_holder_and_is_free_once_that_ends(holder: Start, root: Storage) -> None:
    first = holder(root)
    with pytest.raises(UserError, match=rf"is in use by pid {first.pid} on .*, since 20.*: wait for it"):
        exclusive(root, BEAT_S).__enter__()
    assert ask(first) == "ours"
    first.communicate()
    # There is no lease whose counter would have to be watched.
    assert not root.exists(LEASE)
    with exclusive(root, BEAT_S) as hold:
        hold.check()
    assert not root.exists(LEASE)


def test_the_root_of_a_killed_driver_is_taken_over_by_exactly_one(
    holder: Start, root: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = holder(root, beat_s=QUICK_BEAT_S)
    first.kill()
    first.wait()
    refused, all_have_watched = threading.Semaphore(0), threading.Barrier(4)
    watch, watchers = lock._Lease._watch, set[str]()

    def watch_together(lease: lock._Lease) -> str | None:
        version = watch(lease)
        if lease.token not in watchers:
            watchers.add(lease.token)
            all_have_watched.wait(120)
        return version

    monkeypatch.setattr(lock._Lease, "_watch", watch_together)

    def take(_: int) -> str:
        try:
            with exclusive(root, BEAT_S) as hold:
                for _ in range(3):
                    assert refused.acquire(timeout=120), "another one is neither refused nor done"
                hold.check()
        except UserError as error:
            refused.release()
            return str(error)
        return "ours"

    with ThreadPoolExecutor(4) as threads:
        outcomes = sorted(threads.map(take, range(4)))
    assert outcomes[0] == "ours"
    assert all(f"is in use by pid {os.getpid()}" in each for each in outcomes[1:])
    assert not root.exists(LEASE)


def test_a_driver_that_was_suspended_finds_that_it_lost_its_root_and_leaves_it(holder: Start, root: Storage) -> None:
    first = holder(root, beat_s=QUICK_BEAT_S)
    first.send_signal(signal.SIGSTOP)
    with exclusive(root, QUICK_BEAT_S) as hold:
        first.send_signal(signal.SIGCONT)
        assert f"was taken over by pid {os.getpid()}" in ask(first)
        first.communicate()
        time.sleep(2 * QUICK_BEAT_S)
        hold.check()
        assert root.exists(LEASE)


def test_whoever_waits_is_told_how_far_the_holder_is_and_goes_on_once_that_is_dead(
    holder: Start, place: Storage
) -> None:
    first = holder(place)
    seen: list[Record] = []

    def wait(record: Record) -> None:
        seen.append(record)
        if record["progress"]:
            first.kill()
            first.wait()
        else:
            send(first, '{"done": 3, "total": 8}')

    with exclusive(place, BEAT_S, wait=wait) as hold:
        hold.check()
    assert all(record["holder"].startswith(f"pid {first.pid} on ") for record in seen)
    assert seen[0]["progress"] == {}
    assert seen[-1]["progress"] == {"done": 3, "total": 8}


def test_what_wait_raises_ends_the_waiting_and_leaves_the_holder_alone(holder: Start, place: Storage) -> None:
    first = holder(place)

    def wait(record: Record) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exclusive(place, BEAT_S, wait=wait).__enter__()
    assert ask(first) == "ours"


def test_a_shorter_report_of_progress_takes_the_place_of_a_longer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "POLL_S", 0.0)
    root = Storage(str(tmp_path))

    def wait(record: Record) -> None:
        raise InterruptedError(record["progress"])

    with exclusive(root) as hold:
        for progress in ({"done": 1, "facts": {"loss": "0.031"}}, {"done": 2}):
            hold.tell(**progress)
            with pytest.raises(InterruptedError) as seen:
                exclusive(root, wait=wait).__enter__()
            assert seen.value.args == (progress,)


def test_a_driver_that_waits_for_one_long_result_is_interrupted_when_its_lease_is_lost(
    holder: Start, root: Storage
) -> None:
    first = holder(root, BUSY_HOLDER, beat_s=QUICK_BEAT_S)
    first.send_signal(signal.SIGSTOP)
    with exclusive(root, QUICK_BEAT_S):
        first.send_signal(signal.SIGCONT)
        out, _ = first.communicate(timeout=240)
    assert f"was taken over by pid {os.getpid()}" in out
    assert first.returncode == 0


def test_a_lease_that_is_released_in_time_interrupts_nobody(root: Storage) -> None:
    before = signal.getsignal(lock.INTERRUPT)
    with exclusive(root, 0.05, interrupt=True):
        time.sleep(0.3)
    assert signal.getsignal(lock.INTERRUPT) == before


def test_a_file_system_that_cannot_lock_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError) as refused:
        exclusive(Storage(str(tmp_path)), wait=lambda record: None).__enter__()
    assert str(refused.value) == (
        f"the file system of {tmp_path} cannot lock files (ENOLCK): mount it with locks (Lustre: -o flock, NFS: with "
        "lockd running), or choose another --root"
    )


def test_a_holder_outlives_a_store_that_fails_for_a_while(
    s3_server: S3, root: Storage, use_s3: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(filesystems, "REQUEST_ATTEMPTS", 2)
    with s3_server.behind(Plan({"lose_answer": 0.3}, seed=2)) as proxy:
        use_s3(proxy.url)
        with exclusive(root, 0.3) as hold:

            def beat() -> int:
                return int(json.loads(s3_server.read(f"{root.name}/{LEASE}"))["beat"])

            for shares in ({"lose_answer": 0.3}, {"error": 1.0}):
                proxy.plan.shares = shares
                time.sleep(1.0)
                hold.check()
            proxy.plan.shares, before = {}, beat()
            while beat() == before:
                hold.check()
                time.sleep(0.05)
            monkeypatch.setattr(lock, "PATIENCE_BEATS", 1)
            monkeypatch.setenv("LDM_STORE_PATIENCE_S", "0.3")
            proxy.plan.shares = {"error": 1.0}
            with pytest.raises(UserError, match=r"\.lock\.json could not be renewed for \d+ s: check the network"):
                # Once the last renewal is long enough ago: one may have been under way.
                check_again_and_again(hold)
            proxy.plan.shares = {}
    assert not s3_server.objects(root.name)


def test_stores_without_conditions_are_held_too() -> None:
    root = Storage("memory://lock")
    root.write_json(LEASE, {"holder": "pid 1 on dead", "token": "dead", "beat": 7, "beat_s": 0.05})
    with exclusive(root, BEAT_S) as hold:
        with pytest.raises(UserError, match=f"is in use by pid {os.getpid()}"):
            exclusive(root, BEAT_S).__enter__()
        hold.check()
        lease = {"holder": "pid 2 on other", "token": "other", "beat": 0, "beat_s": BEAT_S}
        with pytest.raises(UserError, match="was taken over by pid 2 on other"):
            # Written again and again: a renewal that is under way may write over it.
            check_again_and_again(hold, before=lambda: root.write_json(LEASE, lease))
    assert root.exists(LEASE)
    root.remove()


def test_whoever_waits_for_a_lock_that_is_discarded_holds_the_next_one(tmp_path: Path) -> None:
    root = Storage(str(tmp_path / "root"))
    with exclusive(root):
        waits = subprocess.Popen(
            [sys.executable, "-c", WAITER, root.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert waits.stdout is not None
        assert waits.stdout.readline() == "waits\n"
        discard(root)
    while (line := waits.stdout.readline()) != "held\n":
        assert line == "waits\n"
    with pytest.raises(HeldError, match=f"is in use by pid {waits.pid}"), exclusive(root):
        pass
    waits.communicate()
    assert find_holder(root) is None


def test_whoever_looks_for_a_holder_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Storage(str(tmp_path))
    with exclusive(root), pytest.raises(HeldError), exclusive(root):
        pass
    with open(tmp_path / lock.LOCK) as file:
        fcntl.flock(file, fcntl.LOCK_SH)

        def look_no_longer(seconds: float) -> None:
            assert seconds == lock.GLANCE_S
            fcntl.flock(file, fcntl.LOCK_UN)

        clock = SimpleNamespace(sleep=look_no_longer, monotonic=time.monotonic, strftime=time.strftime)
        monkeypatch.setattr(lock, "time", clock)
        with exclusive(root) as hold:
            hold.check()
