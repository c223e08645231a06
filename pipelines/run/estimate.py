"""What stages that have not run yet will come to: rows and bytes from the recipe, time from earlier runs under the
same root.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.run.plan import PlannedStage
from pipelines.run.recipe import Recipe
from pipelines.store.ledger import MANIFEST, Manifest, read_manifest
from pipelines.store.storage import Storage

# Of a JPEG at quality 95, bits a pixel are about 2.5 for photographs; the tar adds three headers and the caption.
JPEG_BYTES_PER_PIXEL = 0.31
TAR_OVERHEAD_BYTES = 3_500
FP32_BYTES = 4


@dataclass(frozen=True)
class Estimate:
    """Rows, bytes and seconds of a stage; None where nothing is known."""

    rows: int | None = None
    bytes: int | None = None
    seconds: float | None = None
    estimated: bool = True


def estimate(recipe: Recipe, walk: list[PlannedStage]) -> list[Estimate]:
    """One estimate a stage of the walk: the facts where it is cached, else the recipe's arithmetic."""
    root = Storage(recipe.root)
    estimates: dict[str, Estimate] = {}
    for planned in walk:
        name = planned.stage.name
        if planned.artifact:
            found = planned.artifact.manifest
            estimates[name] = Estimate(found.rows, found.bytes, found.seconds, estimated=False)
        else:
            rows, size = _SIZES[name](recipe, estimates)
            estimates[name] = Estimate(rows, size, _seconds(root, name, planned, rows))
    return list(estimates.values())


def _pairs(recipe: Recipe, before: dict[str, Estimate]) -> tuple[int | None, int | None]:
    from pipelines.stages.pairs.stage import count_rows

    rows = count_rows(recipe.pairs)
    if rows is None:
        return None, None
    per_row = recipe.pairs.image_size**2 * JPEG_BYTES_PER_PIXEL + TAR_OVERHEAD_BYTES
    return rows, round(rows * per_row)


def _autoencoder(recipe: Recipe, before: dict[str, Estimate]) -> tuple[int | None, int | None]:
    from ldm_core.networks.autoencoder import build_first_stage

    return 0, FP32_BYTES * _count_parameters(lambda: build_first_stage(recipe.autoencoder.model))


def _latents(recipe: Recipe, before: dict[str, Estimate]) -> tuple[int | None, int | None]:
    rows = before["pairs"].rows
    if rows is None:
        return None, None
    model = recipe.autoencoder.model
    side = recipe.pairs.image_size // model.downsampling_factor
    moments = 2 if model.regularization == "kl" else 1
    per_row = moments * model.embed_dim * side * side * 2 + 2 * recipe.latents.tokenizer.max_length
    return rows, rows * (per_row + TAR_OVERHEAD_BYTES)


def _diffusion(recipe: Recipe, before: dict[str, Estimate]) -> tuple[int | None, int | None]:
    from ldm_core.networks.text_transformer import TextTransformer
    from ldm_core.networks.unet import UNet

    tokenizer = recipe.latents.tokenizer
    text = recipe.diffusion.text.build(vocabulary_size=tokenizer.size, max_length=tokenizer.max_length)
    parameters = _count_parameters(lambda: UNet(recipe.diffusion.unet)) + _count_parameters(
        lambda: TextTransformer(text)
    )
    return 0, FP32_BYTES * parameters + (before["autoencoder"].bytes or 0)


def _evaluate(recipe: Recipe, before: dict[str, Estimate]) -> tuple[int | None, int | None]:
    return None, None


def _export(recipe: Recipe, before: dict[str, Estimate]) -> tuple[int | None, int | None]:
    size = before["diffusion"].bytes
    return 0, None if size is None else size * (2 if recipe.export.diffusers else 1)


_SIZES: dict[str, Callable[[Recipe, dict[str, Estimate]], tuple[int | None, int | None]]] = {
    "pairs": _pairs,
    "autoencoder": _autoencoder,
    "latents": _latents,
    "diffusion": _diffusion,
    "evaluate": _evaluate,
    "export": _export,
}


def _count_parameters(build: Callable[[], Any]) -> int:
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def _seconds(root: Storage, name: str, planned: PlannedStage, rows: int | None) -> float | None:
    """The seconds of the same stage's newest run here, scaled by rows (data stages) or samples seen (training)."""
    earlier = [m for key in (root / name).names() if (m := _manifest(root / name / key)) is not None]
    if not earlier:
        return None
    last = earlier[-1]
    now, then = _work(planned.config.model_dump(), rows), _work(last.config, last.rows)
    return round(last.seconds * now / then, 1) if now and then else last.seconds


def _work(config: dict[str, Any], rows: int | None) -> int | None:
    training = config.get("training")
    return training["steps"] * training["batch_size"] if training else rows


def _manifest(storage: Storage) -> Manifest | None:
    return read_manifest(storage) if storage.exists(MANIFEST) else None
