"""A run of the latents stage in a process of its own, for tests that kill it, or what it runs on.

Arguments: the root, the address of a Ray that runs already, and the number of workers, all that there is room for if it
is 0. With the word `unfinished` behind them the artifact is never finished: however late the kill comes, it comes
before that.
"""

import sys
import time
from pathlib import Path
from typing import Any

import ray

from pipelines.stages.latents.stage import STAGE
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from tests.tiny_artifacts import latents_config, run_stage


def wait_to_be_killed(writer: ArtifactWriter, **what: Any) -> None:
    time.sleep(3600)


root, address, workers, *unfinished = sys.argv[1:]
if unfinished:
    ArtifactWriter.finish = wait_to_be_killed  # type: ignore[assignment, method-assign]
ray.init(address=address, logging_level="error", log_to_driver=False)
run_stage(
    STAGE,
    latents_config(batch_size=2, workers=int(workers) or None),
    Path(root),
    {name: Artifact(name, name, Storage(f"{root}/{name}/{name}")) for name in ("pairs", "autoencoder")},
    key="killed",
)
