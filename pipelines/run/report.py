"""The report of a pipeline run: one HTML page that needs no script, no network and no other file."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import yaml

from pipelines.drawing.formatting import format_seconds
from pipelines.drawing.html import render
from pipelines.run.plan import STAGES
from pipelines.run.results import StageRow
from pipelines.stage import Headline, Section
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage

TEMPLATE = "run/report.html.j2"


def build_report(root: Storage, recipe_yaml: str, stages: Sequence[StageRow], artifacts: Mapping[str, Artifact]) -> str:
    """Return the report as HTML; stages without an artifact have no section.

    Args:
        root: the root of the pipeline run.
        recipe_yaml: the resolved recipe.
        stages: what happened, in order.
        artifacts: finished ones, by stage name.

    Raises:
        UserError: a committed picture or history cannot be read.
    """
    sections = _sections(artifacts)
    longest = max((row.seconds for row in stages), default=0.0)
    return render(
        TEMPLATE,
        name=(yaml.safe_load(recipe_yaml) or {}).get("name", "run"),
        root=root.url,
        time=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        headlines=[figure for section in sections for figure in section.headlines] + _time(stages),
        stages=[(row, row.seconds / longest if longest else 0.0) for row in stages],
        sections=[section.html for section in sections],
        recipe=recipe_yaml,
    )


def _sections(artifacts: Mapping[str, Artifact]) -> list[Section]:
    """Return the stages' sections, results first: from the last stage to the first, appendices at the end."""
    sections = [stage.section(artifacts[stage.name]) for stage in reversed(STAGES) if stage.name in artifacts]
    return sorted(sections, key=lambda section: section.appendix)


def _time(stages: Sequence[StageRow]) -> list[Headline]:
    if not stages:
        return []
    worked = sum(row.state != "cached" and row.seconds > 0 for row in stages)
    total = format_seconds(sum(row.seconds for row in stages))
    return [Headline(total, "time of this run", f"{worked} of {len(stages)} stages worked")]
