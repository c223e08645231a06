"""A pairs artifact on a terminal: counts, histograms and hosts as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.drawing.formatting import format_bytes, format_count
from pipelines.drawing.printable import printable
from pipelines.drawing.terminal import draw_bar, draw_histogram, table_of
from pipelines.stages.pairs.shard.outcome import OK

_HISTOGRAMS = {
    "source_size": "source size: shorter side, pixels",
    "aspect": "aspect: width / height",
    "caption_words": "caption: words",
    "caption_characters": "caption: characters",
}


def view(facts: Mapping[str, Any]) -> RenderableType:
    """Lay out for people what `inspect_path` says of a pairs artifact, finished or not."""
    details = facts["details"]
    parts: list[RenderableType] = [Text(line) for line in _heading(facts)]
    if statuses := details.get("statuses"):
        parts += [Text(), _counts("status", statuses)]
    filled = [name for name in _HISTOGRAMS if any(details.get(name, {}).get("counts", []))]
    if charts := [draw_histogram(_HISTOGRAMS[name], **details[name]) for name in filled]:
        parts += [Text(), Columns(charts, padding=(1, 4))]
    if details.get("buckets"):
        parts += [Text(), _counts("bucket", details["buckets"])]
    if details.get("hosts"):
        parts += [Text(), _hosts(details["hosts"], exact=details["hosts_exact"])]
    samples = [(sample["key"], (sample.get("captions") or [""])[0]) for sample in facts.get("first_samples", [])]
    samples = samples or [(sample["key"], sample.get("caption", "")) for sample in details.get("examples", [])[:5]]
    if samples:
        parts += [Text(), _samples(samples)]
    return Group(*parts)


def _heading(facts: Mapping[str, Any]) -> Iterator[str]:
    details = facts["details"]
    if facts["kind"] == "unfinished":
        yield from _heading_of_unfinished(facts)
        return
    yield f"pairs {facts['key']}, finished"
    yield facts["url"]
    yield (
        f"{format_count(details['samples'])} samples of {format_count(details.get('input_rows'))} input rows in "
        f"{format_count(facts['shards'])} shards of {details['image_size']} px"
    )
    if "bytes" in details:
        yield f"{format_bytes(details['bytes'])}, {format_bytes(details['bytes_per_sample'])} a sample"


def _heading_of_unfinished(facts: Mapping[str, Any]) -> Iterator[str]:
    details = facts["details"]
    shards, planned_rows = details["shards"], details["planned_rows"]
    yield f"pairs {facts['key']}, not finished"
    yield facts["url"]
    of = f" of {format_count(shards['planned'])}" if shards["planned"] else ""
    yield f"{format_count(shards['committed'])}{of} shards committed, {format_count(shards['made'])} more made"
    of = f" ({format_count(planned_rows)} are planned)" if planned_rows else ""
    yield f"{format_count(details['samples'])} samples of {format_count(details['input_rows'])} rows{of}"
    if details["tables_read"] < shards["committed"] + shards["made"]:
        yield f"counted in {format_count(details['tables_read'])} of these shards, evenly chosen"


def _counts(heading: str, counts: Mapping[str, int]) -> Table:
    table = table_of((heading, "left"), ("rows", "right"), ("share", "right"), ("", "left"))
    total = max(sum(counts.values()), 1)
    for name, count in sorted(counts.items(), key=lambda item: (item[0] != OK, -item[1])):
        style = "green" if name == OK or heading != "status" else "yellow"
        share = count / total
        table.add_row(printable(name), format_count(count), f"{100 * share:.1f} %", Text(draw_bar(share), style))
    return table


def _hosts(hosts: Sequence[Mapping[str, Any]], *, exact: bool) -> Table:
    rows = "rows" if exact else "rows (about)"
    table = table_of(("host", "left"), (rows, "right"), ("ok", "right"), ("most frequent failure", "left"))
    for host in hosts:
        failure = printable(host["failure"] or "")
        table.add_row(_cut(host["host"], 50), format_count(host["rows"]), f"{100 * host['ok']:.1f} %", failure)
    return table


def _samples(samples: Sequence[tuple[str, str]]) -> Table:
    table = table_of(("sample", "left"), ("caption", "left"))
    for key, caption in samples:
        table.add_row(_cut(key, 40), _cut(caption, 200))
    return table


def _cut(text: str, most: int) -> Text:
    # As Text, so that brackets of hostile texts are no markup.
    shown = printable(text[: most + 1])
    return Text(shown if len(shown) <= most else f"{shown[: most - 1]}…")
