"""An S3 server on loopback, and a proxy before it that misbehaves by a seeded plan."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import boto3
from botocore.config import Config
from moto.server import ThreadedMotoServer

KEY_ID = "AKIAFAKEFAKEFAKEFAKE"
SECRET = "fake-secret-that-must-never-be-seen"
SESSION = "fake-session-that-must-never-be-seen"
BUCKET = "bucket"
ANSWERS = {
    "error": (500, "InternalError"),
    "slow_down": (503, "SlowDown"),
    "too_many": (429, "TooManyRequests"),
    "forbidden": (403, "AccessDenied"),
}


@dataclass
class Plan:
    """What becomes of requests: a share of each kind of trouble, else they pass.

    Attributes:
        shares: by kind: `error`, `slow_down`, `too_many`, `forbidden` (answered without the server), `delay`,
            `cut_request` (reset while the request is read; the server never sees it), `cut_answer` (the server did it,
            but only half of the answer arrives), `lose_answer` (the server did it, and nothing arrives).
        seed: of the choice.
        delay_s: of an answer that is delayed.
        only: requests whose first line does not contain this always pass.
    """

    shares: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    delay_s: float = 0.3
    only: str = ""


class Proxy:
    """A reverse proxy for HTTP/1.1 with Content-Length bodies, in a thread of its own. `done` counts what it did."""

    def __init__(self, host: str, port: int, plan: Plan) -> None:
        self.target, self.plan = (host, port), plan
        self.random = random.Random(plan.seed)
        self.done: Counter[str] = Counter()
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20))
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        async def end() -> None:
            self.server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while head := await _head(reader):
                await self._answer(head, reader, writer)
        writer.close()

    async def _answer(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kind, length = self._choose(head), _length(head)
        self.done[kind] += 1
        if b"100-continue" in head.lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if kind == "cut_request":
            await reader.readexactly(length // 2)
            _reset(writer)
        body = await reader.readexactly(length)
        if kind in ANSWERS:
            writer.write(_failure(*ANSWERS[kind], bodiless=head.startswith(b"HEAD")))
            await writer.drain()
            return
        if kind == "delay":
            await asyncio.sleep(self.plan.delay_s)
        answer = await self._forward(head, body)
        if kind == "lose_answer":
            _reset(writer)
        if kind == "cut_answer":
            writer.write(answer[: len(answer) // 2])
            await writer.drain()
            _reset(writer)
        writer.write(answer)
        await writer.drain()

    async def _forward(self, head: bytes, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(*self.target, limit=1 << 20)
        try:
            writer.write(_without(head, b"expect:", b"connection:")[:-2] + b"Connection: close\r\n\r\n" + body)
            await writer.drain()
            # The server closes its connection after each answer; ours stays, so that line goes.
            answer_head, _, rest = (await reader.read(-1)).partition(b"\r\n\r\n")
            return _without(answer_head + b"\r\n\r\n", b"connection:") + rest
        finally:
            writer.close()

    def _choose(self, head: bytes) -> str:
        first_line = head.partition(b"\r\n")[0].decode()
        draw = self.random.random()
        if self.plan.only in first_line:
            for kind, share in self.plan.shares.items():
                if (draw := draw - share) < 0:
                    return kind
        return "pass"


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


def _length(head: bytes) -> int:
    lines = head.lower().split(b"\r\n")
    return next((int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:")), 0)


def _without(head: bytes, *names: bytes) -> bytes:
    return b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(names))


def _failure(status: int, code: str, *, bodiless: bool) -> bytes:
    body = b"" if bodiless else f"<Error><Code>{code}</Code><Message>planned</Message></Error>".encode()
    return f"HTTP/1.1 {status} {code}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    raise ConnectionResetError


class S3:
    """A moto server with one bucket, looked at past every proxy."""

    def __init__(self) -> None:
        self.server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self.server.start()
        self.host, self.port = self.server.get_host_and_port()
        self.url = f"http://{self.host}:{self.port}"
        self.client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET,
            config=Config(retries={"total_max_attempts": 2}),
        )
        self.client.create_bucket(Bucket=BUCKET)

    def objects(self, prefix: str = "") -> dict[str, int]:
        """Return the bytes of every object below a prefix, by key."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return {each["Key"]: each["Size"] for page in pages for each in page.get("Contents", [])}

    def uploads(self, prefix: str = "") -> list[str]:
        """Return the keys of the multipart uploads that are neither completed nor aborted."""
        found = self.client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", [])
        return [each["Key"] for each in found]

    def read(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    @contextlib.contextmanager
    def behind(self, plan: Plan) -> Iterator[Proxy]:
        proxy = Proxy(self.host, self.port, plan)
        try:
            yield proxy
        finally:
            proxy.close()

    def close(self) -> None:
        self.client.close()
        self.server.stop()


def environment(url: str) -> dict[str, str]:
    """Return the variables that make s3fs talk to a server at `url`, with credentials that open nothing."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": SESSION,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }
