"""Find and load a trained model from whatever a person points at: the root of a run, an artifact, a model folder."""

from __future__ import annotations

import torch

from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.model_files import WEIGHTS_FILE, WEIGHTS_INDEX_FILE
from pipelines.conditions.kind import Prompts
from pipelines.errors import UserError
from pipelines.stages.diffusion.artifact import FOLDER, STAGE_NAME
from pipelines.stages.diffusion.model_folder import load_folder
from pipelines.store.ledger import Ledger
from pipelines.store.manifest import MANIFEST
from pipelines.store.storage import Storage

FIRST_STAGE_FOLDER = "first_stage"


def find_model(place: str) -> Storage:
    """Return the folder that holds a model's weights and config.json.

    Args:
        place: the root of a run (its newest finished diffusion artifact is meant), an artifact, or a model folder.

    Raises:
        UserError: there is no model.
    """
    storage = Storage(place)
    if not storage.exists():
        raise UserError(f"no checkpoint at {storage.url}: the folder does not exist")
    for candidate in (storage, storage / FOLDER, storage / FIRST_STAGE_FOLDER):
        if any(candidate.exists(name) for name in (WEIGHTS_FILE, WEIGHTS_INDEX_FILE)):
            return candidate
    stage = storage / STAGE_NAME
    finished = [key for key in stage.names() if (stage / key).exists(MANIFEST)]
    if finished:
        newest = max(finished, key=lambda key: (stage / key).modified_at(MANIFEST))
        return Ledger(storage).storage(STAGE_NAME, newest) / FOLDER
    raise UserError(
        f"no model in {storage.url}: neither model.safetensors, nor model/, nor a finished diffusion stage; "
        "give the root of a finished run or a model folder"
    )


def open_model(place: str, device: str | None = None) -> tuple[LatentDiffusion, Prompts, str]:
    """Load a model, and what makes its input from prompts, from anywhere that `find_model` looks.

    Args:
        place: as for `find_model`.
        device: the torch device to put the model on; None takes the first GPU if there is one, else the CPU.

    Returns:
        The model in evaluation mode, what makes its input, and the URL of the folder they came from.

    Raises:
        UserError: there is no model, or its files are damaged or do not belong together.
    """
    folder = find_model(place)
    return *load_folder(folder, device or ("cuda" if torch.cuda.is_available() else "cpu")), folder.url
