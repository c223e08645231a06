"""A run of the latents stage in a process of its own, for a test that kills it. Argument: the root.

It never finishes its artifact: however late the kill comes, it comes before that.
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


ArtifactWriter.finish = wait_to_be_killed  # type: ignore[assignment, method-assign]
root = Path(sys.argv[1])
ray.init(num_cpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)
run_stage(
    STAGE,
    latents_config(batch_size=2, workers=1),
    root,
    {name: Artifact(name, name, Storage(str(root / name / name))) for name in ("pairs", "autoencoder")},
    key="killed",
)
