"""Kills of workers and of drivers, in one run of the pairs stage over a real web."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipelines.store.storage import Storage
from tests.pipelines.stages.pairs.conftest import RunPairs
from tests.pipelines.stages.pairs.web_server import Web, picture

REPOSITORY = Path(__file__).resolve().parents[4]
SCRIPT = REPOSITORY / "tests/pipelines/stages/pairs/killed_run.py"
PATIENCE_S = 240
ROWS_PER_KILL = 40


def start(folder: Path, options: dict[str, Any]) -> subprocess.Popen[bytes]:
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, str(SCRIPT), address, str(folder), json.dumps({"image_size": 32, **options})]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, start_new_session=True, env=environment, stderr=subprocess.DEVNULL)


def workers() -> list[psutil.Process]:
    """Return the processes of this session's Ray that make shards."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and "MapWorker" in title:
                found.append(process)
    return found


def done(folder: Path) -> int:
    return len([*folder.glob("work/*.json"), *folder.glob("commits/*.json")])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.faults)])
def test_kills_at_random_moments_and_one_while_shards_are_published_change_nothing(
    server: Web, run_pairs: RunPairs, tmp_path: Path, kills: int
) -> None:
    rows = ROWS_PER_KILL * kills
    server.files |= {f"{i}.jpg": picture(i // 2 if i % 10 == 1 else i, (120, 90)) for i in range(rows)}
    server.refused = {f"{i}.jpg": 404 for i in range(5, rows, 17)}
    server.delay_s = 0.05
    names = [f"{i}.jpg" for i in range(rows)]
    names[3], names[77] = "flaky", "503"
    pq.write_table(pa.table({"url": [server.url(name) for name in names], "text": names}), tmp_path / "t.parquet")
    download = {"connect_to": server.connect_to, "connections_per_host": 4, "retries": 1}
    options = {"source": str(tmp_path / "t.parquet"), "rows_per_shard": 10, "near_duplicates": 2, "download": download}
    options["workers"] = 2
    _, whole = run_pairs("whole", **options)

    folder = tmp_path / "killed"
    chance = random.Random(4)
    driver = start(folder, options)
    killed: Counter[str] = Counter()
    while killed.total() < kills - 1:
        before, deadline = done(folder), time.monotonic() + PATIENCE_S
        while done(folder) < before + chance.randrange(1, 4) and driver.poll() is None:
            assert time.monotonic() < deadline, f"no progress after {dict(killed)}"
            time.sleep(0.01)
        # To look for victims takes a while, in which many more shards would be made.
        server.paused = True
        assert driver.poll() is None, f"it ended after {dict(killed)}, with exit code {driver.returncode}"
        victims = workers()
        # One of each first.
        while not killed and not victims:
            assert time.monotonic() < deadline, "no worker is to be found"
            victims = workers()
        if victims and (not killed or (killed["driver"] and chance.random() < 0.7)):
            os.kill(chance.choice(victims).pid, signal.SIGKILL)
            killed["worker"] += 1
        else:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            killed["driver"] += 1
            driver = start(folder, options)
        server.paused = False
    deadline = time.monotonic() + PATIENCE_S
    while not any(folder.glob("commits/*.json")) and driver.poll() is None:
        assert time.monotonic() < deadline, "nothing was published"
        time.sleep(0.001)
    # It may have finished, if that is faster than we look.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(driver.pid, signal.SIGKILL)
        killed["driver"] += 1
    assert driver.wait() in (0, -signal.SIGKILL)
    assert start(folder, options).wait(PATIENCE_S) == 0
    assert set(killed) == {"worker", "driver"}

    storage = Storage(str(folder))
    assert {name: storage.read_bytes(name) for name in storage.names("0*")} == {
        name: whole.read_bytes(name) for name in whole.names("0*")
    }
    tables = [pq.read_table(io.BytesIO(storage.read_bytes(name))) for name in storage.names("*.parquet")]
    assert sorted(row for table in tables for row in table.column("row").to_pylist()) == list(range(rows))
    assert storage.names(".*") == []
