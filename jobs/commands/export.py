"""`ldm export`: a trained model as a folder for other programs."""

import click

from jobs.console import console


@click.command()
@click.argument("checkpoint")
@click.argument("folder")
@click.option("--format", "layout", type=click.Choice(["ldm", "diffusers"]), default="diffusers", show_default=True)
def export(checkpoint: str, folder: str, layout: str) -> None:
    """Write a trained model to FOLDER: safetensors and config, or the layout of diffusers' LDMTextToImagePipeline.

    CHECKPOINT is the root of a run, an artifact, or a model folder. FOLDER must not exist or be empty.

    \b
    Example:
      ldm export runs/demo exported/demo --format ldm
    """
    import tempfile
    from pathlib import Path

    from ldm_core import checkpoint as model_folder
    from ldm_core.diffusers_format import export_pipeline
    from pipelines.checkpoints import open_model
    from pipelines.errors import UserError

    target = Path(folder)
    if "://" in folder:
        raise UserError(f"FOLDER must be on this machine, got {folder}: export here, then copy it there")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder: nothing is overwritten; choose another")
    model, tokenizer, place = open_model(checkpoint, "cpu")
    if layout == "diffusers":
        with tempfile.TemporaryDirectory(prefix="ldm-") as scratch:
            vocabulary = Path(scratch) / "vocab.txt"
            tokenizer.write(vocabulary)
            try:
                export_pipeline(model, vocabulary, target)
            except ValueError as error:
                raise UserError(f"diffusers cannot load this model ({error}): use --format ldm") from error
    else:
        model_folder.save(model, target, tokenizer=tokenizer)
    console().print(f"{place} written to {target} ({layout})")
