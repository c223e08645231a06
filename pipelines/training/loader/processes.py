"""Batches made by processes of their own, which take nothing from the interpreter of the training process.

Process i of n makes the batches of the steps first + i, first + i + n, …, each in a slot of memory that both processes
have mapped. The training process learns by a message of some hundred bytes that one is there, has it copied to the
device, and gives the slot back.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace

import torch
from torch import Tensor

from pipelines.errors import LoaderDiedError
from pipelines.notices import tell
from pipelines.training.loader.pinning import pin, unpin
from pipelines.training.loader.slots import SlotReader, new_slot
from pipelines.training.loader.source import Source
from pipelines.training.loader.worker import BATCH, FREE, JOB, NOTICE, Job, receive, send

# Of each process: one that is trained on, one that waits, one that is made.
SLOTS = 3
# How long a process that is told to end may take.
END_S = 5.0


class ProcessLoader:
    """The batches of the steps `first` to `last` - 1, each made before it is asked for.

    Args:
        source: makes the batches, in each process anew.
        rank, world_size: whose part of the global batches.
        first, last: the first step, and the one after the last.
        processes: how many make batches.
        device: what they are copied to.

    Attributes:
        waited_s: seconds that `next` has spent waiting; its owner may reset it.
    """

    def __init__(
        self,
        source: Source,
        rank: int,
        world_size: int,
        first: int,
        last: int,
        *,
        processes: int,
        device: torch.device,
    ) -> None:
        self.waited_s = 0.0
        steps = [range(first + number, last, processes) for number in range(processes)]
        self._workers = [_Worker(Job(source, rank, world_size, each, ()), device) for each in steps if each]
        self._step = 0

    def next(self) -> dict[str, Tensor]:
        """Return the tensors of the next step, on the device; wait for them if they are not ready.

        On the CPU they are the shared memory itself: use them before the next call.

        Raises:
            UserError: what a person can mend went wrong in a process: a damaged shard, for example.
            LoaderDiedError: a process is gone.
        """
        for worker in self._workers:
            worker.give_back()
        started = time.perf_counter()
        worker = self._workers[self._step % len(self._workers)]
        self._step += 1
        layout = self._wait(worker)
        self.waited_s += time.perf_counter() - started
        return worker.take(layout)

    def close(self) -> None:
        """End the processes, and let go of their memory."""
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.close()

    def _wait(self, worker: _Worker) -> bytes:
        """Return the layout of a process's next batch once it is there."""
        heard = select.poll()
        for each in self._workers:
            heard.register(each.connection, select.POLLIN if each is worker else select.POLLRDHUP)
        kind = NOTICE
        while kind == NOTICE:
            heard.poll()
            try:
                # If another is gone, that is said now: its turn would come, but perhaps not before a long wait.
                for number, _ in heard.poll(0):
                    if number != worker.connection.fileno():
                        raise EOFError
                kind, data = receive(worker.connection)
            except EOFError:
                raise self._death() from None
            if kind == NOTICE:
                tell(data.decode())
        if kind == BATCH:
            return data
        known, text = pickle.loads(data)
        if known is not None:
            raise known
        raise RuntimeError(f"a process of the loader failed:\n{text}")

    def _death(self) -> LoaderDiedError:
        self.close()
        killed = [-code for worker in self._workers if (code := worker.process.returncode) < 0]
        how = f"by signal {killed[0]}: killed, or out of memory?" if killed else "see Ray's logs there"
        return LoaderDiedError(f"a process of the loader on {socket.gethostname()} died ({how})")


class _Slot:
    """A slot as tensors, pinned if they are for a GPU."""

    def __init__(self, file: int, device: torch.device) -> None:
        self._file, self._device = file, device
        self._reader = SlotReader(file)
        self._pinned: Tensor | None = None
        self._tensors: dict[str, Tensor] = {}

    def tensors(self, layout: bytes) -> dict[str, Tensor]:
        before = self._reader.memory
        arrays, are_new = self._reader.arrays(layout)
        if are_new:
            self._tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self._device.type == "cuda" and self._reader.memory is not before:
            self._unpin()
            memory = torch.frombuffer(self._reader.memory, dtype=torch.uint8)
            self._pinned = memory if pin(memory) else None
        return self._tensors

    def close(self) -> None:
        self._unpin()
        os.close(self._file)

    def _unpin(self) -> None:
        if self._pinned is not None:
            unpin(self._pinned)
            self._pinned = None


class _Worker:
    """A process of the loader, as the training process has it."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self._device = device
        files = tuple(new_slot() for _ in range(SLOTS))
        self._slots = [_Slot(file, device) for file in files]
        # What the next batch is in, and those handed out: with the end of their copies, if they are copied.
        self._next = 0
        self._taken: deque[torch.cuda.Event | None] = deque()
        self.connection, theirs = socket.socketpair()
        # One thread of BLAS: there is nothing to multiply, and each would have its own memory.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # A fresh interpreter that finds the same modules. Not multiprocessing's: it would import the program that runs
        # here, and with it Ray and torch.
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        command = [sys.executable, "-m", "pipelines.training.loader.worker", str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                command, env=environment, pass_fds=(theirs.fileno(), *files), stdin=subprocess.DEVNULL
            )
        # If it is dead already, whoever waits for its first batch will see.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send(self.connection, JOB, pickle.dumps(replace(job, slots=files)))

    def take(self, layout: bytes) -> dict[str, Tensor]:
        """Return the tensors of the batch that has come, on the device."""
        tensors = self._slots[self._next].tensors(layout)
        self._next = (self._next + 1) % SLOTS
        if self._device.type != "cuda":
            self._taken.append(None)
            return tensors
        copies = {name: tensor.to(self._device, non_blocking=True) for name, tensor in tensors.items()}
        event = torch.cuda.Event()
        event.record()
        self._taken.append(event)
        return copies

    def give_back(self) -> None:
        """Let the process write into the slots whose batches are copied, or of steps that are over: one at least."""
        while self._taken:
            copied = self._taken[0]
            if copied is not None and not copied.query():
                if len(self._taken) < SLOTS:
                    return
                copied.synchronize()
            self._taken.popleft()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                send(self.connection, FREE)

    def hang_up(self) -> None:
        """Have the process end itself."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Wait until the process has ended, and let go of the memory. Does nothing the second time."""
        if not self._slots:
            return
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.connection.close()
        for copied in self._taken:
            if copied is not None:
                copied.synchronize()
        for slot in self._slots:
            slot.close()
        self._slots = []
