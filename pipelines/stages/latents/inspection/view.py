"""A latents artifact on a terminal: what it is made of, its channels, and how their values are distributed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.drawing.formatting import format_bytes, format_count
from pipelines.drawing.terminal import draw_histogram, table_of


def view(facts: Mapping[str, Any]) -> RenderableType:
    """Lay out for people what `inspect_path` says of a latents artifact, finished or not."""
    details = facts["details"]
    parts: list[RenderableType] = [Text(line) for line in _heading(facts)]
    if channels := details.get("channels"):
        parts += [Text(), _channels(channels)]
    looked_at = facts.get("looked_at", {})
    if looked_at.get("samples"):
        charts = [
            draw_histogram(f"channel {number}, {looked_at['samples']} samples", looked_at["edges"], counts)
            for number, counts in enumerate(looked_at["counts"])
        ]
        parts += [Text(), Columns(charts, padding=(1, 4))]
    return Group(*parts)


def _heading(facts: Mapping[str, Any]) -> Iterator[str]:
    details = facts["details"]
    if facts["kind"] == "unfinished":
        yield f"latents {facts['key']}, not finished"
        yield facts["url"]
        yield f"{format_count(facts['committed_files'])} files committed"
        return
    yield f"latents {facts['key']}, finished"
    yield facts["url"]
    samples = details.get("samples")
    shape = " × ".join(map(str, details.get("latent_shape", [])))
    yield f"{format_count(samples)} samples in {format_count(facts['shards'])} shards, latents of {shape} in fp16"
    if samples:
        yield f"{format_bytes(facts['bytes'])}, {format_bytes(facts['bytes'] / samples)} a sample"
    if "scale_factor" in details:
        yield f"scale factor {details['scale_factor']:.5f}, mean {details.get('latent_mean', 0.0):.4f}"
    if details.get("unencodable"):
        yield f"{format_count(details['unencodable'])} pictures left out: their latents are not finite in fp16"


def _channels(channels: Mapping[str, list[float]]) -> Table:
    names = ("mean", "std", "min", "max")
    table = table_of(("channel", "right"), *((name, "right") for name in names))
    for number, values in enumerate(zip(*(channels[name] for name in names), strict=True)):
        table.add_row(str(number), *(f"{value:.4f}" for value in values))
    return table
