"""A pool of actors: errors, deaths, their number, and the end of their work."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from pipelines.compute.actor_pool import map_on_actors, pool_size
from pipelines.errors import UserError
from tests.pipelines.store.held_root import TAKEN_OVER, held_root

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Square:
    """Squares numbers; refuses 13, fails to start where told to, and dies once at the number that a file names."""

    def __init__(self, *, problem: str = "", death_note: Path | None = None) -> None:
        if problem:
            raise UserError(problem)
        self.death_note = death_note

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        number = item["number"]
        if number == 13:
            raise UserError("13 is refused: choose another number")
        if self.death_note and self.death_note.exists() and number == int(self.death_note.read_text()):
            self.death_note.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"square": number**2}


def squares(numbers: list[int], **arguments: Any) -> list[int]:
    size = pool_size(len(numbers), workers=1)
    items = [{"number": number} for number in numbers]
    return sorted(row["square"] for row in map_on_actors(items, Square, arguments=arguments, size=size))


def test_every_item_is_done_although_an_actor_was_killed(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("3")
    assert squares([1, 2, 3, 4], death_note=tmp_path / "note") == [1, 4, 9, 16]
    assert not (tmp_path / "note").exists()


@pytest.mark.parametrize(
    ("numbers", "problem", "message"),
    [([1, 13], "", "13 is refused: choose another number"), ([1], "no weights: give some", "no weights: give some")],
)
def test_user_errors_arrive_word_for_word(numbers: list[int], problem: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        squares(numbers, problem=problem)
    assert str(caught.value) == message


def test_no_more_actors_than_items_or_room() -> None:
    assert pool_size(100).workers == 4
    assert pool_size(100, workers=99).workers == 4
    assert pool_size(3).workers == 3
    assert (pool_size(100, workers=2).workers, pool_size(100).device) == (2, "cpu")


def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match="the Ray cluster has no GPU"):
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
    wait_until(lambda: ray.available_resources().get("CPU") == 4)
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
