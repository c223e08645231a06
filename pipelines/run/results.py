"""Results of a run: rows of the stage table, the result, and the observer that is told of both."""

from dataclasses import dataclass
from typing import Any

from pipelines.run.plan import PlannedStage, State
from pipelines.store.ledger import Artifact


@dataclass
class StageRow:
    """One line of the table of stages: what was done, and what it came to.

    Attributes:
        name: the stage's name.
        state: what was done.
        key: the artifact's key.
        rows: samples in the artifact.
        bytes: size of the artifact.
        seconds: time that this run spent on it.
        worked: items that this run worked on, for the rate; more than `rows` where rows gave no sample.
        unit: what these items are; None if a rate of them says nothing.
    """

    name: str
    state: State
    key: str
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0
    worked: int = 0
    unit: str | None = None


@dataclass
class RunResult:
    """The result of a pipeline run."""

    root: str
    rows: list[StageRow]
    artifacts: dict[str, Artifact]
    tracking_uri: str | None = None
    run_id: str | None = None
    report: str | None = None
    wall_s: float = 0.0


class RunObserver:
    """Callbacks for the events of a run; the default ones do nothing."""

    def begin(self, planned: PlannedStage) -> None: ...

    def waiting(self, planned: PlannedStage, holder: str, **progress: Any) -> None:
        """Called every few seconds while another run makes the artifact; `progress` is what that run says of it."""

    def progress(self, name: str, done: int, total: int, **facts: str) -> None: ...

    def notice(self, line: str) -> None:
        """Show a line about what the run waits for; called from any thread."""

    def end(self, row: StageRow) -> None: ...
