"""Pictures, and a web server that does what servers on the web do."""

import asyncio
import gzip
import io
import socket
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import web
from PIL import Image

HOST = "pictures.example"


def picture(value: int = 0, size: tuple[int, int] = (48, 40), kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """Encode a picture with a gradient; each value gives other bytes."""
    image = Image.linear_gradient("L").resize(size).point(lambda v: (v + value * 7) % 256).convert(mode)
    image.putpixel((0, 0), tuple([value % 256] * len(image.getbands())))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


class Web:
    """A server on loopback that does what servers on the web do; counts requests by path.

    Args:
        everywhere: listen on every address of the machine, in IPv4 and IPv6, and not on 127.0.0.1 alone.
    """

    def __init__(self, *, everywhere: bool = False) -> None:
        self.requests: Counter[str] = Counter()
        self.files: dict[str, bytes] = {}
        self.refused: dict[str, int] = {}
        self.delay_s = 0.0
        # While it is set, requests are kept waiting.
        self.paused = False
        # Where it is given, requests are answered when as many of them wait as the barrier has parties.
        self.together: asyncio.Barrier | None = None
        self._busy_until = 0.0
        self.most_at_once = self._at_once = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(everywhere), self._loop).result(10)

    async def _start(self, everywhere: bool) -> int:
        app = web.Application()
        app.router.add_get("/{name:.*}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        if everywhere:
            listening = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
            await web.SockSite(self._runner, listening).start()
        else:
            await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return int(self._runner.addresses[0][1])

    @property
    def connect_to(self) -> dict[str, str]:
        return {HOST: f"127.0.0.1:{self.port}", "slow.example": f"127.0.0.1:{self.port}"}

    def url(self, name: str, host: str = HOST) -> str:
        return f"http://{host}/{name}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        self.requests[name] += 1
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await asyncio.sleep(self.delay_s)
            while self.paused:
                await asyncio.sleep(0.01)
            if self.together:
                await self.together.wait()
            return await self._respond(request, name)
        finally:
            self._at_once -= 1

    async def _respond(self, request: web.Request, name: str) -> web.StreamResponse:
        if name in self.refused:
            return web.Response(status=self.refused[name])
        if name in self.files:
            return web.Response(body=self.files[name], content_type="image/jpeg")
        special: dict[str, Callable[[web.Request], Any]] = {
            "slow": self._slow,
            "endless": self._endless,
            "flaky": self._flaky,
            "reset": self._reset,
            "short": self._short,
            "trickle": self._trickle,
            "silent": self._silent,
            "garbage": self._garbage,
            "bytes": self._bytes,
            "cutoff": self._cutoff,
            "busy": self._busy,
        }
        kind = name.split("/")[0]
        if kind in special:
            response: web.StreamResponse = await special[kind](request)
            return response
        if kind == "loop":
            raise web.HTTPFound(f"/loop/{self.requests.total()}")
        if kind == "moved":
            raise web.HTTPMovedPermanently(name.removeprefix("moved/"))
        if kind == "inside":
            raise web.HTTPFound(f"http://127.0.0.1:{self.port}/a.jpg")
        if kind == "gzip":
            bomb = gzip.compress(bytes(10_000_000), mtime=0)
            return web.Response(body=bomb, headers={"Content-Encoding": "gzip"}, content_type="image/jpeg")
        if kind == "metadata":
            raise web.HTTPFound(f"http://169.254.169.254:{self.port}/a.jpg")
        if kind == "noai":
            return web.Response(body=picture(), headers={"X-Robots-Tag": "noai, noimageai"})
        if kind == "tomorrow":
            return web.Response(status=429, headers={"Retry-After": "3600"})
        if kind == "large":
            return web.Response(body=bytes(2_000_000))
        if kind == "page.jpg":
            return web.Response(text="<html>gone</html>", content_type="image/jpeg")
        if kind.isdigit():
            return web.Response(status=int(kind))
        raise web.HTTPNotFound

    async def _slow(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response(body=picture())

    async def _endless(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(1 << 16))

    async def _flaky(self, request: web.Request) -> web.StreamResponse:
        if self.requests[request.match_info["name"]] == 1:
            return web.Response(status=503, headers={"Retry-After": "0"})
        return web.Response(body=picture(3))

    async def _reset(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def _short(self, request: web.Request) -> web.StreamResponse:
        """A body that ends before its Content-Length."""
        self._raw(request, b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + picture())
        return web.Response()

    async def _garbage(self, request: web.Request) -> web.StreamResponse:
        self._raw(request, b"\x00\xff not HTTP at all\r\n\r\n")
        return web.Response()

    async def _bytes(self, request: web.Request) -> web.StreamResponse:
        self._raw(request, b"HTTP/1.1 302 Found\r\nLocation: /\xff\xfe\r\nContent-Length: 0\r\n\r\n")
        return web.Response()

    async def _cutoff(self, request: web.Request) -> web.StreamResponse:
        self._raw(request, b"HTTP/1.1 302 Found\r\nLocation: /a.jpg\r\nContent-Length: 50\r\n\r\nshort")
        return web.Response()

    async def _trickle(self, request: web.Request) -> web.StreamResponse:
        """A byte at a time, never pausing for long: a slow loris."""
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x")
            await asyncio.sleep(0.1)

    async def _silent(self, request: web.Request) -> web.StreamResponse:
        """Headers, and nothing more."""
        response = web.StreamResponse()
        await response.prepare(request)
        await asyncio.sleep(30)
        return response

    async def _busy(self, request: web.Request) -> web.StreamResponse:
        """Asks for a second's patience, and refuses who has less."""
        if self.requests[request.match_info["name"]] == 1:
            # Timers may be a little early.
            self._busy_until = self._loop.time() + 0.95
            return web.Response(status=429, headers={"Retry-After": "1"})
        return web.Response(status=403) if self._loop.time() < self._busy_until else web.Response(body=picture(3))

    def _raw(self, request: web.Request, data: bytes) -> None:
        assert request.transport is not None
        request.transport.write(data)
        request.transport.close()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
