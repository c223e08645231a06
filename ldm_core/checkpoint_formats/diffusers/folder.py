"""Folders of Hugging Face diffusers, in and out, without needing it.

LDMTextToImagePipeline    a model with the paper's text transformer
StableDiffusionPipeline   one with CLIP's
LDMPipeline               an unconditional one
AutoencoderKL, VQModel    a first stage alone
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm_core.checkpoint_formats.diffusers import read_config as reading
from ldm_core.checkpoint_formats.diffusers import tokenizers as tokenizers
from ldm_core.checkpoint_formats.diffusers import write_config as written
from ldm_core.checkpoint_formats.diffusers.names import (
    FIRST_STAGE_TABLE,
    TEXT_TRANSFORMER_TABLE,
    UNET_TABLE,
    current_name,
)
from ldm_core.checkpoint_formats.imported import Imported
from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.text import ClipTextConfig, TextTransformerConfig
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.networks.autoencoder import AutoencoderKL, VQAutoencoder, build_first_stage
from ldm_core.weights.clip_names import CLIP_TEXT_TABLE, current_clip_name
from ldm_core.weights.name_mapping import Entry, entries, to_ours, to_theirs
from ldm_core.weights.named_tensors import NamedTensors, merged
from ldm_core.weights.weights_files import open_foreign_weights, read_json, write_json, write_weights

if TYPE_CHECKING:
    from ldm_core.checkpoint import AnyTokenizer

INDEX_FILE = "model_index.json"
SCHEDULER_FILE = "scheduler_config.json"
WEIGHTS_STEM, TEXT_STEM = "diffusion_pytorch_model", "model"
PIPELINE_MAX_LENGTH = 77  # LDMTextToImagePipeline pads every prompt to this
PIPELINE_DOWNSAMPLING_FACTOR = 8  # and divides image sizes by this


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's folders, its text encoder's class and that one's tokenizer's."""

    first_stage: str
    text: str | None = None
    text_class: tuple[str, str] = ("", "")
    tokenizer_class: str = ""


PIPELINES: Mapping[str, Pipeline] = {
    "LDMTextToImagePipeline": Pipeline("vqvae", "bert", ("latent_diffusion", "LDMBertModel"), "BertTokenizer"),
    "StableDiffusionPipeline": Pipeline("vae", "text_encoder", ("transformers", "CLIPTextModel"), "CLIPTokenizer"),
    "LDMPipeline": Pipeline("vqvae"),
}


def import_folder(folder: str | Path) -> Imported:
    """Read a pipeline's folder, or that of a first stage alone; safetensors, or .bin files as tensors only.

    Raises:
        FileNotFoundError: a part of it is missing.
        ValueError: it is none of the classes above, sets what our networks cannot compute (the setting is named), or
            its weights are not its configuration's (they are listed).
    """
    folder = Path(folder)
    try:
        if (folder / INDEX_FILE).is_file():
            return _import_pipeline(folder, read_json(folder / INDEX_FILE))
        return _import_first_stage(folder)
    except TypeError as error:
        raise ValueError(f"the configurations in {folder} must hold what diffusers writes: {error}") from error


def export_folder(
    model: LatentDiffusion | AutoencoderKL | VQAutoencoder,
    folder: str | Path,
    *,
    tokenizer: AnyTokenizer | None = None,
    max_shard_gib: float | None = None,
) -> str:
    """Write a model as a folder for diffusers' `from_pretrained`.

    Args:
        model: a whole model, or a first stage alone.
        folder: made if it does not exist; files of the same names are replaced.
        tokenizer: of the captions, where the model takes some.
        max_shard_gib: size of the largest weights file in GiB; None is one file a network.

    Returns:
        The class in diffusers that reads it.

    Raises:
        ValueError: diffusers has no such network or pipeline, or a weight is not finite.
    """
    folder = Path(folder)
    if not isinstance(model, LatentDiffusion):
        settings = written.first_stage_config(model.config, scale_factor=1.0)
        state = to_theirs(entries(model, FIRST_STAGE_TABLE), model.state_dict())
        write_weights(NamedTensors.of_state(state), _made(folder), WEIGHTS_STEM, max_shard_gib=max_shard_gib)
        write_json(folder / "config.json", settings)
        return str(settings["_class_name"])
    kind = _pipeline_of(model.config)
    pipeline = PIPELINES[kind]
    # Before anything is written: each of these refuses what diffusers lacks.
    settings = _settings(model.config, pipeline)
    state = to_theirs(_entries(model, pipeline), model.state_dict())
    if pipeline.text:
        if tokenizer is None:
            raise ValueError(f"{kind} takes captions: give the tokenizer that the model was trained with")
        write = tokenizers.write_bert if pipeline.text == "bert" else tokenizers.write_clip
        write(tokenizer, _made(folder / "tokenizer"))
    for component, config in settings.items():
        weights = NamedTensors.of_state(state).under(f"{component}.")
        stem = TEXT_STEM if component == pipeline.text else WEIGHTS_STEM
        write_weights(weights, _made(folder / component), stem, max_shard_gib=max_shard_gib)
        write_json(folder / component / "config.json", config)
    schedule = written.scheduler_config(model.config.schedule, parameterization=model.config.parameterization)
    write_json(_made(folder / "scheduler") / SCHEDULER_FILE, schedule)
    write_json(folder / INDEX_FILE, _index(kind, pipeline, settings))
    return kind


def _import_pipeline(folder: Path, index: dict[str, Any]) -> Imported:
    kind = str(index.get("_class_name"))
    if kind not in PIPELINES:
        raise ValueError(f"{folder} must be one of {', '.join(PIPELINES)}, its {INDEX_FILE} says {kind!r}")
    pipeline = PIPELINES[kind]
    first_stage, scale_factor = reading.read_first_stage(read_json(folder / pipeline.first_stage / "config.json"))
    unet = reading.read_unet(read_json(folder / "unet" / "config.json"))
    schedule, parameterization = reading.read_scheduler(read_json(folder / "scheduler" / SCHEDULER_FILE))
    conditioner, tokenizer = _import_text(folder, pipeline)
    config = LatentDiffusionConfig(
        first_stage=first_stage,
        unet=unet,
        conditioner=conditioner,
        schedule=schedule,
        parameterization=parameterization,
        scale_factor=scale_factor,
    )
    parts = [_part(folder, component, WEIGHTS_STEM) for component in ("unet", pipeline.first_stage)]
    if pipeline.text:
        parts.append(_part(folder, pipeline.text, TEXT_STEM, "pytorch_model"))
    model = config.build(device="meta")
    shapes = NamedTensors.of_module(model).shapes
    weights = to_ours(_entries(model, pipeline), shapes, merged(str(folder), parts), "its config.json files")
    read = ("unet", "scheduler", "tokenizer", pipeline.first_stage, pipeline.text)
    left_out = [name for name, value in index.items() if isinstance(value, list) and any(value) and name not in read]
    return Imported(kind, config, weights, tokenizer, tuple(left_out))


def _import_text(
    folder: Path, pipeline: Pipeline
) -> tuple[TextTransformerConfig | ClipTextConfig | None, AnyTokenizer | None]:
    if pipeline.text is None:
        return None, None
    settings = read_json(folder / pipeline.text / "config.json")
    if pipeline.text == "bert":
        text = reading.read_text_transformer(settings)
        return text, tokenizers.read_bert(folder / "tokenizer", max_length=text.max_length)
    clip = reading.read_clip_text(settings)
    return clip, tokenizers.read_clip(folder / "tokenizer", max_length=clip.max_length)


def _import_first_stage(folder: Path) -> Imported:
    settings = read_json(folder / "config.json")
    config, _ = reading.read_first_stage(settings)
    with torch.device("meta"):
        model = build_first_stage(config)
    theirs = _part(folder, "", WEIGHTS_STEM)
    listed = entries(model, FIRST_STAGE_TABLE)
    weights = to_ours(listed, NamedTensors.of_module(model).shapes, theirs, "its config.json")
    return Imported(str(settings["_class_name"]), config, weights)


def _part(folder: Path, component: str, *stems: str) -> NamedTensors:
    """A network's weights under the names of today, its folder's name before them."""
    weights = open_foreign_weights(folder / component, *stems)
    if weights is None:
        raise FileNotFoundError(f"{folder / component} lacks its weights: neither {stems[0]}.safetensors nor .bin")
    rename = current_clip_name if component == "text_encoder" else current_name

    def name_of(name: str) -> str | None:
        renamed = rename(name)
        return f"{component}.{renamed}" if component and renamed else renamed

    return weights.renamed(name_of)


def _entries(model: LatentDiffusion, pipeline: Pipeline) -> list[Entry]:
    listed = entries(model.unet, UNET_TABLE, ours="unet.", theirs="unet.")
    listed += entries(model.first_stage, FIRST_STAGE_TABLE, ours="first_stage.", theirs=pipeline.first_stage)
    if pipeline.text and model.conditioner is not None:
        text = model.conditioner.get_submodule("transformer")
        table, theirs = (
            (TEXT_TRANSFORMER_TABLE, "bert.")
            if pipeline.text == "bert"
            else (CLIP_TEXT_TABLE, "text_encoder.text_model.")
        )
        listed += entries(text, table, ours="conditioner.transformer.", theirs=theirs)
    return listed


def _pipeline_of(config: LatentDiffusionConfig) -> str:
    match config.conditioner:
        case None:
            return "LDMPipeline"
        case ClipTextConfig():
            return "StableDiffusionPipeline"
        case TextTransformerConfig() as text:
            _check_text_pipeline(text, config.first_stage)
            return "LDMTextToImagePipeline"
    raise ValueError(
        f"diffusers has no pipeline for a model conditioned by {type(config.conditioner).__name__}: only for captions, "
        "or for none"
    )


def _check_text_pipeline(text: TextTransformerConfig, first_stage: FirstStageConfig) -> None:
    if text.max_length != PIPELINE_MAX_LENGTH:
        raise ValueError(
            f"LDMTextToImagePipeline pads prompts to {PIPELINE_MAX_LENGTH} tokens: "
            f"TextTransformerConfig.max_length must be that, got {text.max_length}"
        )
    if first_stage.downsampling_factor != PIPELINE_DOWNSAMPLING_FACTOR:
        raise ValueError(
            f"LDMTextToImagePipeline takes latents to be {PIPELINE_DOWNSAMPLING_FACTOR} times smaller than "
            f"images, got a first stage with downsampling factor {first_stage.downsampling_factor}"
        )


def _settings(config: LatentDiffusionConfig, pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """The config.json of every network of a pipeline, by its folder."""
    settings = {
        "unet": written.unet_config(config.unet),
        pipeline.first_stage: written.first_stage_config(config.first_stage, scale_factor=config.scale_factor),
    }
    match config.conditioner:
        case TextTransformerConfig() as text:
            settings["bert"] = written.text_transformer_config(text)
        case ClipTextConfig() as clip:
            settings["text_encoder"] = written.clip_text_config(clip)
    return settings


def _index(kind: str, pipeline: Pipeline, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    networks = ("unet", pipeline.first_stage)
    index: dict[str, Any] = {"_class_name": kind, "scheduler": ["diffusers", "DDIMScheduler"]}
    index |= {name: ["diffusers", settings[name]["_class_name"]] for name in networks}
    if pipeline.text:
        index |= {pipeline.text: list(pipeline.text_class), "tokenizer": ["transformers", pipeline.tokenizer_class]}
    if kind == "StableDiffusionPipeline":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
        index["requires_safety_checker"] = False
    return index


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
