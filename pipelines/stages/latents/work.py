"""The work of the `latents` stage: take over or encode every pair that is not encoded yet, then sum up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pipelines.compute.actor_pool import pool_size
from pipelines.compute.chain import ActorStep, PoolSize, TaskStep, map_through
from pipelines.compute.resources import alive, require_nodes, smallest_object_store
from pipelines.compute.tasks import chunks, for_each
from pipelines.conditions.kinds import kind_of
from pipelines.errors import UserError
from pipelines.notices import tell
from pipelines.stage import RateMeter, StageContext
from pipelines.stages.autoencoder.artifact import FORMAT_VERSION as AUTOENCODER_FORMAT
from pipelines.stages.autoencoder.artifact import first_stage_config
from pipelines.stages.latents.config import LatentsConfig
from pipelines.stages.latents.encoding.encode import EncodeShard
from pipelines.stages.latents.encoding.read import ReadShard
from pipelines.stages.latents.encoding.write import WriteShard
from pipelines.stages.latents.poison import Poisoned, poisoned_shards
from pipelines.stages.latents.rows import PairsRows
from pipelines.stages.latents.shard import complete_shards
from pipelines.stages.latents.statistics import LatentSums, ShardStatistics, scale_factor, statistics_name, total
from pipelines.stages.latents.takeover import Encoding, take_over
from pipelines.stages.pairs.artifact import PAIRS_FORMAT
from pipelines.stages.pairs.held_out import copy_held_out, held_out_samples
from pipelines.store.file_table import FileRecord
from pipelines.store.ledger import Artifact
from pipelines.store.threads import map_in_threads

SUMS_PER_TASK = 1024
# Under way for each actor: one is encoded, one waits for that, the others are read or written.
SHARDS_A_CORE, SHARDS_A_GPU = 3, 8
# Of all object stores, for decoded shards: Ray moves to disk what is beyond 80 %, and copies are made between nodes.
STORE_SHARE = 0.4
ENCODERS_A_TASK = 4


def run(context: StageContext[LatentsConfig]) -> dict[str, Any]:
    """Encode what is not yet committed; see `stage` for what is written.

    Raises:
        UserError: no samples, a damaged pairs shard, pairs without what the condition needs, or a first stage that does
            not work.
    """
    pairs = context.upstream["pairs"].require("pairs", PAIRS_FORMAT)
    first_stage = context.upstream["autoencoder"].require("autoencoder", AUTOENCODER_FORMAT)
    if not pairs.shards().rows:
        raise UserError(f"{pairs.storage.url} holds no samples: see its parquet files for what became of each row")
    rows = PairsRows(pairs, partial(for_each, check=context.check))
    kind_of(context.config.condition).prepare(rows, context.writer)
    _encode_pending(context, pairs, first_stage)
    return _details(context, pairs, first_stage)


def _encode_pending(context: StageContext[LatentsConfig], pairs: Artifact, first_stage: Artifact) -> None:
    """Commit every shard that is not committed: taken over from other artifacts where they hold it, else encoded."""
    config, writer = context.config, context.writer
    shards, committed = pairs.shards(), writer.committed()
    poisoned = Poisoned(writer, len(shards), config.max_poisoned_share)
    ready = complete_shards(committed) | poisoned.shards
    pending = [record for record in shards if record.name not in ready]
    if not pending:
        return
    encoding = Encoding.of(first_stage, config, writer.storage)
    identities = {record.name: encoding.identify(record) for record in pending}
    done = shards.rows - sum(record.rows for record in pending)
    context.progress(done, shards.rows)
    wanted = {name: identity for name, identity in identities.items() if name not in committed}
    writer.discard(wanted)
    taken: set[str] = set()
    for record in take_over(pairs, wanted, context.siblings(), writer, config.condition, context.check):
        writer.gather([record])
        if record.name in wanted:
            taken.add(record.name)
            done += record.rows
            context.progress(done, shards.rows, taken_over=f"{len(taken):,} shards")
    items = [
        {
            "shard": record.name,
            "rows": record.rows,
            "sha256": record.sha256,
            "origin": identities[record.name].origin,
            "content": identities[record.name].content,
        }
        for record in pending
        if record.name not in taken
    ]
    if items:
        _encode(context, pairs, first_stage, items, poisoned, done)


def _encode(
    context: StageContext[LatentsConfig],
    pairs: Artifact,
    first_stage: Artifact,
    items: list[dict[str, Any]],
    poisoned: Poisoned,
    done: int,
) -> None:
    config, rows = context.config, pairs.shards().rows
    for nodes in (config.task_nodes, config.encoder_nodes):
        require_nodes(nodes, who="latents", check=context.check)
    size = pool_size(
        len(items),
        workers=config.workers,
        use_gpu=config.use_gpu,
        gpus_per_worker=config.gpus_per_worker,
        cpus_of_tasks=config.task_cpus or 0,
        labels=config.encoder_nodes,
        labels_of_tasks=config.task_nodes,
        who="latents",
        check=context.check,
    )
    meter, before, unencodable = RateMeter(), done, 0
    for result in map_through(
        items,
        steps(context, pairs, first_stage, size),
        in_flight=_shards_in_flight(config, pairs, size),
        set_aside=poisoned.set_aside,
        check=context.check,
    ):
        context.writer.gather(map(FileRecord.model_validate, result["records"]))
        # Of this run alone: whoever waits for a whole set should not do so for a first stage that encodes nothing.
        if result["unencodable"]:
            unencodable += len(result["unencodable"])
            _require_few(unencodable, rows, config, result["unencodable"][0])
        done += result["rows"]
        rate = meter.rate(done - before)
        context.progress(done, rows, images_per_s=f"{rate:.0f}")
        context.tracker.rate("throughput/images_per_s", rate, step=done)


def steps(
    context: StageContext[LatentsConfig], pairs: Artifact, first_stage: Artifact, size: PoolSize
) -> list[TaskStep | ActorStep]:
    """Return what a shard goes through: read and decode, encode, write and commit."""
    config, writer = context.config, context.writer
    cpus = config.task_cpus
    if cpus is None:
        cpus = 1.0 if size.use_gpu else 0.0
    tasks: dict[str, Any] = {"num_cpus": cpus, "labels": config.task_nodes}
    if not cpus:
        # They take a hundredth of the time, or less: more of them would only be processes to start.
        tasks["at_once"] = math.ceil(size.workers / ENCODERS_A_TASK)
    encoder = {"first_stage": first_stage, "storage": writer.storage, "config": config, "device": size.device}
    return [
        TaskStep(ReadShard, {"pairs": pairs, "writer": writer, "config": config}, **tasks),
        # Two threads keep a GPU busy: one hands over what is done and takes what is next while the other computes.
        ActorStep(EncodeShard, encoder, size, calls_at_once=2 if size.use_gpu else 1, labels=config.encoder_nodes),
        TaskStep(WriteShard, {"pairs": pairs, "writer": writer}, **tasks),
    ]


def _shards_in_flight(config: LatentsConfig, pairs: Artifact, size: PoolSize) -> int:
    """Return how many shards may be under way for each actor; tell if a node's object store holds not even one."""
    views = config.views.count if config.views else 1
    rows = int(pairs.shards().table.column("rows").to_numpy().max())
    largest = rows * views * 3 * pairs.details["image_size"] ** 2
    # Where tasks put them; of an encoder elsewhere, its node's has a copy of what it is at.
    if (room := smallest_object_store(config.task_nodes)) < largest:
        tell(
            f"latents: a decoded shard takes {largest / 2**20:.0f} MiB, but the object store of a node holds "
            f"{room / 2**20:.0f}: the rest goes to Ray's disk, slowly; set cluster.object_store_mib, or "
            "`ray start --object-store-memory`, for some such shards"
        )
    if config.shards_in_flight is not None:
        return config.shards_in_flight
    wanted = SHARDS_A_GPU if size.use_gpu else SHARDS_A_CORE
    fit = int(STORE_SHARE * alive("object_store_memory", config.task_nodes)) // max(largest * size.workers, 1)
    return max(1, min(wanted, fit))


def _require_few(unencodable: int, rows: int, config: LatentsConfig, key: str) -> None:
    """Refuse more pictures without a latent than there may be; `key` is one of them."""
    if unencodable > config.max_unencodable_share * rows:
        raise UserError(
            f"the first stage encodes sample {key} to values that are not finite in fp16, and {unencodable:,} of "
            f"{rows:,} samples are more than latents.max_unencodable_share={config.max_unencodable_share:g} allows: "
            "train it again with a smaller learning rate, check its weights file, or allow a larger share"
        )


def _details(context: StageContext[LatentsConfig], pairs: Artifact, first_stage: Artifact) -> dict[str, Any]:
    left_out = poisoned_shards(context.writer.storage)
    encoded = pairs.shards().without(left_out)
    found = _sum_up(context, encoded.names)
    if found.unencodable:
        _require_few(found.unencodable, pairs.shards().rows, context.config, found.example)
        tell(
            f"latents: {found.unencodable:,} pictures are left out, {found.example} first: the first stage encodes "
            "them to values that are not finite in fp16"
        )
    shapes, in_buckets = sorted(found.shapes), "buckets" in pairs.details
    if len({shape[:2] if in_buckets else shape for shape in shapes}) > 1:
        raise UserError(f"latents differ in shape from shard to shard ({shapes}): set pairs.resize=center_crop")
    sums = found.sums
    try:
        scale = scale_factor(sums)
    except ValueError as error:
        raise UserError(f"the first stage has collapsed: {error}; train it again with a smaller kl_weight") from error
    moments, *latent_shape = shapes[0]
    if in_buckets:
        # That of the default bucket, which the UNet samples, whether there are such pictures or not.
        side = pairs.details["image_size"] // first_stage_config(first_stage).downsampling_factor
        latent_shape[1:] = [side, side]
    context.tracker.metrics({"latents/mean": sums.mean, "latents/std": sums.std, "latents/scale_factor": scale})
    return {
        "samples": encoded.rows - found.unencodable,
        "poisoned_shards": len(left_out),
        "unencodable": found.unencodable,
        "held_out": copy_held_out(
            pairs, context.writer, _unencodable_rows(context, pairs) if found.unencodable else {}
        ),
        "encoder_sha256": first_stage.details["encoder_sha256"],
        "condition": context.config.condition.cached_identity(),
        **kind_of(context.config.condition).details(context.writer.storage),
        "latent_shape": latent_shape,
        **({"latent_shapes": [list(shape[1:]) for shape in shapes]} if in_buckets else {}),
        "latent_dtype": "float16",
        "moments": moments,
        **({"views": context.config.views.count} if context.config.views else {}),
        "latent_mean": sums.mean,
        "channels": sums.channels(),
        "scale_factor": scale,
    }


def _unencodable_rows(context: StageContext[LatentsConfig], pairs: Artifact) -> dict[str, list[int]]:
    """Return the rows that have no latent, of each shard with held-out samples."""
    storage = context.writer.storage
    shards = sorted({sample.shard for sample in held_out_samples(pairs)} - poisoned_shards(storage))
    read = map_in_threads(lambda shard: storage.read_json(statistics_name(shard)), shards)
    return {
        shard: list(ShardStatistics.from_json(values).unencodable.values())
        for shard, values in zip(shards, read, strict=True)
    }


@dataclass(frozen=True)
class _Found:
    """What is known of the latents of many shards.

    Attributes:
        sums: over all of them.
        shapes: of their moments.
        unencodable: number of pictures without a latent.
        example: key of the first of these; empty if there is none.
    """

    sums: LatentSums
    shapes: set[tuple[int, ...]]
    unencodable: int
    example: str

    @classmethod
    def of(cls, parts: Iterable[ShardStatistics]) -> _Found:
        shards = list(parts)
        keys = [min(shard.unencodable, key=shard.unencodable.__getitem__) for shard in shards if shard.unencodable]
        return cls(
            total(shard.sums for shard in shards),
            {shard.shape for shard in shards if shard.shape},
            sum(len(shard.unencodable) for shard in shards),
            keys[0] if keys else "",
        )


def _sum_up(context: StageContext[LatentsConfig], shards: list[str]) -> _Found:
    """Return what is known of all shards, read in tasks of a fixed number of them."""
    storage, groups = context.writer.storage, list(chunks(shards, SUMS_PER_TASK))

    def sum_group(number: int) -> dict[str, Any]:
        names = [statistics_name(shard) for shard in groups[number]]
        read = map(storage.read_json, names) if storage.is_local else map_in_threads(storage.read_json, names)
        found = _Found.of(map(ShardStatistics.from_json, read))
        return {**asdict(found), "sums": found.sums.to_dict(), "shapes": sorted(found.shapes)}

    # In the order of the shards, groups always alike: the last bit does not depend on who is done first.
    found = list(for_each(sum_group, range(len(groups)), context.check))
    return _Found(
        total(LatentSums.from_dict(group["sums"]) for group in found),
        {tuple(shape) for group in found for shape in group["shapes"]},
        sum(group["unencodable"] for group in found),
        next((group["example"] for group in found if group["example"]), ""),
    )
