"""A folder with a model's files, wherever it lies: fetched if it is remote, and loaded."""

from __future__ import annotations

import contextlib
import fnmatch
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ldm_core import checkpoint
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.model_files import MODEL_FILES
from pipelines.conditions.kind import Prompts
from pipelines.conditions.kinds import prompts_in
from pipelines.errors import UserError
from pipelines.store.storage import Storage


def load_folder(folder: Storage, device: Any) -> tuple[LatentDiffusion, Prompts]:
    """Load the model in a folder, in evaluation mode, and what makes its inputs.

    Raises:
        UserError: its files are damaged, missing or do not belong together.
    """
    try:
        with local_folder(folder) as local:
            model = checkpoint.load(local, device=torch.device(device))
            return model, prompts_in(local, model.config)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise UserError(f"cannot load the model in {folder.url}: {' '.join(str(error).split())[:400]}") from error


@contextlib.contextmanager
def local_folder(folder: Storage) -> Iterator[Path]:
    """Yield a local folder with a model's files: the folder itself, or a download that is deleted afterwards."""
    if folder.is_local:
        yield Path(folder.path())
        return
    with tempfile.TemporaryDirectory(prefix="ldm-") as scratch:
        for name in folder.names():
            if any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES):
                folder.download(name, Path(scratch) / name)
        yield Path(scratch)
