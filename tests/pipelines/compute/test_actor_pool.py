"""A pool of actors: errors, deaths, their number, and the end of their work."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from pipelines.compute import actor_pool, chain
from pipelines.compute.actor_pool import map_on_actors, pool_size
from pipelines.compute.cluster import connect
from pipelines.compute.config import ClusterConfig
from pipelines.compute.resources import waiting_at_most
from pipelines.errors import UserError
from tests.pipelines.store.held_root import TAKEN_OVER, held_root

pytestmark = pytest.mark.usefixtures("no_actor_is_left")


class Square:
    """Squares numbers; refuses 13, and fails to start where told to."""

    def __init__(self, *, problem: str = "") -> None:
        if problem:
            raise UserError(problem)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        number = item["number"]
        if number == 13:
            raise UserError("13 is refused: choose another number")
        return {"square": number**2}


def squares(numbers: list[int], **arguments: Any) -> list[int]:
    size = pool_size(len(numbers), workers=1)
    items = [{"number": number} for number in numbers]
    return sorted(row["square"] for row in map_on_actors(items, Square, arguments=arguments, size=size))


@pytest.mark.parametrize(
    ("numbers", "problem", "message"),
    [([1, 13], "", "13 is refused: choose another number"), ([1], "no weights: give some", "no weights: give some")],
)
def test_user_errors_arrive_word_for_word(numbers: list[int], problem: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        squares(numbers, problem=problem)
    assert str(caught.value) == message


class Poison:
    """Squares numbers, but those in `deadly` kill their worker, each so many times; writes down each number tried."""

    def __init__(self, *, log: Path, deadly: dict[int, int], dies_at_start: bool = False) -> None:
        self.log, self.deadly = log, deadly
        if dies_at_start:
            os._exit(1)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        with open(self.log / f"tries.{item['number']}", "a") as file:
            file.write("x")
            tries = file.tell()
        if tries <= self.deadly.get(item["number"], 0):
            os.kill(os.getpid(), signal.SIGKILL)
        return {"square": item["number"] ** 2}


def poisoned(numbers: list[int], log: Path, *, workers: int = 2, **arguments: Any) -> Iterator[dict[str, Any]]:
    return map_on_actors(
        [{"number": number} for number in numbers],
        Poison,
        arguments={"log": log, **arguments},
        size=pool_size(len(numbers), workers=workers),
        set_aside=lambda item: {"aside": item["number"]},
    )


@pytest.mark.timeout(300)
def test_an_item_that_kills_its_worker_each_time_is_set_aside_and_the_others_are_done(tmp_path: Path) -> None:
    results = list(poisoned(list(range(8)), tmp_path, deadly={3: 9, 5: 1}))
    assert sorted(result["square"] for result in results if "square" in result) == [
        number**2 for number in range(8) if number != 3
    ]
    assert [result["aside"] for result in results if "aside" in result] == [3]
    assert [(tmp_path / f"tries.{number}").stat().st_size for number in (3, 5)] == [3, 2]


@pytest.mark.timeout(300)
def test_without_anybody_to_set_it_aside_the_item_is_named(tmp_path: Path) -> None:
    arguments = {"log": tmp_path, "deadly": {1: 9}}
    with pytest.raises(UserError, match=r'the worker of {"number": 1, "alone": true} died 2 times'):
        list(map_on_actors([{"number": 1}], Poison, arguments=arguments, size=pool_size(1, workers=1), alone_tries=1))


@pytest.mark.timeout(300)
def test_workers_that_die_while_they_start_are_not_replaced_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "MAX_RESTARTS", 1)
    with pytest.raises(UserError, match="workers died again and again before they could begin"):
        list(poisoned([1, 2], tmp_path, workers=1, deadly={}, dies_at_start=True))


class Broken:
    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("no such key")


def test_a_bug_of_a_worker_arrives_as_it_was_raised() -> None:
    with pytest.raises(KeyError, match="no such key") as caught:
        list(map_on_actors([{"number": 1}], Broken, arguments={}, size=pool_size(1, workers=1)))
    assert "in __call__" in caught.value.__notes__[0]


class Slow:
    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        time.sleep(3600)
        return item


@pytest.mark.timeout(120)
def test_the_check_is_called_while_no_result_arrives() -> None:
    began = time.monotonic()

    def check() -> None:
        if time.monotonic() - began > 2:
            raise UserError("stop now")

    with pytest.raises(UserError, match=r"^stop now$"):
        list(map_on_actors([{"number": 1}], Slow, arguments={}, size=pool_size(1, workers=1), check=check))


def test_no_more_actors_than_items_or_room() -> None:
    assert pool_size(100).workers == 4
    assert pool_size(100, workers=99).workers == 4
    assert pool_size(3).workers == 3
    assert (pool_size(100, workers=2).workers, pool_size(100).device) == (2, "cpu")


def test_ray_client_is_refused() -> None:
    with pytest.raises(UserError, match=r"address is ray://head:10001, but Ray Data and Ray Train do not work"):
        connect(ClusterConfig(address="ray://head:10001")).__enter__()


def test_gpus_that_are_not_there_are_refused() -> None:
    with waiting_at_most(0.5), pytest.raises(UserError, match="the work needs 1 GPUs, but after 0 s the cluster has 0"):
        pool_size(1, use_gpu=True)


class Patient:
    """Writes down its process and the items it was given; takes its time for each."""

    def __init__(self, *, log: Path) -> None:
        self.log = log
        (log / f"pid.{os.getpid()}").touch()

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        (self.log / f"item.{item['number']}").touch()
        time.sleep(0.05)
        return item


def wait_until(holds: Callable[[], bool]) -> None:
    """Return when a condition holds; the test's own time limit ends it otherwise."""
    while not holds():
        time.sleep(0.1)


@pytest.mark.timeout(120)
def test_the_actors_are_gone_when_another_driver_has_taken_the_root_over(tmp_path: Path) -> None:
    items = [{"number": number} for number in range(400)]
    size = pool_size(len(items), workers=2)
    # Not all four: raylets may count what other tests have killed as running.
    free = ray.available_resources().get("CPU", 0)
    with held_root() as root:
        results = map_on_actors(items, Patient, arguments={"log": tmp_path}, size=size, check=root.check)
        next(results)
        root.lose()
        with pytest.raises(UserError, match=TAKEN_OVER) as caught:
            list(results)
    pids = [int(file.suffix[1:]) for file in tmp_path.glob("pid.*")]
    assert pids
    # `caught` holds the frames of the work: it must not be what keeps the actors alive.
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))
    wait_until(lambda: ray.available_resources().get("CPU", 0) >= free)
    assert len(list(tmp_path.glob("item.*"))) < len(items)
    assert caught.value.exit_code == 1


def test_no_actor_starts_for_a_driver_that_has_lost_its_root(tmp_path: Path) -> None:
    with held_root() as root:
        root.lose()
        with pytest.raises(UserError, match=TAKEN_OVER):
            next(
                map_on_actors(
                    [{"number": 1}], Patient, arguments={"log": tmp_path}, size=pool_size(1), check=root.check
                )
            )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("cpus", "nodes", "expected"),
    [
        # By pool: the cores of each node. Encoders are on `a`, tasks on `a` or anywhere.
        (1, {"a": [4]}, 3),
        (2, {"a": [2, 2]}, 1),
        (1, {"a": [4], "b": [4]}, 4),
        (3, {"a": [4, 2]}, 1),
        (8, {"a": [4]}, -1),
    ],
)
def test_actors_leave_a_node_with_room_for_a_task_wherever_they_are_placed(
    monkeypatch: pytest.MonkeyPatch, cpus: float, nodes: dict[str, list[float]], expected: int
) -> None:
    def cores_of_nodes(labels: Mapping[str, str]) -> list[float]:
        return [each for pool, cores in nodes.items() if labels.get("pool", pool) == pool for each in cores]

    monkeypatch.setattr(actor_pool, "cores_of_nodes", cores_of_nodes)
    assert actor_pool._beside_tasks(cpus, {"pool": "a"}, {}) == expected
    if "b" not in nodes:
        assert actor_pool._beside_tasks(cpus, {"pool": "a"}, {"pool": "a"}) == expected
    else:
        assert actor_pool._beside_tasks(cpus, {"pool": "a"}, {"pool": "a"}) == 3
        assert actor_pool._beside_tasks(cpus, {"pool": "a"}, {"pool": "b"}) == 4
