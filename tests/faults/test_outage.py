"""The object store of a run goes away in the middle of every stage, and comes back: the run completes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.pipelines.store.gate import Gate
from tests.pipelines.store.s3 import BUCKET, S3, environment
from tests.tiny import tiny_recipe, write_pictures, write_recipe

REPOSITORY = Path(__file__).parents[2]
# Longer than the requests of s3fs are repeated (1.1 s), and than an outage lasts before it is told of (10 s).
DOWN_S = 120.0
# After the start of a stage: by then its workers start, or work. The last one is done sooner.
SHUT_AFTER_S = {"pairs": 3.0, "autoencoder": 3.0, "latents": 3.0, "diffusion": 3.0, "evaluate": 3.0, "export": 0.0}


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_a_run_outlasts_an_outage_of_its_store_in_every_stage(s3_server: S3, tmp_path: Path) -> None:
    values = tiny_recipe(
        write_pictures(tmp_path / "pictures", 64),
        root=f"s3://{BUCKET}/outage",
        tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        cluster={"store_patience_s": 300},
    )
    recipe = write_recipe(tmp_path / "tiny.yaml", values)
    lines: list[str] = []
    with Gate(s3_server.host, s3_server.port) as gate:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "run", str(recipe), "--json"],
            cwd=tmp_path,
            env={**os.environ, **environment(gate.url), "PYTHONPATH": str(REPOSITORY)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

        def follow() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append(line)
                stage, _, rest = line.partition(":")
                if stage in SHUT_AFTER_S and rest.startswith(" starts"):
                    threading.Timer(SHUT_AFTER_S[stage], gate.shut_for, [DOWN_S]).start()

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            assert process.stdout is not None
            out = process.stdout.read()
            assert process.wait() == 0, "".join(lines)
        finally:
            process.kill()
            process.wait()
        follower.join()
    assert [stage["state"] for stage in json.loads(out.splitlines()[-1])["stages"]] == ["run"] * 6
    text = "".join(lines)
    assert f"s3://{BUCKET} has not answered for" in text
    assert f"s3://{BUCKET} answers again, after" in text
