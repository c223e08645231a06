"""Batches from a background thread."""

import threading

import pytest

from pipelines.training.loader.prefetch import Prefetcher


def running() -> set[threading.Thread]:
    """Return the threads that make batches; others of this process may come and go."""
    return {thread for thread in threading.enumerate() if thread.name == "prefetch"}


def test_results_come_in_order_and_are_made_ahead() -> None:
    made: list[int] = []
    ahead = threading.Event()

    def make(index: int) -> int:
        made.append(index)
        if index == 7:
            ahead.set()
        return index * index

    prefetcher = Prefetcher(make, 5, 9, depth=2)
    assert ahead.wait(60), "two results must be made before any is asked for, and a third begun"
    assert [prefetcher.next() for _ in range(4)] == [25, 36, 49, 64]
    assert made == [5, 6, 7, 8]
    prefetcher.close()


def test_a_mistake_is_raised_where_its_result_is_asked_for() -> None:
    def make(index: int) -> int:
        if index == 2:
            raise ValueError("broken sample")
        return index

    prefetcher = Prefetcher(make, 0, 5)
    assert [prefetcher.next(), prefetcher.next()] == [0, 1]
    with pytest.raises(ValueError, match="broken sample"):
        prefetcher.next()
    prefetcher.close()


def test_closing_stops_the_thread_though_its_queue_is_full() -> None:
    others = running()
    prefetcher = Prefetcher(lambda index: index, 0, 10**9, depth=1)
    prefetcher.next()
    assert len(running() - others) == 1
    prefetcher.close()
    assert running() <= others
