"""One attempt to fetch a picture over HTTP: redirects, limits, and what each accident is called."""

from __future__ import annotations

import asyncio
import email.utils
import ssl
import time
from collections.abc import Collection
from typing import Any

import aiohttp
from yarl import URL

from pipelines.pairs.config import Download
from pipelines.pairs.rows import RejectedError
from pipelines.pairs.web.addresses import GuardedResolver, RefusedAddressError
from pipelines.pairs.web.opt_out import opts_out

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Statuses after which the same request may succeed: the server is busy, or too early.
_LATER = frozenset({408, 425, 429})
_CHUNK_BYTES = 1 << 16
# A body of at most this size is read at once; larger ones wait for room in memory.
SMALL_BODY_BYTES = 1 << 20
_SOCKET_BUFFER_BYTES = 1 << 18
# A keep-alive connection costs a file descriptor, and most hosts of a large data set are asked once.
_KEEP_ALIVE_S = 5.0
_DNS_CACHE_S = 300


class RetryLaterError(Exception):
    """An accident that another attempt may not meet.

    Attributes:
        status: of the row, where there is no other attempt.
        after_s: how long the server asks us to wait.
        answered: whether the host is alive.
    """

    def __init__(self, status: str, *, after_s: float = 0.0, answered: bool = False) -> None:
        super().__init__(status)
        self.status, self.after_s, self.answered = status, after_s, answered


class Room:
    """Memory for bodies, shared by all downloads of a process; used from one event loop."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self.held = 0
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def free(self) -> float:
        """The share that is free, from 0 to 1."""
        return max(1 - self.held / self._limit, 0.0)

    def take(self, size: int) -> None:
        """Count bytes that are held already."""
        self.held += size

    async def wait_for(self, size: int) -> None:
        """Count bytes once there is room for them; a body alone always has room."""
        while self.held and self.held + size > self._limit:
            freed = asyncio.get_running_loop().create_future()
            self._waiting.append(freed)
            await freed
        self.held += size

    def give_back(self, size: int) -> None:
        self.held -= size
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)


class Fetcher:
    """An HTTP session that fetches pictures; made and used inside one event loop.

    Args:
        config: limits, and where to connect.
        max_bytes: larger bodies are `too_large`; reading stops there.
        opt_out: directives of `X-Robots-Tag` that are respected.
        room: for bodies.
    """

    def __init__(self, config: Download, *, max_bytes: int, opt_out: Collection[str], room: Room) -> None:
        self._config, self._max_bytes, self._room = config, max_bytes, room
        self._opt_out = frozenset(directive.lower() for directive in opt_out)
        self._resolver = GuardedResolver(
            config.connect_to, allow_private=config.allow_private_addresses, allow=config.allow_addresses
        )
        self._session = aiohttp.ClientSession(
            # How many connections there are is the caller's business, who also knows whose turn it is.
            connector=aiohttp.TCPConnector(
                resolver=self._resolver, limit=0, ttl_dns_cache=_DNS_CACHE_S, keepalive_timeout=_KEEP_ALIVE_S
            ),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=config.connect_timeout_s, sock_read=config.read_timeout_s
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Pictures are compressed already; what is not decompressed cannot be a bomb.
            auto_decompress=False,
            read_bufsize=_SOCKET_BUFFER_BYTES,
            headers={"User-Agent": config.user_agent, "Accept-Encoding": "identity"},
        )

    async def close(self) -> None:
        await self._session.close()

    async def fetch(self, url: URL) -> bytes:
        """The body behind a URL, whose bytes count as held in the room: give them back when done with them.

        Raises:
            RejectedError: with the row's status, where asking again is no use: `http_404`, `refused_address`,
                `too_large`, `too_many_redirects`, `opt_out`, `tls_error` or `bad_url`.
            RetryLaterError: where it may be: `timeout`, `dns_error`, `connection_error`, `incomplete_body`,
                `http_429`, `http_503`…
        """
        try:
            async with asyncio.timeout(self._config.timeout_s) as deadline:
                return await self._follow(url, deadline)
        except TimeoutError:
            raise RetryLaterError("timeout") from None
        except RefusedAddressError:
            raise RejectedError("refused_address") from None
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, UnicodeError):
            raise RejectedError("bad_url") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _accident(error) from None

    async def _follow(self, url: URL, deadline: asyncio.Timeout) -> bytes:
        for _ in range(self._config.max_redirects + 1):
            self._resolver.check_literal(url.host or "")
            async with self._session.get(url, allow_redirects=False) as response:
                headers = response.headers
                if (tags := headers.getall("X-Robots-Tag", ())) and self._opts_out(tags):
                    raise RejectedError("opt_out")
                location = headers.get("Location")
                if response.status in _REDIRECTS and location:
                    try:
                        url = parse_url(str(url.join(URL(location))))
                    except ValueError:
                        raise RejectedError("bad_url") from None
                    continue
                return await self._body(response, deadline)
        raise RejectedError("too_many_redirects")

    def _opts_out(self, tags: Collection[str]) -> bool:
        return opts_out(tags, self._opt_out, self._config.user_agent)

    async def _body(self, response: aiohttp.ClientResponse, deadline: asyncio.Timeout) -> bytes:
        status = response.status
        if status in _LATER or status >= 500:
            raise RetryLaterError(f"http_{status}", after_s=_retry_after_s(response), answered=True)
        if status != 200:
            raise RejectedError(f"http_{status}")
        length = response.content_length
        if length is not None and length > self._max_bytes:
            raise RejectedError("too_large")
        try:
            if length is None or length > SMALL_BODY_BYTES:
                return await self._large_body(response, deadline)
            data = await response.read()
        except TimeoutError:
            raise
        except (aiohttp.ClientError, ConnectionError):
            # However the connection ended: the server had begun to answer.
            raise RetryLaterError("incomplete_body", answered=True) from None
        self._room.take(len(data))
        return data

    async def _large_body(self, response: aiohttp.ClientResponse, deadline: asyncio.Timeout) -> bytes:
        body, reserved = bytearray(), 0
        try:
            async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                body += chunk
                if len(body) > self._max_bytes:
                    raise RejectedError("too_large")
                if len(body) > SMALL_BODY_BYTES and not reserved:
                    # As much as may come: a body that stops halfway for lack of room would never end.
                    reserved = response.content_length or self._max_bytes
                    await self._wait_for_room(reserved, deadline)
        except BaseException:
            self._room.give_back(reserved)
            raise
        self._room.give_back(reserved - len(body))
        return bytes(body)

    async def _wait_for_room(self, size: int, deadline: asyncio.Timeout) -> None:
        # The time that we keep the server waiting is not the server's fault.
        loop = asyncio.get_running_loop()
        left = (deadline.when() or loop.time()) - loop.time()
        deadline.reschedule(None)
        await self._room.wait_for(size)
        deadline.reschedule(loop.time() + left)


def parse_url(url: str) -> URL:
    """A URL of a picture.

    Raises:
        ValueError: no http URL.
    """
    parsed = URL(url.strip())
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"not an http URL: {url[:100]!r}")
    return parsed


def _retry_after_s(response: aiohttp.ClientResponse) -> float:
    """Retry-After: seconds or a date (RFC 9110, section 10.2.3)."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value[:9])
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _accident(error: BaseException) -> Exception:
    """What a broken connection is called. aiohttp wraps what a resolver raises."""
    current: Any = error
    while current is not None:
        if isinstance(current, RefusedAddressError):
            return RejectedError("refused_address")
        current = current.__cause__ or current.__context__
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        return RejectedError("tls_error")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return RetryLaterError("dns_error")
    if isinstance(error, aiohttp.ConnectionTimeoutError | aiohttp.ServerTimeoutError):
        return RetryLaterError("timeout")
    return RetryLaterError("connection_error")
