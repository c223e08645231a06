"""Training as the driver sees it: start Ray Train on a task, pass on what the workers tell, resume."""

from __future__ import annotations

import os
import threading
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.compute.host_memory import keep_freed_memory
from pipelines.errors import UserError
from pipelines.store.ledger import ArtifactWriter
from pipelines.training.checkpoints import Checkpoints, discard_attempts, newest
from pipelines.training.config import TrainingConfig
from pipelines.training.outputs import DETAILS_FILE, TRAIN_FOLDER
from pipelines.training.relay import Relay
from pipelines.training.task import Task

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from pipelines.stage import StageContext
    from pipelines.store.storage import Storage

POLL_S = 0.5


def finished(writer: ArtifactWriter) -> dict[str, Any] | None:
    """What `fit` returned, where training was finished before; None otherwise."""
    if not writer.storage.exists(DETAILS_FILE):
        return None
    (writer.storage / TRAIN_FOLDER).remove()
    details: dict[str, Any] = writer.storage.read_json(DETAILS_FILE)
    return details


def fit(task: Task, config: TrainingConfig, context: StageContext) -> dict[str, Any]:
    """Train a task's network by distributed data parallelism; resumes by itself.

    A worker that dies is replaced and training goes on from the newest checkpoint; after the whole process tree was
    killed the same call does the same. The samples seen, and on one kind of device the weights, are those of an
    uninterrupted run.

    Args:
        task: what to train; must be picklable.
        config: optimisation.
        context: of the stage. Final files are committed to its writer; checkpoints are kept under `train/`
            until training is finished.

    Returns:
        Facts for the manifest: steps, final_loss, workers, images_per_s, trained_parameters, and what the
            task's `save` returned.

    Raises:
        UserError: what a person can mend: a loss that is not finite, a damaged shard, workers that die again
            and again.
    """
    import ray

    train = context.writer.storage / TRAIN_FOLDER
    resume_from = newest(train)
    discard_attempts(train, keep=resume_from)
    relay = Relay()
    attempt = train / f"attempt_{uuid.uuid4().hex[:8]}"
    job = _Job(task, config, context.seed, context.writer, relay, Checkpoints(attempt, resume_from))
    # Ray Train takes over Ctrl-C when it is started from the main thread, and then ends the process as if all were
    # well.
    runner = _Runner(_trainer(job, attempt))
    runner.start()
    try:
        while runner.is_alive():
            _forward(relay, context, config.steps)
        runner.join()
        _forward(relay, context, config.steps, timeout_s=0.0)
    finally:
        relay.close()
    if runner.error is not None:
        raise _explained(runner.error) from runner.error
    assert ray.is_initialized()
    details = finished(context.writer)
    assert details is not None, "rank 0 writes the details before it returns"
    return details


@dataclass(frozen=True)
class _Job:
    """All that a worker needs."""

    task: Task
    config: TrainingConfig
    seed: int
    writer: ArtifactWriter
    relay: Relay
    checkpoints: Checkpoints


def _work(job: _Job) -> None:
    """Runs in each worker."""
    import ray.train
    import ray.train.torch

    from pipelines.training.loop import Place, TrainingLoop, use_cores

    worker = ray.train.get_context()
    use_cores(worker.get_local_world_size())
    keep_freed_memory()
    place = Place(worker.get_world_rank(), worker.get_world_size(), ray.train.torch.get_device())
    TrainingLoop(job.task, job.config, job.seed, job.writer, job.relay, place).run(job.checkpoints)


def _trainer(job: _Job, attempt: Storage) -> TorchTrainer:
    import ray
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchTrainer

    class StopOnUserError(UserCallback):
        """A UserError says that trying again is no use: raised in the controller, it ends the run at once."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if (known := _user_error(error)) is not None:
                    raise known

    # How soon a dead worker, and the end of training, are noticed.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # A process more that we have no use for: a pre-empted worker is replaced as any other that dies.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    config = job.config
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if config.use_gpu and gpus < config.workers:
        raise UserError(
            f"training.use_gpu is true and workers is {config.workers}, but the Ray cluster has {gpus} GPUs: "
            "set training.workers to at most that, or use_gpu to false"
        )
    use_gpu = gpus >= config.workers if config.use_gpu is None else config.use_gpu
    # A machine with fewer cores than workers would otherwise wait for cores for ever.
    cpus = min(1.0, int(100 * resources.get("CPU", config.workers) / config.workers) / 100)
    folder, _, name = attempt.url.rpartition("/")
    filesystem: dict[str, Any] = {}
    if not attempt.is_local:
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        folder = attempt.path().rpartition("/")[0]
        filesystem["storage_filesystem"] = PyFileSystem(FSSpecHandler(attempt.filesystem))
    return TorchTrainer(
        _work,  # type: ignore[arg-type]
        train_loop_config=job,  # type: ignore[arg-type]
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus, "GPU": int(use_gpu)}
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=[StopOnUserError()],  # type: ignore[list-item]
            logging_config=LoggingConfig(log_level="CRITICAL"),  # type: ignore[call-arg]
            **filesystem,
        ),
    )


class _Runner(threading.Thread):
    """Runs the trainer and keeps its error."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:
            self.error = error


def _forward(relay: Relay, context: StageContext, total_steps: int, timeout_s: float = POLL_S) -> None:
    for message in relay.receive(timeout_s):
        message.forward(context, total_steps)


def _user_error(error: BaseException | None) -> UserError | None:
    """The UserError that a worker raised, inside what Ray Train wraps around it."""
    while error is not None and not isinstance(error, UserError):
        failures: dict[int, Exception] = getattr(error, "worker_failures", {})
        for failure in failures.values():
            if (known := _user_error(failure)) is not None:
                return known
        error = getattr(error, "_base_exc", None) or getattr(error, "controller_failure", None)
    return error


def _explained(error: Exception) -> Exception:
    import ray.exceptions

    if (known := _user_error(error)) is not None:
        return UserError(str(known))
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if any(isinstance(failure, ray.exceptions.RayActorError) for failure in failures.values()):
        return UserError(
            "training workers died more often than training.max_failures allows (killed, or out of memory?): "
            "run the same command again to go on from the newest checkpoint"
        )
    return error
