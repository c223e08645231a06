"""The `latents` stage's section of the report."""

from pipelines.drawing.formatting import format_bytes, format_count
from pipelines.drawing.html import render
from pipelines.drawing.sections import facts
from pipelines.stage import Section
from pipelines.stages.latents.artifact import shown_shapes
from pipelines.store.ledger import Artifact


def section(artifact: Artifact) -> Section:
    """Return the facts of the cache: shape, scale factor, encoder and condition."""
    details = artifact.details
    bytes_per_sample = artifact.manifest.bytes / max(details.get("samples", 0), 1)
    shown = facts(
        ("Latents", format_count(details.get("samples"))),
        ("Shape (C, h, w)", shown_shapes(details)),
        ("Stored as", details.get("latent_dtype")),
        ("Scale factor 1/std", f"{details['scale_factor']:.5f}" if "scale_factor" in details else None),
        ("Size of one", format_bytes(bytes_per_sample)),
        ("Condition", details.get("condition", {}).get("kind")),
        ("Text encoder", ", ".join(digest[:16] for digest in details.get("text_encoders", []))),
        ("Classes", format_count(details.get("classes"))),
        ("Vocabulary", format_count(details.get("vocabulary_size"))),
        ("Longest caption", f"{details['max_length']} tokens" if "max_length" in details else None),
        ("Pictures left out", format_count(details["unencodable"]) if details.get("unencodable") else None),
        ("Shards left out", format_count(details["poisoned_shards"]) if details.get("poisoned_shards") else None),
        ("Encoder", details.get("encoder_sha256", "")[:16]),
        ("Tokenizer", details["tokenizer_sha256"][:16] if "tokenizer_sha256" in details else None),
    )
    return Section(render("stages/latents/section.html.j2", facts=shown))
