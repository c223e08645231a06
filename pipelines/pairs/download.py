"""Fetching pictures over HTTP from servers that are slow, broken or hostile."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import defaultdict
from collections.abc import AsyncIterator
from types import TracebackType

import aiohttp
from yarl import URL

from pipelines.pairs.addresses import GuardedResolver, RefusedAddressError
from pipelines.pairs.config import Download
from pipelines.pairs.rows import RejectedError

MAX_REDIRECTS = 5
MAX_RETRY_AFTER_S = 5.0
BACKOFF_S = 0.25
# A host that timed out this often in a row is not asked again for this shard: otherwise a dead host with a thousand
# pictures would hold up its shard for a thousand time limits.
GIVE_UP_AFTER_TIMEOUTS = 8
# Bodies in memory, in connections: fetched ones wait for their turn to be decoded while others are on their way.
_BODIES_PER_CONNECTION = 2
_CHUNK_BYTES = 1 << 16


class Downloader:
    """An HTTP client for one shard; use it as an async context manager.

    Args:
        config: time limits, retries, where to connect.
        max_bytes: larger bodies are `too_large`; reading stops there.
        share: by how many such clients the allowed connections are shared.
    """

    def __init__(self, config: Download, *, max_bytes: int, share: int = 1) -> None:
        self._config = config
        self._max_bytes = max_bytes
        self._resolver = GuardedResolver(config.connect_to, allow_private=config.allow_private_addresses)
        # The limits are ours and not the connector's: time spent waiting for a turn must not count against timeout_s.
        connections = math.ceil(config.connections / share)
        self._turns = asyncio.Semaphore(connections)
        self._bodies = asyncio.Semaphore(_BODIES_PER_CONNECTION * connections)
        per_host = math.ceil(config.connections_per_host / share)
        self._host_turns: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(per_host))
        self._timeouts: dict[str, int] = defaultdict(int)

    async def __aenter__(self) -> Downloader:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=self._resolver, limit=0, ttl_dns_cache=300),
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Pictures are compressed already; what is not decompressed cannot be a bomb.
            auto_decompress=False,
            headers={"User-Agent": self._config.user_agent, "Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    @contextlib.asynccontextmanager
    async def fetched(self, url: str) -> AsyncIterator[bytes]:
        """The body behind a URL. Inside the block it counts as held in memory, and only so many are at a time.

        Raises:
            RejectedError: with the row's status: `http_404`, `timeout`, `connection_error`, `refused_address`,
                `too_large`, `too_many_redirects` or `bad_url`.
        """
        try:
            target = _parse(url)
        except ValueError:
            raise RejectedError("bad_url") from None
        host = target.host or ""
        async with contextlib.AsyncExitStack() as held:
            # The host's turn comes first: those who wait for a slow host must not keep others from being fetched.
            async with self._host_turns[host]:
                await held.enter_async_context(self._bodies)
                data = await self._fetch(target, host)
            yield data

    async def _fetch(self, target: URL, host: str) -> bytes:
        for attempt in range(self._config.retries + 1):
            if self._timeouts[host] >= GIVE_UP_AFTER_TIMEOUTS:
                raise RejectedError("timeout")
            try:
                async with self._turns:
                    return await self._attempt(target, host)
            except _RetryLaterError as later:
                if attempt == self._config.retries:
                    raise RejectedError(later.status) from None
                await asyncio.sleep(max(later.after_s, BACKOFF_S * 2**attempt))
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, target: URL, host: str) -> bytes:
        try:
            async with asyncio.timeout(self._config.timeout_s):
                data = await self._follow(target)
        except TimeoutError:
            self._timeouts[host] += 1
            raise _RetryLaterError("timeout") from None
        except (RejectedError, _RetryLaterError):
            # The host did answer, if with a refusal.
            self._timeouts[host] = 0
            raise
        except RefusedAddressError:
            raise RejectedError("refused_address") from None
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, UnicodeError):
            raise RejectedError("bad_url") from None
        except (aiohttp.ClientError, OSError) as error:
            if _refused(error):
                raise RejectedError("refused_address") from None
            raise _RetryLaterError("connection_error") from None
        self._timeouts[host] = 0
        return data

    async def _follow(self, target: URL) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            self._resolver.check_literal(target.host or "")
            async with self._session.get(target, allow_redirects=False) as response:
                location = response.headers.get("Location")
                if response.status in (301, 302, 303, 307, 308) and location:
                    try:
                        target = _parse(str(target.join(URL(location))))
                    except ValueError:
                        raise RejectedError("bad_url") from None
                    continue
                return await self._body(response)
        raise RejectedError("too_many_redirects")

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        status = response.status
        if status == 429 or status >= 500:
            raise _RetryLaterError(f"http_{status}", after_s=_retry_after_s(response))
        if status != 200:
            raise RejectedError(f"http_{status}")
        if (response.content_length or 0) > self._max_bytes:
            raise RejectedError("too_large")
        body = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            body += chunk
            if len(body) > self._max_bytes:
                raise RejectedError("too_large")
        return bytes(body)


class _RetryLaterError(Exception):
    """An accident that another attempt may not meet."""

    def __init__(self, status: str, after_s: float = 0.0) -> None:
        super().__init__(status)
        self.status, self.after_s = status, after_s


def _parse(url: str) -> URL:
    parsed = URL(url.strip())
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"not an http URL: {url[:100]!r}")
    return parsed


def _retry_after_s(response: aiohttp.ClientResponse) -> float:
    value = response.headers.get("Retry-After", "")
    return min(float(value), MAX_RETRY_AFTER_S) if value.isdecimal() else 0.0


def _refused(error: BaseException) -> bool:
    # aiohttp wraps what a resolver raises.
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, RefusedAddressError):
            return True
        current = current.__cause__ or current.__context__
    return False
