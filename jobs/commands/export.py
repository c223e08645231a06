"""`ldm export`: write a trained model as a folder for other programs."""

from pathlib import Path

import click

from jobs.console import console, emit_json, json_option
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.model_files import CONFIG_FILE
from pipelines.errors import UserError


@click.command()
@click.argument("checkpoint")
@click.argument("folder")
@click.option(
    "--format", "layout", type=click.Choice(["ldm", "diffusers", "compvis"]), default="diffusers", show_default=True
)
@click.option(
    "--max-shard-gib",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    show_default=True,
    help="Largest .safetensors file in GiB; a larger network is written in shards.",
)
@json_option
def export(checkpoint: str, folder: str, layout: str, max_shard_gib: float, as_json: bool) -> None:
    """Write a trained model to FOLDER, for this project, for diffusers or for the paper's code release.

    CHECKPOINT is the root of a run, an artifact, or a model folder, also of a first stage alone. FOLDER must not exist
    or be empty.

    \b
    Formats:
      ldm        model.safetensors and config.json, as training and `ldm import` write them
      diffusers  a folder for LDMTextToImagePipeline, StableDiffusionPipeline, LDMPipeline, AutoencoderKL or VQModel
      compvis    model.ckpt and config.yaml

    \b
    Example:
      ldm export runs/demo exported/demo --format ldm
    """
    # Import torch, which takes seconds that `ldm export --help` should not cost.
    from ldm_core.checkpoint import new_folder
    from pipelines.stages.diffusion.find_model import find_model
    from pipelines.stages.diffusion.model_folder import local_folder

    if "://" in folder:
        raise UserError(f"FOLDER must be on this machine, got {folder}: export here, then copy it there")
    found = find_model(checkpoint)
    try:
        with local_folder(found) as source, new_folder(folder) as target:
            kind, note = _export(source, target, layout, max_shard_gib)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        raise UserError(f"cannot export {found.url} as {layout}: {error}") from error
    console(as_json).print(f"{found.url} written to {folder} ({kind})", markup=False)
    if note:
        console(as_json).print(note, markup=False)
    if as_json:
        emit_json({"checkpoint": found.url, "folder": folder, "format": layout, "kind": kind, "note": note})


def _export(source: Path, target: Path, layout: str, max_shard_gib: float) -> tuple[str, str | None]:
    """Write one layout; return what was written, in its own terms, and a note for the user or None."""
    from ldm_core import checkpoint
    from ldm_core.checkpoint_formats import compvis, diffusers

    config = checkpoint.read_config(source / CONFIG_FILE)
    whole = isinstance(config, LatentDiffusionConfig)
    tokenizer = checkpoint.find_tokenizer(source)
    if layout == "ldm":
        weights = checkpoint.open_weights(source)
        checkpoint.write(config, weights, target, tokenizer=tokenizer, max_shard_gib=max_shard_gib)
        return "ldm", None
    model = checkpoint.load(source, device="cpu") if whole else checkpoint.load_first_stage(source, device="cpu")
    if layout == "diffusers":
        return diffusers.export_folder(model, target, tokenizer=tokenizer, max_shard_gib=max_shard_gib), None
    reason = compvis.export_folder(model, target)
    if tokenizer is not None:
        checkpoint.write_tokenizer(tokenizer, target)
    note = f"config.json instead of config.yaml, for `ldm import` alone: {reason}" if reason else None
    return "compvis", note
