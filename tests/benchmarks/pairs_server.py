"""An HTTP server on loopback for the pairs benchmark, in a process of its own: pictures from memory, and figures of it.

`GET /N.jpg` is picture N modulo the number of files, with N in a JPEG comment, so that no two rows have the same bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

FIGURES = "/figures"
_COMMENT_DIGITS = 12
# In the listening socket, so that connections have it: one write a picture, without waiting for the reader.
_SEND_BUFFER_BYTES = 1 << 20


@dataclass
class Figures:
    """What the server did since it was last asked.

    Attributes:
        first_request: time.monotonic(), which is the same clock in every process; None before any request.
        connections: most open at once.
    """

    requests: int = 0
    bytes: int = 0
    cpu_s: float = 0.0
    first_request: float | None = None
    last_request: float | None = None
    connections: int = 0

    @property
    def cpu_us_per_request(self) -> float:
        return 1e6 * self.cpu_s / self.requests

    @property
    def requests_per_s(self) -> float:
        return self.requests / ((self.last_request or 0.0) - (self.first_request or 0.0))


class PictureServer:
    """What connections share: the answers, the delay, the figures."""

    def __init__(self, pictures: list[bytes], latency_s: float) -> None:
        self.latency_s = latency_s
        self.figures = Figures()
        self.open = 0
        self._cpu_before = time.process_time()
        self._heads = [_head("image/jpeg", len(data) + 4 + _COMMENT_DIGITS) + data[:2] for data in pictures]
        self._tails = [memoryview(data)[2:] for data in pictures]

    def answer(self, number: int) -> tuple[bytes, memoryview]:
        """Return head with the comment, and the rest of a picture; counted."""
        figures, now = self.figures, time.monotonic()
        if figures.first_request is None:
            figures.first_request = now
        figures.last_request = now
        figures.requests += 1
        index = number % len(self._heads)
        tail = self._tails[index]
        head = b"%b\xff\xfe\x00%c%0*d" % (self._heads[index], 2 + _COMMENT_DIGITS, _COMMENT_DIGITS, number)
        figures.bytes += len(head) + len(tail)
        return head, tail

    def take_figures(self) -> bytes:
        """The figures as an HTTP answer; the next ones start at zero."""
        cpu_s = time.process_time()
        self.figures.cpu_s = cpu_s - self._cpu_before
        body = json.dumps(asdict(self.figures)).encode()
        self.figures, self._cpu_before = Figures(connections=self.open), cpu_s
        return _head("application/json", len(body)) + body


class Connection(asyncio.Protocol):
    """One client: requests in, answers out, in order, kept alive unless the client asks otherwise."""

    def __init__(self, server: PictureServer) -> None:
        self._server = server
        self._received = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._server.open += 1
        self._server.figures.connections = max(self._server.figures.connections, self._server.open)

    def connection_lost(self, error: Exception | None) -> None:
        self._server.open -= 1

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            request, _, self._received = self._received.partition(b"\r\n\r\n")
            self._respond(request)

    def _respond(self, request: bytes) -> None:
        path = request.split(b" ", 2)[1]
        if path == FIGURES.encode():
            self._transport.write(self._server.take_figures())
            return
        number = int(path[1 : path.index(b".")])
        close = b"connection: close" in request.lower()
        if self._server.latency_s:
            asyncio.get_running_loop().call_later(self._server.latency_s, self._send, number, close)
        else:
            self._send(number, close)

    def _send(self, number: int, close: bool) -> None:
        if self._transport.is_closing():
            return
        self._transport.writelines(self._server.answer(number))
        if close:
            self._transport.close()


@dataclass(frozen=True)
class RunningServer:
    """A server process, as the benchmark sees it."""

    port: int

    def url(self, number: int) -> str:
        """Return the URL of picture `number`."""
        return f"http://127.0.0.1:{self.port}/{number}.jpg"

    def take_figures(self) -> Figures:
        """What it did since the last time."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{FIGURES}", timeout=30) as answer:
            return Figures(**json.load(answer))


@contextlib.contextmanager
def serving(folder: Path, *, latency_s: float = 0.0) -> Iterator[RunningServer]:
    """Serve all JPEGs of a folder for as long as the context lasts."""
    command = [sys.executable, "-m", "tests.benchmarks.pairs_server", str(folder), "--latency-s", str(latency_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield RunningServer(int(process.stdout.readline()))
    finally:
        process.terminate()
        process.wait()


def _head(content_type: str, length: int) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\r\n".encode()


async def _serve(server: PictureServer) -> None:
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: Connection(server), "127.0.0.1", 0, backlog=4096)
    sock = listener.sockets[0]
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    print(sock.getsockname()[1], flush=True)
    await listener.serve_forever()


def main() -> None:
    """Serve until killed; the first line of stdout is the port."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pairs_server", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency-s", type=float, default=0.0, help="between a request and its answer")
    options = parser.parse_args()
    pictures = [path.read_bytes() for path in sorted(options.folder.glob("*.jpg"))]
    uvloop.run(_serve(PictureServer(pictures, options.latency_s)))


if __name__ == "__main__":
    main()
