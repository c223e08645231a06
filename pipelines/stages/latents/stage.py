"""The `latents` stage: every pair through the frozen encoders once. Tasks read, actors encode, tasks write.

Writes for each pairs shard a `NNNNNN.tar` with the same keys (`KEY.latent.npy`, of further views `KEY.latent.1.npy` and
so on, and what the condition caches, such as `KEY.tokens.npy`), but for pictures whose latent is not finite; beside it
`index/NNNNNN.arrow`, which says where its files lie and what their checksums are, and has the pairs' json of each
sample, and `stats/NNNNNN.json`, the sums that the scale factor is computed from and the pictures left out; what the
condition has once for all samples, such as `vocab.txt`; and the pairs' `held_out/N.parquet`. `poison/NNNNNN.json`
stands for a shard that could not be encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines.stage import Estimate, Section, Sections, Stage, StageContext, Verification
from pipelines.stages.autoencoder.stage import check_sides
from pipelines.stages.latents.artifact import FORMAT_VERSION
from pipelines.stages.latents.config import LatentsConfig
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import RenderableType

FP16_BYTES = 2
# Headers and padding of a member, the tar's and its array's; and what the index has of a sample, its json mostly.
MEMBER_OVERHEAD_BYTES = 900
INDEX_BYTES = 500


# `work` and `section` are imported when they are called: a recipe or a plan needs neither torch nor matplotlib.
def _run(context: StageContext[LatentsConfig]) -> dict[str, Any]:
    from pipelines.stages.latents import work

    return work.run(context)


def _section(artifact: Artifact) -> Section:
    from pipelines.stages.latents.section import section

    return section(artifact)


def _look(artifact: Artifact) -> dict[str, Any]:
    from pipelines.stages.latents.inspection.look import look

    return look(artifact)


def _verify(artifact: Artifact, samples: int) -> Verification:
    from pipelines.stages.latents.inspection.verify import verify

    return verify(artifact, samples)


def _contact_sheet(storage: Storage, shard: str | None) -> NDArray[np.uint8] | None:
    from pipelines.stages.latents.inspection.sheet import contact_sheet

    return contact_sheet(storage, shard)


def _view(facts: Mapping[str, Any]) -> RenderableType:
    from pipelines.stages.latents.inspection.view import view

    return view(facts)


def _inputs(config: LatentsConfig) -> dict[str, str]:
    return config.condition.inputs()


def _configure(sections: Sections) -> LatentsConfig:
    return LatentsConfig(**dict(sections["latents"]), condition=sections["condition"])


def _check(sections: Sections) -> None:
    """Raise ValueError if the pairs do not fit the first stage, or do not carry what the condition needs."""
    if sections["latents"].views and sections["condition"].follows_geometry:
        raise ValueError(
            f"latents.views must be null with condition {sections['condition'].kind}, which is cached for the picture "
            "as it is: leave views out"
        )
    check_sides(sections)
    sections["condition"].check_pairs(sections)


def _estimate(sections: Sections, before: Mapping[str, Estimate]) -> Estimate:
    rows = before["pairs"].rows
    if rows is None:
        return Estimate()
    model = sections["autoencoder"].model
    side = sections["pairs"].image_size // model.downsampling_factor
    # Of a Gaussian posterior mean and log-variance are stored, of a VQ model the latent alone.
    moments = 2 if model.regularization == "kl" else 1
    latent = FP16_BYTES * moments * model.embed_dim * side * side
    condition = sections["condition"].bytes_a_sample()
    views = sections["latents"].views
    latents = (views.count if views else 1) * (latent + MEMBER_OVERHEAD_BYTES)
    return Estimate(rows=rows, bytes=rows * (latents + condition + MEMBER_OVERHEAD_BYTES + INDEX_BYTES))


STAGE = Stage(
    name="latents",
    format_version=FORMAT_VERSION,
    upstream=("pairs", "autoencoder"),
    configure=_configure,
    run=_run,
    section=_section,
    inputs=_inputs,
    check=_check,
    estimate=_estimate,
    uses_seed=False,
    unit="rows",
    headlines=("scale_factor",),
    look=_look,
    verify=_verify,
    view=_view,
    contact_sheet=_contact_sheet,
)
