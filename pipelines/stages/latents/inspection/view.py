"""A latents artifact on a terminal: what it is made of, its channels, and what a few samples hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.drawing.formatting import format_bytes, format_count
from pipelines.drawing.terminal import draw_bar, draw_histogram, table_of
from pipelines.stages.latents.artifact import shown_shapes


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
        charts += [
            draw_histogram(tokens_title(name, tokens), tokens["edges"], tokens["counts"])
            for name, tokens in looked_at["tokens"].items()
        ]
        parts += [Text(), Columns(charts, padding=(1, 4)), Text(), _bytes_a_sample(looked_at["bytes_a_sample"])]
    return Group(*parts)


def tokens_title(name: str, tokens: Mapping[str, Any]) -> str:
    """Say of which captions a histogram of tokens is."""
    return f"{name}: tokens of {format_count(tokens['captions'])} captions, {tokens['mean']:.1f} in the mean"


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
    shape = shown_shapes(details)
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


def _bytes_a_sample(parts: Mapping[str, float]) -> Table:
    table = table_of(("bytes a sample", "left"), ("", "right"), ("share", "right"), ("", "left"))
    total = sum(parts.values())
    for name, count in parts.items():
        table.add_row(name, format_bytes(count), f"{100 * count / total:.1f} %", Text(draw_bar(count / total), "green"))
    return table
