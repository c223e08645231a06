"""A model as a folder: model.safetensors (float32), config.json and, for a model of captions, vocab.txt.

This is what training and export write and `ldm_core.load` reads. No pickle is involved.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm_core.latent_diffusion import LatentDiffusion, LatentDiffusionConfig

if TYPE_CHECKING:
    from ldm_core.tokenizer import Tokenizer

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
VOCABULARY_FILE = "vocab.txt"


def save(model: LatentDiffusion, folder: str | Path, *, tokenizer: "Tokenizer | None" = None) -> None:
    """Write a model to a folder, which is created where needed; files of the same names are replaced.

    Args:
        model: weights are written as float32 in the standard layout, whatever they are held in.
        folder: where to.
        tokenizer: of the captions; its vocabulary is written beside the weights.

    Raises:
        ValueError: when the tokenizer has more ids than the model's text transformer.
    """
    known = model.config.conditioner.vocabulary_size if model.config.conditioner else 0
    if tokenizer is not None and tokenizer.vocabulary_size > known:
        raise ValueError(
            f"the tokenizer's {tokenizer.vocabulary_size} ids must fit the text transformer's {known}: "
            "save the model with the tokenizer it was trained with"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: _plain(tensor) for name, tensor in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(model.config.to_dict(), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.write(folder / VOCABULARY_FILE)


def load(folder: str | Path, *, device: torch.device | str | None = None) -> LatentDiffusion:
    """Read a model from a folder that `save` wrote.

    Args:
        folder: with model.safetensors and config.json.
        device: where to put the weights; None is torch's default device.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: when the folder or one of its files is missing.
        ValueError: when a file is damaged, or the weights are not those of the config; names the tensors.
    """
    folder = Path(folder)
    config = load_config(folder)
    path = _existing(folder, WEIGHTS_FILE)
    # On the meta device nothing is initialized only to be overwritten.
    model = config.build(device="meta")
    _check_weights(model, path)
    with safe_open(path, framework="pt", device=str(device or torch.get_default_device())) as file:
        model.load_state_dict({name: file.get_tensor(name) for name in model.state_dict()}, assign=True)
    return model.eval()


def load_config(folder: str | Path) -> LatentDiffusionConfig:
    """Read a model's config alone. Raises as `load`."""
    path = _existing(Path(folder), CONFIG_FILE)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, it is not: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return LatentDiffusionConfig.from_dict(values)


def load_tokenizer(folder: str | Path) -> "Tokenizer":
    """The tokenizer saved beside a model, cutting captions to the length its text transformer takes.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it does not fit the model, which then takes no captions.
    """
    from ldm_core.tokenizer import Tokenizer

    config = load_config(folder).conditioner
    if config is None:
        raise ValueError(f"the model in {folder} takes no captions: sample it without a prompt")
    return Tokenizer.from_vocabulary_file(_existing(Path(folder), VOCABULARY_FILE), max_length=config.max_length)


def _plain(tensor: Tensor) -> Tensor:
    """Float32, contiguous, on the CPU: the same bytes whatever the memory format or device of training."""
    tensor = tensor.detach().to("cpu")
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


def _existing(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder at {folder}: give a folder with {WEIGHTS_FILE} and {CONFIG_FILE}")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"the model folder {folder} lacks {name}: was it written to the end?")
    return folder / name


def _check_weights(model: LatentDiffusion, path: Path) -> None:
    """Compare names and shapes before any tensor is read."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file, it is not: {error}") from error
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{name} {found[name]} instead of {expected[name]}"
            for name in sorted(expected.keys() & found.keys())
            if expected[name] != found[name]
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"the weights in {path} must be those of its config.json, {listed}")
