"""Everything is killed in every stage; the same command finishes, with the same result.

In the stages that train, all is one process tree, with a Ray of its own that dies too. In the others the driver and all
workers are killed, and the Ray they ran on stays, with whatever it remembers of them: so it is on a cluster. (Starting
Ray takes longer than these stages.)
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from tests.tiny import tiny_recipe, write_pictures, write_recipe

REPOSITORY = Path(__file__).parents[2]
# What is on disk when a stage is in the middle of its work: one that trains has saved the first of its checkpoints.
# Where the stage removes that when all is done, also what is there then: a machine may stop this test for so long.
IN_THE_MIDDLE = {
    "pairs": ("pairs/*/work/*/*.parquet", "pairs/*/*.parquet"),
    "autoencoder": ("autoencoder/*/train/*/step_*/state.pt", "autoencoder/*/first_stage/*.safetensors"),
    "latents": ("latents/*/commits/*.tar.json",),
    "diffusion": ("diffusion/*/train/*/step_*/state.pt", "diffusion/*/model/*.safetensors"),
    "evaluate": ("evaluate/*/samples",),
    "export": ("export/*/tracking.json",),
}
# `ldm`, with a stage (the first argument, or none) that is never finished: the kill comes before that, however late.
LDM = """
import sys, time
from jobs import cli
from pipelines.store.commits import ArtifactWriter

unfinished, finish = sys.argv.pop(1), ArtifactWriter.finish

def finish_or_wait_to_be_killed(writer, **what):
    if writer.stage == unfinished:
        time.sleep(3600)
    return finish(writer, **what)

ArtifactWriter.finish = finish_or_wait_to_be_killed
cli.main()
"""
OWN_RAY = ("autoencoder", "diffusion")
# What an attempt at training saves first, if it begins at step 0 (tests/tiny.py says when).
FIRST_CHECKPOINT = "*/*/train/*/step_00000004"
PATIENCE_S = 400


def start(recipe: Path, root: Path, *, unfinished: str = "", own_ray: bool = False) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if not own_ray:
        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", LDM, unfinished, "run", str(recipe), "--root", str(root), "--json"]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """Kill the driver, its children, and all workers of this session's Ray."""
    # Listing processes takes a while, in which a stage could finish.
    process.send_signal(signal.SIGSTOP)
    workers = [child for child in psutil.Process().children(recursive=True) if _is_worker(child)]
    doomed = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid), *workers]
    for member in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(doomed, timeout=30)
    process.communicate()


def _is_worker(process: psutil.Process) -> bool:
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return False
    # Ray's own agents have such titles too; a node ends when one of them does.
    return title.startswith("ray::") and "Agent" not in title


def wait_for(process: subprocess.Popen[str], root: Path, patterns: Iterable[str]) -> set[Path]:
    """Wait for a file of any pattern; return the first checkpoints that were there in the meantime."""
    deadline = time.monotonic() + PATIENCE_S
    begun = set(root.glob(FIRST_CHECKPOINT))
    while not any(file for pattern in patterns for file in root.glob(pattern)):
        begun |= set(root.glob(FIRST_CHECKPOINT))
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"nothing like {patterns} appeared"
        time.sleep(0.02)
    return begun


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def contents(root: Path, pattern: str) -> dict[str, str]:
    found = {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.glob(pattern))}
    assert found, f"nothing like {pattern} under {root}"
    return found


@pytest.mark.e2e
@pytest.mark.timeout(1800)
def test_killed_in_every_stage_the_same_command_finishes_with_the_same_bytes(ray_cluster: None, tmp_path: Path) -> None:
    values = tiny_recipe(write_pictures(tmp_path / "pictures", 64))
    # One worker in one of the stages that train, two in the other: each takes ten seconds to start.
    values["autoencoder"]["training"] = values["autoencoder"]["training"] | {"workers": 1}
    recipe = write_recipe(tmp_path / "tiny.yaml", values)
    undisturbed = tmp_path / "undisturbed"
    expected = finish(start(recipe, undisturbed))
    assert [stage["state"] for stage in expected["stages"]] == ["run"] * 6

    root = tmp_path / "killed"
    begun: set[Path] = set()
    for stage, patterns in IN_THE_MIDDLE.items():
        process = start(recipe, root, unfinished=stage, own_ray=stage in OWN_RAY)
        begun |= wait_for(process, root, patterns)
        kill(process)
        assert not any(root.glob(f"{stage}/*/manifest.json")), f"{stage} had finished before it was killed"
    result = finish(start(recipe, root))

    trained = [path.relative_to(root).parts[0] for path in begun]
    assert len(trained) == len(set(trained)), f"training began anew, not at its checkpoint: {sorted(begun)}"
    assert [stage["state"] for stage in result["stages"]] == ["cached"] * 5 + ["resumed"]
    assert {stage["name"]: stage["key"] for stage in result["stages"]} == {
        stage["name"]: stage["key"] for stage in expected["stages"]
    }
    for pattern in ("pairs/*/*.tar", "pairs/*/*.parquet", "latents/*/*.tar", "latents/*/vocab.txt"):
        assert contents(root, pattern) == contents(undisturbed, pattern)
    # The same weights: no sample was seen twice, none was left out.
    weights = ("autoencoder/*/first_stage/*", "diffusion/*/model/*", "export/*/model.safetensors")
    for pattern in (*weights, "diffusion/*/history.json"):
        assert contents(root, pattern) == contents(undisturbed, pattern)
    assert contents(root, "evaluate/*/grid.png") == contents(undisturbed, "evaluate/*/grid.png")

    client, runs = mlflow_runs(root)
    assert_one_run_a_stage(runs)
    assert_no_step_is_there_twice(client, runs)


def mlflow_runs(root: Path) -> tuple[Any, list[Any]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    return client, client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def assert_one_run_a_stage(runs: list[Any]) -> None:
    stages = [run.data.tags.get("ldm.stage") for run in runs]
    counted = {name: stages.count(name) for name in stages if name}
    assert counted == dict.fromkeys(("pairs", "autoencoder", "latents", "diffusion", "evaluate", "export"), 1)
    assert stages.count(None) == 1
    pipeline = next(run for run in runs if not run.data.tags.get("ldm.stage"))
    assert {"pairs/samples", "autoencoder/psnr_db", "diffusion/final_loss"} <= pipeline.data.metrics.keys()


def assert_no_step_is_there_twice(client: Any, runs: list[Any]) -> None:
    for run in runs:
        if run.data.tags.get("ldm.stage") in ("autoencoder", "diffusion"):
            steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss/train")]
            assert len(steps) == len(set(steps)), f"steps that were done again after a kill were sent again: {steps}"
