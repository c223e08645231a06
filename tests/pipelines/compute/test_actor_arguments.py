"""What the actors of a pool are given: pickled once, however many they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipelines.compute.actor_pool import map_on_actors, pool_size

pytestmark = pytest.mark.usefixtures("ray_cluster")

pickled: list[int] = []


class Inputs:
    """Remembers that this process has pickled it."""

    def __init__(self, numbers: Any) -> None:
        self.numbers = numbers

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        pickled.append(len(self.numbers))
        return Inputs, (self.numbers,)


class Pick:
    """Picks a number of its inputs; tells whether their memory is its own."""

    def __init__(self, *, inputs: Inputs) -> None:
        self.inputs = inputs

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        numbers = self.inputs.numbers
        return {"picked": int(numbers[item["at"]]), "own": bool(numbers.flags.writeable)}


def test_arguments_are_sent_once_for_all_actors_and_arrays_are_shared() -> None:
    inputs = Inputs(np.arange(1_000_000) * 3)
    items = [{"at": position} for position in range(6)]
    results = list(map_on_actors(items, Pick, arguments={"inputs": inputs}, size=pool_size(6, workers=2)))
    assert sorted(result["picked"] for result in results) == [0, 3, 6, 9, 12, 15]
    assert not any(result["own"] for result in results)
    assert pickled == [1_000_000]
