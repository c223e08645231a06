"""Pairs and latents as `webdataset` pipelines: real artifacts, real DataLoader workers, a real object store."""

import io
import json
import pickle
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from ldm_core.tokenizers.tokenizer import Tokenizer
from pipelines.datasets import open_latents, open_pairs
from pipelines.errors import UserError
from pipelines.shards.format import ShardWriter, decode_npy, encode_npy, read_shard, write_shard
from pipelines.shards.index import IndexBuilder
from pipelines.stages.latents.artifact import FORMAT_VERSION
from pipelines.stages.pairs.artifact import PAIRS_FORMAT
from pipelines.stages.pairs.held_out import held_out_places
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from tests.pipelines.store.s3 import BUCKET, S3, Plan
from tests.tiny_artifacts import (
    encoded_latents_artifact,
    finish,
    first_stage_artifact,
    latents_artifact,
    pairs_artifact,
)

ROWS = (5, 0, 4, 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="module")
def pairs(root: Path) -> Artifact:
    return pairs_artifact(root, rows=ROWS)


@pytest.fixture(scope="module")
def latents(root: Path, pairs: Artifact) -> Artifact:
    return encoded_latents_artifact(root, pairs, first_stage_artifact(root))


def stored(artifact: Artifact) -> Iterator[dict[str, Any]]:
    """Return what the tars hold, in order, not decoded."""
    for record in artifact.shards():
        yield from read_shard(Path(artifact.storage.path(record.name)))


def keys(samples: Any) -> list[str]:
    return [sample["__key__"] for sample in samples]


def one_pair(root: Path, files: dict[str, bytes]) -> Artifact:
    """Make a finished artifact of a single sample with these files."""
    writer = ArtifactWriter("pairs", "one", Storage(str(root)) / "pairs" / "one")
    with writer.storage.writer("000000.tar") as path:
        write_shard(path, [("000000000", files)])
    writer.commit("000000.tar", rows=1)
    return finish(writer, {}, PAIRS_FORMAT)


def png(side: int = 8, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


FACTS = json.dumps({"captions": ["a bear"]}).encode()


def test_pairs_come_in_order_with_picture_captions_and_metadata(pairs: Artifact) -> None:
    samples = list(open_pairs(pairs.storage.url))
    assert len(samples) == sum(ROWS)
    for sample, files in zip(samples, stored(pairs), strict=True):
        assert sample.keys() == {"__key__", "__url__", "image", "captions", "metadata"}
        assert sample["__key__"] == files["__key__"]
        np.testing.assert_array_equal(sample["image"], np.asarray(Image.open(io.BytesIO(files["png"]))))
        assert (sample["image"].dtype, sample["image"].shape) == (np.uint8, (32, 32, 3))
        assert sample["captions"] == json.loads(files["json"])["captions"]
        assert sample["captions"][0] == files["txt"].decode()
    assert samples[-1]["__url__"] == f"{pairs.storage.url}/000003.tar"


def test_what_is_known_of_a_picture_is_its_metadata(tmp_path: Path) -> None:
    facts = {"captions": ["a", "b"], "similarity": 0.3, "url": "https://example.org/a.png"}
    artifact = one_pair(tmp_path, {"png": png(mode="L"), "json": json.dumps(facts).encode()})
    (sample,) = open_pairs(Path(artifact.storage.url))
    assert sample["metadata"] == {"similarity": 0.3, "url": "https://example.org/a.png"}
    assert sample["image"].shape == (8, 8, 3), "grey pictures are RGB too"


def test_latents_are_the_stored_moments_and_tokens(latents: Artifact) -> None:
    tokenizer = Tokenizer.from_vocabulary_file(latents.storage.path("vocab.txt"), max_length=8)
    samples = list(open_latents(latents.storage.url))
    assert len(samples) == sum(ROWS)
    for sample, files in zip(samples, stored(latents), strict=True):
        assert sample.keys() == {"__key__", "__url__", "mean", "logvar", "tokens", "captions", "metadata"}
        mean, logvar = decode_npy(files["latent.npy"])
        np.testing.assert_array_equal(sample["mean"], mean)
        np.testing.assert_array_equal(sample["logvar"], logvar)
        assert (sample["mean"].dtype, sample["mean"].shape) == (np.float16, (4, 4, 4))
        np.testing.assert_array_equal(sample["tokens"], tokenizer.encode(sample["captions"]))


def test_held_out_latents_can_be_left_out_or_had_alone(tmp_path: Path) -> None:
    made = latents_artifact(tmp_path, "0" * 64, rows=(90, 0, 60))
    parts = {wanted: list(open_latents(made.storage.url, held_out=wanted)) for wanted in (None, True, False)}
    keys = {wanted: [(sample["__url__"], sample["__key__"]) for sample in part] for wanted, part in parts.items()}
    assert (len(keys[None]), len(keys[True])) == (150, 2)
    assert sorted(keys[True] + keys[False]) == sorted(keys[None])
    names = list(made.shards().names)
    places = [(f"{made.storage.url}/{names[shard]}", row) for shard, row in held_out_places(made)]
    assert sorted(keys[True]) == sorted((url, [key for of, key in keys[None] if of == url][row]) for url, row in places)
    assert open_latents(made.storage.url).scale_factor == made.details["scale_factor"]


def test_latents_of_a_vq_first_stage_are_one_array(tmp_path: Path, pairs: Artifact) -> None:
    artifact = encoded_latents_artifact(tmp_path, pairs, first_stage_artifact(tmp_path, preset="tiny-vq-f4"))
    sample = next(iter(open_latents(artifact.storage.url)))
    assert sample.keys() == {"__key__", "__url__", "latent", "tokens", "captions", "metadata"}
    np.testing.assert_array_equal(sample["latent"], decode_npy(next(stored(artifact))["latent.npy"])[0])


def test_a_seeded_shuffle_can_be_repeated_and_differs_between_epochs(pairs: Artifact) -> None:
    in_order = keys(stored(pairs))
    orders = [keys(open_pairs(pairs.storage.url, shuffle=100, seed=seed).repeat(2)) for seed in (1, 1, 2)]
    first, second = orders[0][: len(in_order)], orders[0][len(in_order) :]
    assert sorted(first) == sorted(second) == in_order
    assert len({tuple(in_order), tuple(first), tuple(second)}) == 3
    assert orders[0] == orders[1] != orders[2]


def test_a_small_shuffle_still_mixes_the_shards(pairs: Artifact) -> None:
    firsts = {keys(open_pairs(pairs.storage.url, shuffle=1, seed=seed))[0][:5] for seed in range(12)}
    assert firsts == {"00000", "00002", "00003"}


def test_a_shuffle_without_a_seed_differs_from_time_to_time(pairs: Artifact) -> None:
    samples = open_pairs(pairs.storage.url, shuffle=100)
    orders = {tuple(keys(samples)) for _ in range(5)}
    assert len(orders) > 1
    assert {tuple(sorted(order)) for order in orders} == {tuple(keys(stored(pairs)))}


def test_workers_of_a_data_loader_share_the_shards(latents: Artifact) -> None:
    samples = open_latents(latents.storage.url).to_tuple("__key__", "mean", "tokens").batched(3)
    loader: Any = DataLoader(samples, batch_size=None, num_workers=2)
    batches = list(loader)
    assert sorted(key for batch in batches for key in batch[0]) == keys(stored(latents))
    assert batches[0][1].shape[1:] == (4, 4, 4)
    assert batches[0][2].shape[1:] == (2, 8)


def test_samples_can_be_sent_to_workers_that_are_spawned(latents: Artifact) -> None:
    samples = open_latents(latents.storage.url, shuffle=100, seed=1)
    assert keys(pickle.loads(pickle.dumps(samples))) == keys(samples)


def test_nodes_share_the_shards(pairs: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        shares.append(keys(open_pairs(pairs.storage.url)))
    assert all(shares)
    assert sorted(shares[0] + shares[1]) == keys(stored(pairs))
    everything = open_pairs(pairs.storage.url, nodesplitter=lambda shards: shards)
    assert keys(everything) == keys(stored(pairs))


def test_an_object_store_is_read_with_its_hiccups(
    s3_server: S3, pairs: Artifact, use_s3: Callable[[str], None]
) -> None:
    remote = Storage(f"s3://{BUCKET}/datasets/pairs/renamed")
    with s3_server.behind(Plan({"error": 0.2, "cut_answer": 0.1}, seed=3)) as proxy:
        use_s3(proxy.url)
        for name in ["manifest.json", pairs.manifest.table, *pairs.shards().names]:
            pairs.storage.copy(name, remote)
        assert keys(open_pairs(remote.url)) == keys(stored(pairs))
        assert proxy.done["error"]
        with pytest.raises(UserError, match="is no finished artifact"):
            open_pairs(f"s3://{BUCKET}/datasets/pairs/nothing")


@pytest.mark.parametrize("opened", [open_pairs, open_latents])
def test_a_folder_that_is_no_artifact_says_where_to_look(tmp_path: Path, opened: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"is no finished artifact .*ROOT/(pairs|latents)/KEY; `ldm inspect ROOT`"):
        opened(tmp_path)


def test_pairs_are_not_latents(pairs: Artifact, latents: Artifact) -> None:
    with pytest.raises(UserError, match=r"holds latents of format \d+, but pairs of format \d+ is needed"):
        open_pairs(latents.storage.url)
    with pytest.raises(UserError, match=r"holds pairs of format \d+, but latents of format \d+ is needed"):
        open_latents(pairs.storage.url)


def test_an_artifact_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no samples"):
        open_pairs(pairs_artifact(tmp_path, rows=(0,)).storage.url)


def test_a_shard_that_was_cut_is_an_error_and_not_a_shorter_epoch(tmp_path: Path) -> None:
    artifact = pairs_artifact(tmp_path, rows=(5,))
    shard = Path(artifact.storage.path("000000.tar"))
    # Between two samples, where tarfile alone sees a whole tar.
    first_sample, _, _ = shard.read_bytes().partition(b"000000001.json")
    shard.write_bytes(first_sample)
    with pytest.raises(UserError, match=r"000000\.tar is truncated or damaged"):
        list(open_pairs(artifact.storage.url))


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"png": b"no picture", "json": FACTS}, "cannot identify image file"),
        ({"png": png()[:40], "json": FACTS}, ""),
        ({"json": FACTS}, "has no picture"),
        ({"png": png(), "json": b"[" * 100_000}, ""),
        ({"png": png(), "json": b"{}"}, "captions"),
        ({"png": png()}, "json"),
    ],
)
def test_a_damaged_sample_is_named(tmp_path: Path, files: dict[str, bytes], why: str) -> None:
    artifact = one_pair(tmp_path, files)
    with pytest.raises(UserError, match=rf"000000\.tar: sample 000000000 cannot be decoded .*{why}.*`ldm verify`"):
        list(open_pairs(artifact.storage.url))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_claims_to_be_huge_is_not_decoded(tmp_path: Path) -> None:
    claim = bytearray(png())
    claim[16:24] = (11_000).to_bytes(4, "big") * 2
    claim[29:33] = zlib.crc32(claim[12:29]).to_bytes(4, "big")
    artifact = one_pair(tmp_path, {"png": bytes(claim), "json": FACTS})
    with pytest.raises(UserError, match="11000 x 11000 pixels are more than 100,000,000"):
        list(open_pairs(artifact.storage.url))


def test_pickled_latents_are_never_loaded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    artifact = one_latent(tmp_path, {"latent.npy": buffer.getvalue()})
    with pytest.raises(UserError, match=r"cannot be decoded \(Object arrays are not read"):
        list(open_latents(artifact.storage.url))


def test_latents_beside_the_index_of_others_are_refused(tmp_path: Path) -> None:
    artifact = one_latent(tmp_path, {"latent.npy": encode_npy(np.zeros((2, 4, 4, 4), np.float16))})
    (sample,) = open_latents(artifact.storage.url)
    assert sample["captions"] == ["a bear"]
    shard = artifact.storage.path("000000.tar")
    for samples in ([], ["000000001"], ["000000000", "000000001"]):
        write_shard(shard, [(key, {"tokens.npy": encode_npy(np.zeros((40, 77)))}) for key in samples])
        with pytest.raises(
            UserError,
            match=r"index/000000\.arrow is (not the index of 000000\.tar|damaged \(a latent)|does not have the CRC-32",
        ):
            list(open_latents(artifact.storage.url))
    artifact.storage.write_bytes("index/000000.arrow", b"ARROW1")
    with pytest.raises(UserError, match=r"index/000000\.arrow is damaged"):
        list(open_latents(artifact.storage.url))


def one_latent(root: Path, files: dict[str, bytes]) -> Artifact:
    """Make a finished artifact of a single sample with these files."""
    writer, index = ArtifactWriter("latents", "one", Storage(str(root)) / "latents" / "one"), IndexBuilder()
    with writer.storage.writer("000000.tar") as path, ShardWriter(path, index) as tar:
        tar.add("000000000", files)
    writer.commit("000000.tar", rows=1)
    writer.storage.write_bytes("index/000000.arrow", index.index().with_facts([FACTS]).encode())
    writer.commit("index/000000.arrow")
    return finish(writer, {"scale_factor": 1.0}, FORMAT_VERSION)
