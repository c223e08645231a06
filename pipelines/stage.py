"""The contract between a stage and whoever runs it.

A stage is a function from (its config, finished upstream artifacts) to one artifact. It knows neither the command
line nor which other stages exist, only the names of the artifacts that it reads.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipelines.config import Config
from pipelines.store.ledger import Artifact, ArtifactWriter
from pipelines.tracking import StageTracker


class Progress(Protocol):
    """Where a stage tells how far it is; `facts` are short values worth watching, such as `loss="0.031"`."""

    def __call__(self, done: int, total: int, **facts: str) -> None: ...


@dataclass(frozen=True)
class StageContext:
    """Everything a stage is given.

    Attributes:
        config: the stage's own section of the recipe.
        seed: of the whole recipe.
        writer: the artifact to make. Files are written to `writer.storage`, then committed.
        upstream: finished artifacts by stage name.
        tracker: metrics, images and tags of this stage's MLflow run; never blocks.
        progress: how far the stage is.
        scratch: a local folder that is gone after the run; for what may be lost.
        finished: the artifact as it is, where it is finished and only grows.
        check: raises UserError where another driver has taken the root over; long stages call it now and then.
    """

    config: Any
    seed: int
    writer: ArtifactWriter
    upstream: Mapping[str, Artifact]
    tracker: StageTracker
    progress: Progress
    scratch: Path
    finished: Artifact | None = None
    check: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        name: also its folder in the ledger and its section in the recipe.
        format_version: of what it writes; raised when the bytes or their meaning change.
        upstream: names of the artifacts it reads.
        inputs: digests of what it reads besides (sources by content, weights and tokenizer files by sha256), from its
            config. Cheap: runs for every `plan`.
        run: does the work; skips what is committed, returns the manifest's `details`.
        uses_seed: whether the recipe's seed can change its output.
        may_grow: whether this config asks to add to a finished artifact; None where that never happens.
    """

    name: str
    format_version: int
    upstream: tuple[str, ...]
    inputs: Callable[[Any], dict[str, str]]
    run: Callable[[StageContext], dict[str, Any]]
    uses_seed: bool = True
    may_grow: Callable[[Any, Artifact], bool] | None = None

    def identity(self, config: Config, seed: int, upstream_keys: Mapping[str, str]) -> dict[str, Any]:
        """Everything that can change the output, as JSON values."""
        return {
            "stage": self.name,
            "format_version": self.format_version,
            "config": config.identity(),
            "upstream": dict(upstream_keys),
            "inputs": self.inputs(config),
            **({"seed": seed} if self.uses_seed else {}),
        }


@dataclass
class RateMeter:
    """Items per second since the meter was made."""

    started: float = field(default_factory=time.monotonic)

    def rate(self, items: int) -> float:
        return items / max(time.monotonic() - self.started, 1e-9)
