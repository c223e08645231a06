"""The interface between a stage and the pipeline that runs it.

A stage is a function from its section of the recipe and finished upstream artifacts to one artifact. It says all about
itself here: the walk, the plan, the report, `ldm inspect` and `ldm submit` loop over stages and know none by name. A
stage knows neither the command line nor which other stages exist, only the names of the artifacts that it reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from pipelines.config import Config
from pipelines.store.commits import ArtifactWriter
from pipelines.store.file_table import FileTable
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from pipelines.tracking import StageTracker

if TYPE_CHECKING:
    import numpy as np
    from markupsafe import Markup
    from numpy.typing import NDArray
    from rich.console import RenderableType

ConfigT = TypeVar("ConfigT", bound=Config)
# The sections of a recipe by stage name, and its `condition`.
Sections = Mapping[str, Any]


class Progress(Protocol):
    """Called by a stage with how far it is; `facts` are short values worth watching, such as `loss="0.031"`."""

    def __call__(self, done: int, total: int, **facts: str) -> None: ...


@dataclass(frozen=True)
class StageContext(Generic[ConfigT]):
    """Everything a stage is given.

    Attributes:
        config: the stage's own section of the recipe, and what it shares with others.
        seed: the recipe's seed.
        writer: the artifact to make. Files are written to `writer.storage`, then committed.
        upstream: finished artifacts by stage name.
        tracker: metrics and images of this stage's MLflow run; never blocks.
        progress: called with how far the stage is.
        scratch: a local folder, deleted after the run.
        existing: the artifact already committed, when this run only adds samples to it; otherwise None.
        check: raises UserError if another driver has taken over the artifact; long work calls it every few seconds.
        siblings: folders and committed files of the stage's other artifacts under the same root, finished or not, to
            take over what they hold; none in a forced re-run, which makes everything anew.
    """

    config: ConfigT
    seed: int
    writer: ArtifactWriter
    upstream: Mapping[str, Artifact]
    tracker: StageTracker
    progress: Progress
    scratch: Path
    existing: Artifact | None = None
    check: Callable[[], None] = lambda: None
    siblings: Callable[[], Iterable[tuple[Storage, FileTable]]] = tuple


@dataclass(frozen=True)
class Estimate:
    """Estimated rows, bytes and seconds of a stage; None if unknown."""

    rows: int | None = None
    bytes: int | None = None
    seconds: float | None = None
    estimated: bool = True


@dataclass(frozen=True)
class Headline:
    """One of the few figures that a reader of the report looks for first."""

    value: str
    label: str
    remark: str


@dataclass(frozen=True)
class Section:
    """A stage's part of the report.

    Attributes:
        html: its heading and everything below it.
        headlines: figures for the top of the page.
        appendix: whether it comes after all other sections, which begin with the results.
    """

    html: Markup
    headlines: tuple[Headline, ...] = ()
    appendix: bool = False


@dataclass(frozen=True)
class Verification:
    """What a close look at a few samples of an artifact, beyond their digests, has found.

    Attributes:
        problems: one line each, naming the file and the sample; empty if all is as it should be.
        notes: lines that say what was measured, and what could not be checked.
        facts: what was measured, as JSON values.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def _nothing_to_check(sections: Sections) -> None:
    return None


def _no_inputs(config: Any) -> dict[str, str]:
    return {}


def _depends_on_all(config: Any) -> None:
    return None


def _unknown(sections: Sections, before: Mapping[str, Estimate]) -> Estimate:
    return Estimate()


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[ConfigT]):
    """One stage of the pipeline.

    Attributes:
        name: also its folder in the ledger and its section in the recipe.
        format_version: version of what it writes; raised when the bytes or their meaning change.
        upstream: names of the artifacts it reads.
        run: does the work; skips what is committed, returns the manifest's `details`.
        section: its part of the report.
        configure: makes its config of the recipe's sections; None takes its own section.
        inputs: digests of what it reads besides artifacts (sources by content, weights and tokenizer files by sha256),
            from its config. Runs for every `plan`.
        check: raises ValueError if its section of the recipe does not fit those of the stages it reads.
        estimate: what it will come to, from the recipe's sections and the estimates of earlier stages. Leaves out
            seconds, which are scaled from earlier runs.
        uses_seed: whether the recipe's seed can change its output.
        self_contained: the settings that, with `inputs`, are all that can change the output under this config; None if
            the other settings, the seed and the upstream artifacts count too.
        may_grow: whether this config asks to add to a finished artifact; None if that never happens.
        unit: what `progress` counts, in the plural; None if a rate of it says nothing.
        headlines: keys of `details` that the pipeline's MLflow run shows, so that runs can be compared in one table.
        local_inputs: dotted fields of its config that may name files of the submitting machine.
        logs: committed files, or folders ending in "/", whose contents do not follow from the key but, say, from how
            often something is logged; they do not count when two artifacts are compared, and no later stage reads them.
        outputs: files that a person opens, by display name.
        survey: facts of an artifact that is not finished yet, for `ldm inspect`.
        look: what a few samples of a finished artifact show, for `ldm inspect`.
        verify: holds up to so many samples of a finished artifact, whose files are whole, against what they were made
            from.
        view: facts of an artifact, as `ldm inspect` gives them, for a terminal; None shows them as they are.
        contact_sheet: random samples with their captions as one picture, from an artifact's folder or (by file name)
            one shard in it; None in place of the picture if there are no samples.
    """

    name: str
    format_version: int
    upstream: tuple[str, ...] = ()
    run: Callable[[StageContext[ConfigT]], dict[str, Any]]
    section: Callable[[Artifact], Section]
    configure: Callable[[Sections], ConfigT] | None = None
    inputs: Callable[[ConfigT], dict[str, str]] = _no_inputs
    check: Callable[[Sections], None] = _nothing_to_check
    estimate: Callable[[Sections, Mapping[str, Estimate]], Estimate] = _unknown
    uses_seed: bool = True
    self_contained: Callable[[ConfigT], dict[str, Any] | None] = _depends_on_all
    may_grow: Callable[[ConfigT, Artifact], bool] | None = None
    unit: str | None = None
    headlines: tuple[str, ...] = ()
    local_inputs: tuple[str, ...] = ()
    logs: tuple[str, ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)
    survey: Callable[[Storage], dict[str, Any]] | None = None
    look: Callable[[Artifact], dict[str, Any]] | None = None
    verify: Callable[[Artifact, int], Verification] | None = None
    view: Callable[[Mapping[str, Any]], RenderableType] | None = None
    contact_sheet: Callable[[Storage, str | None], NDArray[np.uint8] | None] | None = None

    def identity(self, config: ConfigT, seed: int, upstream_keys: Mapping[str, str]) -> dict[str, Any]:
        """Return everything that can change the output, as JSON values.

        Args:
            config: the stage's section of the recipe.
            seed: the recipe's seed.
            upstream_keys: the reference of each upstream artifact.
        """
        identity = {"stage": self.name, "format_version": self.format_version, "inputs": self.inputs(config)}
        if (settings := self.self_contained(config)) is not None:
            return {**identity, "config": settings}
        return {
            **identity,
            "config": config.identity(),
            "upstream": dict(upstream_keys),
            **({"seed": seed} if self.uses_seed else {}),
        }


@dataclass
class RateMeter:
    """Items per second since the meter was made."""

    started: float = field(default_factory=time.monotonic)

    def rate(self, items: int) -> float:
        return items / max(time.monotonic() - self.started, 1e-9)
