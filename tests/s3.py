"""The S3 server of `tests.benchmarks.s3_server` in a process of its own: starts it, sets it up, asks what it did."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

BUCKET = "bucket"
_OBJECTS_AT_ONCE = 20_000

Outage = Literal["unavailable", "closed"]


@dataclass(frozen=True)
class Figures:
    """What a server did since it was last asked.

    Attributes:
        requests: by the names that S3 gives them; those refused by an outage are `Refused`.
        seconds: of CPU time, by the same names.
        bytes: sent.
        most_at_once: requests that waited for an answer together.
    """

    requests: dict[str, int]
    seconds: dict[str, float]
    bytes: int
    most_at_once: int

    @property
    def count(self) -> int:
        return sum(self.requests.values())


@dataclass(frozen=True)
class FastS3:
    """A running server with one bucket. `tests.pipelines.store.s3.environment(url)` makes s3fs talk to it."""

    port: int

    @classmethod
    def at(cls, url: str) -> FastS3:
        """Return the server of a URL such as `url`."""
        return cls(int(url.rpartition(":")[2]))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def take_figures(self) -> Figures:
        """What it did since the last time."""
        return Figures(**json.loads(self._control("figures")))

    def set_delay(self, seconds: float) -> None:
        """Answer every request so much later; those that come together are delayed together."""
        self._control("settings", json.dumps({"delay_s": seconds}).encode())

    @contextlib.contextmanager
    def outage(self, kind: Outage = "unavailable") -> Iterator[None]:
        """Answer nothing but 503, or `closed`: end every connection without an answer, while the block runs."""
        self.begin_outage(kind)
        try:
            yield
        finally:
            self.end_outage()

    def begin_outage(self, kind: Outage = "unavailable") -> None:
        self._control("settings", json.dumps({"outage": kind}).encode())

    def end_outage(self) -> None:
        self._control("settings", json.dumps({"outage": None}).encode())

    def add_objects(self, objects: Iterable[tuple[str, int | str]]) -> None:
        """Put many objects into the bucket: key, and how many zeros it holds or its text."""
        remaining = iter(objects)
        while batch := list(islice(remaining, _OBJECTS_AT_ONCE)):
            lines = (json.dumps([BUCKET, key, content]) for key, content in batch)
            self._control("objects", "\n".join(lines).encode())

    def _control(self, what: str, body: bytes = b"") -> bytes:
        connection: Any = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("POST", f"/-/{what}", body)
            answer = connection.getresponse()
            assert answer.status == 200
            return bytes(answer.read())


@contextlib.contextmanager
def fast_s3(*, delay_s: float = 0.0) -> Iterator[FastS3]:
    """Run a server for as long as the context lasts."""
    command = [sys.executable, "-m", "tests.benchmarks.s3_server", "--delay-s", str(delay_s), "--bucket", BUCKET]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield FastS3(int(process.stdout.readline()))
    finally:
        process.terminate()
        process.wait()
