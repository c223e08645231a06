"""The progress of all workers, where actors die and their shards are made again by others."""

import time
from collections import Counter
from collections.abc import Callable

import ray

from pipelines.stages.pairs.making.progress_board import Poster, ProgressBoard, WorkerCounts


def counted(rows: int, size: int = 0) -> Counter[str]:
    return Counter({"rows": rows, "bytes": size, "status:ok": rows})


def read_when(board: ProgressBoard, there: Callable[[Counter[str]], bool]) -> Counter[str]:
    """Return the board's counts once they are as they should be."""
    deadline = time.monotonic() + 60
    while not there(counts := board.read()):
        assert time.monotonic() < deadline, counts
        time.sleep(0.05)
    return counts


def test_a_shard_that_another_worker_makes_again_counts_once(ray_cluster: None) -> None:
    board = ProgressBoard()
    try:
        poster: Poster = ray.get(ray.put(board))
        poster.post("first", {7: counted(100, 900), 8: counted(40)})
        assert read_when(board, lambda counts: counts["rows"] == 140)["bytes"] == 900
        # Its actor dies, and another one begins shard 7 again; of what it posts the older may arrive later.
        poster.post("second", {7: counted(30, 200)})
        assert read_when(board, lambda counts: counts["rows"] == 70) == counted(70, 200)
        poster.post("second", {7: counted(20, 100), 9: counted(1)})
        assert read_when(board, lambda counts: counts["rows"] == 71)["bytes"] == 200
        board.finish(7, {"ok": 90, "timeout": 10}, 800)
        poster.post("first", {7: counted(100, 900), 9: counted(2)})
        counts = read_when(board, lambda counts: counts["rows"] != 141)
        assert counts == {"rows": 142, "bytes": 800, "status:ok": 132, "status:timeout": 10}
    finally:
        board.close()


def test_a_worker_posts_the_shards_it_is_at(ray_cluster: None) -> None:
    board = ProgressBoard()
    try:
        worker = WorkerCounts(ray.get(ray.put(board)), "worker")
        with worker.of(3) as counts:
            counts.add("ok", 10)
            counts.add("timeout")
            found = read_when(board, lambda counts: bool(counts))
        assert found == {"rows": 2, "bytes": 10, "status:ok": 1, "status:timeout": 1}
    finally:
        board.close()
