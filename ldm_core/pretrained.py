"""Frozen text encoders with their pretrained weights: CLIP, OpenCLIP, or any encoder of the transformers library.

Weights come from a folder or file on disk or, given a network, from the hub by name. No pickle is executed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_core.conditioning import FrozenClipConditioner, FrozenTextConditioner
from ldm_core.configs.text import ClipTextConfig, FrozenTextConfig
from ldm_core.model_files import CONFIG_FILE
from ldm_core.networks.clip_text import ClipTextLayer, ClipTextTransformer
from ldm_core.tokenizers.clip import open_clip_tokenizer
from ldm_core.tokenizers.from_folder import tokenizer_from_folder
from ldm_core.tokenizers.tokenizer import Tokenizer
from ldm_core.weights.clip_names import CLIP_TEXT_TABLE, current_clip_name
from ldm_core.weights.digest import sha256_of_files
from ldm_core.weights.name_mapping import Table, entries
from ldm_core.weights.named_tensors import differences
from ldm_core.weights.weights_files import open_foreign_weights, open_tensors, read_json

HUB_FILES = ("*.json", "*.txt", "*.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class TextEncoder:
    """A frozen text encoder, ready to use.

    Attributes:
        conditioner: token ids (B, L) to a context (B, L, D); in evaluation mode, without gradients.
        tokenizer: captions to the token ids that the encoder was trained on.
        digest: sha256 (hex) of its weights files, a key for caches of its outputs.
    """

    conditioner: FrozenClipConditioner | FrozenTextConditioner
    tokenizer: Tokenizer
    digest: str


def text_encoder(source: str | Path, *, max_length: int | None = None) -> TextEncoder:
    """Load a text encoder from a folder of the transformers library.

    Args:
        source: a folder with config.json, weights (safetensors, or pytorch_model.bin read as tensors only) and a
            tokenizer; or a hub name such as "openai/clip-vit-large-patch14". Of a whole CLIP the text half is taken.
        max_length: number of tokens that captions are cut or padded to; None is the encoder's longest.

    Raises:
        FileNotFoundError: the folder or a file in it is missing, or the hub does not answer.
        ValueError: the weights are not those of the config; names the tensors.
    """
    folder = _folder(source)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} lacks {CONFIG_FILE}: give a folder of the transformers library")
    settings = read_json(folder / CONFIG_FILE)
    files = _weights_files(folder)
    conditioner: FrozenClipConditioner | FrozenTextConditioner
    if settings.get("model_type") in ("clip", "clip_text_model"):
        config = _clip_config(settings.get("text_config", {}) if settings["model_type"] == "clip" else settings)
        conditioner = clip = FrozenClipConditioner(config)
        weights = open_foreign_weights(folder, "model", "pytorch_model")
        assert weights is not None, "there are weights files"
        _load_clip(clip, weights.renamed(current_clip_name), _transformers_names(clip), origin=folder)
    else:
        conditioner = _wrapped(settings, folder, max_length)
    length = max_length or conditioner.config.max_length
    if length > conditioner.config.max_length:
        raise ValueError(f"max_length must be at most the encoder's {conditioner.config.max_length}, got {length}")
    tokenizer = tokenizer_from_folder(folder, max_length=length)
    return TextEncoder(conditioner, tokenizer, sha256_of_files(files))


def open_clip_text_encoder(architecture: str, weights: str | Path, *, unused_layers: int = 0) -> TextEncoder:
    """Load the text half of an OpenCLIP model from its weights file, with the tokenizer that open_clip ships.

    Args:
        architecture: open_clip's name of the model, e.g. "ViT-H-14".
        weights: a .safetensors or .pt file of the whole model.
        unused_layers: number of last layers to skip (Stable Diffusion 2 skips 1 of ViT-H-14).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: open_clip has no such architecture or it is no plain CLIP, or the weights are not its weights.
    """
    import open_clip

    settings = open_clip.get_model_config(architecture)
    if settings is None:
        raise ValueError(f"open_clip has no architecture {architecture!r}: see open_clip.list_models()")
    text = settings["text_cfg"]
    known = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
    if text.keys() - known:
        raise ValueError(
            f"the text half of {architecture} must be CLIP's transformer, it also sets {sorted(text.keys() - known)}"
        )
    config = ClipTextConfig(
        vocabulary_size=text.get("vocab_size", 49_408),
        max_length=text.get("context_length", 77),
        width=text["width"],
        layers=text["layers"],
        heads=text["heads"],
        feed_forward_width=int(text["width"] * text.get("mlp_ratio", 4.0)),
        activation="quick_gelu" if settings.get("quick_gelu") else "gelu",
        unused_layers=unused_layers,
    )
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"no OpenCLIP weights at {path}: give the .safetensors or .pt file of {architecture}")
    conditioner = FrozenClipConditioner(config)
    names = {entry.ours: entry.theirs[0] for entry in entries(conditioner.transformer, _OPEN_CLIP_TABLE)}
    _load_clip(conditioner, _open_clip_weights(path), names, origin=path)
    return TextEncoder(conditioner, open_clip_tokenizer(max_length=config.max_length), sha256_of_files([path]))


def _wrapped(settings: Mapping[str, Any], folder: Path, max_length: int | None) -> FrozenTextConditioner:
    """Load any other text encoder through the transformers library."""
    from transformers import AutoModel, AutoModelForTextEncoding

    width = settings.get("hidden_size") or settings.get("d_model")
    longest = settings.get("max_position_embeddings") or max_length or 77
    if not isinstance(width, int):
        raise ValueError(f"{folder}/config.json must be a text encoder's, it sets neither hidden_size nor d_model")
    config = FrozenTextConfig(
        architecture=dict(settings), width=width, max_length=longest, pad_id=settings.get("pad_token_id", 0)
    )
    auto = AutoModelForTextEncoding if settings.get("is_encoder_decoder") else AutoModel
    with torch.device("meta"):
        conditioner = FrozenTextConditioner(config)
    try:
        with _without_progress_bars():
            loaded, report = auto.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"the weights in {folder} must be those of its config.json: {_first_line(error)}") from error
    # Text encoders are often published without the pooler, and we take the hidden states before it.
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing or report["mismatched_keys"]:
        raise ValueError(
            f"the weights in {folder} must be those of its config.json, missing: {', '.join(missing[:8]) or 'none'}; "
            f"misshapen: {', '.join(str(key) for key in list(report['mismatched_keys'])[:8]) or 'none'}"
        )
    conditioner.encoder = loaded.float()
    conditioner.freeze()
    return conditioner


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keep the transformers library from drawing on a terminal that is somebody else's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _folder(source: str | Path) -> Path:
    if (folder := Path(source)).is_dir():
        return folder
    # A hub name is NAME or OWNER/NAME; anything else was meant as a path.
    if isinstance(source, Path) or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder at {source}: give a text encoder's folder or its hub name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(HUB_FILES)))
    except Exception as error:
        raise FileNotFoundError(
            f"{source} is neither a folder here nor available from the hub ({_first_line(error)}): "
            "download it on a machine with a network, and give the folder"
        ) from error


def _weights_files(folder: Path) -> list[Path]:
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise FileNotFoundError(f"{folder} lacks weights: no model.safetensors, nor shards of one")


def _clip_config(settings: Mapping[str, Any]) -> ClipTextConfig:
    activation = settings.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"CLIP's activation must be quick_gelu or gelu, config.json sets {activation!r}")
    return ClipTextConfig(
        vocabulary_size=settings.get("vocab_size", 49_408),
        max_length=settings.get("max_position_embeddings", 77),
        width=settings.get("hidden_size", 512),
        layers=settings.get("num_hidden_layers", 12),
        heads=settings.get("num_attention_heads", 8),
        feed_forward_width=settings.get("intermediate_size", 2048),
        activation=activation,
    )


def _transformers_names(conditioner: FrozenClipConditioner) -> dict[str, str]:
    """Map our name of every tensor to the one in files of the transformers library."""
    listed = entries(conditioner.transformer, CLIP_TEXT_TABLE, theirs="text_model.")
    return {entry.ours: entry.theirs[0] for entry in listed}


# `_open_clip_weights` splits OpenCLIP's fused projection into attn.query, attn.key and attn.value.
_OPEN_CLIP_TABLE: Table = {
    ClipTextTransformer: {
        "token_embedding": "token_embedding",
        "layers": "transformer.resblocks",
        "norm_out": "ln_final",
        "position_embedding": "position_embedding",
    },
    ClipTextLayer: {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "linear1": "mlp.c_fc",
        "linear2": "mlp.c_proj",
        "query": "attn.query",
        "key": "attn.key",
        "value": "attn.value",
        "output": "attn.out_proj",
    },
}


def _open_clip_weights(path: Path) -> dict[str, Tensor]:
    """Read an OpenCLIP file, its fused `attn.in_proj_*` (3D, ...) split into query, key and value."""
    weights: dict[str, Tensor] = {}
    for stored, tensor in open_tensors(path).items():
        name = stored.removeprefix("module.").removeprefix("text.")
        prefix, fused, kind = name.partition("in_proj_")
        if fused:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            weights |= {f"{prefix}{part}.{kind}": piece for part, piece in parts}
        else:
            weights["position_embedding.weight" if name == "positional_embedding" else name] = tensor
    return weights


def _load_clip(
    conditioner: FrozenClipConditioner, weights: Mapping[str, Tensor], names: Mapping[str, str], *, origin: Path
) -> None:
    """Copy the text half; the rest of a whole CLIP is ignored."""
    expected = {names[ours]: tuple(tensor.shape) for ours, tensor in conditioner.transformer.state_dict().items()}
    found = {name: tuple(weights[name].shape) for name in expected if name in weights}
    if wrong := differences(expected, found):
        raise ValueError(f"the weights in {origin} must be those of its architecture, {wrong}")
    conditioner.transformer.load_state_dict({ours: weights[theirs].float() for ours, theirs in names.items()})
    conditioner.freeze()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
