"""A run of the latents stage in a process of its own, for tests that kill it, or what it runs on.

Arguments: the root, and the address of a Ray that runs already; without it one is started.
"""

import sys
from pathlib import Path

import ray

from pipelines.stages.latents.stage import STAGE
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from tests.tiny_artifacts import latents_config, run_stage

root, *address = sys.argv[1:]
where = {"address": address[0]} if address else {"num_cpus": 1, "include_dashboard": False}
ray.init(**where, logging_level="error", log_to_driver=False)
run_stage(
    STAGE,
    latents_config(batch_size=2, workers=None if address else 1),
    Path(root),
    {name: Artifact(name, name, Storage(f"{root}/{name}/{name}")) for name in ("pairs", "autoencoder")},
    key="killed",
)
