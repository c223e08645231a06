"""The pairs stage in a process of its own, for a test that kills it. Arguments: Ray's address, folder, config."""

import json
import logging
import sys
from pathlib import Path

import ray

from pipelines.stage import StageContext
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.stage import STAGE
from pipelines.store.commits import ArtifactWriter
from pipelines.store.storage import Storage
from pipelines.tracking import null_stage_tracker

address, folder, config = sys.argv[1:]
ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
STAGE.run(
    StageContext(
        config=PairsConfig.model_validate(json.loads(config)),
        seed=0,
        writer=ArtifactWriter("pairs", "0" * 16, Storage(folder)),
        upstream={},
        tracker=null_stage_tracker(),
        progress=lambda done, total, **facts: None,
        scratch=Path(folder).parent,
    )
)
