"""A process of the loader: `python -m pipelines.training.loader.worker SOCKET`.

It makes the batches of every n-th step, and writes each into the next of its slots as soon as that is free. It speaks
with the training process over a socket, and ends when nobody is at the other end any more, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.errors import UserError
from pipelines.notices import told_to
from pipelines.patience import expect_answers
from pipelines.training.loader.slots import SlotWriter

if TYPE_CHECKING:
    from pipelines.training.loader.source import Source

# In front of each message: what it is, and how many bytes follow.
HEAD = struct.Struct("<cI")
JOB, BATCH, ERROR, FREE, NOTICE = b"J", b"B", b"E", b"F", b"N"


@dataclass(frozen=True)
class Job:
    """What a process is to make.

    Attributes:
        source: makes the batches.
        rank, world_size: whose part of the global batches.
        steps: of which steps, in order.
        slots: file descriptors of the slots, which are filled in turn.
    """

    source: Source
    rank: int
    world_size: int
    steps: range
    slots: tuple[int, ...]


def send(connection: socket.socket, kind: bytes, data: bytes = b"") -> None:
    """Send a message."""
    connection.sendall(HEAD.pack(kind, len(data)) + data)


def receive(connection: socket.socket) -> tuple[bytes, bytes]:
    """Wait for a message. Raises EOFError if the other end is closed."""
    kind, size = HEAD.unpack(_exactly(connection, HEAD.size))
    return kind, _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        try:
            more = connection.recv(size - len(data))
        except ConnectionResetError:
            more = b""
        if not more:
            raise EOFError
        data += more
    return data


def main() -> None:
    """Make batches until all are made, or nobody wants them any more."""
    # Ctrl-C is for the training process to obey; this one ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_end_with_training, args=(connection.fileno(),), daemon=True).start()
    try:
        _, data = receive(connection)
        _make_batches(pickle.loads(data), connection)
    except EOFError:
        return
    except OSError as error:
        if not isinstance(error, BrokenPipeError | ConnectionResetError):
            raise


def _end_with_training(connection: int) -> None:
    """End this process when the training process has closed its end of the socket, or is gone."""
    hung_up = select.poll()
    # Nothing else: what is sent is for the other thread to read.
    hung_up.register(connection, select.POLLRDHUP)
    hung_up.poll()
    # Not by an exception: the other thread may be waiting for a store that does not answer.
    os._exit(0)


def _make_batches(job: Job, connection: socket.socket) -> None:
    expect_answers()
    turn = threading.Lock()

    def say(kind: bytes, data: bytes) -> None:
        # Threads that fetch shards have something to tell, too.
        with turn:
            send(connection, kind, data)

    try:
        with told_to(lambda line: say(NOTICE, line.encode())):
            _fill_slots(job, connection, say)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except BaseException as error:
        # One that a person can mend travels as it is: it is of this package, and holds nothing but its line.
        known = error if isinstance(error, UserError) else None
        say(ERROR, pickle.dumps((known, traceback.format_exc())))
    # Not before the training process has taken what it wants: it reads the end of this process as its death.
    while True:
        receive(connection)


def _fill_slots(job: Job, connection: socket.socket, say: Callable[[bytes, bytes], None]) -> None:
    batches = job.source.open()
    with contextlib.closing(batches.reader):
        slots = [SlotWriter(file) for file in job.slots]
        free = len(slots)
        for number, step in enumerate(job.steps):
            while not free:
                receive(connection)
                free += 1
            free -= 1
            slot = slots[number % len(slots)]
            slot.begin()
            batches.reader.fetch_ahead(batches.order.shards_ahead(step, job.rank, job.world_size))
            batches.assemble(batches.order.slice(step, job.rank, job.world_size), slot.new)
            say(BATCH, slot.layout())


if __name__ == "__main__":
    main()
