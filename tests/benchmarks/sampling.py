"""From captions to images, ours and diffusers': text transformer, 50 DDIM steps with guidance, decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.samplers import initial_noise
from tests.benchmarks import peers
from tests.benchmarks.shapes import OURS, THEIRS, Call, Shape

GUIDANCE_SCALE = 5.0
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "painting", "of", "fox", "in", "the", "snow")
PROMPT = "a painting of a fox in the snow"


def sides(
    config: LatentDiffusionConfig, batch_size: int, num_steps: int, device: torch.device, folder: Path
) -> dict[str, Callable[[Shape], Call]]:
    """Build both sides' whole pipelines with the same weights, caption and noise; ours alone without diffusers.

    Args:
        config: a text-to-image model with a KL first stage of f=8, as the pipeline has it.
        batch_size: images a run.
        num_steps: DDIM steps.
        device: where they run.
        folder: where the vocabulary is written.
    """
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    ids = [WORDS.index(word) for word in PROMPT.split()]
    tokens = torch.stack([_padded(ids)] * batch_size).to(device)
    empty = _padded([])[None].to(device)
    seeds = list(range(batch_size))

    def ours(shape: Shape) -> Call:
        model = initial_model(config, device)
        shape.prepare(model, "sampling")
        return lambda: model.sample(
            tokens, seeds=seeds, unconditional=empty, num_steps=num_steps, guidance_scale=GUIDANCE_SCALE
        )

    def theirs(shape: Shape) -> Call:
        pipeline = peers.diffusers_pipeline(initial_model(config, device), vocabulary)
        for part in (pipeline.unet, pipeline.vqvae, pipeline.bert):
            shape.infer_theirs(part)
        # The text transformer runs once.
        for part in (pipeline.unet, pipeline.vqvae.decoder):
            shape.compile_theirs(part)
        size = config.unet.latent_size
        noise = initial_noise(seeds, (config.unet.in_channels, size, size), device)
        latents = noise.to(shape.dtype).contiguous(memory_format=shape.memory_format)

        def run() -> Tensor:
            images = pipeline(
                [PROMPT] * batch_size,
                latents=latents,
                num_inference_steps=num_steps,
                guidance_scale=GUIDANCE_SCALE,
                output_type="pt",
            ).images
            return images * 2 - 1

        return run

    return {OURS: ours, THEIRS: theirs} if peers.available() else {OURS: ours}


def largest_difference(found: dict[str, Callable[[Shape], Call]]) -> float | None:
    """Return the largest difference between both sides' images in fp32, of the range [-1, 1]; None without a peer."""
    if THEIRS not in found:
        return None
    ours, theirs = (found[side](Shape("fp32", False))() for side in (OURS, THEIRS))
    return float((ours - theirs).abs().max())


def initial_model(config: LatentDiffusionConfig, device: torch.device) -> LatentDiffusion:
    """Build the model with the same random weights at every call, none of them zero."""
    torch.manual_seed(1)
    model = config.build(device)
    for weight in model.unet.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.02)
    return model.eval()


def _padded(ids: list[int]) -> Tensor:
    """Return (77,) ids as BertTokenizer gives them: [CLS] ... [SEP] [PAD] ..."""
    whole = [WORDS.index("[CLS]"), *ids, WORDS.index("[SEP]")]
    return torch.tensor(whole + [WORDS.index("[PAD]")] * (77 - len(whole)))
