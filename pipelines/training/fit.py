"""Training as the driver sees it: start Ray Train on a task, pass on what the workers report, resume, stop."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import ray
import ray.exceptions
import ray.train
import ray.train.torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.util.placement_group import PlacementGroup, PlacementGroupID, placement_group_table, remove_placement_group

from pipelines.compute.host_memory import keep_freed_memory
from pipelines.compute.nodes import on_every_node
from pipelines.compute.resources import TELL_EVERY_S, alive, use_gpus
from pipelines.errors import LoaderDiedError, TransientError, UserError, explain, found_behind, raised_as_user_error
from pipelines.notices import tell, told_to
from pipelines.patience import expect_answers
from pipelines.shards.node_cache import remove_unused_here
from pipelines.store.commits import ArtifactWriter
from pipelines.store.patient import PatientFileSystem
from pipelines.training.checkpoints import Checkpoints, discard_attempts, newest
from pipelines.training.config import TrainingConfig
from pipelines.training.loop import Rank, TrainingLoop, use_cores
from pipelines.training.outputs import DETAILS_FILE, TRAIN_FOLDER
from pipelines.training.relay import Message, Relay
from pipelines.training.task import Task

if TYPE_CHECKING:
    from pipelines.stage import StageContext
    from pipelines.store.storage import Storage

POLL_S = 0.5
# Of Ray Train's controller, which asks every worker how it is.
POLLS_PER_S = 128
LOOK_EVERY_S = 10.0
# Between an attempt that a store ended, after minutes of patience, and the next one.
RESTART_PAUSE_S = 10.0
# How long workers may take to notice that they must stop: a step, or a preview, is finished first.
STOP_PATIENCE_S = 60.0


def finished(writer: ArtifactWriter) -> dict[str, Any] | None:
    """Return what `fit` returned if training was finished before, else None. Removes checkpoints no longer needed."""
    if not writer.storage.exists(DETAILS_FILE):
        return None
    (writer.storage / TRAIN_FOLDER).remove()
    details: dict[str, Any] = writer.storage.read_json(DETAILS_FILE)
    return details


def fit(task: Task, config: TrainingConfig, context: StageContext) -> dict[str, Any]:
    """Train a task's network by distributed data parallelism, from the newest checkpoint if there is one.

    A worker or controller that dies is replaced and training goes on from the newest checkpoint; a store that does not
    answer for longer than the patience with it delays training, and never ends it. After the whole process tree was
    killed the same call does the same. The samples seen, and on one kind of device the weights, are those of an
    uninterrupted run.

    Args:
        task: what to train; must be picklable.
        config: the optimisation section of the recipe.
        context: the stage's context. Final files are committed to its writer; checkpoints are kept under `train/`
            until training is finished. Its `check` is called while training runs; whatever it raises stops training.

    Returns:
        Facts for the manifest: steps, final_loss, workers, images_per_s, trained_parameters, and what the task's
        `save` returned.

    Raises:
        UserError: what a person can mend: a loss that is not finite, a damaged shard, workers that die again and
            again, a root that another driver has taken over.
    """
    try:
        return _train(task, config, context)
    finally:
        # What killed workers had fetched lies on their nodes until somebody comes who may remove it.
        if not isinstance(sys.exception(), KeyboardInterrupt):
            # A cluster that is gone must not hide what ended training.
            with contextlib.suppress(Exception):
                on_every_node(remove_unused_here)


def _train(task: Task, config: TrainingConfig, context: StageContext) -> dict[str, Any]:
    train = context.writer.storage / TRAIN_FOLDER
    scaling = _scaling(config, context)
    failures = _Failures(config.max_failures)
    while True:
        try:
            resume_from = newest(train)
            if failures.judge(resume_from):
                _go_on(failures.reason, context)
            return _attempt(task, config, context, train, scaling, resume_from)
        except TransientError as error:
            # Nobody has to mend anything but the store, and hours of training are worth waiting for it.
            _go_on(str(error), context)
        except _FailedWorkersError as error:
            failures.last, failures.reason = error, "its workers failed too often"
        except ray.exceptions.RayActorError as error:
            # Ray Train replaces workers; its controller, which may live on any node, is replaced by nobody else.
            _release_workers()
            failures.last, failures.reason = error, "Ray Train's controller died"


def _go_on(reason: str, context: StageContext) -> None:
    tell(f"training stopped ({reason}): it goes on from the newest checkpoint")
    until = time.monotonic() + RESTART_PAUSE_S
    while time.monotonic() < until:
        context.check()
        time.sleep(POLL_S)


class _FailedWorkersError(Exception):
    """Ray Train has given up on its workers, `max_failures` times replaced. `shown` is what to raise for it."""

    def __init__(self, shown: Exception) -> None:
        super().__init__(str(shown))
        self.shown = shown


class _Failures:
    """Decides whether training goes on after a failure: those before a new checkpoint do not count any more.

    Otherwise every long training on many machines would end one day.

    Attributes:
        last: what ended the last attempt, unless it was judged already.
        reason: the same in a few words.
    """

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0
        self._reached: str | None = None
        self.last: Exception | None = None
        self.reason = ""

    def judge(self, reached: str | None) -> bool:
        """Raise what ended the last attempt unless it may be tried again; tell whether something had ended it.

        Args:
            reached: the newest checkpoint now.
        """
        advanced, self._reached = reached != self._reached, reached
        error, self.last = self.last, None
        if error is None:
            return False
        self._count = 1 if advanced else self._count + 1
        if isinstance(error, _FailedWorkersError) and not (advanced and self._most):
            raise error.shown from error
        if self._count > self._most:
            raise UserError(
                f"Ray Train's controller died {self._count} times without a new checkpoint, more often than "
                "training.max_failures allows (killed, or out of memory?): run the same command again to go on from "
                "the newest checkpoint"
            ) from error
        return True


def _attempt(
    task: Task,
    config: TrainingConfig,
    context: StageContext,
    train: Storage,
    scaling: ScalingConfig,
    resume_from: str | None,
) -> dict[str, Any]:
    """Train from a checkpoint, or from the beginning, to the end.

    Raises:
        TransientError: a store did not recover in time.
        RayActorError: Ray Train's controller died.
        _FailedWorkersError: workers failed more often than they are replaced.
        UserError: what a person can mend.
    """
    if (details := finished(context.writer)) is not None:
        # The last attempt lost touch with the store after all was done.
        return details
    discard_attempts(train, keep=resume_from)
    relay = Relay()
    attempt = train / f"attempt_{uuid.uuid4().hex[:8]}"
    job = _WorkerJob(task, config, context.seed, context.writer, relay, Checkpoints(attempt, resume_from))
    training = _TrainingThread(_trainer(job, attempt, scaling))
    training.start()
    try:
        missing = _MissingResources(config.workers, cast(dict[str, float], scaling.resources_per_worker))
        while training.is_alive():
            _forward(relay, context, config.steps)
            context.check()
            missing.watch()
        _forward(relay, context, config.steps, timeout_s=0.0)
    except BaseException as error:
        # Ctrl-C is not kept waiting: the process ends, and with it the workers.
        _stop(training, relay, str(error), STOP_PATIENCE_S if isinstance(error, Exception) else 0.0)
        raise
    finally:
        relay.close()
    if training.error is not None:
        raise _raised_for(training.error) from training.error
    details = finished(context.writer)
    assert details is not None, "rank 0 writes the details before it returns"
    return details


def _release_workers() -> None:
    """Give back what the workers of a dead controller reserved: Ray's own way to notice its death needs a dashboard."""
    job = ray.get_runtime_context().get_job_id()
    for number, group in placement_group_table().items():
        # It ends with the number of the job, of which this training is all that reserves anything.
        if number.endswith(job) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(number))))


@dataclass(frozen=True)
class _WorkerJob:
    """All that a worker needs to know, sent to it by Ray Train."""

    task: Task
    config: TrainingConfig
    seed: int
    writer: ArtifactWriter
    relay: Relay
    checkpoints: Checkpoints


def _run_worker(job: _WorkerJob) -> None:
    """Train in a worker process: Ray Train's training function."""
    expect_answers()
    worker = ray.train.get_context()
    use_cores(worker.get_local_world_size())
    keep_freed_memory()
    rank = Rank(worker.get_world_rank(), worker.get_world_size(), ray.train.torch.get_device())
    # What it waits for is also of interest to whoever watches the driver.
    with told_to(lambda line: job.relay.send(Message(0, notice=line))):
        TrainingLoop(job.task, job.config, job.seed, job.writer, job.relay, rank).run(job.checkpoints)


class _StopOnUserError(UserCallback):
    """Ends the run at a UserError, which says that trying again is of no use. Runs in Ray Train's controller.

    At a TransientError too: `fit` then begins anew, as often as needed, while Ray Train would count it as a failure of
    the workers and give up after `max_failures`.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        # Without a callback that raises, every exception of a worker counts as a failure and is tried again.
        for error in worker_exceptions.values():
            # Only for errors that were raised as such: a full disk on one node may pass with another worker.
            if (known := raised_as_user_error(error)) is not None:
                raise known


def _trainer(job: _WorkerJob, attempt: Storage, scaling: ScalingConfig) -> TorchTrainer:
    # How soon a dead worker, and the end of training, are noticed.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(max(0.5, job.config.workers / POLLS_PER_S)))
    # The watcher is one more process, of no use here: a pre-empted worker is replaced like any other that dies.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    return TorchTrainer(
        _run_worker,  # type: ignore[arg-type]
        train_loop_config=job,  # type: ignore[arg-type]
        scaling_config=scaling,
        run_config=_run_config(job.config, attempt),
    )


def _scaling(config: TrainingConfig, context: StageContext) -> ScalingConfig:
    """Return the workers and what each reserves of the cluster; UserError if GPUs that it needs do not come."""
    use_gpu = use_gpus(
        config.use_gpu,
        config.workers,
        who="training",
        advice="add nodes, set training.workers to what there is, or training.use_gpu to false",
        check=context.check,
    )
    # On a machine with fewer cores than workers, Ray would otherwise wait for cores for ever.
    cpus = min(1.0, int(100 * (alive("CPU") or config.workers) / config.workers) / 100)
    per_worker = {"CPU": cpus, "GPU": int(use_gpu)}
    return ScalingConfig(num_workers=config.workers, use_gpu=use_gpu, resources_per_worker=per_worker)


class _MissingResources:
    """Tells, once a minute, what the cluster has too little of: Ray waits in silence for nodes that have left."""

    def __init__(self, workers: int, per_worker: dict[str, float]) -> None:
        self._needed = {name: each * workers for name, each in per_worker.items() if each}
        self._looked_at = self._told_at = time.monotonic() - TELL_EVERY_S

    def watch(self) -> None:
        """Look whether the nodes of the cluster have room for the workers; to be called often."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_EVERY_S or now - self._told_at < TELL_EVERY_S:
            return
        self._looked_at = now
        found = {name: ray.cluster_resources().get(name, 0) for name in self._needed}
        if short := [name for name, needed in self._needed.items() if found[name] < needed]:
            self._told_at = now
            amounts = ", ".join(f"{self._needed[name]:g} {name} (the cluster has {found[name]:g})" for name in short)
            tell(f"training: a node has left; waiting for {amounts}")


def _run_config(config: TrainingConfig, attempt: Storage) -> RunConfig:
    """Return where Ray Train keeps this attempt's folder, how many checkpoints, and when it gives up."""
    folder, _, name = attempt.url.rpartition("/")
    filesystem: dict[str, Any] = {}
    if not attempt.is_local:
        # Through our own fsspec file system, with its credentials and endpoint; Ray's default would look for its own.
        folder = attempt.path().rpartition("/")[0]
        filesystem["storage_filesystem"] = PyFileSystem(FSSpecHandler(PatientFileSystem(attempt.url)))
    return RunConfig(
        name=name,
        storage_path=folder,
        checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
        failure_config=FailureConfig(max_failures=config.max_failures),
        callbacks=[_StopOnUserError()],  # type: ignore[list-item]
        logging_config=LoggingConfig(log_level="CRITICAL"),  # type: ignore[call-arg]
        **filesystem,
    )


class _TrainingThread(threading.Thread):
    """Waits for Ray Train, and keeps its error.

    A thread of its own, because Ray Train started from the main thread takes over Ctrl-C and then ends the process as
    if all were well; and because the driver has other things to do meanwhile.
    """

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
    for message in sorted(relay.receive(timeout_s), key=lambda message: message.step):
        message.forward(context, total_steps)


def _stop(training: _TrainingThread, relay: Relay, reason: str, patience_s: float) -> None:
    """Have the workers end themselves, and wait until Ray Train has released them.

    Ray Train has no public call that ends a run. Workers that take longer end with the driver's connection to Ray.
    """
    deadline = time.monotonic() + patience_s
    while training.is_alive():
        # Every time anew: the mailbox forgets the order if it dies.
        relay.order_stop(reason)
        if time.monotonic() >= deadline:
            return
        training.join(POLL_S)


def _raised_for(error: Exception) -> Exception:
    """Return the error to raise for one of Ray Train's."""
    if (raised := raised_as_user_error(error)) is not None:
        # Once more: Ray's own class for it is not ours alone.
        return type(raised)(str(raised)) if isinstance(raised, TransientError) else UserError(str(raised))
    if not (failures := getattr(error, "worker_failures", {})):
        return explain(error) or error
    if (known := explain(error)) is not None:
        return _FailedWorkersError(UserError(str(known)))
    # What a worker's own code raises is wrapped with its traceback; what Ray finds out about a worker is not.
    if not all(hasattr(failure, "_base_exc") for failure in failures.values()):
        return _FailedWorkersError(
            UserError(
                "training workers died more often than training.max_failures allows (killed, or out of memory?): "
                "run the same command again to go on from the newest checkpoint"
            )
        )
    if (died := found_behind(error, LoaderDiedError)) is not None:
        return _FailedWorkersError(
            UserError(
                f"{died}, more often than training.max_failures allows: give the nodes more memory, or set "
                "training.loader_workers lower, and run the same command again to go on from the newest checkpoint"
            )
        )
    return _FailedWorkersError(error)
