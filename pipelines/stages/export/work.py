"""The work of the `export` stage: write each layout, read ours back, commit."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldm_core import checkpoint
from ldm_core.checkpoint_formats import diffusers
from ldm_core.latent_diffusion import LatentDiffusion
from pipelines.errors import UserError
from pipelines.stage import StageContext
from pipelines.stages.diffusion.artifact import FORMAT_VERSION as DIFFUSION_FORMAT
from pipelines.stages.diffusion.artifact import load_model
from pipelines.stages.export.config import ExportConfig

DIFFUSERS_FOLDER = "diffusers"


def run(context: StageContext[ExportConfig]) -> dict[str, Any]:
    """Write every layout to scratch, read ours back, then commit file by file.

    Raises:
        UserError: the diffusion artifact is damaged, or diffusers is insisted on and has no counterpart of the model.
    """
    artifact = context.upstream["diffusion"].require("diffusion", DIFFUSION_FORMAT)
    model, prompts = load_model(artifact)
    folder = context.scratch / "export"
    checkpoint.save(model, folder, tokenizer=prompts.tokenizer)
    _check_same_weights(model, folder)
    details: dict[str, Any] = {"layouts": ["ldm"], "parameters": _parameters(model)}
    if context.config.diffusers is not False:
        try:
            diffusers.export_folder(model, folder / DIFFUSERS_FOLDER, tokenizer=prompts.tokenizer)
            details["layouts"].append("diffusers")
        except ValueError as error:
            if context.config.diffusers:
                raise UserError(f"no diffusers layout of this model: {error}; or set export.diffusers=false") from error
            shutil.rmtree(folder / DIFFUSERS_FOLDER, ignore_errors=True)
            details["diffusers_skipped"] = str(error)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for done, path in enumerate(files):
        context.progress(done, len(files), file=path.name)
        context.writer.commit_once(path.relative_to(folder).as_posix(), partial(shutil.copyfile, path))
    context.progress(len(files), len(files))
    return details | {"files": len(files)}


def _check_same_weights(model: LatentDiffusion, folder: Path) -> None:
    read_back = checkpoint.load(folder, device="cpu").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(read_back[name], tensor.float()), f"{name} changed on its way through {folder}"


def _parameters(model: LatentDiffusion) -> dict[str, int]:
    """Count the parameters of the model's parts, and of all of it."""
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in model.named_children()}
    return counts | {"total": sum(counts.values())}
