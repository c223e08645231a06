"""Reading the `diffusion` artifact: what its files are, and its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.store.ledger import Artifact

if TYPE_CHECKING:
    from ldm_core.checkpoint import AnyTokenizer
    from ldm_core.latent_diffusion import LatentDiffusion

STAGE_NAME = "diffusion"
FORMAT_VERSION = 1
FOLDER = "model"
FILES = ("model.safetensors", "config.json", "vocab.txt")


def load_model(artifact: Artifact, device: Any = "cpu") -> tuple[LatentDiffusion, AnyTokenizer]:
    """Load the final model (EMA weights, first stage included), in evaluation mode, and its tokenizer.

    Args:
        artifact: a finished artifact of the `diffusion` stage.
        device: the torch device to put the model on.

    Raises:
        UserError: the artifact is another stage's, of another format version, or damaged.
    """
    # The stage's declaration imports this module for the names above, and must not wait for torch.
    from pipelines.stages.diffusion.find_model import load_folder

    artifact.require(STAGE_NAME, FORMAT_VERSION)
    return load_folder(artifact.storage / FOLDER, device)
