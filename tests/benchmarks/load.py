"""How much the benchmark's server can give: two client processes that read pictures and throw them away."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from functools import partial
from typing import Any

import uvloop

from tests.benchmarks.pairs_server import Figures, RunningServer

_CONNECTIONS = 16
_BUFFER_BYTES = 1 << 18


class _Reader(asyncio.BufferedProtocol):
    """Asks for the next picture as soon as the last one is there, until the time is up."""

    def __init__(self, number: int, stop: float, done: asyncio.Event) -> None:
        self._number, self._stop, self._done = number, stop, done
        self._buffer = bytearray(_BUFFER_BYTES)
        self._missing = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if not self._missing:
            head = bytes(self._buffer[:nbytes])
            self._missing = head.index(b"\r\n\r\n") + 4 + int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
        self._missing -= nbytes
        if not self._missing:
            self._ask()

    def _ask(self) -> None:
        if time.monotonic() > self._stop:
            self._done.set()
            self._transport.close()
            return
        self._number += 1
        self._transport.write(b"GET /%d.jpg HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % self._number)


def read_for(port: int, first: int, seconds: float) -> None:
    """Read pictures over 16 connections for some seconds."""
    uvloop.run(_read_for(port, first, seconds))


async def _read_for(port: int, first: int, seconds: float) -> None:
    loop, stop = asyncio.get_running_loop(), time.monotonic() + seconds
    finished = [asyncio.Event() for _ in range(_CONNECTIONS)]
    for connection, done in enumerate(finished):
        reader = partial(_Reader, first + 10_000 * connection, stop, done)
        await loop.create_connection(reader, "127.0.0.1", port)
    await asyncio.gather(*(done.wait() for done in finished))


def capacity(server: RunningServer, *, seconds: float = 3.0) -> Figures:
    """Measure the server with two clients that do nothing but read; they share this machine's cores with it."""
    context = multiprocessing.get_context("spawn")
    clients = [context.Process(target=read_for, args=(server.port, first, seconds)) for first in (0, 1_000_000)]
    server.take_figures()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return server.take_figures()
