"""The report of a pipeline run: one HTML page that needs no script, no network and no other file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from pipelines.drawing.charts import histogram, loss_chart
from pipelines.drawing.formatting import format_bytes, format_count, format_seconds
from pipelines.drawing.printable import printable

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.run.walk import StageRow
    from pipelines.store.ledger import Artifact
    from pipelines.store.storage import Storage

TEMPLATE = "report.html.j2"
MOST_PREVIEWS = 8
# Larger pictures are stored as WebP: the page stays small enough to mail.
LARGEST_PNG_BYTES = 300_000


def build_report(root: Storage, recipe_yaml: str, stages: Sequence[StageRow], artifacts: Mapping[str, Artifact]) -> str:
    """The report as HTML. What a stage that did not run would show is left out.

    Args:
        root: of the pipeline run.
        recipe_yaml: the resolved recipe.
        stages: what happened, in order.
        artifacts: finished ones, by stage name.

    Raises:
        UserError: a committed picture or history cannot be read.
    """
    import jinja2
    import yaml

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "size": format_bytes,
        "duration": format_seconds,
        "count": format_count,
        "printable": printable,
    }
    longest = max((row.seconds for row in stages), default=0.0)
    return environment.get_template(TEMPLATE).render(
        name=(yaml.safe_load(recipe_yaml) or {}).get("name", "run"),
        root=root.url,
        time=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        headlines=_headlines(stages, artifacts),
        stages=[(row, row.seconds / longest if longest else 0.0) for row in stages],
        sections={name: build(artifacts[name]) for name, build in SECTIONS.items() if name in artifacts},
        recipe=recipe_yaml,
    )


def _headlines(stages: Sequence[StageRow], artifacts: Mapping[str, Artifact]) -> list[tuple[str, str, str]]:
    """(value, what it is, a remark) of the few figures that a reader looks for first."""
    facts = {name: artifact.details for name, artifact in artifacts.items()}
    evaluate, diffusion = facts.get("evaluate", {}), facts.get("diffusion", {})
    headlines = []
    if (accuracy := evaluate.get("alignment_accuracy")) is not None:
        samples = evaluate.get("alignment_samples", 0)
        low, high = wilson_interval(accuracy, samples)
        remark = f"of {samples} held-out prompts; 95 % interval {100 * low:.0f}–{100 * high:.0f} %"
        headlines.append((f"{100 * accuracy:.1f} %", "alignment accuracy", remark))
    if "samples" in facts.get("pairs", {}):
        remark = f"of {format_count(facts['pairs'].get('input_rows'))} input rows"
        headlines.append((format_count(facts["pairs"]["samples"]), "image–text pairs", remark))
    if "images_per_s" in diffusion:
        remark = f"{diffusion.get('steps', 0):,} steps, final loss {diffusion.get('final_loss', math.nan):.3g}"
        headlines.append((f"{diffusion['images_per_s']:.1f}", "images/s in training", remark))
    if "psnr_db" in facts.get("autoencoder", {}):
        headlines.append((f"{facts['autoencoder']['psnr_db']:.1f} dB", "reconstruction PSNR", "of the first stage"))
    if stages:
        remark = f"{sum(row.state != 'cached' and row.seconds > 0 for row in stages)} of {len(stages)} stages worked"
        headlines.append((format_seconds(sum(row.seconds for row in stages)), "time of this run", remark))
    return headlines


def _pairs(artifact: Artifact) -> dict[str, Any]:
    details = artifact.details
    rows = max(details.get("input_rows", 0), 1)
    charts = [
        (title, histogram(details[name]["edges"], details[name]["counts"], label))
        for name, title, label in (
            ("source_size", "Source size", "shorter side of the source picture, pixels"),
            ("aspect", "Aspect ratio", "width / height of the source picture"),
            ("caption_words", "Caption length in words", "words of the first caption"),
            ("caption_characters", "Caption length in characters", "characters of the first caption"),
        )
        if name in details
    ]
    samples = max(details.get("samples", 0), 1)
    return {
        "facts": _facts(
            ("Samples", format_count(details.get("samples"))),
            ("Size", format_bytes(details["bytes"]) if "bytes" in details else None),
            ("Size of one", format_bytes(details["bytes_per_sample"]) if "bytes_per_sample" in details else None),
            ("Image size", f"{details['image_size']} px" if "image_size" in details else None),
        ),
        "statuses": [(name, count, count / rows) for name, count in _descending(details.get("statuses", {}))],
        "buckets": [(name, count, count / samples) for name, count in _descending(details.get("buckets", {}))],
        "hosts": details.get("hosts", []),
        "hosts_exact": details.get("hosts_exact", True),
        "charts": [(title, chart) for title, chart in charts if chart],
        "contact_sheet": _contact_sheet(artifact),
        "examples": details.get("examples", []),
        "failures": details.get("failures", {}),
    }


def _descending(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _contact_sheet(artifact: Artifact) -> str | None:
    """Random samples with their captions as a data URL; None where there are none."""
    from PIL import Image

    from pipelines.stages.pairs.summary.contact_sheet import contact_sheet, tars_of

    sheet = contact_sheet(tars_of(artifact.storage))
    return None if sheet is None else _webp(Image.fromarray(sheet), quality=80)


def _autoencoder(artifact: Artifact) -> dict[str, Any]:
    details = artifact.details
    return {
        "facts": _facts(
            ("Parameters", format_count(details.get("parameters"))),
            ("PSNR", f"{details['psnr_db']:.2f} dB" if "psnr_db" in details else None),
            ("Steps", format_count(details.get("steps"))),
            ("Throughput", _rate(details)),
            ("Weights", details.get("encoder_sha256", "")[:16]),
        ),
        "loss": _loss_chart(artifact),
        "reconstructions": _picture(artifact, "reconstructions.png"),
        "previews": _previews(artifact),
    }


def _latents(artifact: Artifact) -> dict[str, Any]:
    details = artifact.details
    shape = " × ".join(str(size) for size in details.get("latent_shape", []))
    bytes_per_sample = artifact.manifest.bytes / max(details.get("samples", 0), 1)
    return {
        "facts": _facts(
            ("Latents", format_count(details.get("samples"))),
            ("Shape (C, h, w)", shape),
            ("Stored as", details.get("latent_dtype")),
            ("Scale factor 1/std", f"{details['scale_factor']:.5f}" if "scale_factor" in details else None),
            ("Size of one", format_bytes(bytes_per_sample)),
            ("Vocabulary", format_count(details.get("vocabulary_size"))),
            ("Longest caption", f"{details['max_length']} tokens" if "max_length" in details else None),
            ("Encoder", details.get("encoder_sha256", "")[:16]),
            ("Tokenizer", details.get("tokenizer_sha256", "")[:16]),
        )
    }


def _diffusion(artifact: Artifact) -> dict[str, Any]:
    details = artifact.details
    parameters = details.get("parameters", {})
    counts = parameters.items() if isinstance(parameters, dict) else [("all", parameters)]
    return {
        "facts": _facts(
            *((f"Parameters: {name.replace('_', ' ')}", format_count(count)) for name, count in counts),
            ("Steps", format_count(details.get("steps"))),
            ("Throughput", _rate(details)),
            ("Workers", format_count(details.get("workers"))),
            ("Final loss", f"{details['final_loss']:.4g}" if "final_loss" in details else None),
        ),
        "loss": _loss_chart(artifact),
        "previews": _previews(artifact),
    }


def _evaluate(artifact: Artifact) -> dict[str, Any]:
    details = artifact.details
    names = {file.name for file in artifact.manifest.files}
    scores = artifact.storage.read_json("scores.json").get("alignment", {}) if "scores.json" in names else {}
    groups = [
        (f"{name.replace('_', ' ')}: {'yes' if value == 'true' else 'no'}", score["accuracy"], score["samples"])
        for name, group in scores.get("groups", {}).items()
        for value, score in group.items()
    ]
    return {
        "grid": _picture(artifact, "grid.png"),
        "training_grid": _picture(artifact, "training_grid.png"),
        "prompts": details.get("prompts", []) if isinstance(details.get("prompts"), list) else [],
        "attributes": [(name, share, scores.get("samples", 0)) for name, share in scores.get("attributes", {}).items()]
        + groups,
        "mistakes": [item for item in scores.get("items", []) if not item["right"]][:12],
    }


def _export(artifact: Artifact) -> dict[str, Any]:
    return {
        "facts": _facts(("Layouts", ", ".join(artifact.details.get("layouts", [])))),
        "place": artifact.storage.url,
        "files": [(file.name, file.bytes) for file in artifact.manifest.files],
    }


SECTIONS = {
    "pairs": _pairs,
    "autoencoder": _autoencoder,
    "latents": _latents,
    "diffusion": _diffusion,
    "evaluate": _evaluate,
    "export": _export,
}


def _facts(*facts: tuple[str, str | None]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in facts if value]


def _rate(details: Mapping[str, Any]) -> str | None:
    return f"{details['images_per_s']:,.1f} images/s" if "images_per_s" in details else None


def _loss_chart(artifact: Artifact) -> Markup:
    if "history.json" not in {file.name for file in artifact.manifest.files}:
        return Markup("")
    history = artifact.storage.read_json("history.json")
    return loss_chart([entry["step"] for entry in history], [entry["loss"] for entry in history])


def _previews(artifact: Artifact) -> list[tuple[int, str]]:
    """(step, picture) of at most MOST_PREVIEWS grids, evenly spread, the last one among them."""
    names = sorted(f.name for f in artifact.manifest.files if f.name.startswith("previews/step_"))
    stride = math.ceil(len(names) / MOST_PREVIEWS)
    kept = names[::-1][:: max(stride, 1)][::-1]
    return [
        (int(name.removesuffix(".png").rpartition("_")[2]), picture)
        for name in kept
        if (picture := _picture(artifact, name))
    ]


def _picture(artifact: Artifact, name: str) -> str | None:
    """A committed PNG as a data URL; None where the artifact has none of that name."""
    from PIL import Image

    if name not in {file.name for file in artifact.manifest.files}:
        return None
    data = artifact.storage.read_bytes(name)
    if len(data) > LARGEST_PNG_BYTES:
        return _webp(Image.open(io.BytesIO(data)), quality=88)
    return _data_url("png", data)


def _webp(image: Image.Image, quality: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return _data_url("webp", buffer.getvalue())


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def wilson_interval(share: float, samples: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds the true share with 95 % confidence (Wilson, 1927)."""
    if samples == 0:
        return 0.0, 1.0
    center = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples**2))
    return max(center - half, 0.0), min(center + half, 1.0)
