"""How later stages read the `autoencoder` artifact."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.store.storage import sha256_file

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ldm_core.configs.first_stage import FirstStageConfig
    from pipelines.stages.autoencoder.reconstruction import ReconstructionTest
    from pipelines.store.ledger import ArtifactWriter

import dataclasses
import json
from typing import TYPE_CHECKING

from pipelines.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from ldm_core.configs.first_stage import FirstStageConfig

from typing import TYPE_CHECKING

from pipelines.store.ledger import Artifact

if TYPE_CHECKING:
    from torch import nn

    from ldm_core.configs.first_stage import FirstStageConfig

STAGE_NAME = "autoencoder"
FORMAT_VERSION = 1
FOLDER = "first_stage"


def load_first_stage(artifact: Artifact, device: Any = "cpu") -> nn.Module:
    """The frozen first stage: AutoencoderKL or VQAutoencoder in evaluation mode, without gradients.

    Raises:
        UserError: where the artifact is of another stage or format, or damaged.
    """
    config = first_stage_config(artifact)
    with (artifact.storage / FOLDER).local_copy(WEIGHTS_FILE) as path:
        return load_weights(config, path, device)


def first_stage_config(artifact: Artifact) -> FirstStageConfig:
    """The first stage's configuration. Raises as `load_first_stage`."""
    artifact.require(STAGE_NAME, FORMAT_VERSION)
    with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
        path = Path(folder) / CONFIG_FILE
        path.write_bytes((artifact.storage / FOLDER).read_bytes(CONFIG_FILE))
        return read_config(path)


WEIGHTS_FILE = "model.safetensors"

CONFIG_FILE = "config.json"


def weights_file(path: str) -> Path:
    """The .safetensors file that a recipe's `weights` names: the file itself, or the one in that folder.

    Raises:
        UserError: where there is none.
    """
    given = Path(path).expanduser()
    file = given / WEIGHTS_FILE if given.is_dir() else given
    if not file.is_file():
        raise UserError(
            f"autoencoder.weights: no file at {file}; give a .safetensors file or a folder with {WEIGHTS_FILE}"
        )
    return file


def save_first_stage(model: nn.Module, config: FirstStageConfig, folder: Path) -> None:
    """Write `model.safetensors` (float32, contiguous) and `config.json` to a folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def read_config(path: Path) -> FirstStageConfig:
    """The configuration that `save_first_stage` wrote. Raises UserError where it is not one."""
    from ldm_core.configs.first_stage import FirstStageConfig

    try:
        return FirstStageConfig(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a first stage's configuration: {error}") from error


def load_weights(config: FirstStageConfig, file: Path, device: Any = "cpu") -> nn.Module:
    """A first stage of that configuration with the weights of a .safetensors file.

    Returns:
        AutoencoderKL or VQAutoencoder in evaluation mode, without gradients.

    Raises:
        UserError: where the file cannot be read, or its tensors are not the configuration's; they are listed by name.
    """
    import torch

    from ldm_core.networks.autoencoder import build_first_stage
    from ldm_core.weights.named_tensors import differences
    from ldm_core.weights.weights_files import open_safetensors

    try:
        tensors = open_safetensors(file)
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error})") from error
    with torch.device("meta"):
        model = build_first_stage(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if problems := differences(expected, tensors.shapes):
        raise UserError(
            f"the weights in {file} are not those of autoencoder.model: {problems}; "
            "set autoencoder.model to the configuration that they were trained with"
        )
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.to(device).eval().requires_grad_(False)


def commit_first_stage(
    writer: ArtifactWriter,
    first_stage: nn.Module,
    config: FirstStageConfig,
    test: ReconstructionTest,
    device: torch.device,
) -> dict[str, Any]:
    """Commit weights, configuration and the reconstructions' grid; returns facts for the manifest."""
    with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
        save_first_stage(first_stage, config, Path(folder))
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            writer.commit_once(f"{FOLDER}/{name}", partial(shutil.copyfile, Path(folder) / name))
    png = test.grid_png(first_stage, device)
    writer.commit_once("reconstructions.png", lambda path: path.write_bytes(png))
    with writer.storage.open(f"{FOLDER}/{WEIGHTS_FILE}") as file:
        digest = sha256_file(file)
    return {
        "psnr_db": round(test.psnr_db(first_stage, device), 3),
        "psnr_pictures": len(test.pixels),
        "psnr_held_out": test.held_out,
        "parameters": sum(weight.numel() for weight in first_stage.parameters()),
        "encoder_sha256": digest,
    }
