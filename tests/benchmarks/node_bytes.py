"""What the nodes of a training run fetch of a latent cache in a bucket: `python -m tests.benchmarks.node_bytes`.

The nodes do not speak to each other while they read, so they are measured one after the other, each with a cache of its
own, its ranks in threads. The cache holds a part of the node's share of the data: every epoch fetches it again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.shards.format import ShardWriter, encode_npy
from pipelines.shards.index import IndexBuilder, index_name
from pipelines.shards.order import SampleOrder
from pipelines.shards.reader import ShardReader
from pipelines.store.commits import ArtifactWriter
from pipelines.store.file_table import FileTable
from pipelines.store.storage import Storage
from tests.benchmarks.tool_run import dump
from tests.pipelines.store.s3 import environment
from tests.s3 import BUCKET, FastS3, fast_s3

SHARDS, ROWS = 1280, 16
BATCH_SIZE = 256
EPOCHS = 2
# (ranks, nodes)
LAYOUTS = ((8, 2), (64, 8))
# Of a node's share of the data.
CACHE_SHARE = 0.25


def measure(server: FastS3, *, shards: int = SHARDS, delay_s: float = 0.025) -> dict[str, Any]:
    """Measure what each node fetches an epoch, over its share of the data.

    Args:
        server: an S3 server, for this alone.
        shards: of the cache.
        delay_s: added to every request.
    """
    os.environ.update(environment(server.url))
    storage = Storage(f"s3://{BUCKET}/node-bytes")
    files = _write(storage, shards)
    bytes_ = sum(record.bytes for record in files)
    server.set_delay(delay_s)
    found: dict[str, Any] = {"shards": shards, "mib": bytes_ / 2**20, "delay_ms": delay_s * 1e3, "layouts": []}
    for ranks, nodes in LAYOUTS:
        started = time.perf_counter()
        # As Ray Train numbers them: those of a node follow each other.
        here = ranks // nodes
        fetched = [
            _read_node(server, storage, files, range(node * here, (node + 1) * here), ranks, nodes)
            for node in range(nodes)
        ]
        found["layouts"].append(
            {
                "ranks": ranks,
                "nodes": nodes,
                "worst": max(bytes_fetched for bytes_fetched, _ in fetched) / EPOCHS / (bytes_ / nodes),
                "mean": sum(bytes_fetched for bytes_fetched, _ in fetched) / EPOCHS / bytes_,
                "requests_a_shard": sum(requests for _, requests in fetched) / EPOCHS / shards,
                "seconds": time.perf_counter() - started,
            }
        )
    return {"bytes_per_node": max(layout["worst"] for layout in found["layouts"]), **found}


def _write(storage: Storage, shards: int) -> FileTable:
    """Commit shards of small latents, no two alike, with their indexes."""
    writer = ArtifactWriter("latents", "key", storage)
    random = np.random.default_rng(0)

    def commit(shard: int) -> None:
        name, index = f"{shard:06d}.tar", IndexBuilder()
        with storage.writer(name) as path, ShardWriter(path, index) as tar:
            for row in range(ROWS):
                moments = random.standard_normal((2, 4, 16, 16)).astype(np.float16)
                tar.add(f"{shard:05d}{row:04d}", {"latent.npy": encode_npy(moments)})
        storage.write_bytes(index_name(name), index.index().encode())
        writer.commit(name, rows=ROWS, sha256=tar.sha256)
        writer.commit(index_name(name))

    # One after the other draws the same numbers whatever the machine.
    for shard in range(shards):
        commit(shard)
    return writer.committed()


def _read_node(
    server: FastS3, storage: Storage, files: FileTable, ranks: range, world: int, nodes: int
) -> tuple[int, int]:
    """Train the ranks of a node for some epochs without a model; return what they fetched, bytes and requests."""
    share = sum(record.bytes for record in files) // nodes
    with _node():
        server.take_figures()
        # As a step ends on all ranks at once, none is ahead of the others.
        together = threading.Barrier(len(ranks))

        def train(rank: int) -> None:
            with contextlib.closing(ShardReader(storage, files, cache_bytes=int(CACHE_SHARE * share))) as reader:
                order = SampleOrder(reader.rows_per_shard, 0, 1, batch_size=BATCH_SIZE, partitions=64)
                steps = EPOCHS * order.samples_per_epoch // BATCH_SIZE
                for step in range(steps):
                    reader.fetch_ahead(order.shards_ahead(step, rank, world))
                    for sample in order.slice(step, rank, world):
                        reader.read(*sample.place)
                    together.wait()

        with ThreadPoolExecutor(len(ranks)) as threads:
            list(threads.map(train, ranks))
        figures = server.take_figures()
    return figures.bytes, figures.count


@contextlib.contextmanager
def _node() -> Iterator[Path]:
    """Give what runs in the block a disk of its own for fetched shards."""
    before = os.environ.get("LDM_CACHE")
    with tempfile.TemporaryDirectory(prefix="bench-node-") as folder:
        os.environ["LDM_CACHE"] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ["LDM_CACHE"]
            if before is not None:
                os.environ["LDM_CACHE"] = before


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.node_bytes", description=__doc__)
    parser.add_argument("--shards", type=int, default=SHARDS)
    parser.add_argument("--delay-ms", type=float, default=25.0)
    options = parser.parse_args()
    with fast_s3() as server:
        print(dump(measure(server, shards=options.shards, delay_s=options.delay_ms / 1e3)))


if __name__ == "__main__":
    main()
