"""A run of the latents stage in a process of its own, for a test that kills it. Argument: the root."""

import sys
from pathlib import Path

import ray

from pipelines.stages.latents.stage import STAGE
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from tests.tiny_artifacts import latents_config, run_stage

root = Path(sys.argv[1])
ray.init(num_cpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)
run_stage(
    STAGE,
    latents_config(batch_size=2, workers=1),
    root,
    {name: Artifact(name, name, Storage(str(root / name / name))) for name in ("pairs", "autoencoder")},
    key="killed",
)
