"""`ldm sample`: sample pictures for prompts."""

from pathlib import Path
from typing import Literal, get_args

import click
from PIL import Image

from jobs.console import console, emit_json, json_option
from pipelines.drawing.grids import grid
from pipelines.errors import MisuseError, UserError
from pipelines.stages.diffusion.config import SamplerName, SamplingConfig


@click.command()
@click.argument("checkpoint")
@click.argument("prompts", nargs=-1)
@click.option("--out", default="samples", show_default=True, help="Folder for the pictures.")
@click.option("--images", default=1, show_default=True, type=click.IntRange(1), help="Pictures for each prompt.")
@click.option("--seed", default=0, show_default=True, help="Seed of the first picture; the following ones count up.")
@click.option("--steps", default=50, show_default=True, type=click.IntRange(1, 1000), help="Timesteps visited.")
@click.option(
    "--sampler",
    type=click.Choice(get_args(SamplerName)),
    default="ddim",
    show_default=True,
    help="The last three need 10 to 20 steps; heun's cost two evaluations each.",
)
@click.option(
    "--guidance",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Guidance scale; of no effect without a condition.",
)
@click.option("--eta", default=0.0, show_default=True, type=click.FloatRange(0), help="DDIM's eta.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="auto is bf16 where this machine is faster in it; only in fp32 a seed gives the same picture everywhere.",
)
@click.option("--device", help="Torch device; by default the first GPU, or the CPU if there is none.")
@json_option
def sample(
    checkpoint: str,
    prompts: tuple[str, ...],
    out: str,
    images: int,
    seed: int,
    steps: int,
    sampler: SamplerName,
    guidance: float,
    eta: float,
    precision: Literal["auto", "fp32", "bf16"],
    device: str | None,
    as_json: bool,
) -> None:
    """Sample pictures for prompts from a checkpoint.

    CHECKPOINT is the root of a run (its newest diffusion model), an artifact, or a model folder. PROMPTS are captions,
    or names of classes for a class-conditional model; an unconditional model takes none.

    \b
    Example:
      ldm sample runs/demo "a large red circle on the left" --images 4 --seed 7
      ldm sample runs/clothing dress hat --images 8
    """
    # Import torch, which takes seconds that `ldm sample --help` should not cost.
    from ldm_core.prepare import prepare
    from pipelines.stages.diffusion.find_model import open_model
    from pipelines.stages.diffusion.sampling import sample_prompts

    if eta and sampler != "ddim":
        raise MisuseError(f"only ddim has an eta, got --eta {eta} with --sampler {sampler}: leave it out")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be a folder: {error.strerror}") from error
    model, reader, place = open_model(checkpoint, device)
    if eta and model.config.schedule.is_flow:
        raise MisuseError(f"the model in {place} is a rectified flow, which has no eta: leave it out, got --eta {eta}")
    if not prompts and reader.guided:
        raise MisuseError(f"the model in {place} needs PROMPTS: what it is asked to show")
    # Not compiled: it would take longer than what most people sample.
    prepared = prepare(model, for_="sampling", precision=None if precision == "auto" else precision, compile=False)
    captions = [prompt for prompt in prompts or ("",) for _ in range(images)]
    seeds = [seed + i for i in range(len(captions))]
    sampling = SamplingConfig(sampler=sampler, num_steps=steps, guidance_scale=guidance, eta=eta)
    pictures = sample_prompts(model, reader, captions, seeds, sampling)
    files = [str(folder / f"{i:03d}.png") for i in range(len(captions))]
    for path, picture in zip(files, pictures):
        Image.fromarray(picture).save(path)
    sheet = str(folder / "grid.png")
    Image.fromarray(grid(pictures, columns=min(len(captions), 8), captions=captions)).save(sheet)
    console(as_json).print(f"{len(files)} pictures from {place}, in {prepared.precision}: {sheet}")
    if as_json:
        rows = [{"prompt": p, "seed": s, "file": f} for p, s, f in zip(captions, seeds, files)]
        emit_json({"checkpoint": place, "precision": prepared.precision, "grid": sheet, "images": rows})
