"""A recipe and a data set small enough to run the whole pipeline inside a test."""

import json
from pathlib import Path
from typing import Any

import yaml

from jobs.demo.captions import caption
from jobs.demo.scenes import render, training_scenes

# For 32-pixel pictures, in the words of a recipe.
TINY_UNET: dict[str, Any] = {
    "latent_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_downsampling": [1],
    "num_heads": 2,
    "context_dim": 32,
}
TINY_TEXT = {"width": 32, "layers": 1, "heads": 2, "head_dim": 16}


def write_pictures(folder: Path, count: int, side: int = 48) -> Path:
    """Write rendered scenes with a metadata.jsonl beside them; return the table."""
    folder.mkdir(parents=True)
    rows = []
    for i, scene in enumerate(training_scenes(0, count)):
        render(scene, i, side=side).save(folder / f"{i:04d}.png")
        rows.append(json.dumps({"file": f"{i:04d}.png", "captions": [caption(scene, i), caption(scene, i + count)]}))
    table = folder / "metadata.jsonl"
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return table


def tiny_recipe(source: Path | str, **changes: Any) -> dict[str, Any]:
    """Return a recipe of all six stages in seconds: 32-pixel pictures, tiny networks, a dozen steps.

    Few workers: to start one takes longer than all it does here.
    """
    training = {"steps": 12, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 2, "ema_decay": 0.9, "workers": 2}
    training |= {"checkpoint_every_steps": 4, "sample_every_steps": 12, "log_every_steps": 2}
    recipe: dict[str, Any] = {
        "name": "tiny",
        "pairs": {
            "source": str(source),
            "columns": {"image": "file", "text": "captions"},
            "image_size": 32,
            "rows_per_shard": 16,
            "workers": 1,
        },
        "autoencoder": {
            "model": {"preset": "tiny-kl-f8", "channel_mult": [1, 1, 2, 2]},
            "training": training,
        },
        "condition": {"kind": "text", "tokenizer": {"size": 256, "max_length": 16}, "transformer": {**TINY_TEXT}},
        "latents": {"batch_size": 8, "workers": 1},
        "diffusion": {
            "unet": {**TINY_UNET},
            "training": training,
            "preview": {"num_steps": 2},
            "preview_prompts": 2,
        },
        "evaluate": {
            "prompts": ["a large red circle on the left", "a small blue star at the top"],
            "training_captions": 4,
            "workers": 1,
            "sampling": {"num_steps": 4, "guidance_scale": 2.0},
        },
    }
    return recipe | changes


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
