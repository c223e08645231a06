"""Training checkpoints: one file each, put under its final name atomically, so that whatever exists is complete.

Each start of the driver is an attempt, with a run folder of its own: `train/ATTEMPT/step_00001000/state.pt`.

Ray Train can resume a run of the same name by itself, but it rewrites its snapshot of the run in place. A process that
is killed at that moment leaves an empty snapshot, and Ray Train then refuses to start. So no attempt reads the snapshot
of an earlier one: the newest checkpoint is found by its name.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode

from pipelines.errors import UserError
from pipelines.store.storage import Storage

STATE_FILE = "state.pt"
_PREFIX = "step_"


class Checkpoints:
    """A worker's access to checkpoints: load the newest, save in the background. Ray Train keeps the newest few.

    Args:
        attempt: the folder of this attempt's Ray Train run.
        resume_from: URL of a checkpoint folder of an earlier attempt; used until this attempt has one of its own.
    """

    def __init__(self, attempt: Storage, resume_from: str | None) -> None:
        self.attempt, self.resume_from = attempt, resume_from

    def newest(self, device: torch.device) -> dict[str, Any] | None:
        """Return the state to go on from, the same on all workers; None if training has to begin at step 0."""
        # Ray Train knows what this attempt has saved before it lost a worker.
        if (own := ray.train.get_checkpoint()) is not None:
            return load(self.attempt / Path(own.path).name, device)
        return load(Storage(self.resume_from), device) if self.resume_from else None

    def save(self, step: int, state: dict[str, Any] | None) -> None:
        """Save the state after `step` steps. Called by all workers together; only rank 0 brings the state."""
        checkpoint = None
        if state is not None:
            # To a local disk now, since training changes the tensors at the next step; from there by a thread.
            folder = Path(tempfile.mkdtemp(prefix="ldm-checkpoint-"))
            torch.save(state, folder / STATE_FILE)
            checkpoint = Checkpoint.from_directory(folder)
        # A barrier of Ray Train: it counts a checkpoint when all workers have reported it.
        ray.train.report(
            {"step": step},
            checkpoint=checkpoint,
            checkpoint_dir_name=f"{_PREFIX}{step:08d}",
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=self._upload,
        )

    def _upload(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        # Ray's own upload copies in place: a process killed during it would leave half a file under the final name,
        # which would be the newest checkpoint of the next attempt.
        with (self.attempt / name).writer(STATE_FILE) as path:
            shutil.copyfile(Path(checkpoint.path) / STATE_FILE, path)
        storage = ray.train.get_context().get_storage()
        return Checkpoint(storage.build_checkpoint_path_from_name(name), filesystem=storage.storage_filesystem)


def newest(train: Storage) -> str | None:
    """Return the URL of the checkpoint folder with the most steps among all attempts; None if there is none."""
    found: list[tuple[int, str]] = []
    for attempt in train.names("*"):
        for name in (train / attempt).names(f"{_PREFIX}*"):
            folder = train / attempt / name
            # Ray Train makes the folder before our file is in it.
            if name.removeprefix(_PREFIX).isdigit() and folder.exists(STATE_FILE):
                found.append((int(name.removeprefix(_PREFIX)), folder.url))
    return max(found)[1] if found else None


def discard_attempts(train: Storage, *, keep: str | None) -> None:
    """Remove the folders of earlier attempts, except the one that holds the checkpoint `keep`."""
    for attempt in train.names("*"):
        if keep is None or not keep.startswith(f"{(train / attempt).url}/"):
            (train / attempt).remove()


def load(folder: Storage, device: torch.device) -> dict[str, Any]:
    """Read the state saved in a checkpoint folder: tensors and plain values only, no code.

    Args:
        folder: the checkpoint's own folder.
        device: where to put the tensors.

    Raises:
        UserError: the file is missing or damaged.
    """
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
