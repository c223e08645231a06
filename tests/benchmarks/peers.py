"""The same models in Hugging Face diffusers, with the same weights; absent where diffusers is not installed."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm_core.checkpoint_formats.diffusers import write_config as diffusers_config
from ldm_core.conditioning import TextConditioner
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.networks.autoencoder import AutoencoderKL, VQAutoencoder
from ldm_core.networks.unet import UNet
from tests.diffusers_weights import diffusers_weights


def available() -> bool:
    """Tell whether diffusers is installed."""
    return importlib.util.find_spec("diffusers") is not None


def be_quiet() -> None:
    """Keep their notes about dtypes and deprecations out of the tables."""
    warnings.filterwarnings("ignore")
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def diffusers_unet(unet: UNet) -> Any:
    """Build diffusers' UNet that computes what ours computes, on the same device."""
    import diffusers

    settings = diffusers_config.unet_config(unet.config)
    kind = getattr(diffusers, settings.pop("_class_name"))
    return _with_weights(kind(**settings), diffusers_weights(unet), unet)


def diffusers_first_stage(first_stage: AutoencoderKL | VQAutoencoder, *, scale_factor: float = 1.0) -> Any:
    """Build diffusers' `AutoencoderKL` or `VQModel` that computes what ours computes, on the same device."""
    import diffusers

    settings = diffusers_config.first_stage_config(first_stage.config, scale_factor=scale_factor)
    kind = getattr(diffusers, settings.pop("_class_name"))
    return _with_weights(kind(**settings), diffusers_weights(first_stage), first_stage)


def diffusers_pipeline(model: LatentDiffusion, vocabulary: Path) -> Any:
    """Build `LDMTextToImagePipeline` with our model's weights and a BERT tokenizer of that vocab.txt, silent."""
    import diffusers
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
    from transformers import BertTokenizer

    assert isinstance(model.conditioner, TextConditioner)
    transformer = model.conditioner.transformer
    settings = diffusers_config.text_transformer_config(transformer.config)
    schedule = diffusers_config.scheduler_config(model.config.schedule, parameterization=model.config.parameterization)
    schedule.pop("_class_name")
    pipeline: Any = diffusers.LDMTextToImagePipeline(
        vqvae=diffusers_first_stage(model.first_stage, scale_factor=model.scale_factor),
        bert=_with_weights(LDMBertModel(LDMBertConfig(**settings)), diffusers_weights(transformer), model.unet),
        tokenizer=BertTokenizer(str(vocabulary)),
        unet=diffusers_unet(model.unet),
        scheduler=diffusers.DDIMScheduler(**schedule),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _with_weights(theirs: nn.Module, weights: Mapping[str, Tensor], ours: nn.Module) -> nn.Module:
    theirs.load_state_dict(dict(weights), strict=True)
    return theirs.to(next(ours.parameters()).device)
