"""Several runs on one root: who waits, who is refused, and who takes over from a run that is killed or suspended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipelines.run.plan import Selection
from pipelines.run.recipe import Recipe
from pipelines.run.walk import run
from pipelines.store.lock import LEASE, LOCK, exclusive
from pipelines.store.storage import Storage
from tests.pipelines.stages.pairs.web_server import Web, picture
from tests.pipelines.store.s3 import BUCKET, S3, environment
from tests.tiny import tiny_recipe, write_pictures, write_recipe

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 300.0
ROWS = 60
BEAT_S = 1.0
LDM = ("-m", "jobs.cli")
# `ldm`, with a stage that waits for one long result and looks at nothing else meanwhile.
BUSY_LDM = (
    "-c",
    f"""
import functools, time
import ray
from jobs import cli
from pipelines.run import walk
from pipelines.stages.pairs.stage import STAGE
from pipelines.store.lock import exclusive

@ray.remote(num_cpus=0)
def work():
    time.sleep(3600)

def wait_for_one_result(context):
    result = work.remote()
    print("waiting", flush=True)
    ray.get(result)

walk.exclusive = functools.partial(exclusive, beat_s={BEAT_S})
object.__setattr__(STAGE, "run", wait_for_one_result)
cli.main()
""",
)


class Driver:
    """A process of `ldm run RECIPE --json`, and what it has said so far.

    Args:
        arguments: of Python: the command, or what stands for it.
        options: of `ldm run`, the recipe first.
        store: the S3 server that it and a Ray of its own work with; by default it works on the session's Ray.
    """

    def __init__(self, arguments: tuple[str, ...], *options: str | Path, store: S3 | None = None) -> None:
        variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        if store:
            variables |= environment(store.url)
        if not store or arguments is BUSY_LDM:
            variables["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        self.process = subprocess.Popen(
            [sys.executable, *arguments, "run", *map(str, options), "--json"],
            cwd=REPOSITORY,
            env=variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.pid = self.process.pid
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=lines.extend, args=(stream,), daemon=True)
            for lines, stream in ((self.out, self.process.stdout), (self.err, self.process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def said(self) -> str:
        return "".join(self.err)

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}: {self.said}"
            assert time.monotonic() < deadline, f"no {what}: {self.said}"
            time.sleep(0.02)

    def end(self) -> int:
        """Wait until it ends by itself; return the exit code."""
        code = self.process.wait(PATIENCE_S)
        for reader in self._readers:
            reader.join()
        return code

    def stages(self) -> dict[str, str]:
        """Wait until it is done; return the states of the stages that were not skipped."""
        assert self.end() == 0, self.said
        states = {stage["name"]: stage["state"] for stage in json.loads(self.out[-1])["stages"]}
        return {name: state for name, state in states.items() if state != "skipped"}

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()


Start = Callable[..., Driver]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts drivers; what is left of them is killed after the test."""
    drivers: list[Driver] = []

    def start(*options: str | Path, arguments: tuple[str, ...] = LDM, store: S3 | None = None) -> Driver:
        drivers.append(Driver(arguments, *options, store=store))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()


@pytest.fixture
def server() -> Iterator[Web]:
    server = Web()
    yield server
    server.close()


def told(root: Path) -> list[str]:
    """Return the stages whose makers have told how far they are."""
    records = {path: path.read_text() for path in root.glob(f".locks/*-*/{LOCK}")}
    return [path.parent.name.partition("-")[0] for path, text in records.items() if '"total"' in text]


def suspend_in_the_middle(driver: Driver, root: Path) -> str:
    """Stop a driver while it holds an artifact, and has told how far it is; return the stage."""
    while True:
        driver.wait_until(lambda: told(root), "progress")
        driver.process.send_signal(signal.SIGSTOP)
        # It may just have finished.
        if held := told(root):
            return held[0]
        driver.process.send_signal(signal.SIGCONT)


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
def test_runs_on_one_root_share_what_they_have_in_common_and_make_the_rest_at_once(
    start: Start, tmp_path: Path
) -> None:
    values = tiny_recipe(write_pictures(tmp_path / "pictures", 64), root=str(tmp_path / "root"))
    recipe, root = write_recipe(tmp_path / "tiny.yaml", values), tmp_path / "root"
    first = start(recipe, "--to", "latents")
    stage = suspend_in_the_middle(first, root)

    refused = start(recipe, "--to", "latents", "--no-wait")
    assert refused.end() == 1
    assert re.fullmatch(
        rf"ldm: {stage} \w{{16}} under {root} is in use by pid {first.pid} on \S+, since .*: wait for it "
        r"\(leave out --no-wait\), .*\n",
        refused.err[-1],
    )

    second = start(recipe, "--to", "latents")
    waits = re.compile(rf"{stage}: \w{{16}} is being made by pid {first.pid} on .*: \d+ of \d+; waiting")
    second.wait_until(lambda: waits.search(" ".join(second.said.split())), "line about who is waited for")
    first.process.send_signal(signal.SIGCONT)
    states = first.stages(), second.stages()
    for name in ("pairs", "autoencoder", "latents"):
        assert sorted(each[name] for each in states) == ["cached", "run"], f"{first.said}\n{second.said}"
    # The one that was refused did not finish, so that the second went on with its run.
    assert_reported(root, 2)

    # Two people train on one latent cache.
    others = []
    for name, rate in (("mine", 1e-3), ("yours", 2e-3)):
        diffusion = {**values["diffusion"], "training": {**values["diffusion"]["training"], "learning_rate": rate}}
        others.append(write_recipe(tmp_path / f"{name}.yaml", {**values, "name": name, "diffusion": diffusion}))
    both = [start(other, "--to", "diffusion") for other in others]
    for driver in both:
        cached = dict.fromkeys(("pairs", "autoencoder", "latents"), "cached")
        assert driver.stages() == {**cached, "diffusion": "run"}
        assert "waiting" not in driver.said
    assert len(list(root.glob("diffusion/*/manifest.json"))) == 2
    assert len(list(root.glob("latents/*/manifest.json"))) == 1
    assert_reported(root, 4)
    assert_one_experiment_a_run(root)


def assert_reported(root: Path, count: int) -> None:
    folders = list((root / "runs").iterdir())
    assert len(folders) == count
    assert {json.loads((folder / "run.json").read_text())["state"] for folder in folders} == {"finished"}
    reports = {(folder / "report.html").read_text() for folder in folders}
    assert (root / "report.html").read_text() in reports


def assert_one_experiment_a_run(root: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    stages = [each.data.tags["ldm.stage"] for each in runs if "ldm.stage" in each.data.tags]
    assert sorted(stages) == ["autoencoder", "diffusion", "diffusion", "latents", "pairs"]
    assert {each.info.status for each in runs if "ldm.stage" in each.data.tags} == {"FINISHED"}


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
def test_on_s3_the_run_that_waits_takes_over_from_a_killed_one(
    start: Start, s3_server: S3, server: Web, tmp_path: Path
) -> None:
    server.files |= {f"{i}.jpg": picture(i, (90, 70)) for i in range(ROWS)}
    table = tmp_path / "table.parquet"
    urls = [server.url(f"{i}.jpg") for i in range(ROWS)]
    pq.write_table(pa.table({"url": urls, "text": [f"number {i}" for i in range(ROWS)]}), table)
    prefix = f"two-runs-{tmp_path.name}"
    values = tiny_recipe(table, root=f"s3://{BUCKET}/{prefix}", tracking={"enabled": False})
    values["pairs"] = {
        "source": str(table),
        "image_size": 32,
        "rows_per_shard": 8,
        "workers": 2,
        "download": {"connect_to": server.connect_to, "read_timeout_s": 900, "timeout_s": 900},
    }
    recipe = write_recipe(tmp_path / "tiny.yaml", values)
    elsewhere = Recipe.model_validate({**values, "root": str(tmp_path / "undisturbed")})
    undisturbed = run(elsewhere, Selection(only="pairs")).artifacts["pairs"].storage

    server.delay_s = 0.5
    first = start(recipe, "--only", "pairs", store=s3_server)
    first.wait_until(lambda: any("/work/" in key for key in s3_server.objects(f"{prefix}/pairs")), "work")
    server.delay_s = 600.0
    second = start(recipe, "--only", "pairs", store=s3_server)
    second.wait_until(lambda: f"is being made by pid {first.pid} on" in " ".join(second.said.split()), "holder")
    first.kill()
    server.delay_s = 0.0
    assert second.stages() == {"pairs": "resumed"}

    manifest = next(key for key in s3_server.objects(f"{prefix}/pairs") if key.endswith("/manifest.json"))
    folder = manifest.removesuffix("manifest.json")
    shards = {name: s3_server.read(f"{folder}{name}") for name in undisturbed.names("0*")}
    assert shards == {name: undisturbed.read_bytes(name) for name in shards}
    assert len(shards) > 8
    assert not [key for key in s3_server.objects(prefix) if "/work/" in key or "/.locks/pairs-" in key]


@pytest.mark.e2e
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("ray_cluster")
def test_a_suspended_run_that_has_lost_its_artifact_ends_by_itself_whatever_it_waits_for(
    start: Start, s3: S3, tmp_path: Path
) -> None:
    root = f"s3://{BUCKET}/suspended-{tmp_path.name}"
    values = tiny_recipe(write_pictures(tmp_path / "pictures", 4), root=root, tracking={"enabled": False})
    recipe = write_recipe(tmp_path / "tiny.yaml", values)
    driver = start(recipe, "--only", "pairs", arguments=BUSY_LDM, store=s3)
    driver.wait_until(lambda: "waiting\n" in driver.out, "stage at work")
    lease = next(key for key in s3.objects(root.removeprefix(f"s3://{BUCKET}/")) if "/.locks/pairs-" in key)

    driver.process.send_signal(signal.SIGSTOP)
    with exclusive(Storage(f"s3://{BUCKET}/{lease.removesuffix(f'/{LEASE}')}"), BEAT_S):
        driver.process.send_signal(signal.SIGCONT)
        assert driver.end() == 1
    assert re.fullmatch(
        rf"ldm: pairs \w{{16}} under {root} was taken over by pid {os.getpid()} on \S+, since .* while this run did "
        r"not answer: this run stops; what it committed is kept\n",
        driver.err[-1],
    )
    assert "Traceback" not in driver.said
