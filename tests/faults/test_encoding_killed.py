"""The encoding of latents on a cluster of several real nodes, of which something is killed: the bytes are the same."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from tests.tiny_artifacts import contents, encoded_latents_artifact, first_stage_artifact, pairs_artifact

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900), pytest.mark.usefixtures("own_threads")]
REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 300.0
SHARDS = 12
# What Ray calls the process of a task, and that of an actor, while it is at it.
READING, ENCODING, WRITING = (
    r"ray::MapBatches\(ReadShard\)",
    r"ray::MapWorker.*\.submit",
    r"ray::MapBatches\(WriteShard\)",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes; the driver is on the first, which stays."""
    # Ray's own patience with a node that does not answer is half a minute.
    patience = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000}
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 2**20, "_system_config": patience}
    running = Cluster(initialize_head=True, head_node_args=head)
    for number in range(2):
        running.add_node(num_cpus=1, object_store_memory=100 * 2**20, labels={"role": f"worker-{number}"})
    yield running
    running.shutdown()


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, str]:
    """Make the upstream artifacts; return what an undisturbed run in this process writes."""
    pairs = pairs_artifact(tmp_path, rows=(30,) * SHARDS, side=96)
    first_stage = first_stage_artifact(tmp_path)
    return contents(encoded_latents_artifact(tmp_path, pairs, first_stage, name="undisturbed"))


def start(root: Path, cluster: Cluster) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.pipelines.stages.latents.killed_run", str(root), cluster.address, "0"]
    return subprocess.Popen(command, cwd=REPOSITORY, text=True, stderr=subprocess.PIPE)


def finish(run: subprocess.Popen[str], root: Path) -> dict[str, str]:
    """Wait for a run; return sha256 of every file that it has written, by name."""
    _, errors = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 0, errors
    return contents(Artifact("latents", "killed", Storage(str(root / "latents" / "killed"))))


def wait_for_commits(run: subprocess.Popen[str], root: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while len(list(root.glob("latents/killed/commits/*.tar.json"))) < count:
        assert run.poll() is None, "the run ended before anything could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_one(run: subprocess.Popen[str], title: str) -> None:
    """Kill -9 of one process of this title, as soon as there is one."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert run.poll() is None, f"the run ended before a {title} could be killed"
        assert time.monotonic() < deadline
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if re.match(title, " ".join(process.cmdline())):
                    process.kill()
                    return


@pytest.mark.parametrize("title", [READING, ENCODING, WRITING])
def test_after_a_worker_is_killed_the_run_finishes_with_the_same_bytes(
    cluster: Cluster, tmp_path: Path, expected: dict[str, str], title: str
) -> None:
    run = start(tmp_path, cluster)
    wait_for_commits(run, tmp_path, 1)
    kill_one(run, title)
    assert finish(run, tmp_path) == expected


def test_after_the_driver_is_killed_another_run_finishes_with_the_same_bytes(
    cluster: Cluster, tmp_path: Path, expected: dict[str, str]
) -> None:
    run = start(tmp_path, cluster)
    wait_for_commits(run, tmp_path, 2)
    run.kill()
    run.communicate()
    committed = {path: path.stat().st_mtime_ns for path in tmp_path.glob("latents/killed/*.tar")}
    assert 2 <= len(committed) < SHARDS
    assert finish(start(tmp_path, cluster), tmp_path) == expected
    first = min(committed)
    assert first.stat().st_mtime_ns == committed[first], "a committed shard was written again"


def test_each_step_keeps_to_its_nodes(cluster: Cluster) -> None:
    code = f"""
import json
import ray
from pipelines.compute.chain import ActorStep, PoolSize, TaskStep, map_through

class Where:
    def __init__(self, *, step):
        self.step = step

    def __call__(self, value):
        return {{**value, self.step: ray.get_runtime_context().get_node_id()}}

ray.init("{cluster.address}", logging_level="error", log_to_driver=False)
steps = [
    TaskStep(Where, {{"step": "read"}}, num_cpus=0, labels={{"role": "worker-0"}}),
    ActorStep(Where, {{"step": "encode"}}, PoolSize(workers=1, use_gpu=False, most=1), labels={{"role": "worker-1"}}),
]
roles = {{node["NodeID"]: node["Labels"].get("role") for node in ray.nodes()}}
found = list(map_through([{{}}] * 6, steps, in_flight=2))
print(json.dumps([sorted({{roles[each[step]] for each in found}}) for step in ("read", "encode")]))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, check=True, text=True)
    assert run.stdout.splitlines()[-1] == '[["worker-0"], ["worker-1"]]'


def test_after_a_node_is_lost_the_run_finishes_on_the_others_with_the_same_bytes(
    cluster: Cluster, tmp_path: Path, expected: dict[str, str]
) -> None:
    """Last in this file: the node does not come back."""
    run = start(tmp_path, cluster)
    wait_for_commits(run, tmp_path, 2)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    assert finish(run, tmp_path) == expected
