"""The `autoencoder` artifact: how the stage saves a first stage, and how later stages load it.

Importing this module needs no torch, because stages declare their format with it: what computes is imported on call.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.model import config_from_dict
from ldm_core.model_files import CONFIG_FILE, WEIGHTS_FILE
from pipelines.errors import UserError
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import sha256_file

if TYPE_CHECKING:
    import torch

    from ldm_core.networks.autoencoder import FirstStage
    from pipelines.stages.autoencoder.reconstruction import ReconstructionTest

STAGE_NAME = "autoencoder"
FORMAT_VERSION = 3
FOLDER = "first_stage"
RECONSTRUCTIONS = "reconstructions.png"


def load_first_stage(artifact: Artifact, device: Any = "cpu") -> FirstStage:
    """Load the frozen first stage of an artifact: in evaluation mode, without gradients.

    Raises:
        UserError: the artifact is of another stage or format, or damaged.
    """
    config = first_stage_config(artifact)
    with (artifact.storage / FOLDER).local_copy(WEIGHTS_FILE) as path:
        return load_weights(config, path, device)


def first_stage_config(artifact: Artifact) -> FirstStageConfig:
    """Read the first stage's configuration. Raises as `load_first_stage`."""
    folder = artifact.require(STAGE_NAME, FORMAT_VERSION).storage / FOLDER
    try:
        config = config_from_dict(folder.read_json(CONFIG_FILE))
    except ValueError as error:
        raise UserError(f"{folder.url}/{CONFIG_FILE} is not a first stage's configuration: {error}") from error
    if not isinstance(config, FirstStageConfig):
        raise UserError(f"{folder.url}/{CONFIG_FILE} is not a first stage's configuration, but a whole model's")
    return config


def weights_file(path: str) -> Path:
    """Return the .safetensors file that `autoencoder.weights` of a recipe names: the file itself, or its folder.

    Raises:
        UserError: there is no such file.
    """
    given = Path(path).expanduser()
    file = given / WEIGHTS_FILE if given.is_dir() else given
    if not file.is_file():
        raise UserError(
            f"autoencoder.weights: no file at {file}; give a .safetensors file or a folder with {WEIGHTS_FILE}"
        )
    return file


def load_weights(config: FirstStageConfig, file: Path, device: Any = "cpu") -> FirstStage:
    """Build a first stage with the weights of a .safetensors file: in evaluation mode, without gradients.

    Args:
        config: the first stage's shape, `autoencoder.model` of the recipe.
        file: the weights.
        device: where to put them.

    Raises:
        UserError: the file cannot be read, or its tensors are not finite or not the configuration's; they are listed.
    """
    from ldm_core import checkpoint
    from ldm_core.weights.named_tensors import differences
    from ldm_core.weights.weights_files import open_safetensors

    try:
        weights = open_safetensors(file, device=str(device))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error})") from error
    if problems := differences(checkpoint.weight_shapes(config), weights.shapes):
        raise UserError(
            f"the weights in {file} are not those of autoencoder.model: {problems}; "
            "set autoencoder.model to the configuration that they were trained with"
        )
    try:
        first_stage = checkpoint.first_stage_with(config, weights)
    except ValueError as error:
        raise UserError(f"the weights in {file} cannot be used: {error}") from error
    return first_stage.requires_grad_(False)


def commit_first_stage(
    writer: ArtifactWriter, first_stage: FirstStage, test: ReconstructionTest, device: torch.device
) -> dict[str, Any]:
    """Commit weights, configuration and the grid of reconstructions.

    Args:
        writer: writes the stage's artifact.
        first_stage: the trained or imported first stage.
        test: pictures that reconstructions are drawn and measured on.
        device: where to reconstruct them.

    Returns:
        Facts for the artifact's manifest.
    """
    from ldm_core import checkpoint

    with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
        checkpoint.save(first_stage, folder)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            writer.commit_once(f"{FOLDER}/{name}", partial(shutil.copyfile, Path(folder) / name))
    png = test.grid_png(first_stage, device)
    writer.commit_once(RECONSTRUCTIONS, lambda path: path.write_bytes(png))
    with writer.storage.open(f"{FOLDER}/{WEIGHTS_FILE}") as file:
        digest = sha256_file(file)
    return {
        "psnr_db": round(test.psnr_db(first_stage, device), 3),
        "psnr_pictures": sum(map(len, test.pixels)),
        "psnr_held_out": test.held_out,
        "parameters": sum(weight.numel() for weight in first_stage.parameters()),
        "encoder_sha256": digest,
    }
