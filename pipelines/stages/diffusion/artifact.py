"""How later stages read the `diffusion` artifact."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_core.model_files import CONFIG_FILE, VOCABULARY_FILE, WEIGHTS_FILE
from pipelines.errors import UserError
from pipelines.store.ledger import Artifact

if TYPE_CHECKING:
    from ldm_core.latent_diffusion import LatentDiffusion
    from ldm_core.tokenizers.tokenizer import Tokenizer

STAGE_NAME = "diffusion"
FORMAT_VERSION = 1
FOLDER = "model"
FILES = (WEIGHTS_FILE, CONFIG_FILE, VOCABULARY_FILE)


def load_model(artifact: Artifact, device: Any = "cpu") -> "tuple[LatentDiffusion, Tokenizer]":
    """The final model (EMA weights, first stage included) in evaluation mode, and its tokenizer.

    Raises:
        UserError: where the artifact is of another stage or format, or damaged.
    """
    from ldm_core import checkpoint

    artifact.require(STAGE_NAME, FORMAT_VERSION)
    with _local_folder(artifact) as folder:
        try:
            return checkpoint.load(folder, device=device), checkpoint.load_tokenizer(folder)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{artifact.storage.url}/{FOLDER}: {error}") from error


@contextlib.contextmanager
def _local_folder(artifact: Artifact) -> Iterator[Path]:
    """The model's files in one local folder: in place, or fetched from remote storage for as long as the block runs."""
    storage = artifact.storage / FOLDER
    if storage.is_local:
        yield Path(storage.path())
        return
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
        for name in FILES:
            storage.download(name, Path(folder) / name)
        yield Path(folder)
