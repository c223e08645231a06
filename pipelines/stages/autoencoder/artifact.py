"""How later stages read the `autoencoder` artifact."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.stages.autoencoder.weights import CONFIG_FILE, WEIGHTS_FILE, load_weights, read_config
from pipelines.store.ledger import Artifact

if TYPE_CHECKING:
    from torch import nn

    from ldm_core.networks.autoencoder import FirstStageConfig

STAGE_NAME = "autoencoder"
FORMAT_VERSION = 1
FOLDER = "first_stage"


def load_first_stage(artifact: Artifact, device: Any = "cpu") -> "nn.Module":
    """The frozen first stage: AutoencoderKL or VQAutoencoder in evaluation mode, without gradients.

    Raises:
        UserError: where the artifact is of another stage or format, or damaged.
    """
    config = first_stage_config(artifact)
    with (artifact.storage / FOLDER).local_copy(WEIGHTS_FILE) as path:
        return load_weights(config, path, device)


def first_stage_config(artifact: Artifact) -> "FirstStageConfig":
    """The first stage's configuration. Raises as `load_first_stage`."""
    artifact.require(STAGE_NAME, FORMAT_VERSION)
    with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
        path = Path(folder) / CONFIG_FILE
        path.write_bytes((artifact.storage / FOLDER).read_bytes(CONFIG_FILE))
        return read_config(path)
