"""Reading the `diffusion` artifact: its model, and what that is conditioned on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.store.ledger import Artifact

if TYPE_CHECKING:
    from ldm_core.latent_diffusion import LatentDiffusion
    from pipelines.conditions.kind import Kind, Prompts

STAGE_NAME = "diffusion"
FORMAT_VERSION = 4
FOLDER = "model"


def condition_of(artifact: Artifact) -> Kind:
    """Return the kind of condition that a model was trained with."""
    # The stage's declaration imports this module for the names above, and must not wait for torch.
    from pydantic import TypeAdapter

    from pipelines.conditions.config import Condition
    from pipelines.conditions.kinds import kind_of

    condition: Condition = TypeAdapter(Condition).validate_python(artifact.details["condition"])
    return kind_of(condition)


def load_model(artifact: Artifact, device: Any = "cpu") -> tuple[LatentDiffusion, Prompts]:
    """Load the final model (EMA weights, first stage included) in evaluation mode, and what makes its inputs.

    Args:
        artifact: a finished artifact of the `diffusion` stage.
        device: the torch device to put the model on.

    Raises:
        UserError: the artifact is another stage's, of another format version, or damaged.
    """
    # As above.
    from pipelines.stages.diffusion.model_folder import load_folder

    artifact.require(STAGE_NAME, FORMAT_VERSION)
    return load_folder(artifact.storage / FOLDER, device)
