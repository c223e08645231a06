"""A small web on loopback that serves the demo's pictures, and misbehaves as the real one does.

`DemoWeb` runs it in a process of its own, so that the pipeline meets real sockets. Its paths:

    /images/NAME      the picture                         /truncated/NAME  its first half, as if that were all
    /copies/NAME      the same bytes under another URL    /page/NAME       an HTML page under a picture's name
    /moved/NAME       a redirect to /images/NAME          /empty/NAME      200 and no body
    /flaky/NAME       500 when first asked, then the picture
    /slow/NAME        the picture after 2 seconds         /hang/NAME       nothing for half a minute
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType

import click
from aiohttp import web

from pipelines.errors import UserError

SLOW_S = 2.0
HANG_S = 30.0
PARENT_CHECK_S = 0.5
STOP_S = 5.0
HOST = "127.0.0.1"
# No name can leave the folder: a stem, a dot and a suffix, none of them empty.
NAME = r"{name:\w+\.\w+}"


class DemoWeb:
    """The demo's web as a context manager: started on entry, stopped on exit, gone when this process dies.

    Args:
        root: the folder that holds `images/`.
        port: the loopback port to listen on; 0 takes any free one.

    Attributes:
        port: the port that is really listened on, once entered.

    Raises:
        UserError: on entry, when the port is occupied or the server does not start.
    """

    def __init__(self, root: Path | str, port: int = 0) -> None:
        self.root = Path(root)
        self.port = port
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "DemoWeb":
        # The package may be run from a checkout, in any working directory.
        package_folder = str(Path(__file__).resolve().parents[2])
        paths = [package_folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jobs.demo.web", "--root", str(self.root), "--port", str(self.port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C in the terminal is the pipeline's to handle; the server then goes with it, quietly.
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        said = json.loads(line) if line.startswith("{") else {"error": "the server ended without a word"}
        if "error" in said:
            self._stop()
            raise UserError(
                f"the demo's web cannot listen on {HOST}:{self.port}: {said['error']}; "
                "choose another port, or 0 for any free one"
            )
        self.port = int(said["port"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def application(root: Path) -> web.Application:
    """Return the web's paths over the pictures in `root/images`."""
    behaviours = _Behaviours(root / "images")
    app = web.Application()
    app.add_routes([web.get(f"/{prefix}/{NAME}", handler) for prefix, handler in behaviours.by_prefix().items()])
    return app


class _Behaviours:
    """One handler for each way that the web answers; see the module's docstring."""

    def __init__(self, images: Path) -> None:
        self._images = images
        self._asked: set[str] = set()

    def by_prefix(self) -> dict[str, Callable[[web.Request], Awaitable[web.Response]]]:
        return {
            "images": self.whole,
            "copies": self.whole,
            "moved": self.moved,
            "flaky": self.flaky,
            "slow": self.slow,
            "hang": self.hang,
            "truncated": self.truncated,
            "page": self.page,
            "empty": self.empty,
        }

    async def whole(self, request: web.Request) -> web.Response:
        return _reply(self._picture(request), request)

    async def truncated(self, request: web.Request) -> web.Response:
        body = self._picture(request)
        return _reply(body[: len(body) // 2], request)

    async def flaky(self, request: web.Request) -> web.Response:
        if request.path not in self._asked:
            self._asked.add(request.path)
            raise web.HTTPInternalServerError
        return await self.whole(request)

    async def slow(self, request: web.Request) -> web.Response:
        await asyncio.sleep(SLOW_S)
        return await self.whole(request)

    async def hang(self, request: web.Request) -> web.Response:
        await asyncio.sleep(HANG_S)
        return await self.whole(request)

    async def moved(self, request: web.Request) -> web.Response:
        raise web.HTTPFound(f"/images/{request.match_info['name']}")

    async def page(self, request: web.Request) -> web.Response:
        text = "<!doctype html><title>Gone</title><p>This picture has moved."
        return web.Response(text=text, content_type="text/html")

    async def empty(self, request: web.Request) -> web.Response:
        return _reply(b"", request)

    def _picture(self, request: web.Request) -> bytes:
        try:
            return (self._images / request.match_info["name"]).read_bytes()
        except OSError:
            raise web.HTTPNotFound from None


def _reply(body: bytes, request: web.Request) -> web.Response:
    return web.Response(body=body, content_type="image/png" if request.path.endswith(".png") else "image/jpeg")


async def serve(root: Path, port: int) -> None:
    """Listen until the parent process is gone; the first line on stdout is JSON: the port or the error."""
    parent = os.getppid()
    runner = web.AppRunner(application(root), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, port, shutdown_timeout=0.1).start()
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        print(json.dumps({"error": os.strerror(number) if number else str(error)}), flush=True)
        await runner.cleanup()
        raise SystemExit(1) from None
    print(json.dumps({"port": runner.addresses[0][1]}), flush=True)
    closed = asyncio.create_task(_stdin_closed())
    # A forked sibling may hold the other end of stdin open, so we watch for the parent's death as well.
    while os.getppid() == parent and not closed.done():
        await asyncio.wait([closed], timeout=PARENT_CHECK_S)
    await runner.cleanup()


async def _stdin_closed() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


@click.command()
@click.option("--root", required=True, type=click.Path(path_type=Path), help="Folder that holds images/.")
@click.option("--port", default=0, show_default=True, help="Loopback port; 0 takes any free one.")
def main(root: Path, port: int) -> None:
    """Serve the demo's pictures on loopback until standard input closes."""
    asyncio.run(serve(root, port))


if __name__ == "__main__":
    main()
