"""What a run reports: rows of the stage table, the result, and observers."""

from dataclasses import dataclass

from pipelines.run.plan import PlannedStage, State
from pipelines.store.ledger import Artifact


@dataclass
class StageRow:
    """One line of the table of stages: what was done, and what it came to."""

    name: str
    state: State
    key: str
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass
class RunResult:
    """What a pipeline run leaves behind."""

    root: str
    rows: list[StageRow]
    artifacts: dict[str, Artifact]
    tracking_uri: str | None = None
    run_id: str | None = None
    report: str | None = None
    wall_s: float = 0.0


class RunObserver:
    """Told what happens during a run; the command line draws it. Does nothing by itself."""

    def begin(self, planned: PlannedStage) -> None: ...

    def progress(self, name: str, done: int, total: int, **facts: str) -> None: ...

    def end(self, row: StageRow) -> None: ...
