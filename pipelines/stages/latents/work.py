"""The work of the `latents` stage: encode every pair that is not encoded yet, then sum up."""

from __future__ import annotations

from typing import Any

from ldm_core.tokenizers.tokenizer import Tokenizer
from pipelines.compute.actor_pool import map_on_actors, pool_size
from pipelines.errors import UserError
from pipelines.stage import RateMeter, StageContext
from pipelines.stages.autoencoder.artifact import FORMAT_VERSION as AUTOENCODER_FORMAT
from pipelines.stages.latents.config import LatentsConfig
from pipelines.stages.latents.encode import EncodeShard, statistics_name
from pipelines.stages.latents.poison import Poisoned, poisoned_shards
from pipelines.stages.latents.statistics import LatentSums, scale_factor, total
from pipelines.stages.latents.vocabulary import commit_vocabulary
from pipelines.stages.pairs.artifact import PAIRS_FORMAT
from pipelines.store.ledger import Artifact


def run(context: StageContext[LatentsConfig]) -> dict[str, Any]:
    """Encode what is not yet committed; see `stage` for what is written.

    Raises:
        UserError: no samples, a damaged pairs shard, a file that is no vocabulary, or a first stage that does
            not work.
    """
    pairs = context.upstream["pairs"].require("pairs", PAIRS_FORMAT)
    first_stage = context.upstream["autoencoder"].require("autoencoder", AUTOENCODER_FORMAT)
    if not sum(record.rows for record in pairs.shards()):
        raise UserError(f"{pairs.storage.url} holds no samples: see its parquet files for what became of each row")
    tokenizer = commit_vocabulary(context.config.tokenizer, pairs, context.writer)
    _encode_pending(context, pairs, first_stage)
    return _details(context, pairs, first_stage, tokenizer)


def _encode_pending(context: StageContext[LatentsConfig], pairs: Artifact, first_stage: Artifact) -> None:
    config = context.config
    committed = context.writer.committed()
    poisoned = Poisoned(context.writer, len(pairs.shards()), config.max_poisoned_share)
    pending: list[dict[str, Any]] = [
        {"shard": r.name, "rows": r.rows, "bytes": r.bytes, "encoded": r.name in committed}
        for r in pairs.shards()
        if r.name not in poisoned.shards and (r.name not in committed or statistics_name(r.name) not in committed)
    ]
    if not pending:
        return
    size = pool_size(len(pending), workers=config.workers, use_gpu=config.use_gpu, who="latents", check=context.check)
    arguments = {
        "pairs": pairs,
        "first_stage": first_stage,
        "writer": context.writer,
        "config": config,
        "device": size.device,
    }
    rows = sum(record.rows for record in pairs.shards())
    done = rows - sum(item["rows"] for item in pending)
    meter, before = RateMeter(), done
    context.progress(done, rows)
    for result in map_on_actors(
        pending, EncodeShard, arguments=arguments, size=size, set_aside=poisoned.set_aside, check=context.check
    ):
        done += result["rows"]
        rate = meter.rate(done - before)
        context.progress(done, rows, images_per_s=f"{rate:.0f}")
        context.tracker.metric("throughput/images_per_s", rate, step=done)


def _details(
    context: StageContext[LatentsConfig], pairs: Artifact, first_stage: Artifact, tokenizer: Tokenizer
) -> dict[str, Any]:
    left_out = poisoned_shards(context.writer.storage)
    encoded = [record for record in pairs.shards() if record.name not in left_out]
    statistics = [context.writer.storage.read_json(statistics_name(r.name)) for r in encoded]
    shapes = {tuple(shard["shape"]) for shard in statistics if shard["shape"]}
    if len(shapes) > 1:
        raise UserError(f"latents differ in shape from shard to shard ({sorted(shapes)}): set pairs.resize=center_crop")
    sums = total([LatentSums.from_dict(shard) for shard in statistics])
    try:
        scale = scale_factor(sums)
    except ValueError as error:
        raise UserError(f"the first stage has collapsed: {error}; train it again with a smaller kl_weight") from error
    moments, *latent_shape = shapes.pop()
    context.tracker.metrics({"latents/mean": sums.mean, "latents/std": sums.std, "latents/scale_factor": scale})
    return {
        "samples": sum(record.rows for record in encoded),
        "poisoned_shards": len(left_out),
        "encoder_sha256": first_stage.details["encoder_sha256"],
        "tokenizer_sha256": tokenizer.digest,
        "vocabulary_size": tokenizer.vocabulary_size,
        "max_length": tokenizer.max_length,
        "empty_tokens": tokenizer.encode([""])[0].tolist(),
        "latent_shape": list(latent_shape),
        "latent_dtype": "float16",
        "moments": moments,
        "latent_mean": sums.mean,
        "scale_factor": scale,
    }
