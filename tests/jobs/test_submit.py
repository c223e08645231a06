"""`ldm submit`, `jobs`, `logs` and `stop` against a real Ray cluster that wants a token."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobs.commands.submit import with_absolute_paths
from pipelines.errors import MisuseError
from pipelines.run.recipe import parse_recipe
from pipelines.stages.pairs.config import Scoring
from tests.tiny import tiny_recipe, write_pictures, write_recipe

REPOSITORY = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4
PATIENCE_S = 180


def environment(token: str) -> dict[str, str]:
    # A cluster of its own, whatever Ray the test session is connected to.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Jobs are started with the `python` of the cluster's PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return inherited | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0", "PATH": path}


def keep_port(kept: contextlib.ExitStack) -> int:
    """Keep a port from all others while nobody listens on it; a server that sets SO_REUSEADDR may still take it."""
    holder = kept.enter_context(socket.socket())
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return int(holder.getsockname()[1])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    # Not pytest's folder: Ray's sockets do not take long paths.
    with (
        contextlib.ExitStack() as kept,
        tempfile.TemporaryDirectory(prefix="ldm-ray-", ignore_cleanup_errors=True) as folder,
    ):
        dashboard = keep_port(kept)
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus", "3"]
        command += ["--port", str(keep_port(kept)), "--dashboard-port", str(dashboard), "--temp-dir", folder]
        command += ["--dashboard-agent-listen-port", str(keep_port(kept))]
        process = subprocess.Popen(
            command, env=environment(TOKEN), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            _wait_for(f"http://127.0.0.1:{dashboard}/api/version", process)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    while True:
        assert process.poll() is None, "the cluster did not start"
        assert time.monotonic() < deadline, "the cluster did not answer"
        try:
            urllib.request.urlopen(request, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)


def ldm(*arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    return subprocess.run(
        command, env=environment(token), cwd=REPOSITORY, text=True, capture_output=True, timeout=PATIENCE_S, check=False
    )


def test_every_local_file_that_a_recipe_names_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe(
        tiny_recipe("pictures/metadata.jsonl", root="s3://bucket/run")
        | {"condition": {"tokenizer": {"vocabulary": "vocab.txt"}}, "evaluate": {"prompts_file": "prompts.txt"}}
    )
    mix = [{"latents": "s3://bucket/latents/key", "weight": 0.1}, {"latents": "other/latents/key", "weight": 0.1}]
    diffusion = recipe.diffusion.model_validate({**dict(recipe.diffusion), "mix": mix})
    scoring = Scoring(clip="models/clip", aesthetic_head="~/head.pth")
    pairs = recipe.pairs.model_copy(update={"scoring": scoring})
    recipe = recipe.model_copy(update={"diffusion": diffusion})
    moved = with_absolute_paths(recipe.model_copy(update={"pairs": pairs}), "http://head:8265")
    assert moved.pairs.source == str(tmp_path / "pictures/metadata.jsonl")
    assert moved.pairs.scoring == Scoring(
        clip=str(tmp_path / "models/clip"), aesthetic_head=str(Path("~/head.pth").expanduser())
    )
    assert moved.condition.tokenizer.vocabulary == str(tmp_path / "vocab.txt")
    assert [each.latents for each in moved.diffusion.mix] == [mix[0]["latents"], str(tmp_path / "other/latents/key")]
    assert moved.evaluate.prompts_file == str(tmp_path / "prompts.txt")
    in_a_bucket = recipe.model_copy(update={"pairs": pairs.model_copy(update={"source": "s3://bucket/pairs.parquet"})})
    assert with_absolute_paths(in_a_bucket, "http://head:8265").pairs.source == "s3://bucket/pairs.parquet"


def test_a_relative_root_is_refused_for_a_cluster() -> None:
    with pytest.raises(MisuseError, match="root runs/here is relative: the cluster at http://head:8265 needs"):
        with_absolute_paths(parse_recipe(tiny_recipe("pictures", root="runs/here")), "http://head:8265")


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_submitted_recipe_runs_on_the_cluster_and_can_be_followed(address: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_recipe(write_pictures(tmp_path / "pictures", 20)))
    root = tmp_path / "root"
    options = ("--only", "pairs", "--set", "tracking.enabled=false", "--address", address)

    done = ldm("submit", str(recipe), "--root", str(root), *options, "--follow", "--json")
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout.splitlines()[-1])
    assert job["status"] == "SUCCEEDED"
    assert next(root.glob("pairs/*/manifest.json")).is_file()

    listed = json.loads(ldm("jobs", "--address", address, "--json").stdout.splitlines()[-1])["jobs"]
    assert [(row["job_id"], row["status"], row["recipe"]) for row in listed] == [(job["job_id"], "SUCCEEDED", "tiny")]
    assert "pairs: run" in ldm("logs", job["job_id"], "--address", address).stdout
    stopped = ldm("stop", job["job_id"], "--address", address)
    assert "had already ended" in stopped.stdout

    failed = ldm("submit", str(recipe), "--root", "/proc/nowhere", *options, "--follow")
    assert failed.returncode == 1
    assert "cannot write to root /proc/nowhere" in failed.stdout

    unknown = ldm("logs", "raysubmit_nothing", "--address", address)
    assert unknown.returncode == 1
    assert "no job raysubmit_nothing" in unknown.stderr

    refused = ldm("jobs", "--address", address, token="f" * 64)
    assert refused.returncode == 1
    assert "no Ray cluster takes jobs" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert TOKEN not in done.stdout + done.stderr
