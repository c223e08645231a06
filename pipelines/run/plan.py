"""The plan of a run: each stage of a recipe with its key and its state, before anything runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.config import Config
from pipelines.errors import MisuseError
from pipelines.run.recipe import Recipe
from pipelines.stage import Sections, Stage
from pipelines.stages.autoencoder.stage import STAGE as AUTOENCODER
from pipelines.stages.diffusion.stage import STAGE as DIFFUSION
from pipelines.stages.evaluate.stage import STAGE as EVALUATE
from pipelines.stages.export.stage import STAGE as EXPORT
from pipelines.stages.latents.stage import STAGE as LATENTS
from pipelines.stages.pairs.stage import STAGE as PAIRS
from pipelines.store.known_digests import kept_with
from pipelines.store.ledger import Artifact, Ledger, artifact_key
from pipelines.store.storage import Storage

STAGES: tuple[Stage[Any], ...] = (PAIRS, AUTOENCODER, LATENTS, DIFFUSION, EVALUATE, EXPORT)
STAGE_NAMES = tuple(stage.name for stage in STAGES)

State = Literal["cached", "resumed", "retried", "run", "skipped"]


@dataclass(frozen=True)
class Selection:
    """The stages that a command selects: `only` one, or a range; and those to run again although they are cached."""

    only: str | None = None
    first: str | None = None
    last: str | None = None
    force: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.named:
            if name not in STAGE_NAMES:
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
    def named(self) -> tuple[str, ...]:
        """The stages that were asked for by name."""
        return tuple(name for name in (self.only, self.first, self.last, *self.force) if name is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """The stages selected, whether a recipe has them or not."""
        if self.only:
            return (self.only,)
        first = STAGE_NAMES.index(self.first) if self.first else 0
        last = STAGE_NAMES.index(self.last) if self.last else len(STAGE_NAMES) - 1
        return STAGE_NAMES[first : last + 1]


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a walk, before anything runs.

    Attributes:
        stage: the stage.
        config: its section of the recipe, and what it shares with others.
        key: the key of the current artifact of this config, which is the latest generation.
        identity: what the key is a hash of.
        state: what a run will do, or has done.
        artifact: the finished one, if there is one.
    """

    stage: Stage[Any]
    config: Config
    key: str
    identity: dict[str, Any]
    state: State
    artifact: Artifact | None

    @property
    def reference(self) -> str:
        """The value that later stages' keys hash: this key, and `+N` after N retries that added samples."""
        return self.artifact.reference if self.artifact else self.key


def sections_of(recipe: Recipe) -> Sections:
    """Return the recipe's condition and its sections by stage name; stages that the recipe leaves out are missing."""
    sections: dict[str, Config] = {"condition": recipe.condition}
    for stage in STAGES:
        section = getattr(recipe, stage.name)
        if section is not None and all(name in sections for name in stage.upstream):
            sections[stage.name] = section
    return sections


def stages_of(recipe: Recipe) -> Iterator[Stage[Any]]:
    """Yield the stages that the recipe has sections for, in order."""
    sections = sections_of(recipe)
    return (stage for stage in STAGES if stage.name in sections)


def check(recipe: Recipe, selection: Selection) -> None:
    """Raise MisuseError if the sections that a selected stage needs do not fit each other.

    Raises:
        MisuseError: the fields that disagree with their values; or a stage that was named but is not in the recipe.
    """
    sections = sections_of(recipe)
    for name in selection.named:
        if name not in sections:
            raise MisuseError(
                f"recipe {recipe.name} has no stage {name}: its stages are "
                f"{', '.join(stage.name for stage in stages_of(recipe))}; add the missing sections to the recipe"
            )
    for stage in stages_of(recipe):
        if stage.name in selection.names:
            try:
                stage.check(sections)
            except ValueError as error:
                raise MisuseError(f"recipe {recipe.name}: {error}") from error


def plan(recipe: Recipe, selection: Selection | None = None) -> list[PlannedStage]:
    """Return the walk without running anything: each stage with its key and its state.

    Raises:
        MisuseError: sections that do not fit each other.
        UserError: a source, a weights file or a vocabulary that cannot be read.
    """
    selection = selection or Selection()
    check(recipe, selection)
    ledger = Ledger(Storage(recipe.root))
    ledger.require_version(STAGE_NAMES)
    keys: dict[str, str] = {}
    walk = []
    for stage in stages_of(recipe):
        planned = plan_stage(recipe, ledger, stage, keys, selection)
        keys[stage.name] = planned.reference
        walk.append(planned)
    return walk


def plan_stage(
    recipe: Recipe, ledger: Ledger, stage: Stage[Any], keys: dict[str, str], selection: Selection
) -> PlannedStage:
    """Return key and state of one stage.

    Args:
        recipe: has a section for the stage.
        ledger: where finished artifacts are looked up.
        stage: the stage to plan.
        keys: references of the stages before it.
        selection: which stages are to run.
    """
    sections = sections_of(recipe)
    config: Config = stage.configure(sections) if stage.configure else sections[stage.name]
    with kept_with(Storage(recipe.root)):
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
