"""What `prepare` gains on this machine, on the networks of the demo and of the recipe `small`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

import jobs
from ldm_core import presets
from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.text import TextTransformerConfig
from ldm_core.configs.unet import UNetConfig
from ldm_core.prepare import prepare
from pipelines.config import expand_preset
from tests.benchmarks.sampling import initial_model
from tests.benchmarks.shapes import Shape
from tests.benchmarks.train_step import prepared_step, random_batch

RECIPES = ("demo", "small")
EAGER, PREPARED = "eager", "prepared"
TRAINING, SAMPLING = "training", "sampling"
EAGER_SHAPE = Shape("fp32", channels_last=False)


def model_of(recipe: str) -> LatentDiffusionConfig:
    """Return the model of a recipe that is shipped."""
    values = yaml.safe_load((Path(jobs.__file__).parent / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    tokenizer, text = values["condition"]["tokenizer"], values["condition"]["transformer"]
    return replace(
        presets.get("tiny-txt2img"),
        first_stage=FirstStageConfig(**expand_preset(values["autoencoder"]["model"], presets.first_stage)),
        unet=UNetConfig(**values["diffusion"]["unet"]),
        conditioner=TextTransformerConfig(
            vocabulary_size=tokenizer["size"], max_length=tokenizer["max_length"], **text
        ),
        parameterization=values["diffusion"]["parameterization"],
    )


def candidates(
    config: LatentDiffusionConfig, batch_size: int, num_steps: int, device: torch.device
) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Return training steps and sampling runs, eager in fp32 and prepared, with the same weights and inputs.

    Args:
        config: a text-to-image model.
        batch_size: samples a step; half as many pictures are sampled at a time.
        num_steps: DDIM steps a run, with guidance.
        device: where they run.
    """
    text = config.conditioner
    assert isinstance(text, TextTransformerConfig)
    torch.manual_seed(0)
    tokens = torch.randint(0, text.vocabulary_size, (batch_size, text.max_length), device=device)
    batch = random_batch(config.unet, batch_size, text.max_length, device)

    def training(*, prepared: bool) -> Callable[[], Tensor]:
        network = initial_model(config, device).network().train()
        shape = None if prepared else EAGER_SHAPE
        return prepared_step(network, batch, lambda z, t: network(z, t, tokens), shape)

    def sampling(*, prepared: bool) -> Callable[[], Tensor]:
        model, seeds = initial_model(config, device), list(range(max(1, batch_size // 2)))
        if prepared:
            prepare(model, for_="sampling")
        return lambda: model.sample(
            tokens[: len(seeds)], seeds=seeds, unconditional=tokens[:1], num_steps=num_steps, guidance_scale=2.0
        )

    return {
        kind: {EAGER: make(prepared=False), PREPARED: make(prepared=True)}
        for kind, make in ((TRAINING, training), (SAMPLING, sampling))
    }
