"""libcurl inside an event loop: many transfers at once, each a coroutine.

libcurl tells which sockets it waits for and until when; the loop tells it when they are ready. Everything on the way of
a body from the socket to memory is C.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import certifi
import pycurl

# As much as one read from a socket may bring.
_BUFFER_BYTES = 1 << 18
_KEEP_ALIVE_S = 5
_DNS_CACHE_S = 300
_ROBOTS, _LENGTH, _LOCATION = b"x-robots-tag:", b"content-length:", b"location:"
# Pages that come with an error are read so far, that the connection can be used again.
_ERROR_PAGE_BYTES = 1 << 16


@dataclass(slots=True)
class Transfer:
    """One request and what came of it.

    Args:
        accept: called with the size so far when a piece of the body arrives; False ends the transfer.
        allowed: whether an address may be connected to.

    Attributes:
        error: libcurl's code; 0 where the answer is complete.
        status: of the answer; 0 where none came.
        size, announced: bytes of the body so far; in all, as the answer says, or 0.
        robots: the values of `X-Robots-Tag` headers.
        refused: whether an address was not allowed.
        location: where the answer redirects to, as it says it; None where it does not.
        retry_after_s: that the server asks for; 0 where it does not.
    """

    url: str
    accept: Callable[[int], bool]
    allowed: Callable[[str], bool]
    error: int = 0
    status: int = 0
    received: bytearray = field(default_factory=bytearray)
    size: int = 0
    announced: int = 0
    robots: list[str] = field(default_factory=list)
    refused: bool = False
    location: str | None = None
    retry_after_s: float = 0.0

    @property
    def body(self) -> bytes:
        return bytes(self.received)


class Transfers:
    """Runs transfers in the loop in which it was made.

    Args:
        user_agent: sent with every request.
        connect_to: `HOST:PORT` to connect to for some host names.
        connect_timeout_s, silence_timeout_s: until a connection stands; without a byte (whole seconds).
        max_bytes: answers that announce more are not read.
        connections: that are kept open for other requests.
    """

    def __init__(
        self,
        *,
        user_agent: str,
        connect_to: dict[str, str],
        connect_timeout_s: float,
        silence_timeout_s: float,
        max_bytes: int,
        connections: int,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._user_agent = user_agent
        self._connect_to = [f"{host}::{address}" for host, address in connect_to.items()]
        self._connect_timeout_ms = max(round(1000 * connect_timeout_s), 1)
        self._silence_timeout_s = max(round(silence_timeout_s), 1)
        self._max_bytes = max_bytes
        self._idle: list[Any] = []
        self._running: dict[Any, asyncio.Future[int]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._multi: Any = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        self._multi.setopt(pycurl.M_MAXCONNECTS, connections)

    async def run(self, transfer: Transfer, timeout_s: float) -> None:
        """Run a transfer to its end; its attributes say how it ended."""
        easy = self._idle.pop() if self._idle else self._new_easy()
        self._prepare(easy, transfer, timeout_s)
        done = self._loop.create_future()
        self._running[easy] = done
        self._multi.add_handle(easy)
        try:
            transfer.error = await done
            if transfer.status not in (0, 200):
                transfer.retry_after_s = easy.getinfo(pycurl.RETRY_AFTER)
        finally:
            del self._running[easy]
            self._multi.remove_handle(easy)
            self._idle.append(easy)

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()
        for easy in self._idle:
            easy.close()
        self._multi.close()

    def _new_easy(self) -> Any:
        easy = pycurl.Curl()
        options = {
            pycurl.NOSIGNAL: 1,
            # What the environment says about proxies is not the recipe's word.
            pycurl.PROXY: "",
            pycurl.PROTOCOLS: pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS,
            pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
            pycurl.USERAGENT: self._user_agent,
            # Pictures are compressed already; what is not decompressed cannot be a bomb.
            pycurl.HTTPHEADER: ["Accept: */*", "Accept-Encoding: identity"],
            pycurl.HTTP_CONTENT_DECODING: 0,
            pycurl.HTTP_TRANSFER_DECODING: 1,
            pycurl.CAINFO: certifi.where(),
            pycurl.BUFFERSIZE: _BUFFER_BYTES,
            pycurl.DNS_CACHE_TIMEOUT: _DNS_CACHE_S,
            pycurl.MAXAGE_CONN: _KEEP_ALIVE_S,
            pycurl.CONNECTTIMEOUT_MS: self._connect_timeout_ms,
            pycurl.MAXFILESIZE_LARGE: self._max_bytes,
            pycurl.LOW_SPEED_LIMIT: 1,
            pycurl.LOW_SPEED_TIME: self._silence_timeout_s,
        }
        for option, value in options.items():
            easy.setopt(option, value)
        if self._connect_to:
            easy.setopt(pycurl.CONNECT_TO, self._connect_to)
        return easy

    @staticmethod
    def _prepare(easy: Any, transfer: Transfer, timeout_s: float) -> None:
        def write(chunk: bytes) -> int | None:
            transfer.size += len(chunk)
            if transfer.status != 200:
                return None if transfer.size <= _ERROR_PAGE_BYTES else 0
            if not transfer.accept(transfer.size):
                return 0
            # Not a list of pieces: a server may send them two bytes at a time.
            transfer.received += chunk
            return None

        def header(line: bytes) -> None:
            if line.startswith(b"HTTP/"):
                code = line.split(maxsplit=2)[1:2]
                transfer.status = int(code[0]) if code and code[0].isdigit() else 0
                transfer.announced = 0
            elif line[:15].lower() == _LENGTH:
                length = line[15:].strip()
                transfer.announced = int(length) if length[:12].isdigit() and len(length) < 13 else 0
            elif line[:9].lower() == _LOCATION:
                transfer.location = line[9:].strip().decode("latin-1")
            elif line[:13].lower() == _ROBOTS:
                transfer.robots.append(line[13:].decode("latin-1").strip())

        def open_socket(purpose: int, address: Any) -> Any:
            if not transfer.allowed(address.addr[0]):
                transfer.refused = True
                return pycurl.SOCKET_BAD
            return socket.socket(address.family, address.socktype, address.protocol)

        easy.setopt(pycurl.URL, transfer.url)
        easy.setopt(pycurl.TIMEOUT_MS, max(round(1000 * timeout_s), 1))
        easy.setopt(pycurl.WRITEFUNCTION, write)
        easy.setopt(pycurl.HEADERFUNCTION, header)
        easy.setopt(pycurl.OPENSOCKETFUNCTION, open_socket)

    def _watch(self, event: int, descriptor: int, multi: Any, data: Any) -> None:
        """libcurl waits for a socket in another way than before."""
        if event in (pycurl.POLL_IN, pycurl.POLL_INOUT):
            self._loop.add_reader(descriptor, self._act, descriptor, pycurl.CSELECT_IN)
        else:
            self._loop.remove_reader(descriptor)
        if event in (pycurl.POLL_OUT, pycurl.POLL_INOUT):
            self._loop.add_writer(descriptor, self._act, descriptor, pycurl.CSELECT_OUT)
        else:
            self._loop.remove_writer(descriptor)

    def _set_timer(self, milliseconds: int) -> None:
        if self._timer:
            self._timer.cancel()
        # Never at once: libcurl must not be called from inside one of its callbacks.
        late = milliseconds >= 0
        self._timer = self._loop.call_later(milliseconds / 1000, self._act, pycurl.SOCKET_TIMEOUT, 0) if late else None

    def _act(self, descriptor: int, events: int) -> None:
        self._multi.socket_action(descriptor, events)
        while True:
            left, finished, failed = self._multi.info_read()
            for easy in finished:
                self._finish(easy, 0)
            for easy, code, _ in failed:
                self._finish(easy, code)
            if not left:
                return

    def _finish(self, easy: Any, code: int) -> None:
        done = self._running.get(easy)
        if done is not None and not done.done():
            done.set_result(code)
