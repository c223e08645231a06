"""Work in three steps: tasks, actors, tasks."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from pipelines.compute.actor_pool import pool_size
from pipelines.compute.chain import ActorStep, PoolSize, TaskStep, map_through
from pipelines.compute.resources import require_nodes, waiting_at_most
from pipelines.errors import UserError

pytestmark = pytest.mark.usefixtures("ray_cluster")
SIDE = 512


class Step:
    """Notes what it is at, and how many items are under way; dies, once or each time, or refuses, where it is told to.

    Args:
        log: a folder for notes.
        deaths: how often it dies at which numbers.
        refused: a number that it refuses.
    """

    def __init__(self, *, log: Path, deaths: dict[int, int] | None = None, refused: int = -1) -> None:
        self.log, self.deaths, self.refused = log, deaths or {}, refused

    def met(self, number: int) -> None:
        name = type(self).__name__
        tries = len(list(self.log.glob(f"{name}.{number}.*")))
        (self.log / f"{name}.{number}.{tries}").touch()
        if tries < self.deaths.get(number, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if number == self.refused:
            raise UserError(f"{name} refuses {number}: choose another number")


class Read(Step):
    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        self.met(item["number"])
        (self.log / f"begun.{item['number']}").touch()
        return {**item, "picture": np.full((SIDE, SIDE), item["number"], np.int32)}


class Compute(Step):
    def __call__(self, value: dict[str, Any]) -> dict[str, Any]:
        self.met(value["number"])
        mapped = not value["picture"].flags.writeable
        return {"number": value["number"], "mapped": mapped, "sum": value["picture"].astype(np.int64) * 2}


class Write(Step):
    def __call__(self, value: dict[str, Any]) -> dict[str, Any]:
        self.met(value["number"])
        under_way = len(list(self.log.glob("begun.*"))) - len(list(self.log.glob("ended.*")))
        (self.log / f"ended.{value['number']}").touch()
        mean = float(value["sum"].mean())
        return {"number": value["number"], "mean": mean, "mapped": value["mapped"], "under_way": under_way}


@pytest.fixture(autouse=True)
def classes_are_sent_along() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def results(
    log: Path, count: int, size: PoolSize, *, in_flight: int = 3, **settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Take numbers through the three steps; `settings` are arguments of a step, by its name."""
    steps = [
        TaskStep(Read, {"log": log, **settings.get("read", {})}, num_cpus=0, at_once=1),
        ActorStep(Compute, {"log": log, **settings.get("compute", {})}, size),
        TaskStep(Write, {"log": log, **settings.get("write", {})}, num_cpus=0, at_once=1),
    ]
    items = [{"number": number} for number in range(count)]
    found = map_through(items, steps, in_flight=in_flight, set_aside=lambda item: {"aside": item["number"]})
    return sorted(found, key=lambda result: result.get("number", count))


def test_items_pass_all_steps_mapped_and_no_more_are_under_way_than_may_be(tmp_path: Path) -> None:
    # All cores: actors must not take the place of the tasks beside them.
    size = pool_size(16)
    assert size.workers == 4
    found = results(tmp_path, 16, size, in_flight=2)
    assert [(each["number"], each["mean"], each["mapped"]) for each in found] == [
        (number, 2.0 * number, True) for number in range(16)
    ]
    assert max(each["under_way"] for each in found) <= 2 * size.workers


@pytest.mark.timeout(300)
def test_whichever_worker_is_killed_its_items_are_done_again_and_one_that_kills_each_is_set_aside(
    tmp_path: Path,
) -> None:
    deaths = {"read": {"deaths": {1: 1, 5: 9}}, "compute": {"deaths": {2: 1}}, "write": {"deaths": {3: 1}}}
    found = results(tmp_path, 8, PoolSize(workers=1, use_gpu=False, most=1), **deaths)
    assert [(each["number"], each["mean"]) for each in found if "number" in each] == [
        (number, 2.0 * number) for number in range(8) if number != 5
    ]
    assert found[-1] == {"aside": 5}
    # Once among the others, twice alone.
    assert len(list(tmp_path.glob("Read.5.*"))) == 3


@pytest.mark.parametrize("step", ["read", "write"])
def test_what_a_step_refuses_ends_the_work_with_its_line(tmp_path: Path, step: str) -> None:
    with pytest.raises(UserError, match=f"^{step.capitalize()} refuses 2: choose another number$"):
        results(tmp_path, 4, PoolSize(workers=1, use_gpu=False, most=1), **{step: {"refused": 2}})


class Stuck:
    def __init__(self, *, log: Path) -> None:
        self.log = log

    def __call__(self, item: Any) -> Any:
        time.sleep(3600)
        return item


@pytest.mark.timeout(120)
def test_the_check_ends_a_chain_whose_tasks_hang(tmp_path: Path) -> None:
    began = time.monotonic()

    def check() -> None:
        if time.monotonic() - began > 2:
            raise UserError("stop now")

    steps = [
        TaskStep(Stuck, {"log": tmp_path}, num_cpus=0),
        ActorStep(Compute, {"log": tmp_path}, PoolSize(workers=1, use_gpu=False, most=1)),
    ]
    with pytest.raises(UserError, match=r"^stop now$"):
        list(map_through([{"number": 1}], steps, in_flight=1, check=check))


def test_nodes_that_nobody_has_are_refused() -> None:
    message = r"^latents is for nodes with the labels role=nobody, but after 0 s the cluster has none: start one with"
    with waiting_at_most(0.2), pytest.raises(UserError, match=message):
        require_nodes({"role": "nobody"}, who="latents")
    require_nodes({}, who="latents")


def test_cores_that_tasks_reserve_are_left_to_them() -> None:
    assert pool_size(9, cpus_of_tasks=1.0) == PoolSize(workers=3, use_gpu=False, most=3)
    with pytest.raises(
        UserError, match="needs a CPU core for its model and 4 for tasks beside it, but the cluster has 4"
    ):
        pool_size(9, cpus_of_tasks=4.0)
