"""A worker process: makes several shards at once and keeps its core busy.

Bodies come from the network (one client, many connections), from a remote store (a few threads) or from local files.
One thread decodes them all, in the order in which they arrive, so that no core is idle while servers are slow.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import queue
import resource
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.compute.host_memory import keep_freed_memory
from pipelines.stages.pairs.assignment import Assignment
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.filters import check_row
from pipelines.stages.pairs.making.progress_board import Poster, ShardCounts, WorkerCounts
from pipelines.stages.pairs.making.suspects import Suspects
from pipelines.stages.pairs.memory import WORKER_MEMORY, Allowance
from pipelines.stages.pairs.pictures.transcode import make_picture
from pipelines.stages.pairs.rows import RejectedError, Row, Source
from pipelines.stages.pairs.shard.duplicate_tokens import Tokens, make_tokens
from pipelines.stages.pairs.shard.files import Spool
from pipelines.stages.pairs.shard.outcome import OK, Outcome
from pipelines.stages.pairs.shard.staged import StagedShard, is_staged, stage_shard
from pipelines.stages.pairs.web.download import Client
from pipelines.store.commits import ArtifactWriter
from pipelines.store.storage import Storage

_REMOTE_READERS = 16
_MOST_OPEN_FILES = 65_536
# Reading rows only to throw them away is cheaper than another read, up to this many.
_GAP_ROWS = 256
_READ_ROWS = 4096


class ShardMaker:
    """An actor: built once in each process, then called with one shard at a time by each of several threads.

    Args:
        source, config, assignment: the input, the stage's section of the recipe, and which rows make which shard.
        work: the folder of staged shards.
        writer: the artifact's, to publish each shard at once; None if shards stay staged until all of them are.
        board: receives the counts of finished rows.
    """

    def __init__(
        self,
        *,
        source: Source,
        config: PairsConfig,
        assignment: Assignment,
        work: Storage,
        writer: ArtifactWriter | None,
        board: Poster | None,
    ) -> None:
        self._source, self._config, self._assignment = source, config, assignment
        self._work, self._writer = work, writer
        self._attempt = uuid.uuid4().hex[:12]
        keep_freed_memory()
        # Arrow's own choice keeps three times as much of what it freed.
        pa.set_memory_pool(pa.jemalloc_memory_pool())
        url = config.source
        self._processor = Processor(
            config,
            downloads=source.downloads,
            remote="://" in url and not url.startswith("file://"),
        )
        self._counts = WorkerCounts(board, self._attempt)
        # An actor is not told when it is no longer needed: its process just ends.
        atexit.register(self._processor.close)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Make the shard `item["shard"]`; return its number, rows by status, bytes fetched and records of its files.

        If `item["alone"]`, a worker has died while it made this shard, and the row to blame is looked for.
        """
        number = item["shard"]
        suspects = Suspects(self._work, number) if item.get("alone") else None
        with self._counts.of(number) as counts:
            # It may have been made by a process that died before it could say so, or before everything was committed.
            known = is_staged(self._work, number)
            shard = StagedShard.open(self._work, number) if known else self._make(number, counts, suspects)
            records = shard.publish(self._writer) if self._writer is not None else []
            return {
                "shard": number,
                "statuses": dict(shard.statuses),
                "bytes": counts.now()["bytes"],
                "records": [record.model_dump() for record in records],
            }

    def _make(self, number: int, counts: ShardCounts, suspects: Suspects | None) -> StagedShard:
        rows = read_rows(self._source, self._assignment.rows_of(number))
        with self._processor.spool() as spool:
            outcomes = self._processor.process(rows, spool, counts, suspects)
            return stage_shard(
                self._work,
                number,
                self._attempt,
                rows,
                outcomes,
                spool=spool,
                tokens=_tokens(rows, outcomes, self._config) if self._config.deduplicate else None,
                extra_types=self._source.extra_types,
                config=self._config,
            )


def read_rows(source: Source, numbers: NDArray[np.int64]) -> list[Row]:
    """Read rows by their ascending numbers, neighbours in one piece."""
    rows: list[Row] = []
    for start, stop in _spans(numbers):
        wanted = set(numbers[np.searchsorted(numbers, start) : np.searchsorted(numbers, stop)].tolist())
        rows += [row for row in source.read(start, stop) if row.index in wanted]
    return rows


def _spans(numbers: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield ranges (start, stop) that hold all of these ascending numbers, and few others."""
    first = last = int(numbers[0])
    for number in numbers[1:].tolist():
        is_gap = number - last > 1
        if number - last > _GAP_ROWS or (is_gap and number - first >= _READ_ROWS):
            yield first, last + 1
            first = number
        last = number
    yield first, last + 1


def _tokens(rows: Sequence[Row], outcomes: Sequence[Outcome], config: PairsConfig) -> Tokens:
    made = [(row, outcome) for row, outcome in zip(rows, outcomes, strict=True) if outcome.status == OK]
    return make_tokens(
        [row.index for row, _ in made],
        [outcome.sha256 or "" for _, outcome in made],
        [row.url for row, _ in made],
        [outcome.picture.phash if outcome.picture else None for _, outcome in made],
        config.near_duplicates,
    )


class Processor:
    """Turns rows into outcomes; `process` may be called from any number of threads until `close`.

    Args:
        config: the stage's section of the recipe.
        downloads: whether pictures are behind URLs.
        remote: whether pictures are read from a remote store.
    """

    def __init__(self, config: PairsConfig, *, downloads: bool, remote: bool) -> None:
        self._config = config
        self._allowance = Allowance(WORKER_MEMORY.encoded_bytes)
        self._read_bodies = threading.BoundedSemaphore(WORKER_MEMORY.remote_bodies)
        # Unbounded: what waits in it is bounded at its source, by the memory of the client or by `_read_bodies`.
        self._bodies: queue.SimpleQueue[_Body | None] = queue.SimpleQueue()
        self._resources = contextlib.ExitStack()
        self._client: Client | None = None
        self._readers: ThreadPoolExecutor | None = None
        if downloads:
            _allow_many_connections()
            client = Client(config.download, max_bytes=config.max_image_bytes, opt_out=config.opt_out)
            self._client = self._resources.enter_context(client)
        elif remote:
            self._readers = ThreadPoolExecutor(_REMOTE_READERS, thread_name_prefix="read")
            self._resources.callback(self._readers.shutdown, wait=False, cancel_futures=True)
        # One is enough: Ray runs a worker process for every core, and decoding keeps its core busy.
        threading.Thread(target=self._decode, daemon=True, name="decode").start()
        self._resources.callback(self._bodies.put, None)

    def close(self) -> None:
        """End all downloads and threads; shards under way are lost."""
        self._resources.close()

    def spool(self) -> Spool:
        """Return a place for the pictures of one shard until it is written; close it afterwards."""
        return Spool(self._allowance)

    def process(
        self, rows: Sequence[Row], spool: Spool, counts: ShardCounts, suspects: Suspects | None = None
    ) -> list[Outcome]:
        """Return the outcome of every row, in order; the pictures' bytes are in the spool.

        Args:
            rows: the rows of a shard.
            spool: receives the encoded pictures.
            counts: receives every finished row.
            suspects: knows rows that kill their worker, and is told which row is decoded; None for a shard without.
        """
        decided = [(suspects and suspects.outcome(row.index)) or self._decide(row) for row in rows]
        pending = _PendingRows(spool, decided, counts)
        if suspects is not None:
            pending.note = lambda indices: suspects.note([rows[index].index for index in indices])
        if self._client:
            self._fetch(pending, rows, self._client)
        elif self._readers:
            for index in pending.undecided:
                self._readers.submit(self._read, pending, index, rows[index])
        else:
            # Local files are read by the decoding thread itself: it would only wait for another one.
            for index in pending.undecided:
                self._bodies.put(_Body(pending, (index,), functools.partial(self._load, rows[index])))
        return pending.wait()

    def _decide(self, row: Row) -> Outcome | None:
        """Return the outcome if it is known without the row's picture."""
        if row.status is not None:
            return Outcome(row.status)
        if not row.captions and self._config.captions == "required":
            return Outcome("empty_caption")
        most = self._config.max_caption_bytes
        # A character has at most 4 bytes in UTF-8, so that most captions need not be encoded to be found short enough.
        if any(4 * len(caption) > most and len(caption.encode()) > most for caption in row.captions):
            return Outcome("caption_too_long")
        try:
            check_row(row, self._config)
        except RejectedError as error:
            return Outcome(error.status)
        return Outcome("missing_url") if row.load is None and row.url is None else None

    def _fetch(self, pending: _PendingRows, rows: Sequence[Row], client: Client) -> None:
        # One request for all the rows that name the same URL.
        indices: dict[str, list[int]] = {}
        for index in pending.undecided:
            indices.setdefault(rows[index].url or "", []).append(index)
        rows_of_url = list(indices.values())

        def deliver(position: int, answer: bytes | str) -> None:
            if isinstance(answer, str):
                pending.settle(rows_of_url[position], Outcome(answer))
            else:
                self._bodies.put(_Body(pending, tuple(rows_of_url[position]), answer))

        client.fetch(list(indices), deliver)

    def _load(self, row: Row) -> bytes:
        assert row.load is not None
        return row.load(self._config.max_image_bytes)

    def _read(self, pending: _PendingRows, index: int, row: Row) -> None:
        """Read a body from a remote store; runs in one of the readers' threads."""
        self._read_bodies.acquire()
        try:
            # From here on the decoding thread releases it.
            self._bodies.put(_Body(pending, (index,), self._load(row)))
            return
        except RejectedError as error:
            pending.settle([index], Outcome(error.status))
        except Exception as error:
            pending.fail(error)
        self._read_bodies.release()

    def _decode(self) -> None:
        while (body := self._bodies.get()) is not None:
            try:
                body.pending.note(body.indices)
                data = body.data if isinstance(body.data, bytes) else body.data()
            except RejectedError as error:
                body.pending.settle(body.indices, Outcome(error.status))
                continue
            except Exception as error:
                body.pending.fail(error)
                continue
            try:
                body.pending.settle(body.indices, self._outcome(data, body.pending.spool), size=len(data))
            except Exception as error:
                body.pending.fail(error)
            if self._client:
                self._client.give_back(len(data))
            elif self._readers:
                self._read_bodies.release()

    def _outcome(self, data: bytes, spool: Spool) -> Outcome:
        # Of the source's bytes, before anything is done to them: equal downloads are duplicates whatever the settings.
        digest = hashlib.sha256(data).hexdigest()
        try:
            picture = make_picture(data, self._config)
        except RejectedError as error:
            return Outcome(error.status, digest)
        return Outcome(OK, digest, dataclasses.replace(picture, data=b""), spool.put(picture.data))


@dataclasses.dataclass(frozen=True, slots=True)
class _Body:
    """The source bytes of a picture, or a function that reads them, for all rows that they belong to."""

    pending: _PendingRows
    indices: tuple[int, ...]
    data: bytes | Callable[[], bytes]


class _PendingRows:
    """The rows of one shard until each has an outcome."""

    def __init__(self, spool: Spool, decided: list[Outcome | None], counts: ShardCounts) -> None:
        self.spool = spool
        self.undecided = [index for index, outcome in enumerate(decided) if outcome is None]
        self._outcomes = decided
        self._counts = counts
        self._left = len(self.undecided)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._error: Exception | None = None
        # Told the indices of the rows whose picture is about to be decoded.
        self.note: Callable[[Sequence[int]], None] = lambda indices: None
        for outcome in decided:
            if outcome is not None:
                counts.add(outcome.status)
        if not self._left:
            self._done.set()

    def settle(self, indices: Sequence[int], outcome: Outcome, size: int = 0) -> None:
        """Give rows their outcome; `size` bytes were fetched for all of them together."""
        for position, index in enumerate(indices):
            self._outcomes[index] = outcome
            self._counts.add(outcome.status, 0 if position else size)
        with self._lock:
            self._left -= len(indices)
            if not self._left:
                self._done.set()

    def fail(self, error: Exception) -> None:
        """End the shard with an error that no row is to blame for: a full disk, a lost file system, a bug."""
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
