"""Pairs to an object store through a network that loses, delays and refuses: bytes of a local run, no secret told."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from pipelines.stages.pairs.config import PairsConfig
from pipelines.store.file_table import FileTable
from tests.pipelines.stages.pairs.conftest import RunPairs
from tests.pipelines.stages.pairs.web_server import Web, picture
from tests.pipelines.store.s3 import BUCKET, KEY_ID, S3, SECRET, SESSION, Plan, environment
from tests.tiny import tiny_recipe

ROWS = 40
PATIENCE_S = 240


def start(recipe: Path, url: str, *options: str) -> subprocess.Popen[str]:
    """Start `ldm run --only pairs` on this session's Ray, as a submitted job: its workers see the store too."""
    job = {"runtime_env": {"env_vars": environment(url)}}
    variables = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}
    command = [sys.executable, "-m", "jobs.cli", "--debug", "run", str(recipe), "--only", "pairs", "--json", *options]
    return subprocess.Popen(
        command,
        env={**os.environ, **environment(url), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_tree(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.timeout(900)
def test_a_bad_network_and_a_dead_driver_change_nothing(
    server: Web, s3_server: S3, run_pairs: RunPairs, tmp_path: Path
) -> None:
    server.files |= {f"{i}.jpg": picture(i // 2 if i % 10 == 1 else i, (90, 70)) for i in range(ROWS)}
    table = tmp_path / "t.parquet"
    pq.write_table(
        pa.table({"url": [server.url(f"{i}.jpg") for i in range(ROWS)], "text": [f"n {i}" for i in range(ROWS)]}), table
    )
    pairs: dict[str, Any] = {
        "source": str(table),
        "rows_per_shard": 8,
        "workers": 2,
        # No request is given up while the server keeps it waiting.
        "download": {"connect_to": server.connect_to, "connections": 2, "timeout_s": 600, "read_timeout_s": 600},
    }
    details, whole = run_pairs("whole", **pairs)

    root = f"s3://{BUCKET}/pairs-{tmp_path.name}"
    values = tiny_recipe(table, root=root, tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    values["pairs"] = {"image_size": 32, **pairs}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    prefix = f"pairs-{tmp_path.name}/pairs/"
    shares = {
        "error": 0.03,
        "slow_down": 0.03,
        "delay": 0.05,
        "cut_request": 0.02,
        "cut_answer": 0.03,
        "lose_answer": 0.02,
    }
    said = []
    with s3_server.behind(Plan(shares=shares, seed=3, delay_s=0.2)) as proxy:
        server.delay_s = 0.5
        first = start(recipe, proxy.url)
        deadline = time.monotonic() + PATIENCE_S
        while not any("/work/" in key for key in s3_server.objects(prefix)) and first.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # The first one shall not be done before the second one is refused.
        server.paused = True
        assert first.poll() is None
        # A second driver is refused, by the name of the first; once that is dead, the next one takes over.
        second = start(recipe, proxy.url, "--no-wait")
        _, error = second.communicate(timeout=PATIENCE_S)
        assert second.returncode == 1
        assert f"is in use by pid {first.pid}" in error
        said.append(error)
        kill_tree(first)
        server.paused, server.delay_s = False, 0.0
        third = start(recipe, proxy.url)
        out, error = third.communicate(timeout=PATIENCE_S)
        said += [out, error]
        assert third.returncode == 0, error
        disturbed = sum(count for kind, count in proxy.done.items() if kind != "pass")
    assert disturbed > 10
    assert json.loads(out)["stages"][0]["state"] == "resumed"

    found = s3_server.objects(prefix)
    folder = next(key for key in found if key.endswith("manifest.json")).removesuffix("manifest.json")
    manifest = json.loads(s3_server.read(f"{folder}manifest.json"))
    table = FileTable.decode(s3_server.read(f"{folder}{manifest['table']}"))
    shards = {key.removeprefix(folder): key for key in found if key.endswith((".tar", ".parquet"))}
    del shards[manifest["table"]]
    assert {name: s3_server.read(key) for name, key in shards.items()} == {
        name: whole.read_bytes(name) for name in [*whole.names("0*"), "held_out/0.parquet"]
    }
    assert manifest["details"]["statuses"] == details["statuses"]
    assert set(table.names) == shards.keys()
    assert not any("/work/" in key for key in found)
    assert s3_server.uploads(prefix) == []

    said += [s3_server.read(key).decode("latin-1") for key in s3_server.objects(f"pairs-{tmp_path.name}/")]
    said += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (SECRET, SESSION, KEY_ID):
        assert not any(secret in text for text in said)
    assert PairsConfig.model_validate(manifest["config"])
