"""Finished pairs and latents as `webdataset` pipelines of decoded samples, for your own training loop or notebook.

The shards are plain WebDataset tars, which every tool reads; these two calls add what a tar alone does not tell: which
shards belong to the artifact, how its arrays are laid out, the captions of latents, and that a damaged shard is an
error, not a shorter epoch.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import webdataset

from pipelines.errors import UserError
from pipelines.shards.format import decode_json, decode_npy, read_shard, read_with_facts
from pipelines.shards.tar_headers import shown
from pipelines.stages.latents.artifact import FORMAT_VERSION
from pipelines.stages.latents.encoding.names import latent_files
from pipelines.stages.pairs.artifact import PAIRS_FORMAT, decode_image, image_of
from pipelines.stages.pairs.held_out import held_out_places
from pipelines.store.ledger import Artifact, artifact_at
from pipelines.store.storage import Storage

Sample = dict[str, Any]
Read = Callable[[Storage, str], Iterator[Sample]]


class Samples(webdataset.DataPipeline, webdataset.FluidInterface):
    """Decoded samples; has `.map`, `.select`, `.to_tuple`, `.batched`, `.repeat`, `.with_epoch` … as `WebDataset` does.

    It is a torch `IterableDataset`, so that a `DataLoader` takes it.

    Attributes:
        scale_factor: of latents, what they are to be multiplied with before a UNet sees them (paper, Sec. 4.3.2).
    """

    scale_factor: float


def open_pairs(
    url: str | Path,
    *,
    shuffle: int = 0,
    seed: int | None = None,
    nodesplitter: Callable[..., Any] = webdataset.split_by_node,
) -> Samples:
    """Open the image-text pairs of a finished `pairs` artifact.

    Args:
        url: the artifact's folder, `ROOT/pairs/KEY`, local or at any fsspec URL (`s3://…`).
        shuffle: samples held back to be drawn from at random, and shards are read in random order; 0 keeps the stored
            order.
        seed: makes the shuffle repeatable: the order then depends on it and on how often this process has gone through
            the samples. A `DataLoader` starts new worker processes for each epoch, which begin to count anew, unless it
            is given `persistent_workers=True`. None for another order each time.
        nodesplitter: which shards this node reads, as for `webdataset.WebDataset`: by default each node of a
            `torch.distributed` job its own share, and each `DataLoader` worker its part of that.

    Returns:
        Samples with `__key__`, `__url__` (the shard), `image` ((H, W, 3) uint8 RGB), `captions` (list of str, empty
        only with `pairs.captions: optional`) and `metadata` (what else is known: `width`, `height`, `url`, scores, …).

    Raises:
        UserError: there is no such artifact; or, while it is read, a shard or a sample of it is damaged.
    """
    artifact = artifact_at(str(url), "pairs").require("pairs", PAIRS_FORMAT)
    return _open(artifact, _shards(artifact), _read_pairs, _decode_pair, shuffle, seed, nodesplitter)


def open_latents(
    url: str | Path,
    *,
    shuffle: int = 0,
    seed: int | None = None,
    held_out: bool | None = None,
    nodesplitter: Callable[..., Any] = webdataset.split_by_node,
) -> Samples:
    """Open the encoded pairs of a finished `latents` artifact.

    Args:
        url: the artifact's folder, `ROOT/latents/KEY`, local or at any fsspec URL (`s3://…`).
        shuffle: as for `open_pairs`.
        seed: as for `open_pairs`.
        held_out: False leaves out the samples that `ldm run` trains nothing on, True gives these alone, None gives all.
        nodesplitter: as for `open_pairs`.

    Returns:
        Samples with `__key__` and `__url__`; of a KL first stage the posterior's `mean` and `logvar`, of a VQ one
        `latent`, which is not quantized yet, each (C, h, w) float16 and not scaled (the `scale_factor` of what is
        returned is 1/std), of further views `mean.1` and so on; what is cached of the condition, such as `tokens`,
        (captions, L) uint16 ids, or `class`, an int32; `captions` and `metadata` as for `open_pairs`.

    Raises:
        UserError: there is no such artifact; or, while it is read, a shard or a sample of it is damaged.
    """
    artifact = artifact_at(str(url), "latents").require("latents", FORMAT_VERSION)
    read, shards = read_with_facts, _shards(artifact)
    if held_out is not None:
        names = artifact.shards().names
        places = {(names[shard], row) for shard, row in held_out_places(artifact)}
        read = partial(_split, places, held_out)
        if held_out:
            # A few of all: others need not be read.
            shards = sorted({shard for shard, _ in places})
    samples = _open(artifact, shards, read, _decode_latents, shuffle, seed, nodesplitter)
    samples.scale_factor = float(artifact.details["scale_factor"])
    return samples


def _shards(artifact: Artifact) -> list[str]:
    """Return the names of the shards that hold samples."""
    return [record.name for record in artifact.shards() if record.rows]


def _split(places: set[tuple[str, int]], wanted: bool, storage: Storage, shard: str) -> Iterator[Sample]:
    """Yield the samples of a shard that are at such places, or that are not."""
    for row, sample in enumerate(read_with_facts(storage, shard)):
        if ((shard, row) in places) == wanted:
            yield sample


def _open(
    artifact: Artifact,
    shards: list[str],
    read: Read,
    decode: Callable[[Sample], Sample],
    shuffle: int,
    seed: int | None,
    nodesplitter: Callable[..., Any],
) -> Samples:
    storage = artifact.storage
    if not shards:
        raise UserError(f"{storage.url} holds no samples")
    steps = [webdataset.SimpleShardList(shards), nodesplitter, _not_empty, webdataset.split_by_worker]
    if shuffle:
        steps.append(_shuffled(len(shards), seed))
    steps.append(partial(_read, read, storage))
    if shuffle:
        # Before they are decoded: a picture is many times larger than its file.
        steps.append(_shuffled(shuffle, seed))
    return Samples(*steps, webdataset.map(partial(_decode, decode)))


def _not_empty(shards: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Pass shards on. A node without any would take no step, and the others would wait for it for ever."""
    empty = True
    for shard in shards:
        empty = False
        yield shard
    if empty:
        raise UserError("this node has no shard to read: there are more nodes than shards; give another nodesplitter")


def _shuffled(buffer: int, seed: int | None) -> Any:
    # The buffer is filled before the first sample is drawn; webdataset would begin with a hundred.
    if seed is None:
        return webdataset.shuffle(buffer, initial=buffer)
    return webdataset.detshuffle(buffer, initial=buffer, seed=seed)


def _read(read: Read, storage: Storage, shards: Iterable[dict[str, str]]) -> Iterator[Sample]:
    """Yield the samples of the shards, each a dict of encoded files."""
    # By our reader: webdataset's own takes the place where a tar was cut for its end.
    for shard in shards:
        for sample in read(storage, shard["url"]):
            yield {**sample, "__url__": f"{storage.url}/{shard['url']}"}


def _read_pairs(storage: Storage, shard: str) -> Iterator[Sample]:
    with storage.open(shard) as file:
        yield from read_shard(file)


def _decode(decode: Callable[[Sample], Sample], sample: Sample) -> Sample:
    try:
        return {"__key__": sample["__key__"], "__url__": sample["__url__"], **decode(sample)}
    # Whatever decoders answer to bytes that are not what they should be.
    except Exception as error:
        raise UserError(
            f"{sample['__url__']}: sample {shown(sample['__key__'])} cannot be decoded ({error}): `ldm verify` of its "
            "folder tells what is damaged"
        ) from error


def _decode_pair(sample: Sample) -> Sample:
    return {"image": decode_image(image_of(sample)), **_decode_facts(sample)}


def _decode_latents(sample: Sample) -> Sample:
    arrays = {name.removesuffix(".npy"): decode_npy(data) for name, data in sample.items() if name.endswith(".npy")}
    decoded: Sample = {}
    for number, name in enumerate(latent_files(sample)):
        moments, view = arrays.pop(name.removesuffix(".npy")), f".{number}" if number else ""
        names = ("mean", "logvar") if len(moments) == 2 else ("latent",)
        decoded |= {f"{each}{view}": values for each, values in zip(names, moments, strict=True)}
    return decoded | arrays | _decode_facts(sample)


def _decode_facts(sample: Sample) -> Sample:
    metadata = decode_json(sample["json"])
    return {"captions": [str(caption) for caption in metadata.pop("captions")], "metadata": metadata}
