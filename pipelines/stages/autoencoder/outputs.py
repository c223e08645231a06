"""The files of the `autoencoder` artifact, the same for a trained and for a pretrained first stage."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.stages.autoencoder.artifact import FOLDER
from pipelines.stages.autoencoder.weights import CONFIG_FILE, WEIGHTS_FILE, save_first_stage
from pipelines.store.storage import sha256_file
from pipelines.training.outputs import commit_once

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ldm_core.networks.autoencoder import FirstStageConfig
    from pipelines.stages.autoencoder.reconstruction import ReconstructionTest
    from pipelines.store.ledger import ArtifactWriter


def commit_first_stage(
    writer: ArtifactWriter,
    first_stage: nn.Module,
    config: FirstStageConfig,
    test: ReconstructionTest,
    device: torch.device,
) -> dict[str, Any]:
    """Commit weights, configuration and the reconstructions' grid; returns facts for the manifest."""
    with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
        save_first_stage(first_stage, config, Path(folder))
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            commit_once(writer, f"{FOLDER}/{name}", partial(shutil.copyfile, Path(folder) / name))
    png = test.grid_png(first_stage, device)
    commit_once(writer, "reconstructions.png", lambda path: path.write_bytes(png))
    with writer.storage.open(f"{FOLDER}/{WEIGHTS_FILE}") as file:
        digest = sha256_file(file)
    return {
        "psnr_db": round(test.psnr_db(first_stage, device), 3),
        "psnr_pictures": len(test.pixels),
        "psnr_held_out": test.held_out,
        "parameters": sum(weight.numel() for weight in first_stage.parameters()),
        "encoder_sha256": digest,
    }
