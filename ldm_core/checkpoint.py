"""A model as a folder: model.safetensors (float32), config.json and, for a model of captions, its tokenizer's file.

This is what training, import and export write and `ldm_core.load` reads. No pickle is involved. Large models may be
in shards, model-00001-of-0000N.safetensors with an index beside them. A first stage alone has the same files.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ldm_core.conditioning import FrozenTextConfig
from ldm_core.conditioning.build import build_conditioner
from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.text import ClipTextConfig, TextTransformerConfig
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.networks.autoencoder import AutoencoderKL, VQAutoencoder, build_first_stage
from ldm_core.weights.finite import check_finite
from ldm_core.weights.named_tensors import NamedTensors, differences
from ldm_core.weights.weights_files import open_stem, read_json, write_json, write_weights

if TYPE_CHECKING:
    from ldm_core.tokenizers.from_file import FileTokenizer
    from ldm_core.tokenizers.wordpiece import Tokenizer

    AnyTokenizer = Tokenizer | FileTokenizer

WEIGHTS_STEM = "model"
WEIGHTS_FILE = f"{WEIGHTS_STEM}.safetensors"
CONFIG_FILE = "config.json"
VOCABULARY_FILE = "vocab.txt"
TOKENIZER_FILE = "tokenizer.json"
CAPTION_CONFIGS = (TextTransformerConfig, ClipTextConfig, FrozenTextConfig)


def save(
    model: LatentDiffusion,
    folder: str | Path,
    *,
    tokenizer: "AnyTokenizer | None" = None,
    max_shard_gib: float | None = None,
) -> None:
    """Write a model to a folder, which is created where needed; files of the same names are replaced.

    Args:
        model: weights are written as float32 in the standard layout, whatever they are held in.
        folder: where to.
        tokenizer: of the captions; written beside the weights.
        max_shard_gib: size of the largest weights file in GiB; None is one file whatever its size.

    Raises:
        ValueError: when the tokenizer has more ids than the model's text encoder, or a weight is not finite.
    """
    write(model.config, NamedTensors.of_module(model), folder, tokenizer=tokenizer, max_shard_gib=max_shard_gib)


def write(
    config: LatentDiffusionConfig | FirstStageConfig,
    weights: NamedTensors,
    folder: str | Path,
    *,
    tokenizer: "AnyTokenizer | None" = None,
    max_shard_gib: float | None = None,
) -> None:
    """Write a model, or a first stage alone, that need not be in memory: as `save`, a shard at a time.

    A first stage is one file whatever its size: a recipe's `autoencoder.weights` takes one.

    Raises:
        ValueError: as `save`; or the weights are not those of the config, they are named.
    """
    _check_tokenizer(config, tokenizer)
    if wrong := differences(_meta_shapes(config), weights.shapes):
        raise ValueError(f"the weights of {weights.source} must be those of the config, {wrong}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    limit = max_shard_gib if is_whole_model(config) else None
    write_weights(weights, folder, WEIGHTS_STEM, max_shard_gib=limit)
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)
    # Last: without it a folder that was not written to its end is no model.
    write_config(config, folder)


def load(folder: str | Path, *, device: torch.device | str | None = None) -> LatentDiffusion:
    """Read a model from a folder that `save` or `write` wrote.

    Args:
        folder: with model.safetensors (or its shards) and config.json.
        device: where to put the weights; None is torch's default device.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: when the folder or one of its files is missing.
        ValueError: when a file is damaged, or the weights are not those of the config; names the tensors.
    """
    config = load_config(folder)
    # On the meta device nothing is initialized only to be overwritten.
    model = config.build(device="meta")
    if isinstance(config.conditioner, FrozenTextConfig):
        # Encoders of the transformers library keep tables outside of their state dict: these must be real.
        model.conditioner = build_conditioner(config.conditioner).to(device or torch.get_default_device())
    _fill(model, Path(folder), device)
    return model


def load_first_stage(folder: str | Path, *, device: torch.device | str | None = None) -> AutoencoderKL | VQAutoencoder:
    """Read a first stage alone from a folder that `write` or the autoencoder stage wrote; as `load`."""
    config = read_config(_existing(Path(folder), CONFIG_FILE))
    if not isinstance(config, FirstStageConfig):
        raise ValueError(f"{folder} must hold a first stage alone, it holds a whole model: use `load`")
    with torch.device("meta"):
        model = build_first_stage(config)
    _fill(model, Path(folder), device)
    return model


def load_config(folder: str | Path) -> LatentDiffusionConfig:
    """Read a model's config alone. Raises as `load`."""
    config = read_config(_existing(Path(folder), CONFIG_FILE))
    if isinstance(config, FirstStageConfig):
        raise ValueError(
            f"{folder} must hold a whole model, it holds a first stage alone: give it as autoencoder.weights"
        )
    return config


def read_config(path: str | Path) -> LatentDiffusionConfig | FirstStageConfig:
    """The config of a whole model or of a first stage from a config.json.

    Raises:
        ValueError: the file is damaged or describes neither.
    """
    values = read_json(Path(path))
    if "regularization" not in values:
        return LatentDiffusionConfig.from_dict(values)
    try:
        return FirstStageConfig(**values)
    except TypeError as error:
        raise ValueError(f"{path} must be a first stage's configuration: {error}") from error


def write_config(config: LatentDiffusionConfig | FirstStageConfig, folder: str | Path) -> None:
    """Write what `read_config` reads: config.json in the folder."""
    values = config.to_dict() if isinstance(config, LatentDiffusionConfig) else dataclasses.asdict(config)
    write_json(Path(folder) / CONFIG_FILE, values)


def is_whole_model(config: LatentDiffusionConfig | FirstStageConfig) -> bool:
    """Whether a config is that of a whole model, not of a first stage alone."""
    return isinstance(config, LatentDiffusionConfig)


def takes_captions(config: LatentDiffusionConfig | FirstStageConfig) -> bool:
    """Whether a model is conditioned on captions, and so has a tokenizer."""
    return isinstance(getattr(config, "conditioner", None), CAPTION_CONFIGS)


def load_tokenizer(folder: str | Path) -> "AnyTokenizer":
    """The tokenizer saved beside a model, cutting captions to the length its text encoder takes.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it does not fit the model, or the model takes no captions.
    """
    from ldm_core.tokenizers.from_file import FileTokenizer
    from ldm_core.tokenizers.wordpiece import Tokenizer

    folder, config = Path(folder), load_config(folder)
    if not takes_captions(config):
        raise ValueError(f"the model in {folder} takes no captions: sample it without a prompt")
    max_length: int = config.conditioner.max_length  # type: ignore[union-attr]
    if (folder / TOKENIZER_FILE).is_file():
        tokenizer: AnyTokenizer = FileTokenizer.from_file(folder / TOKENIZER_FILE, max_length=max_length)
    else:
        path = _existing(folder, VOCABULARY_FILE)
        tokenizer = Tokenizer.from_vocabulary_file(path, max_length=max_length)
    _check_tokenizer(config, tokenizer)
    return tokenizer


def find_tokenizer(folder: str | Path) -> "AnyTokenizer | None":
    """The tokenizer saved beside a model, or None where there is none. Raises ValueError where it does not fit."""
    names = (VOCABULARY_FILE, TOKENIZER_FILE)
    return load_tokenizer(folder) if any((Path(folder) / name).is_file() for name in names) else None


def write_tokenizer(tokenizer: "AnyTokenizer", folder: str | Path) -> None:
    """Write vocab.txt, or tokenizer.json where it is another kind than BERT's."""
    from ldm_core.tokenizers.wordpiece import Tokenizer

    tokenizer.write(Path(folder) / (VOCABULARY_FILE if isinstance(tokenizer, Tokenizer) else TOKENIZER_FILE))


@contextlib.contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A folder that appears under its name only when everything in it is written.

    Raises:
        FileExistsError: the target exists and is not an empty folder.
    """
    target = Path(target)
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise FileExistsError(f"{target} exists and is not an empty folder: nothing is overwritten; choose another")
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def open_weights(folder: str | Path, *, device: torch.device | str | None = None) -> NamedTensors:
    """The weights of a model folder, read one by one; they are not held against its config.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is damaged.
    """
    weights = open_stem(Path(folder), WEIGHTS_STEM, device=str(device or torch.get_default_device()))
    if weights is None:
        raise FileNotFoundError(f"the model folder {folder} lacks {WEIGHTS_FILE}: was it written to the end?")
    return weights


def _fill(model: nn.Module, folder: Path, device: torch.device | str | None) -> None:
    """Put a folder's weights in a model without any."""
    weights = open_weights(folder, device=device)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if wrong := differences(expected, weights.shapes):
        raise ValueError(f"the weights in {weights.source} must be those of its config.json, {wrong}")
    model.load_state_dict(dict(weights), assign=True)
    check_finite(model)
    model.eval()


def _existing(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder at {folder}: give a folder with {WEIGHTS_FILE} and {CONFIG_FILE}")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"the model folder {folder} lacks {name}: was it written to the end?")
    return folder / name


def _meta_shapes(config: LatentDiffusionConfig | FirstStageConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = build_first_stage(config) if isinstance(config, FirstStageConfig) else config.build(device="meta")
    return NamedTensors.of_module(model).shapes


def _check_tokenizer(config: LatentDiffusionConfig | FirstStageConfig, tokenizer: "AnyTokenizer | None") -> None:
    if tokenizer is None:
        return
    text = getattr(config, "conditioner", None)
    if isinstance(text, FrozenTextConfig):
        known = text.architecture.get("vocab_size", tokenizer.vocabulary_size)
    else:
        known = text.vocabulary_size if isinstance(text, TextTransformerConfig | ClipTextConfig) else 0
    if tokenizer.vocabulary_size > known:
        raise ValueError(
            f"the tokenizer's {tokenizer.vocabulary_size} ids must fit the text transformer's {known}: "
            "use the tokenizer that the model was trained with"
        )
