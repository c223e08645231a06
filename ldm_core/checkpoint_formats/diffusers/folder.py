"""Import and export folders of Hugging Face diffusers, without needing the library.

LDMTextToImagePipeline    a model with the paper's text transformer
StableDiffusionPipeline   one with CLIP's
LDMPipeline               an unconditional one
AutoencoderKL, VQModel    a first stage alone
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm_core.checkpoint_formats.diffusers import read_config, tokenizers, write_config
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
from ldm_core.model_files import CONFIG_FILE
from ldm_core.networks.autoencoder import FirstStage, build_first_stage
from ldm_core.tokenizers.joined import AnyTokenizer
from ldm_core.tokenizers.tokenizer import Tokenizer
from ldm_core.weights.clip_names import CLIP_TEXT_TABLE, current_clip_name
from ldm_core.weights.name_mapping import Entry, entries, to_ours, to_theirs
from ldm_core.weights.named_tensors import NamedTensors, merged
from ldm_core.weights.weights_files import open_foreign_weights, read_json, write_json, write_weights

INDEX_FILE = "model_index.json"
SCHEDULER_FILE = "scheduler_config.json"
# Stems of weights files, as diffusers and as transformers name them.
WEIGHTS_STEM, TEXT_STEM = "diffusion_pytorch_model", "model"
# LDMTextToImagePipeline pads every prompt to this many tokens, and divides image sizes by this factor.
PIPELINE_MAX_LENGTH = 77
PIPELINE_DOWNSAMPLING_FACTOR = 8


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of diffusers.

    Attributes:
        first_stage: folder of the first stage.
        text: folder of the text encoder; None for an unconditional pipeline.
        text_class: library and class of the text encoder.
        tokenizer_class: class of its tokenizer, in transformers.
    """

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
    """Open a pipeline's folder, or that of a first stage alone; of .bin files only tensors are read.

    Raises:
        FileNotFoundError: a part of it is missing.
        ValueError: it is of no class in this module's docstring, sets what our networks cannot compute (the setting is
            named), or its weights are not its configuration's (they are listed).
    """
    folder = Path(folder)
    try:
        if (folder / INDEX_FILE).is_file():
            return _import_pipeline(folder, read_json(folder / INDEX_FILE))
        return _import_first_stage(folder)
    except TypeError as error:
        raise ValueError(f"the configurations in {folder} must hold what diffusers writes: {error}") from error


def export_folder(
    model: LatentDiffusion | FirstStage,
    folder: str | Path,
    *,
    tokenizer: AnyTokenizer | None = None,
    max_shard_gib: float | None = None,
) -> str:
    """Write a model as a folder for diffusers' `from_pretrained`.

    Args:
        model: a whole model, or a first stage alone.
        folder: where to write; it is created if needed, and files of the same names are replaced.
        tokenizer: the captions' tokenizer, required if the model takes captions.
        max_shard_gib: size of the largest weights file in GiB; None is one file per network.

    Returns:
        The class of diffusers that reads the folder.

    Raises:
        ValueError: diffusers has no such network or pipeline, or a weight is not finite.
    """
    folder = Path(folder)
    if not isinstance(model, LatentDiffusion):
        settings = write_config.first_stage_config(model.config, scale_factor=1.0)
        state = to_theirs(entries(model, FIRST_STAGE_TABLE), model.state_dict())
        write_weights(NamedTensors.of_state(state), _created(folder), WEIGHTS_STEM, max_shard_gib=max_shard_gib)
        write_json(folder / CONFIG_FILE, settings)
        return str(settings["_class_name"])
    kind = _pipeline_of(model.config)
    pipeline = PIPELINES[kind]
    # Before anything is written: each of these refuses what diffusers lacks.
    settings = _settings(model.config, pipeline)
    schedule = write_config.scheduler_config(model.config.schedule, parameterization=model.config.parameterization)
    state = to_theirs(_entries(model, pipeline), model.state_dict())
    if pipeline.text:
        if not isinstance(tokenizer, Tokenizer):
            raise ValueError(f"{kind} takes captions: give the tokenizer that the model was trained with")
        write = tokenizers.write_bert if pipeline.text == "bert" else tokenizers.write_clip
        write(tokenizer, _created(folder / "tokenizer"))
    for component, config in settings.items():
        weights = NamedTensors.of_state(state).under(f"{component}.")
        stem = TEXT_STEM if component == pipeline.text else WEIGHTS_STEM
        write_weights(weights, _created(folder / component), stem, max_shard_gib=max_shard_gib)
        write_json(folder / component / CONFIG_FILE, config)
    write_json(_created(folder / "scheduler") / SCHEDULER_FILE, schedule)
    write_json(folder / INDEX_FILE, _index(kind, pipeline, settings))
    return kind


def _import_pipeline(folder: Path, index: dict[str, Any]) -> Imported:
    kind = str(index.get("_class_name"))
    if kind not in PIPELINES:
        raise ValueError(f"{folder} must be one of {', '.join(PIPELINES)}, its {INDEX_FILE} says {kind!r}")
    pipeline = PIPELINES[kind]
    first_stage, scale_factor = read_config.read_first_stage(read_json(folder / pipeline.first_stage / CONFIG_FILE))
    unet = read_config.read_unet(read_json(folder / "unet" / CONFIG_FILE))
    schedule, parameterization = read_config.read_scheduler(read_json(folder / "scheduler" / SCHEDULER_FILE))
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
) -> tuple[TextTransformerConfig | ClipTextConfig | None, Tokenizer | None]:
    if pipeline.text is None:
        return None, None
    settings = read_json(folder / pipeline.text / CONFIG_FILE)
    if pipeline.text == "bert":
        text = read_config.read_text_transformer(settings)
        return text, tokenizers.read_bert(folder / "tokenizer", max_length=text.max_length)
    clip = read_config.read_clip_text(settings)
    return clip, tokenizers.read_clip(folder / "tokenizer", max_length=clip.max_length)


def _import_first_stage(folder: Path) -> Imported:
    settings = read_json(folder / CONFIG_FILE)
    config, _ = read_config.read_first_stage(settings)
    with torch.device("meta"):
        model = build_first_stage(config)
    theirs = _part(folder, "", WEIGHTS_STEM)
    listed = entries(model, FIRST_STAGE_TABLE)
    weights = to_ours(listed, NamedTensors.of_module(model).shapes, theirs, "its config.json")
    return Imported(str(settings["_class_name"]), config, weights)


def _part(folder: Path, component: str, *stems: str) -> NamedTensors:
    """Open a network's weights under current names, each prefixed by the network's folder."""
    weights = open_foreign_weights(folder / component, *stems)
    if weights is None:
        raise FileNotFoundError(f"{folder / component} lacks its weights: neither {stems[0]}.safetensors nor .bin")
    rename = current_clip_name if component == "text_encoder" else current_name

    def name_of(name: str) -> str | None:
        renamed = rename(name)
        return f"{component}.{renamed}" if component and renamed else renamed

    return weights.renamed(name_of)


def _entries(model: LatentDiffusion, pipeline: Pipeline) -> list[Entry]:
    """List every weight of a model with its name in the pipeline, prefixed by the folder of its network."""
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
        f"diffusers has no pipeline for a model conditioned by {type(config.conditioner).__name__}: "
        "only for captions, and for unconditional models"
    )


def _check_text_pipeline(text: TextTransformerConfig, first_stage: FirstStageConfig) -> None:
    if text.max_length != PIPELINE_MAX_LENGTH:
        raise ValueError(
            f"LDMTextToImagePipeline pads prompts to {PIPELINE_MAX_LENGTH} tokens: "
            f"TextTransformerConfig.max_length must be that, got {text.max_length}"
        )
    if text.mask_padding:
        raise ValueError(
            f"LDMTextToImagePipeline attends to padding: TextTransformerConfig.pad_id must be None, got {text.pad_id}"
        )
    if first_stage.downsampling_factor != PIPELINE_DOWNSAMPLING_FACTOR:
        raise ValueError(
            f"LDMTextToImagePipeline takes latents to be {PIPELINE_DOWNSAMPLING_FACTOR} times smaller than "
            f"images, got a first stage with downsampling factor {first_stage.downsampling_factor}"
        )


def _settings(config: LatentDiffusionConfig, pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """Return the content of the config.json of every network of a pipeline, by its folder."""
    settings = {
        "unet": write_config.unet_config(config.unet),
        pipeline.first_stage: write_config.first_stage_config(config.first_stage, scale_factor=config.scale_factor),
    }
    match config.conditioner:
        case TextTransformerConfig() as text:
            settings["bert"] = write_config.text_transformer_config(text)
        case ClipTextConfig() as clip:
            settings["text_encoder"] = write_config.clip_text_config(clip)
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


def _created(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
