"""`ldm import`: convert another program's checkpoint to a model folder of ours."""

import click

from jobs.console import console, emit_json, json_option
from ldm_core.configs.model import LatentDiffusionConfig, takes_captions
from pipelines.errors import MisuseError, UserError


@click.command("import")
@click.argument("source")
@click.argument("folder")
@click.option("--preset", help="The published model or first stage that SOURCE is; inferred if left out.")
@click.option("--config", "config", metavar="FILE", help="Its configuration in place of a preset: the release's YAML.")
@click.option(
    "--weights", type=click.Choice(["ema", "raw"]), help="Averaged weights (the default if there are any) or raw."
)
@click.option("--tokenizer", metavar="PATH", help="vocab.txt, tokenizer.json or their folder, if SOURCE has none.")
@click.option(
    "--max-shard-gib",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    show_default=True,
    help="Largest weights file in GiB; a larger model is written in shards.",
)
@json_option
def import_(
    source: str,
    folder: str,
    preset: str | None,
    config: str | None,
    weights: str | None,
    tokenizer: str | None,
    max_shard_gib: float,
    as_json: bool,
) -> None:
    """Convert another program's checkpoint to a model of ours in FOLDER.

    SOURCE is a .ckpt or .safetensors of the paper's code release (or Stable Diffusion v1), a whole model or a first
    stage, or a folder of diffusers: LDMTextToImagePipeline, StableDiffusionPipeline, LDMPipeline, AutoencoderKL,
    VQModel. FOLDER must not exist or be empty. No code in SOURCE is run. A first stage's folder is what
    `autoencoder.weights` of a recipe takes.

    \b
    Example:
      ldm import model.ckpt models/txt2img --preset txt2img-1p4b --tokenizer bert/vocab.txt
      ldm import stable-diffusion-v1-5 models/sd-v1
    """
    # Imports torch, which takes seconds that `ldm import --help` should not cost.
    from ldm_core import checkpoint, presets
    from ldm_core.checkpoint_formats.importing import open_checkpoint

    if preset and config:
        raise MisuseError(f"--preset {preset} and --config {config} both say what {source} is: give one")
    if preset and preset not in presets.FIRST_STAGE_CONFIGS:
        try:
            presets.get(preset)
        except ValueError as error:
            raise MisuseError(f"--preset: {error}") from error
    try:
        with checkpoint.new_folder(folder) as partial:
            found = open_checkpoint(
                source,
                preset=preset,
                config=config,
                weights=weights,  # type: ignore[arg-type]
                tokenizer=tokenizer,
            )
            checkpoint.write(
                found.config, found.weights, partial, tokenizer=found.tokenizer, max_shard_gib=max_shard_gib
            )
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        raise UserError(f"cannot import {source}: {error}") from error
    parameters = found.parameters
    console(as_json).print(f"{found.kind}: {parameters:,} weights written to {folder}", markup=False)
    if found.left_out:
        console(as_json).print(f"left out, not being part of the model: {', '.join(found.left_out)}", markup=False)
    if takes_captions(found.config) and found.tokenizer is None:
        console(as_json).print("without a tokenizer it cannot be sampled by captions: add --tokenizer", markup=False)
    if as_json:
        facts = {"source": source, "folder": folder, "kind": found.kind, "parameters": parameters}
        whole = isinstance(found.config, LatentDiffusionConfig)
        emit_json({**facts, "model": whole, "tokenizer": found.tokenizer is not None, "left_out": found.left_out})
