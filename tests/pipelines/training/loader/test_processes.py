"""Batches from processes of their own: the same as from a thread, and no process or byte left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
import pytest
import torch

from pipelines.errors import LoaderDiedError, UserError
from pipelines.notices import told_to
from pipelines.shards.format import encode_npy
from pipelines.stages.diffusion.learner import DiffusionLearner
from pipelines.training.fit import _FailedWorkersError, _raised_for
from pipelines.training.loader.open import open_loader, tensors_of
from pipelines.training.loader.processes import SLOTS, ProcessLoader
from pipelines.training.loader.source import Source
from tests.golden.test_golden_losses import TRAINING, diffusion
from tests.pipelines.stages.diffusion.test_diffusion_stage import learner, upstream
from tests.pipelines.training.loader.numbers import BATCH_SIZE, Numbers

CPU = torch.device("cpu")

__all__ = ["upstream"]


@contextlib.contextmanager
def loading(source: Source, *, first: int = 0, last: int = 10**9, processes: int = 2) -> Iterator[ProcessLoader]:
    loader = ProcessLoader(source, 0, 1, first, last, processes=processes, device=CPU)
    try:
        yield loader
    finally:
        loader.close()


def wait_until(holds: Callable[[], bool]) -> None:
    """Return when a condition holds; the test's own time limit ends it otherwise."""
    while not holds():
        time.sleep(0.02)


def take(loader: ProcessLoader) -> NoReturn:
    """Take batches until it fails."""
    while True:
        loader.next()


def begun(log: Path) -> list[tuple[int, int]]:
    """Return pid and step of each batch that was begun."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(pid), int(step)) for pid, step in map(str.split, lines)]


def batches(trainer: DiffusionLearner, rank: int, world_size: int, first: int, last: int, processes: int) -> list[Any]:
    loader = open_loader(trainer.batches, rank, world_size, first, last, processes=processes, device=CPU)
    try:
        return [{name: tensor.clone() for name, tensor in loader.next().items()} for _ in range(first, last)]
    finally:
        loader.close()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_what_a_process_tells_is_told_by_the_one_that_trains(tmp_path: Path) -> None:
    lines: list[str] = []
    with told_to(lines.append), loading(Numbers(tmp_path / "log", tells_at=3), last=6) as loader:
        places = [loader.next()["places"].tolist() for _ in range(6)]
    assert lines == ["the cache is too small"]
    assert len(places) == 6


def test_a_process_that_reads_latents_imports_nothing_that_it_does_not_need() -> None:
    check = """
import sys
import pipelines.stages.diffusion.batches, pipelines.training.loader.worker
print(*({"PIL", "matplotlib", "pipelines.stages.latents.config", "ray", "torch"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_any_number_of_processes_makes_the_same_batches_wherever_training_begins(upstream: dict[str, Any]) -> None:
    trainer = learner(upstream)
    expected = [tensors_of(trainer.batches, trainer.batches.order.slice(step, 0, 1)) for step in range(12)]
    for processes in (0, 1, 3):
        for first in (0, 7):
            for found, whole in zip(batches(trainer, 0, 1, first, 12, processes), expected[first:], strict=True):
                assert_same(found, whole)
    halves = [batches(trainer, rank, 2, 5, 9, 2) for rank in range(2)]
    for step, parts in enumerate(zip(*halves, strict=True), start=5):
        # Which captions differ is each worker's own affair.
        shared = parts[0].keys() - {"distinct", "caption"}
        joined = {name: torch.cat([part[name] for part in parts]) for name in shared}
        assert_same(joined, {name: expected[step][name] for name in shared})


def test_training_from_processes_is_the_training_from_a_thread(own_threads: None, tmp_path: Path) -> None:
    training = {**TRAINING, "steps": 4}
    thread, processes = (
        diffusion(tmp_path / str(number), training={**training, "loader_workers": number}) for number in (0, 2)
    )
    assert processes == thread


def test_batches_come_whole_however_they_grow(tmp_path: Path) -> None:
    with loading(Numbers(tmp_path / "log", grows=True), last=20) as loader:
        for step in range(20):
            values = loader.next()["values"]
            assert values.shape == (BATCH_SIZE, 5000 * step)
            positions = torch.arange(BATCH_SIZE * step, BATCH_SIZE * (step + 1), dtype=torch.float32)
            assert torch.equal(values, positions[:, None].expand_as(values))


def test_a_batch_in_use_is_never_written_over(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with loading(Numbers(log), processes=1) as loader:
        loader.next()
        batch = loader.next()
        before = {name: tensor.clone() for name, tensor in batch.items()}
        process = psutil.Process(loader._workers[0].process.pid)
        # The first slot was given back, and the one in use is not.
        wait_until(lambda: len(begun(log)) > SLOTS and process.status() == psutil.STATUS_SLEEPING)
        assert_same(batch, before)
        assert len(begun(log)) == 1 + SLOTS
        assert float(loader.next()["values"][0, 0]) == 2 * BATCH_SIZE


def test_a_killed_process_is_one_clear_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with loading(Numbers(log)) as loader:
        loader.next()
        pids = [worker.process.pid for worker in loader._workers]
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(
            LoaderDiedError, match=r"^a process of the loader on .* died \(by signal 9: killed, or out of"
        ):
            take(loader)
    assert not any(map(psutil.pid_exists, pids))


def test_the_death_of_any_process_is_noticed_while_waiting_for_another(tmp_path: Path) -> None:
    """The first process would make its batch only after the second one has died."""
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    with loading(Numbers(fifo)) as loader:
        # Nobody reads from the pipe, so that neither gets beyond opening it.
        os.kill(loader._workers[1].process.pid, signal.SIGKILL)
        with pytest.raises(LoaderDiedError):
            loader.next()


def test_a_mistake_of_the_data_travels_as_its_line(tmp_path: Path) -> None:
    with loading(Numbers(tmp_path / "log", fails_at=3)) as loader:
        for step in range(3):
            assert float(loader.next()["values"][0, 0]) == BATCH_SIZE * step
        with pytest.raises(UserError, match=r"^shard 3 is damaged: remove it$"):
            loader.next()


def test_a_bug_shows_where_it_was(tmp_path: Path) -> None:
    with (
        loading(Numbers(tmp_path / "log", breaks_at=0)) as loader,
        pytest.raises(RuntimeError, match=r"(?s)Traceback.*numbers\.py.*ZeroDivisionError: a bug"),
    ):
        loader.next()


def test_a_flipped_bit_is_named_and_never_trained_on(upstream: dict[str, Any]) -> None:
    trainer = learner(upstream)
    shard = Path(upstream["latents"].storage.path("000002.tar"))
    data = bytearray(shard.read_bytes())
    values = data.index(encode_npy(np.zeros((2, 4, 4, 4), np.float16))[:100]) + 200
    data[values] ^= 1
    shard.write_bytes(data)
    with pytest.raises(
        UserError, match=r"000002.tar is damaged, .*: latent.npy of sample \d+ does not have the CRC-32"
    ):
        batches(trainer, 0, 1, 0, 6, 1)


@pytest.mark.parametrize("busy", [False, True])
def test_processes_end_with_a_training_process_that_is_killed(tmp_path: Path, busy: bool) -> None:
    """Whether they wait for a free slot, or are busy with something that never ends."""
    log = tmp_path / "log"
    if busy:
        os.mkfifo(log)
    command = [sys.executable, "-m", "tests.pipelines.training.loader.killed_training", str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout is not None
        pids = list(map(int, training.stdout.readline().split()))
        assert len(pids) == 2
        training.kill()
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))


def test_nothing_is_left_when_training_ends(tmp_path: Path) -> None:
    files = len(os.listdir("/proc/self/fd"))
    with loading(Numbers(tmp_path / "log"), last=3) as loader:
        for _ in range(3):
            loader.next()
        pids = [worker.process.pid for worker in loader._workers]
        assert len(os.listdir("/proc/self/fd")) > files
    loader.close()
    assert len(os.listdir("/proc/self/fd")) == files
    assert not any(map(psutil.pid_exists, pids))


def test_training_that_gives_up_says_what_died_and_what_to_do() -> None:
    # As Ray Train raises it: by rank, what a worker's own code raised behind it.
    error, failure = RuntimeError("of the workers"), RuntimeError("of rank 3")
    error.worker_failures = {3: failure}  # type: ignore[attr-defined]
    failure._base_exc = LoaderDiedError(  # type: ignore[attr-defined]
        "a process of the loader on node-3 died (by signal 9: killed, or out of memory?)"
    )
    raised = _raised_for(error)
    assert isinstance(raised, _FailedWorkersError), "training may go on from a newer checkpoint"
    explained = raised.shown
    assert isinstance(explained, UserError)
    assert str(explained).startswith(
        "a process of the loader on node-3 died (by signal 9: killed, or out of memory?), "
    )
    assert "set training.loader_workers lower, and run the same command again" in str(explained)
