"""Training checkpoints: one file each, put under its final name atomically, so that what exists is whole.

Each start of the driver is an attempt with a Ray Train run folder of its own:
    `train/ATTEMPT/step_00001000/state.pt`. Ray Train can itself resume a
run of the same name, but it rewrites its snapshot in place: a process killed at that moment leaves an empty
    snapshot, which then refuses to
start. So its snapshot is never read back, and the newest checkpoint is found by its name.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.store.storage import Storage

if TYPE_CHECKING:
    import torch
    from ray.train import Checkpoint

STATE_FILE = "state.pt"
_PREFIX = "step_"


class Checkpoints:
    """A worker's access to checkpoints: loads the newest, saves in the background through Ray Train, which keeps
    the newest few.

    Args:
        attempt: folder of this attempt's Ray Train run.
        resume_from: checkpoint folder of an earlier attempt; used until this attempt has one of its own.
    """

    def __init__(self, attempt: Storage, resume_from: str | None) -> None:
        self.attempt, self.resume_from = attempt, resume_from

    def newest(self, device: torch.device) -> dict[str, Any] | None:
        """The state to go on from, the same on all workers; None at the very beginning."""
        import ray.train

        if (own := ray.train.get_checkpoint()) is not None:
            return load(self.attempt / Path(own.path).name, device)
        return load(Storage(self.resume_from), device) if self.resume_from else None

    def save(self, step: int, state: dict[str, Any] | None) -> None:
        """Called by all workers together; only one of them brings the state."""
        import ray.train
        import torch
        from ray.train import Checkpoint, CheckpointUploadMode

        checkpoint = None
        if state is not None:
            folder = Path(tempfile.mkdtemp(prefix="ldm-checkpoint-"))
            torch.save(state, folder / STATE_FILE)
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(
            {"step": step},
            checkpoint=checkpoint,
            checkpoint_dir_name=f"{_PREFIX}{step:08d}",
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=self._upload,
        )

    def _upload(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        # Ray's own upload copies in place: a process killed in the middle would leave half a file under the final
        # name.
        import ray.train

        with (self.attempt / name).writer(STATE_FILE) as path:
            shutil.copyfile(Path(checkpoint.path) / STATE_FILE, path)
        storage = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(
            storage.build_checkpoint_path_from_name(name), filesystem=storage.storage_filesystem
        )


def newest(train: Storage) -> str | None:
    """URL of the checkpoint folder with the most steps among all attempts; None where there is none."""
    found: list[tuple[int, str]] = []
    for attempt in train.names("*"):
        for name in (train / attempt).names(f"{_PREFIX}*"):
            folder = train / attempt / name
            if name.removeprefix(_PREFIX).isdigit() and folder.exists(STATE_FILE):
                found.append((int(name.removeprefix(_PREFIX)), folder.url))
    return max(found)[1] if found else None


def discard_attempts(train: Storage, *, keep: str | None) -> None:
    """Remove the folders of earlier attempts, except the one that holds the checkpoint `keep`."""
    for attempt in train.names("*"):
        if keep is None or not keep.startswith(f"{(train / attempt).url}/"):
            (train / attempt).remove()


def load(folder: Storage, device: torch.device) -> dict[str, Any]:
    """The state that was saved in a checkpoint folder; tensors and plain values only.

    Raises:
        UserError: where it cannot be read.
    """
    import torch

    with folder.local_copy(STATE_FILE) as path:
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0][:160]
            raise UserError(
                f"checkpoint {folder.url} is damaged ({reason}): remove it and run the same command again to go on "
                "from an earlier one"
            ) from error
    return state
