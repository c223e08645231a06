"""One attempt to fetch a picture over HTTP: redirects, limits, and what each accident is called."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

import pycurl
from yarl import URL

from pipelines.stages.pairs.config import Download
from pipelines.stages.pairs.rows import RejectedError
from pipelines.stages.pairs.web.addresses import Guard
from pipelines.stages.pairs.web.curl import Transfer, Transfers
from pipelines.stages.pairs.web.opt_out import opts_out

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Statuses after which the same request may succeed: the server is busy, or too early.
_LATER = frozenset({408, 425, 429})
_TIMEOUTS = frozenset({pycurl.E_OPERATION_TIMEDOUT})
_BAD_CERTIFICATES = frozenset({pycurl.E_PEER_FAILED_VERIFICATION, pycurl.E_SSL_CACERT, pycurl.E_SSL_ISSUER_ERROR})
# Larger bodies wait for room in memory.
SMALL_BODY_BYTES = 1 << 20


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
        """The share that is free, from 0 to 1; none while a large body waits, which small ones would starve."""
        if self._waiting:
            return 0.0
        return max(1 - self.held / self._limit, 0.0)

    def take(self, size: int) -> None:
        """Count bytes that are held already."""
        self.held += size

    def take_if_free(self, size: int) -> bool:
        """Count bytes if there is room for them now."""
        if self.held and self.held + size > self._limit:
            return False
        self.held += size
        return True

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
    """Fetches pictures; made and used inside one event loop.

    Args:
        config: limits, and where to connect.
        max_bytes: larger bodies are `too_large`; reading stops there.
        opt_out: directives of `X-Robots-Tag` that are respected.
        room: for bodies.
    """

    def __init__(self, config: Download, *, max_bytes: int, opt_out: Collection[str], room: Room) -> None:
        self._config, self._max_bytes, self._room = config, max_bytes, room
        self._opt_out = frozenset(directive.lower() for directive in opt_out)
        self._guard = Guard(allow_private=config.allow_private_addresses, allow=config.allow_addresses)
        self._transfers = Transfers(
            user_agent=config.user_agent,
            connect_to=config.connect_to,
            connect_timeout_s=config.connect_timeout_s,
            silence_timeout_s=config.read_timeout_s,
            max_bytes=max_bytes,
            connections=config.connections,
        )

    def close(self) -> None:
        self._transfers.close()

    async def fetch(self, url: URL) -> bytes:
        """The body behind a URL, whose bytes count as held in the room: give them back when done with them.

        Raises:
            RejectedError: with the row's status, where asking again is no use: `http_404`, `refused_address`,
                `too_large`, `too_many_redirects`, `opt_out`, `tls_error` or `bad_url`.
            RetryLaterError: where it may be: `timeout`, `dns_error`, `connection_error`, `incomplete_body`,
                `http_429`, `http_503`…
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.timeout_s
        for _ in range(self._config.max_redirects + 1):
            transfer = await self._run(url, deadline - loop.time())
            if transfer.robots and opts_out(transfer.robots, self._opt_out, self._config.user_agent):
                self._room.give_back(transfer.size if transfer.status == 200 else 0)
                raise RejectedError("opt_out")
            if not (transfer.status in _REDIRECTS and transfer.location):
                return transfer.body
            url = _redirected(url, transfer.location)
        raise RejectedError("too_many_redirects")

    async def _run(self, url: URL, timeout_s: float) -> Transfer:
        """One request: an answer that is a picture or a redirect, or an error. A picture's bytes count as held."""
        room = self._room
        reserved = 0

        def accept(size: int) -> bool:
            nonlocal reserved
            if size <= SMALL_BODY_BYTES or size > self._max_bytes or reserved:
                return size <= self._max_bytes
            # As much as may come. Without room it ends here, to be asked for again: one that pauses may never go on.
            wanted = transfer.announced or self._max_bytes
            reserved = wanted if room.take_if_free(wanted) else 0
            return reserved > 0

        transfer = Transfer(str(url), accept, self._allowed_for(url))
        try:
            await self._transfers.run(transfer, timeout_s)
            if transfer.status == 200 and SMALL_BODY_BYTES < transfer.size <= self._max_bytes and not reserved:
                reserved = transfer.announced or self._max_bytes
                await room.wait_for(reserved)
                transfer = Transfer(str(url), accept, self._allowed_for(url))
                await self._transfers.run(transfer, self._config.timeout_s)
        finally:
            room.give_back(reserved)
        self._check(transfer)
        if transfer.status == 200:
            room.take(transfer.size)
        return transfer

    def _allowed_for(self, url: URL) -> Callable[[str], bool]:
        # What the recipe itself names is trusted.
        return _anywhere if (url.host or "").lower() in self._config.connect_to else self._guard.allows

    def _check(self, transfer: Transfer) -> None:
        status = transfer.status
        if transfer.error in _TIMEOUTS:
            raise RetryLaterError("timeout")
        if status == 200 and (transfer.size > self._max_bytes or transfer.error == pycurl.E_FILESIZE_EXCEEDED):
            raise RejectedError("too_large")
        if status in _LATER or status >= 500:
            raise RetryLaterError(f"http_{status}", after_s=transfer.retry_after_s, answered=True)
        if status not in (0, 200) and not (status in _REDIRECTS and transfer.location):
            raise RejectedError(f"http_{status}")
        if transfer.error and status in (0, 200):
            raise _accident(transfer)


def _anywhere(address: str) -> bool:
    return True


def _redirected(url: URL, location: str) -> URL:
    try:
        return parse_url(str(url.join(URL(location))))
    except Exception:  # As in `parse_url`.
        raise RejectedError("bad_url") from None


def parse_url(url: str) -> URL:
    """A URL of a picture.

    Raises:
        ValueError: no http URL.
    """
    try:
        parsed = URL(url.strip())
    except Exception:  # On hostile text it also raises IndexError.
        raise ValueError(f"not a URL: {url[:100]!r}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"not an http URL: {url[:100]!r}")
    return parsed


def _accident(transfer: Transfer) -> Exception:
    """What a broken connection is called."""
    if transfer.refused:
        return RejectedError("refused_address")
    if transfer.error in _BAD_CERTIFICATES:
        return RejectedError("tls_error")
    if transfer.error == pycurl.E_URL_MALFORMAT:
        return RejectedError("bad_url")
    if transfer.error == pycurl.E_COULDNT_RESOLVE_HOST:
        return RetryLaterError("dns_error")
    if transfer.status:
        # However the connection ended: the server had begun to answer.
        return RetryLaterError("incomplete_body", answered=True)
    return RetryLaterError("connection_error")
