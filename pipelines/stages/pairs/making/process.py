"""Rows to outcomes: what a worker process keeps for all its shards, and how it keeps its core busy.

Bodies come from the network (one client, many connections), from remote files (a few threads) or from local ones; one
thread decodes them all, in the order in which they are there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import queue
import resource
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.filters import check_row
from pipelines.stages.pairs.making.board import Counting
from pipelines.stages.pairs.pictures.decode import make_picture
from pipelines.stages.pairs.rows import RejectedError, Row
from pipelines.stages.pairs.shard.outcome import OK, Outcome
from pipelines.stages.pairs.shard.spool import Allowance, Spool
from pipelines.stages.pairs.web.download import Client

# Encoded pictures that wait for the rest of their shards.
SPOOL_BYTES = 128 * 2**20
_REMOTE_READERS = 16
# Read from a remote store, and not decoded yet.
_MOST_READ_BODIES = 2 * _REMOTE_READERS
_MOST_OPEN_FILES = 65_536

# Puts off reading a body: called in the decoding thread.
Load = Callable[[], bytes]


class Processor:
    """Makes outcomes of rows; use it as a context manager, then call `process` from any number of threads.

    Args:
        config: of the stage.
        downloads: whether pictures are behind URLs.
        remote: whether pictures are read from a remote store.
        counting: is told of every finished row.
    """

    def __init__(self, config: PairsConfig, *, downloads: bool, remote: bool, counting: Counting) -> None:
        self._config, self._counting = config, counting
        self._allowance = Allowance(SPOOL_BYTES)
        self._bodies: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._decoder = threading.Thread(target=self._decode, daemon=True, name="decode")
        self._client: Client | None = None
        if downloads:
            _allow_many_connections()
            self._client = Client(config.download, max_bytes=config.max_image_bytes, opt_out=config.opt_out)
        self._readers = ThreadPoolExecutor(_REMOTE_READERS, thread_name_prefix="read") if remote else None
        self._read_bodies = threading.BoundedSemaphore(_MOST_READ_BODIES)

    def __enter__(self) -> Processor:
        if self._client:
            self._client.__enter__()
        self._decoder.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bodies.put(None)
        if self._client:
            self._client.__exit__(kind, error, trace)
        if self._readers:
            self._readers.shutdown(cancel_futures=True)

    def spool(self) -> Spool:
        """Where the pictures of one shard are kept until it is written; close it afterwards."""
        return Spool(self._allowance)

    def process(self, rows: Sequence[Row], spool: Spool) -> list[Outcome]:
        """The outcome of every row, in order; the pictures' bytes are in the spool."""
        job = _Job(spool, [self._decide(row) for row in rows], self._counting)
        todo = job.undecided
        if self._client:
            self._fetch(job, rows, todo)
        elif self._readers:
            for index in todo:
                self._readers.submit(self._read, job, index, rows[index])
        else:
            for index in todo:
                self._bodies.put(_Work(job, (index,), functools.partial(self._load, rows[index])))
        return job.wait()

    def _decide(self, row: Row) -> Outcome | None:
        """The outcome where the row alone, without its picture, is enough."""
        if row.status is not None:
            return Outcome(row.status)
        if not row.captions:
            return Outcome("empty_caption")
        most = self._config.max_caption_bytes
        if any(4 * len(caption) > most and len(caption.encode()) > most for caption in row.captions):
            return Outcome("caption_too_long")
        try:
            check_row(row, self._config)
        except RejectedError as error:
            return Outcome(error.status)
        return Outcome("missing_url") if row.load is None and row.url is None else None

    def _fetch(self, job: _Job, rows: Sequence[Row], todo: Sequence[int]) -> None:
        # One request for all the rows that name the same URL.
        indices: dict[str, list[int]] = {}
        for index in todo:
            indices.setdefault(rows[index].url or "", []).append(index)
        places = list(indices.values())

        def deliver(position: int, answer: bytes | str) -> None:
            if isinstance(answer, str):
                job.settle(places[position], Outcome(answer))
            else:
                self._bodies.put(_Work(job, tuple(places[position]), answer))

        assert self._client is not None
        self._client.fetch(list(indices), deliver)

    def _load(self, row: Row) -> bytes:
        assert row.load is not None
        return row.load(self._config.max_image_bytes)

    def _read(self, job: _Job, index: int, row: Row) -> None:
        self._read_bodies.acquire()
        try:
            self._bodies.put(_Work(job, (index,), self._load(row)))
            return
        except RejectedError as error:
            job.settle([index], Outcome(error.status))
        except Exception as error:
            job.fail(error)
        self._read_bodies.release()

    def _decode(self) -> None:
        while (work := self._bodies.get()) is not None:
            try:
                data = work.body if isinstance(work.body, bytes) else work.body()
            except RejectedError as error:
                work.job.settle(work.indices, Outcome(error.status))
                continue
            except Exception as error:
                work.job.fail(error)
                continue
            try:
                work.job.settle(work.indices, self._outcome(data, work.job.spool), size=len(data))
            except Exception as error:
                work.job.fail(error)
            if self._client:
                self._client.give_back(len(data))
            elif self._readers:
                self._read_bodies.release()

    def _outcome(self, data: bytes, spool: Spool) -> Outcome:
        digest = hashlib.sha256(data).hexdigest()
        try:
            picture = make_picture(data, self._config)
        except RejectedError as error:
            return Outcome(error.status, digest)
        return Outcome(OK, digest, dataclasses.replace(picture, data=b""), spool.put(picture.data))


@dataclasses.dataclass(frozen=True, slots=True)
class _Work:
    """A body to decode, for all rows that it is of."""

    job: _Job
    indices: tuple[int, ...]
    body: bytes | Load


class _Job:
    """The rows of one shard while they are worked on."""

    def __init__(self, spool: Spool, decided: list[Outcome | None], counting: Counting) -> None:
        self.spool = spool
        self.undecided = [index for index, outcome in enumerate(decided) if outcome is None]
        self._outcomes = decided
        self._counting = counting
        self._left = len(self.undecided)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._error: Exception | None = None
        for outcome in decided:
            if outcome is not None:
                counting.add(outcome.status)
        if not self._left:
            self._done.set()

    def settle(self, indices: Sequence[int], outcome: Outcome, size: int = 0) -> None:
        for place, index in enumerate(indices):
            self._outcomes[index] = outcome
            self._counting.add(outcome.status, 0 if place else size)
        with self._lock:
            self._left -= len(indices)
            if not self._left:
                self._done.set()

    def fail(self, error: Exception) -> None:
        """An error that is not the row's: a full disk, a lost file system, a bug."""
        self._error = error
        self._done.set()

    def wait(self) -> list[Outcome]:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return [outcome for outcome in self._outcomes if outcome is not None]


def _allow_many_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
