"""The HTTP client of a worker process: a thread of its own that keeps many hosts busy at once.

The oldest row whose host has a connection to spare goes next. A host that is slow, broken or asks us to wait delays
only its own rows.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import uvloop
from yarl import URL

from pipelines.stages.pairs.config import Download
from pipelines.stages.pairs.memory import WORKER_MEMORY, Room
from pipelines.stages.pairs.rows import RejectedError
from pipelines.stages.pairs.web.addresses import Guard
from pipelines.stages.pairs.web.curl import RetryLaterError, Transfer, Transfers
from pipelines.stages.pairs.web.opt_out import opts_out

BACKOFF_S = 0.25
# A host that failed this often in a row without an answer is not asked again for a while: otherwise a dead host with a
# thousand pictures would take a thousand time limits.
GIVE_UP_AFTER_FAILURES = 8
GIVE_UP_FOR_S = 60.0
# Larger bodies need room in memory before they are read on; smaller ones are counted once they are there.
SMALL_BODY_BYTES = 1 << 20
_MOST_HOSTS_REMEMBERED = 10_000

# Called in the client's thread with the position of a URL and its body, or the status of its failure.
Deliver = Callable[[int, bytes | str], None]


@dataclass(order=True, slots=True)
class _Request:
    sequence: int
    position: int = field(compare=False)
    url: URL = field(compare=False)
    deliver: Deliver = field(compare=False)
    attempts: int = field(default=0, compare=False)


@dataclass(slots=True)
class _Host:
    waiting: list[_Request] = field(default_factory=list)
    active: int = 0
    failures: int = 0
    closed_until: float = 0.0
    closed_status: str = ""


class Client:
    """Fetches URLs; use it as a context manager. Its public methods may be called from any thread.

    Args:
        config: the recipe's limits, retries and connections.
        max_bytes: larger bodies are `too_large`.
        opt_out: directives of `X-Robots-Tag` that are respected.
        room_bytes: memory for bodies until they are given back.
    """

    def __init__(
        self,
        config: Download,
        *,
        max_bytes: int,
        opt_out: Collection[str] = (),
        room_bytes: int = WORKER_MEMORY.downloaded_bytes,
    ) -> None:
        self._config = config
        self._max_bytes, self._opt_out = max_bytes, opt_out
        self._room = Room(room_bytes)
        self._hosts: dict[str, _Host] = {}
        # (sequence of a host's oldest waiting row, host): the smallest is next.
        self._ready: list[tuple[int, str]] = []
        self._active = 0
        self._sequence = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="downloads", daemon=True)

    def __enter__(self) -> Client:
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def fetch(self, urls: Sequence[str], deliver: Deliver) -> None:
        """Fetch every URL, in any order, and deliver each once: its body, or the status of its failure.

        A body counts as held in memory until `give_back`; while too many are held, no more are fetched.
        """
        self._loop.call_soon_threadsafe(self._enqueue, list(urls), deliver)

    def give_back(self, size: int) -> None:
        """Free the memory of a delivered body of `size` bytes."""
        self._loop.call_soon_threadsafe(self._give_back, size)

    def _serve(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._main())
        except Exception as error:
            self._failure = error
            self._started.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._fetcher = Fetcher(self._config, max_bytes=self._max_bytes, opt_out=self._opt_out, room=self._room)
        self._started.set()
        await self._stopping.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fetcher.close()

    def _enqueue(self, urls: Sequence[str], deliver: Deliver) -> None:
        for position, url in enumerate(urls):
            self._sequence += 1
            try:
                request = _Request(self._sequence, position, parse_url(url), deliver)
            except ValueError:
                deliver(position, "bad_url")
                continue
            self._wait_in_line(request)
        self._pump()

    def _wait_in_line(self, request: _Request) -> None:
        name = request.url.host or ""
        host = self._hosts.setdefault(name, _Host())
        heapq.heappush(host.waiting, request)
        if host.waiting[0] is request:
            self._offer(name, host)

    def _offer(self, name: str, host: _Host) -> None:
        if host.waiting and host.active < self._config.connections_per_host:
            heapq.heappush(self._ready, (host.waiting[0].sequence, name))

    def _pump(self) -> None:
        """Start as many requests as may run now."""
        # Back-pressure: the more bodies wait to be decoded, the fewer are requested: half-read answers cost.
        while self._ready and self._active < self._config.connections * self._room.free:
            sequence, name = heapq.heappop(self._ready)
            host = self._hosts.get(name)
            # Entries are never removed when a host's oldest row changes; outdated ones are passed over here.
            if host is None or not host.waiting or host.waiting[0].sequence != sequence:
                continue
            if host.active >= self._config.connections_per_host:
                continue
            request = heapq.heappop(host.waiting)
            if host.closed_until > self._loop.time():
                request.deliver(request.position, host.closed_status)
            else:
                host.active += 1
                self._active += 1
                task = self._loop.create_task(self._attempt(request, host))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            self._offer(name, host)

    async def _attempt(self, request: _Request, host: _Host) -> None:
        name = request.url.host or ""
        try:
            answer: bytes | str | None = await self._fetcher.fetch(request.url)
            host.failures = 0
        except RejectedError as error:
            answer = error.status
            host.failures = 0
        except RetryLaterError as later:
            answer = self._later(request, host, later)
        except ValueError:
            # The parser of URLs lets it through, but libcurl does not take it.
            answer = "bad_url"
        except Exception:
            # Every row gets an answer, even if a hostile server has found a bug in the client.
            answer = self._later(request, host, RetryLaterError("connection_error"))
        finally:
            host.active -= 1
            self._active -= 1
        if answer is not None:
            request.deliver(request.position, answer)
        self._offer(name, host)
        if not host.waiting and not host.active:
            self._forget(name, host)
        self._pump()

    def _later(self, request: _Request, host: _Host, later: RetryLaterError) -> str | None:
        """Put a request back in line after a pause, or return its status if it is not tried again."""
        host.failures = 0 if later.answered else host.failures + 1
        now = self._loop.time()
        if later.after_s > self._config.max_retry_after_s:
            host.closed_until, host.closed_status = now + later.after_s, later.status
        elif host.failures >= GIVE_UP_AFTER_FAILURES:
            host.closed_until, host.closed_status = now + GIVE_UP_FOR_S, later.status
        if request.attempts >= self._config.retries or host.closed_until > now:
            return later.status
        pause = max(later.after_s, BACKOFF_S * 2**request.attempts)
        request.attempts += 1
        self._loop.call_later(pause, self._again, request)
        return None

    def _again(self, request: _Request) -> None:
        self._wait_in_line(request)
        self._pump()

    def _forget(self, name: str, host: _Host) -> None:
        # Failures matter while a host may be asked again, but most of a million hosts are asked only once.
        if not host.failures and not host.closed_until:
            self._hosts.pop(name, None)
        elif len(self._hosts) > _MOST_HOSTS_REMEMBERED:
            idle = [n for n, h in self._hosts.items() if not h.waiting and not h.active]
            for old in idle[: len(idle) // 2]:
                del self._hosts[old]

    def _give_back(self, size: int) -> None:
        self._room.give_back(size)
        self._pump()


class Fetcher:
    """Makes single attempts to fetch pictures; created and used inside one event loop.

    Args:
        config: the recipe's limits and connections.
        max_bytes: larger bodies are `too_large`; reading stops there.
        opt_out: directives of `X-Robots-Tag` that are respected.
        room: memory for bodies.
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
        """Fetch the body behind a URL, following redirects. Its bytes count as held in the room until given back.

        Raises:
            RejectedError: with the row's status, if asking again is no use: `http_404`, `refused_address`, `too_large`,
                `too_many_redirects`, `opt_out`, `tls_error` or `bad_url`.
            RetryLaterError: if it may be of use: `timeout`, `dns_error`, `connection_error`, `incomplete_body`,
                `http_429`, `http_503`…
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.timeout_s
        for _ in range(self._config.max_redirects + 1):
            transfer = await self._run(url, deadline - loop.time())
            if transfer.robots and opts_out(transfer.robots, self._opt_out, self._config.user_agent):
                self._room.give_back(transfer.size if transfer.status == 200 else 0)
                raise RejectedError("opt_out")
            if not transfer.redirects:
                return transfer.body
            url = _redirected(url, transfer.location or "")
        raise RejectedError("too_many_redirects")

    async def _run(self, url: URL, timeout_s: float) -> Transfer:
        """Make one request, answered by a picture or a redirect. A picture's bytes count as held."""
        room = self._room
        reserved = 0

        def accept(size: int) -> bool:
            nonlocal reserved
            if size <= SMALL_BODY_BYTES or size > self._max_bytes or reserved:
                return size <= self._max_bytes
            # As much as may still come. Without room the transfer ends here, to be asked for again: a server whose
            # answer is paused may never go on with it.
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
        transfer.check(self._max_bytes)
        if transfer.status == 200:
            room.take(transfer.size)
        return transfer

    def _allowed_for(self, url: URL) -> Callable[[str], bool]:
        # An address that the recipe itself names is trusted.
        return _anywhere if (url.host or "").lower() in self._config.connect_to else self._guard.allows


def _anywhere(address: str) -> bool:
    return True


def _redirected(url: URL, location: str) -> URL:
    try:
        return parse_url(str(url.join(URL(location))))
    except Exception:  # As in `parse_url`.
        raise RejectedError("bad_url") from None


def parse_url(url: str) -> URL:
    """Parse the URL of a picture.

    Raises:
        ValueError: it is not an http or https URL.
    """
    try:
        parsed = URL(url.strip())
    except Exception:  # On hostile text it also raises IndexError.
        raise ValueError(f"not a URL: {url[:100]!r}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"not an http URL: {url[:100]!r}")
    return parsed
