"""The plan of a run: each selected stage with its key and state."""

from dataclasses import dataclass
from typing import Any, Literal

from pipelines.config import Config
from pipelines.errors import MisuseError
from pipelines.run.recipe import Recipe
from pipelines.stage import Stage
from pipelines.stages.autoencoder.stage import STAGE as AUTOENCODER
from pipelines.stages.diffusion.stage import STAGE as DIFFUSION
from pipelines.stages.evaluate.stage import STAGE as EVALUATE
from pipelines.stages.export.stage import STAGE as EXPORT
from pipelines.stages.latents.stage import STAGE as LATENTS
from pipelines.stages.pairs.stage import STAGE as PAIRS
from pipelines.store.ledger import Artifact, Ledger, artifact_key
from pipelines.store.storage import Storage

STAGES: tuple[Stage, ...] = (PAIRS, AUTOENCODER, LATENTS, DIFFUSION, EVALUATE, EXPORT)

STAGE_NAMES = tuple(stage.name for stage in STAGES)

State = Literal["cached", "resumed", "retried", "run", "skipped"]


@dataclass(frozen=True)
class Selection:
    """Which stages a command is about: `only` one, or a range, and which to run again although they are cached."""

    only: str | None = None
    first: str | None = None
    last: str | None = None
    force: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (self.only, self.first, self.last, *self.force):
            if name is not None and name not in STAGE_NAMES:
                raise MisuseError(f"unknown stage {name!r}; the stages are {', '.join(STAGE_NAMES)}")
        if self.only and (self.first or self.last):
            raise MisuseError("--only names one stage; it cannot be combined with --from or --to")
        if self.first and self.last and STAGE_NAMES.index(self.first) > STAGE_NAMES.index(self.last):
            raise MisuseError(
                f"--from {self.first} comes after --to {self.last}; the order is {', '.join(STAGE_NAMES)}"
            )
        for name in self.force:
            if name not in self.names:
                raise MisuseError(f"--force {name} is outside the stages selected: {', '.join(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        if self.only:
            return (self.only,)
        first = STAGE_NAMES.index(self.first) if self.first else 0
        last = STAGE_NAMES.index(self.last) if self.last else len(STAGE_NAMES) - 1
        return STAGE_NAMES[first : last + 1]


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a walk, before anything runs."""

    stage: Stage
    config: Config
    key: str
    identity: dict[str, Any]
    state: State
    artifact: Artifact | None

    @property
    def reference(self) -> str:
        """What the keys of later stages are made of."""
        return self.artifact.reference if self.artifact else self.key


def plan(recipe: Recipe, selection: Selection | None = None) -> list[PlannedStage]:
    """The walk without running anything: each stage with its key and its state."""
    selection = selection or Selection()
    ledger = Ledger(Storage(recipe.root))
    keys: dict[str, str] = {}
    walk = []
    for stage in STAGES:
        planned = plan_stage(recipe, ledger, stage, keys, selection)
        keys[stage.name] = planned.reference
        walk.append(planned)
    return walk


def plan_stage(
    recipe: Recipe, ledger: Ledger, stage: Stage, keys: dict[str, str], selection: Selection
) -> PlannedStage:
    """Key and state of one stage, given the keys of the stages before it."""
    config: Config = getattr(recipe, stage.name)
    identity = stage.identity(config, recipe.seed, {name: keys[name] for name in stage.upstream})
    key, identity = ledger.resolve(stage.name, identity)
    artifact = ledger.find(stage.name, key)
    if artifact and stage.name in selection.force:
        identity = {**identity, "generation": identity.get("generation", 0) + 1}
        key, artifact = artifact_key(identity), None
    state: State
    if artifact:
        artifact.require(stage.name, stage.format_version)
        grows = stage.name in selection.names and stage.may_grow is not None and stage.may_grow(config, artifact)
        state = "retried" if grows else "cached"
    elif stage.name not in selection.names:
        state = "skipped"
    else:
        state = "resumed" if ledger.started(stage.name, key) else "run"
    return PlannedStage(stage, config, key, identity, state, artifact)
