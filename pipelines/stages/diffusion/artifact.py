"""Reading the `diffusion` artifact: what its files are, and its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ldm_core.model_files import CONFIG_FILE, VOCABULARY_FILE, WEIGHTS_FILE
from pipelines.store.ledger import Artifact

if TYPE_CHECKING:
    from ldm_core.latent_diffusion import LatentDiffusion
    from ldm_core.tokenizers.tokenizer import Tokenizer

STAGE_NAME = "diffusion"
FORMAT_VERSION = 3
FOLDER = "model"
FILES = (WEIGHTS_FILE, CONFIG_FILE, VOCABULARY_FILE)


def load_model(artifact: Artifact, device: Any = "cpu") -> tuple[LatentDiffusion, Tokenizer]:
    """Load the final model (EMA weights, first stage included), in evaluation mode, and its tokenizer.

    Args:
        artifact: a finished artifact of the `diffusion` stage.
        device: the torch device to put the model on.

    Raises:
        UserError: the artifact is another stage's, of another format version, or damaged.
    """
    # The stage's declaration imports this module for the names above, and must not wait for torch.
    from pipelines.stages.diffusion.model_folder import load_folder

    artifact.require(STAGE_NAME, FORMAT_VERSION)
    return load_folder(artifact.storage / FOLDER, device)
