"""Estimate rows, bytes and time of stages that have not run: rows and bytes by the stages' own arithmetic, time scaled
from earlier runs under the same root.
"""

import dataclasses
from typing import Any

from pipelines.run.plan import PlannedStage, sections_of
from pipelines.run.recipe import Recipe
from pipelines.stage import Estimate
from pipelines.store.manifest import MANIFEST, read_manifest
from pipelines.store.storage import Storage


def estimate(recipe: Recipe, walk: list[PlannedStage]) -> list[Estimate]:
    """Return one estimate for each stage of the walk: the facts if it is finished, else the stage's own estimate.

    What a retry will add is unknown until its rows have been fetched.
    """
    root, sections = Storage(recipe.root), sections_of(recipe)
    estimates: dict[str, Estimate] = {}
    for planned in walk:
        stage = planned.stage
        if planned.state == "retried":
            estimates[stage.name] = Estimate()
        elif planned.artifact:
            found = planned.artifact.manifest
            estimates[stage.name] = Estimate(found.rows, found.bytes, found.seconds, estimated=False)
        else:
            guess = stage.estimate(sections, estimates)
            estimates[stage.name] = dataclasses.replace(guess, seconds=_seconds(root, planned, guess.rows))
    return list(estimates.values())


def _seconds(root: Storage, planned: PlannedStage, rows: int | None) -> float | None:
    """Scale the seconds of the same stage's newest run here, by rows (data stages) or samples seen (training)."""
    folder = root / planned.stage.name
    finished = [folder / key for key in folder.names() if (folder / key).exists(MANIFEST)]
    if not finished:
        return None
    last = read_manifest(max(finished, key=lambda artifact: artifact.modified_at(MANIFEST)))
    now, then = _work(planned.config.model_dump(), rows), _work(last.config, last.rows)
    return round(last.seconds * now / then, 1) if now and then else last.seconds


def _work(config: dict[str, Any], rows: int | None) -> int | None:
    training = config.get("training")
    return training["steps"] * training["batch_size"] if training else rows
