"""libcurl in an asyncio event loop: many transfers at once, each a coroutine, each failure with its name.

libcurl says which sockets it waits for and until when, and the loop tells it when they are ready (its "multi socket"
interface). A body passes from the socket to memory in C.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import certifi
import pycurl

from pipelines.stages.pairs.rows import RejectedError

# The most that one read from a socket returns.
_BUFFER_BYTES = 1 << 18
_KEEP_ALIVE_S = 5
_DNS_CACHE_S = 300
_ROBOTS, _LENGTH, _LOCATION = b"x-robots-tag:", b"content-length:", b"location:"
# Read at most this much of an error response's body, so that the connection can be reused.
_ERROR_PAGE_BYTES = 1 << 16
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Statuses after which the same request may succeed: the server is busy, or the request came too early.
_LATER = frozenset({408, 425, 429})
_BAD_CERTIFICATES = frozenset({pycurl.E_PEER_FAILED_VERIFICATION, pycurl.E_SSL_CACERT, pycurl.E_SSL_ISSUER_ERROR})


class RetryLaterError(Exception):
    """A transient failure: another attempt may succeed.

    Attributes:
        status: the row's status if there is no other attempt.
        after_s: the pause that the server asks for.
        answered: whether the host is alive.
    """

    def __init__(self, status: str, *, after_s: float = 0.0, answered: bool = False) -> None:
        super().__init__(status)
        self.status, self.after_s, self.answered = status, after_s, answered


@dataclass(slots=True)
class Transfer:
    """One request and its answer.

    Args:
        url: an http or https URL.
        accept: called with the size so far whenever a piece of the body arrives; False ends the transfer.
        allowed: tells whether an address may be connected to.

    Attributes:
        error: libcurl's error code; 0 if the answer is complete.
        status: the answer's HTTP status; 0 if there was none.
        received: the body so far.
        size: its length.
        announced: the length that the answer announces; 0 if it does not.
        robots: the values of `X-Robots-Tag` headers.
        refused: whether an address was not allowed.
        location: the target of a redirect as the answer gives it; None if there is none.
        retry_after_s: the pause that the server asks for; 0 if it does not.
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

    @property
    def redirects(self) -> bool:
        return self.status in _REDIRECTS and bool(self.location)

    def check(self, max_bytes: int) -> None:
        """Accept a picture (status 200) or a redirect, and raise the name of anything else.

        Raises:
            RejectedError: asking again is no use.
            RetryLaterError: another attempt may succeed.
        """
        if self.error == pycurl.E_OPERATION_TIMEDOUT:
            raise RetryLaterError("timeout")
        if self.status == 200 and (self.size > max_bytes or self.error == pycurl.E_FILESIZE_EXCEEDED):
            raise RejectedError("too_large")
        if self.status in _LATER or self.status >= 500:
            raise RetryLaterError(f"http_{self.status}", after_s=self.retry_after_s, answered=True)
        if self.status not in (0, 200) and not self.redirects:
            raise RejectedError(f"http_{self.status}")
        # A redirect is complete with its headers, however its body ended.
        if self.error and self.status in (0, 200):
            raise self._connection_failure()

    def _connection_failure(self) -> Exception:
        if self.refused:
            return RejectedError("refused_address")
        if self.error in _BAD_CERTIFICATES:
            return RejectedError("tls_error")
        if self.error == pycurl.E_URL_MALFORMAT:
            return RejectedError("bad_url")
        if self.error == pycurl.E_COULDNT_RESOLVE_HOST:
            return RetryLaterError("dns_error")
        if self.status:
            # However the connection ended: the server had begun to answer.
            return RetryLaterError("incomplete_body", answered=True)
        return RetryLaterError("connection_error")


class Transfers:
    """Runs transfers in the event loop in which it was made.

    Args:
        user_agent: sent with every request.
        connect_to: `HOST:PORT` to connect to instead, by host name.
        connect_timeout_s: time limit for a connection to be established.
        silence_timeout_s: time limit without a byte, in whole seconds.
        max_bytes: answers that announce more are not read.
        connections: how many are kept open for later requests.
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
        """Run a transfer to its end and set its attributes."""
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
            # No proxy from the environment: a recipe must do the same on every machine.
            pycurl.PROXY: "",
            pycurl.PROTOCOLS: pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS,
            pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
            pycurl.USERAGENT: self._user_agent,
            # Pictures are compressed already, and what is not decompressed cannot be a bomb.
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
            # Not a list of pieces: a server may send two bytes at a time.
            transfer.received += chunk
            return None

        def header(line: bytes) -> None:
            # Lenient: libcurl hands on what hostile servers send. Each answer of one transfer starts with this line.
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
        """Watch a socket as libcurl asks: for reading, for writing, for both or no longer."""
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
        self._timer = None
        # A negative time means no timer. Zero must not act at once: this is one of libcurl's own callbacks, from which
        # it must not be called.
        if milliseconds >= 0:
            self._timer = self._loop.call_later(milliseconds / 1000, self._act, pycurl.SOCKET_TIMEOUT, 0)

    def _act(self, descriptor: int, events: int) -> None:
        """Let libcurl work on a socket that is ready, or on whatever is due; then settle what is finished."""
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
