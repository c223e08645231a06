"""A model as a folder: model.safetensors (float32), config.json and, for a model of captions, its tokenizers' files.

Training, import and export write it, `ldm_core.load` reads it; no pickle is involved. Large models may be in shards,
model-00001-of-0000N.safetensors with an index beside them. A first stage alone is a folder of the same kind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_core.conditioning.build import build_conditioner
from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.model import Config, LatentDiffusionConfig, config_from_dict, config_to_dict, takes_captions
from ldm_core.configs.text import FrozenTextConfig, JoinedTextConfig
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.model_files import CONFIG_FILE, TOKENIZER_FILE, VOCABULARY_FILE, WEIGHTS_FILE, WEIGHTS_STEM, numbered
from ldm_core.networks.autoencoder import FirstStage, build_first_stage
from ldm_core.tokenizers.joined import AnyTokenizer, JoinedTokenizer
from ldm_core.tokenizers.tokenizer import Tokenizer
from ldm_core.weights.finite import check_finite
from ldm_core.weights.named_tensors import NamedTensors, Shape, differences
from ldm_core.weights.weights_files import open_stem, read_json, write_json, write_weights


def save(
    model: LatentDiffusion | FirstStage,
    folder: str | Path,
    *,
    tokenizer: AnyTokenizer | None = None,
    max_shard_gib: float | None = None,
) -> None:
    """Write a model, or a first stage alone, to a folder; it is created if needed, files of the same names replaced.

    Args:
        model: its weights are written as float32 in the standard memory layout, whatever they are held in.
        folder: where to write.
        tokenizer: the captions' tokenizer, written beside the weights; of a model with several text encoders all of
            theirs.
        max_shard_gib: size of the largest weights file in GiB; None is one file whatever its size.

    Raises:
        ValueError: the tokenizer has more ids than the model's text encoder, or a weight is not finite.
    """
    write(model.config, NamedTensors.of_module(model), folder, tokenizer=tokenizer, max_shard_gib=max_shard_gib)


def write(
    config: Config,
    weights: NamedTensors,
    folder: str | Path,
    *,
    tokenizer: AnyTokenizer | None = None,
    max_shard_gib: float | None = None,
) -> None:
    """Write a model that need not be in memory: like `save`, one shard at a time.

    A first stage is one file whatever its size, because a recipe's `autoencoder.weights` takes one.

    Raises:
        ValueError: as `save`; or the weights are not those of the config, which are named.
    """
    _check_tokenizer(config, tokenizer)
    if wrong := differences(weight_shapes(config), weights.shapes):
        raise ValueError(f"the weights of {weights.source} must be those of the config, {wrong}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    limit = None if isinstance(config, FirstStageConfig) else max_shard_gib
    write_weights(weights, folder, WEIGHTS_STEM, max_shard_gib=limit)
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)
    # Last: without it, a folder whose writing was cut short is no model.
    write_config(config, folder)


def load(folder: str | Path, *, device: torch.device | str | None = None) -> LatentDiffusion:
    """Read a model from a folder that `save` or `write` wrote.

    Args:
        folder: holds model.safetensors (or its shards) and config.json.
        device: where to put the weights; None is torch's default device.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is damaged, or the weights are not those of the config; names the tensors.
    """
    return model_with(load_config(folder), open_weights(folder, device=device), device=device)


def model_with(
    config: LatentDiffusionConfig, weights: NamedTensors, *, device: torch.device | str | None = None
) -> LatentDiffusion:
    """Build a model around given weights, in evaluation mode.

    Weights on the CPU that are float32 in their file stay in its pages, which are read when they are first needed and
    copied when they are written to; all others are in memory once, as float32.

    Args:
        config: the model's configuration.
        weights: its weights, read here one by one.
        device: where to put them; None is torch's default device.

    Raises:
        ValueError: the weights are not those of the config, or not finite; names the tensors.
    """
    device = device or torch.get_default_device()
    # On the meta device nothing is initialized only to be overwritten.
    model = config.build(device="meta")
    if isinstance(config.conditioner, FrozenTextConfig | JoinedTextConfig):
        # Encoders of the transformers library keep tables outside of their state dict: these must be real.
        model.conditioner = build_conditioner(config.conditioner).to(device)
    _fill(model, weights, device)
    return model


def load_first_stage(folder: str | Path, *, device: torch.device | str | None = None) -> FirstStage:
    """Read a first stage alone from a folder that `save`, `write` or the autoencoder stage wrote; like `load`."""
    config = read_config(_existing(Path(folder), CONFIG_FILE))
    if not isinstance(config, FirstStageConfig):
        raise ValueError(f"{folder} must hold a first stage alone, it holds a whole model: use `load`")
    return first_stage_with(config, open_weights(folder, device=device))


def first_stage_with(config: FirstStageConfig, weights: NamedTensors) -> FirstStage:
    """Build a first stage around given weights, in evaluation mode.

    Args:
        config: the first stage's shape.
        weights: its weights, read here, on the device where the first stage is wanted.

    Raises:
        ValueError: the weights are not those of the config, or not finite; names the tensors.
    """
    with torch.device("meta"):
        model = build_first_stage(config)
    _fill(model, weights)
    return model


def load_config(folder: str | Path) -> LatentDiffusionConfig:
    """Read a model's config alone. Raises as `load`."""
    config = read_config(_existing(Path(folder), CONFIG_FILE))
    if isinstance(config, FirstStageConfig):
        raise ValueError(
            f"{folder} must hold a whole model, it holds a first stage alone: give it as autoencoder.weights"
        )
    return config


def read_config(path: str | Path) -> Config:
    """Read the config of a whole model or of a first stage from a config.json.

    Raises:
        ValueError: the file is damaged or describes neither.
    """
    values = read_json(Path(path))
    try:
        return config_from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path} must be a model's or a first stage's configuration: {error}") from error


def write_config(config: Config, folder: str | Path) -> None:
    """Write config.json, which `read_config` reads, to a folder."""
    write_json(Path(folder) / CONFIG_FILE, config_to_dict(config))


def load_tokenizer(folder: str | Path) -> AnyTokenizer:
    """Read the tokenizer saved beside a model, or one for each of its text encoders.

    It cuts captions to the length that the text encoder takes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not fit the model, or the model takes no captions.
    """
    folder, config = Path(folder), load_config(folder)
    if not takes_captions(config):
        raise ValueError(f"the model in {folder} takes no captions: sample it without a prompt")
    text: Any = config.conditioner
    count = len(text.encoders) if isinstance(text, JoinedTextConfig) else 1
    read = [_read_tokenizer(folder, number, text.max_length) for number in range(count)]
    tokenizer = JoinedTokenizer(read) if count > 1 else read[0]
    _check_tokenizer(config, tokenizer)
    return tokenizer


def _read_tokenizer(folder: Path, number: int, max_length: int) -> Tokenizer:
    name = numbered(TOKENIZER_FILE, number)
    if (folder / name).is_file():
        return Tokenizer.from_json_file(folder / name, max_length=max_length)
    vocabulary = _existing(folder, numbered(VOCABULARY_FILE, number))
    return Tokenizer.from_vocabulary_file(vocabulary, max_length=max_length)


def find_tokenizer(folder: str | Path) -> AnyTokenizer | None:
    """Read the tokenizer saved beside a model, None if there is none. Raises ValueError if it does not fit."""
    names = (VOCABULARY_FILE, TOKENIZER_FILE)
    return load_tokenizer(folder) if any((Path(folder) / name).is_file() for name in names) else None


def write_tokenizer(tokenizer: AnyTokenizer, folder: str | Path) -> None:
    """Write vocab.txt or, for any other kind than BERT's, tokenizer.json to a folder; of several each one's."""
    for number, each in enumerate(_each(tokenizer)):
        each.write(Path(folder) / numbered(each.file_name, number))


def _each(tokenizer: AnyTokenizer) -> tuple[Tokenizer, ...]:
    return tokenizer.tokenizers if isinstance(tokenizer, JoinedTokenizer) else (tokenizer,)


@contextlib.contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Yield a folder that appears as `target` only once everything in it is written.

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
    """Open the weights of a model folder, to be read one by one; they are not compared with its config.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is damaged.
    """
    weights = open_stem(Path(folder), WEIGHTS_STEM, device=str(device or torch.get_default_device()))
    if weights is None:
        raise FileNotFoundError(f"the model folder {folder} lacks {WEIGHTS_FILE}: was it written to the end?")
    return weights


def weight_shapes(config: Config) -> dict[str, Shape]:
    """Return the shape of every weight of a model, or of a first stage, by name; nothing is allocated."""
    with torch.device("meta"):
        model = build_first_stage(config) if isinstance(config, FirstStageConfig) else config.build(device="meta")
    return NamedTensors.of_module(model).shapes


def _fill(model: nn.Module, weights: NamedTensors, device: torch.device | str | None = None) -> None:
    """Give a model that was built on the meta device its weights, as float32; None leaves them where they are read."""
    if wrong := differences(NamedTensors.of_module(model).shapes, weights.shapes):
        raise ValueError(f"the weights in {weights.source} must be those of its config.json, {wrong}")
    tensors = {}
    for name, tensor in weights.items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        tensors[name] = tensor.to(device, dtype).contiguous()
    model.load_state_dict(tensors, assign=True)
    check_finite(model)
    model.eval()


def _existing(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder at {folder}: give a folder with {WEIGHTS_FILE} and {CONFIG_FILE}")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"the model folder {folder} lacks {name}: was it written to the end?")
    return folder / name


def _check_tokenizer(config: Config, tokenizer: AnyTokenizer | None) -> None:
    """Raise ValueError for a tokenizer whose ids reach beyond the text encoder's embedding, or too few or many."""
    if tokenizer is None:
        return
    text = getattr(config, "conditioner", None)
    encoders = text.encoders if isinstance(text, JoinedTextConfig) else (text,)
    if len(encoders) != len(_each(tokenizer)):
        raise ValueError(
            f"a model must have a tokenizer for each of its {len(encoders)} text encoders, got {len(_each(tokenizer))}"
        )
    for encoder, each in zip(encoders, _each(tokenizer), strict=True):
        _check_ids(encoder, each, takes_captions(config))


def _check_ids(text: Any, tokenizer: Tokenizer, wanted: bool) -> None:
    if isinstance(text, FrozenTextConfig):
        known = text.architecture.get("vocab_size", tokenizer.vocabulary_size)
    else:
        known = getattr(text, "vocabulary_size", 0) if wanted else 0
    if tokenizer.vocabulary_size > known:
        raise ValueError(
            f"the tokenizer's {tokenizer.vocabulary_size} ids must fit the text transformer's {known}: "
            "use the tokenizer that the model was trained with"
        )
