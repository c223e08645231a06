"""Patience with a store that does not answer: a real server behind a port that refuses connections for a while."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines import patience
from pipelines.errors import MisuseError, TransientError, UserError
from pipelines.notices import told_to
from pipelines.store import filesystems
from pipelines.store.failures import explain_failure, is_transient
from pipelines.store.patient import PatientFileSystem
from pipelines.store.storage import Storage
from pipelines.store.threads import map_in_threads
from tests.pipelines.store.gate import Gate
from tests.pipelines.store.s3 import BUCKET, S3, environment

DOWN_S = 3.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "REQUEST_ATTEMPTS", 1)
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.5)
    monkeypatch.setattr(patience, "FIRST_CONTACT_S", 1.0)
    monkeypatch.setattr(patience, "TELL_AFTER_S", 1.0)
    monkeypatch.setattr(patience, "_outages", {})


@pytest.fixture
def gate(s3_server: S3, use_s3: Callable[[str], None]) -> Iterator[Gate]:
    with Gate(s3_server.host, s3_server.port) as gate:
        use_s3(gate.url)
        yield gate


@pytest.fixture
def root(request: pytest.FixtureRequest) -> Storage:
    return Storage(f"s3://{BUCKET}/{request.node.name}")


def test_reading_and_writing_outlast_an_outage_which_is_told_of_once(gate: Gate, root: Storage, tmp_path: Path) -> None:
    root.write_bytes("a", b"1" * 100)
    lines: list[str] = []
    with told_to(lines.append), ThreadPoolExecutor(4) as threads:
        with gate.shut():
            copied = threads.submit(root.download, "a", tmp_path / "a")
            written = threads.submit(root.write_bytes, "b", b"2")
            read = threads.submit(root.read_bytes, "a")
            listed = threads.submit(root.names)
            while not lines:
                time.sleep(0.05)
        assert read.result() == b"1" * 100
        assert "a" in listed.result()
        copied.result()
        written.result()
    assert (tmp_path / "a").read_bytes() == b"1" * 100
    assert root.read_bytes("b") == b"2"
    assert len(lines) == 2
    assert lines[0].startswith(f"s3://{BUCKET} has not answered for ")
    assert "EndpointConnectionError" in lines[0]
    assert lines[1].startswith(f"s3://{BUCKET} answers again, after ")


def test_bytes_asked_for_long_after_a_file_was_opened_outlast_an_outage_too(gate: Gate, root: Storage) -> None:
    data = bytes(range(256)) * (1 << 16)
    root.write_bytes("a", data)
    with root.open("a") as file:
        found = file.read(1)
        gate.shut_for(DOWN_S)
        assert found + file.read() == data


def test_a_store_that_never_answered_is_given_up_soon(
    root: Storage, use_s3: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_s3("http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(TransientError, match=r"cannot be reached .EndpointConnectionError at 127\.0\.0\.1:9"):
        root.exists("a")
    assert time.monotonic() - began < patience.DEFAULT_S / 2
    monkeypatch.setenv(patience.VARIABLE, "ten")
    with pytest.raises(MisuseError, match="LDM_STORE_PATIENCE_S must be a number of seconds, got 'ten'"):
        root.exists("a")


def test_patience_ends_after_the_time_that_the_environment_says(
    gate: Gate, root: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.write_bytes("a", b"1")
    monkeypatch.setenv(patience.VARIABLE, "2")
    began = time.monotonic()
    with gate.shut(), pytest.raises(TransientError):
        root.read_bytes("a")
    assert time.monotonic() - began >= 2


def test_whoever_has_a_deadline_gives_up_before_it(gate: Gate, root: Storage) -> None:
    root.write_bytes("a", b"1")
    with gate.shut(), patience.impatient(0.2), pytest.raises(TransientError):
        root.read_bytes("a")


def test_the_other_calls_of_a_failed_group_do_not_wait_for_the_store(gate: Gate, root: Storage) -> None:
    root.write_bytes("a", b"1")
    started = threading.Barrier(3)

    def call(number: int) -> bytes:
        started.wait()
        if number == 0:
            time.sleep(1)
            raise UserError("the first one fails")
        return root.read_bytes("a")

    # Without an end to their patience this test would last ten minutes.
    with gate.shut(), pytest.raises(UserError, match="the first one fails"):
        list(map_in_threads(call, range(3), threads=3))


def test_a_file_system_that_was_sent_to_another_process_has_that_one_expect_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patience, "_expecting_answers", False)
    system = PatientFileSystem("s3://never-asked/folder")
    assert patience.outage_of(system.url).patience_s() == patience.FIRST_CONTACT_S
    sent = pickle.loads(pickle.dumps(system))
    assert sent == system
    assert patience.outage_of(sent.url).patience_s() == patience.DEFAULT_S


@pytest.mark.timeout(120)
def test_ctrl_c_works_while_it_waits(gate: Gate, root: Storage) -> None:
    root.write_bytes("a", b"1")
    program = (
        "import sys; from pipelines.store.storage import Storage; from pipelines import patience; "
        "patience.expect_answers(); patience.TELL_AFTER_S = 0.5; print('up', flush=True)\n"
        # Whoever started the tests in the background may have had SIGINT ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try: Storage(sys.argv[1]).read_bytes('a')\n"
        "except KeyboardInterrupt: print('interrupted')"
    )
    with gate.shut():
        process = subprocess.Popen(
            [sys.executable, "-c", program, root.url],
            env={**os.environ, **environment(gate.url)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        # Without an observer the notice goes to stderr.
        assert "has not answered for" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate()
    assert out.splitlines() == ["up", "interrupted"]


def test_dns_failures_are_transient_also_those_that_fsspec_calls_missing_files(use_s3: Callable[[str], None]) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        filesystems.filesystem_of("http://host.invalid/a")[0].info("http://host.invalid/a")
    assert is_transient(caught.value)
    assert isinstance(explain_failure("http://host.invalid/a", caught.value), TransientError)
