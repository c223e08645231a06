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
import torch

from ldm_core import checkpoint, presets
from ldm_core.networks.autoencoder import build_first_stage
from pipelines.run.recipe import load_recipe
from pipelines.run.walk import run
from tests.tiny import tiny_recipe, write_pictures, write_recipe
from tests.torch_state import SEED

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


def killed_in(stages: Iterable[str], recipe: Path, root: Path) -> tuple[dict[str, Any], set[Path]]:
    """Kill a run in one stage after the other; return the result of the one that finishes, and where training began."""
    begun: set[Path] = set()
    for stage in stages:
        process = start(recipe, root, unfinished=stage, own_ray=stage in OWN_RAY)
        begun |= wait_for(process, root, IN_THE_MIDDLE[stage])
        kill(process)
        assert not any(root.glob(f"{stage}/*/manifest.json")), f"{stage} had finished before it was killed"
    return finish(start(recipe, root)), begun


def assert_the_same(root: Path, undisturbed: Path, begun: set[Path]) -> None:
    """Check that training never began anew, and that every file of every stage is as if nothing had been killed."""
    trained = [path.relative_to(root).parts[0] for path in begun]
    assert len(trained) == len(set(trained)), f"training began anew, not at its checkpoint: {sorted(begun)}"
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


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_killed_while_it_trains_the_same_command_finishes_with_the_same_bytes(
    ray_cluster: None, tmp_path: Path
) -> None:
    """Kill the tree of all processes with its Ray; kills in pairs and latents, and of workers alone, have their own."""
    values = tiny_recipe(write_pictures(tmp_path / "pictures", 16))
    torch.manual_seed(SEED)
    checkpoint.save(build_first_stage(presets.first_stage("tiny-kl-f8")), tmp_path / "first_stage")
    values["autoencoder"] = {"model": "tiny-kl-f8", "weights": str(tmp_path / "first_stage")}
    values["diffusion"]["training"] |= {"workers": 1, "steps": 8, "sample_every_steps": 8}
    recipe = write_recipe(tmp_path / "tiny.yaml", values)
    undisturbed, root = tmp_path / "undisturbed", tmp_path / "killed"
    expected = run(load_recipe(recipe, (f"root={undisturbed}", "tracking.enabled=false")))
    result, begun = killed_in(["diffusion"], recipe, root)
    assert [path.relative_to(root).parts[0] for path in begun] == ["diffusion"]
    assert [stage["state"] for stage in result["stages"]] == ["cached"] * 3 + ["resumed", "run", "run"]
    assert {stage["name"]: stage["key"] for stage in result["stages"]} == {row.name: row.key for row in expected.rows}
    assert_the_same(root, undisturbed, begun)


@pytest.mark.e2e
@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_killed_in_every_stage_the_same_command_finishes_with_the_same_bytes(ray_cluster: None, tmp_path: Path) -> None:
    values = tiny_recipe(write_pictures(tmp_path / "pictures", 64))
    # One worker in one of the stages that train, two in the other: each takes ten seconds to start.
    values["autoencoder"]["training"] = values["autoencoder"]["training"] | {"workers": 1}
    recipe = write_recipe(tmp_path / "tiny.yaml", values)
    undisturbed, root = tmp_path / "undisturbed", tmp_path / "killed"
    expected = finish(start(recipe, undisturbed))
    assert [stage["state"] for stage in expected["stages"]] == ["run"] * 6
    result, begun = killed_in(IN_THE_MIDDLE, recipe, root)
    assert [stage["state"] for stage in result["stages"]] == ["cached"] * 5 + ["resumed"]
    assert {stage["name"]: stage["key"] for stage in result["stages"]} == {
        stage["name"]: stage["key"] for stage in expected["stages"]
    }
    assert_the_same(root, undisturbed, begun)
    pipeline = next(each for each in mlflow_runs(root)[1] if not each.data.tags.get("ldm.stage"))
    assert "autoencoder/psnr_db" in pipeline.data.metrics


def mlflow_runs(root: Path) -> tuple[Any, list[Any]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    return client, client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def assert_one_run_a_stage(runs: list[Any]) -> None:
    stages = [each.data.tags.get("ldm.stage") for each in runs]
    counted = {name: stages.count(name) for name in stages if name}
    assert counted == dict.fromkeys(("pairs", "autoencoder", "latents", "diffusion", "evaluate", "export"), 1)
    assert stages.count(None) == 1
    pipeline = next(each for each in runs if not each.data.tags.get("ldm.stage"))
    assert {"pairs/samples", "diffusion/final_loss"} <= pipeline.data.metrics.keys()


def assert_no_step_is_there_twice(client: Any, runs: list[Any]) -> None:
    for each in runs:
        if each.data.tags.get("ldm.stage") in ("autoencoder", "diffusion"):
            steps = [point.step for point in client.get_metric_history(each.info.run_id, "loss/train")]
            assert len(steps) == len(set(steps)), f"steps that were done again after a kill were sent again: {steps}"
