"""Finding a trained model from whatever a person points at: the root of a run, an artifact, a model folder."""

import contextlib
import fnmatch
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_core.model_files import MODEL_FILES, WEIGHTS_FILE, WEIGHTS_INDEX_FILE
from pipelines.errors import UserError
from pipelines.store.ledger import MANIFEST, Ledger
from pipelines.store.storage import Storage

if TYPE_CHECKING:
    from ldm_core.latent_diffusion import LatentDiffusion
    from ldm_core.tokenizers.tokenizer import Tokenizer


def find_model(place: str) -> Storage:
    """The folder that holds model.safetensors and config.json.

    Args:
        place: root of a run (the newest finished diffusion artifact counts), an artifact folder, or a model folder.

    Raises:
        UserError: where there is no such thing.
    """
    storage = Storage(place)
    if not storage.exists():
        raise UserError(f"no checkpoint at {storage.url}: the folder does not exist")
    for candidate in (storage, storage / "model", storage / "first_stage"):
        if any(candidate.exists(name) for name in (WEIGHTS_FILE, WEIGHTS_INDEX_FILE)):
            return candidate
    finished = [key for key in (storage / "diffusion").names() if (storage / "diffusion" / key).exists(MANIFEST)]
    if finished:
        newest = max(finished, key=lambda key: (storage / "diffusion" / key).modified_at(MANIFEST))
        return Ledger(storage).storage("diffusion", newest) / "model"
    raise UserError(
        f"no model in {storage.url}: neither model.safetensors, nor model/, nor a finished diffusion stage; "
        "give the root of a finished run or a model folder"
    )


def open_model(place: str, device: str | None = None) -> "tuple[LatentDiffusion, Tokenizer, str]":
    """Load the model and its tokenizer from anywhere `find_model` looks.

    Returns:
        Model (in evaluation mode, on the device), tokenizer, and the folder they came from.

    Raises:
        UserError: where there is no model, or its files are damaged or do not belong together.
    """
    import torch

    from ldm_core import checkpoint

    folder = find_model(place)
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with local_folder(folder) as local:
            model = checkpoint.load(local, device=torch.device(chosen))
            tokenizer = checkpoint.load_tokenizer(local)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise UserError(f"cannot load the model in {folder.url}: {' '.join(str(error).split())[:400]}") from error
    return model, tokenizer, folder.url


@contextlib.contextmanager
def local_folder(folder: Storage) -> Iterator[Path]:
    """A model's files in a folder of this machine: in place, or fetched for as long as the block runs."""
    if folder.is_local:
        yield Path(folder.path())
        return
    with tempfile.TemporaryDirectory(prefix="ldm-") as scratch:
        for name in folder.names():
            if any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES):
                folder.download(name, Path(scratch) / name)
        yield Path(scratch)
