"""A first stage as files: `model.safetensors` and `config.json` in one folder."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from ldm_core.networks.autoencoder import FirstStageConfig

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


def save_first_stage(model: "nn.Module", config: "FirstStageConfig", folder: Path) -> None:
    """Write `model.safetensors` (float32, contiguous) and `config.json` to a folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def read_config(path: Path) -> "FirstStageConfig":
    """The configuration that `save_first_stage` wrote. Raises UserError where it is not one."""
    from ldm_core.networks.autoencoder import FirstStageConfig

    try:
        return FirstStageConfig(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a first stage's configuration: {error}") from error


def load_weights(config: "FirstStageConfig", file: Path, device: Any = "cpu") -> "nn.Module":
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
