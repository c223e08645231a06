"""The latent cache, by real actors on real shards."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import webdataset

from pipelines.conditions.kinds import kind_of
from pipelines.errors import UserError
from pipelines.shards.format import decode_npy, read_shard, read_with_facts
from pipelines.stages.autoencoder.artifact import load_first_stage
from pipelines.stages.latents import work
from pipelines.stages.latents.encoding.encode import EncodeShard
from pipelines.stages.latents.encoding.shards import DecodedShard, EncodedShard
from pipelines.stages.latents.poison import Poisoned
from pipelines.stages.latents.rows import PairsRows
from pipelines.stages.latents.stage import STAGE
from pipelines.stages.pairs.artifact import decode_image
from pipelines.stages.pairs.held_out import copy_held_out
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact, artifact_key
from pipelines.store.storage import Storage
from tests.shard_encoder import ShardEncoder
from tests.tiny_artifacts import contents, first_stage_artifact, latents_config, pairs_artifact, run_stage

CONFIG = latents_config(batch_size=2, workers=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="module")
def upstream(root: Path) -> dict[str, Artifact]:
    return {"pairs": pairs_artifact(root), "autoencoder": first_stage_artifact(root)}


@pytest.fixture(scope="module")
def latents(ray_cluster: None, root: Path, upstream: dict[str, Artifact]) -> Artifact:
    return run_stage(STAGE, CONFIG, root, upstream)


def test_every_pair_is_encoded_as_the_first_stage_encodes_it(latents: Artifact, upstream: dict[str, Artifact]) -> None:
    first_stage = load_first_stage(upstream["autoencoder"])
    keys = []
    for record in latents.shards():
        encoded = list(read_with_facts(latents.storage, record.name))
        pairs = list(read_shard(Path(upstream["pairs"].storage.path(record.name))))
        assert record.rows == len(encoded)
        for pair, sample in zip(pairs, encoded, strict=True):
            keys.append(sample["__key__"])
            assert (sample["__key__"], sample["json"]) == (pair["__key__"], pair["json"])
            picture = torch.from_numpy(decode_image(pair["png"])).permute(2, 0, 1)[None]
            with torch.no_grad():
                expected = first_stage.encode(picture / 127.5 - 1).moments[0].numpy()
            stored = decode_npy(sample["latent.npy"])
            assert stored.dtype == np.float16
            np.testing.assert_allclose(stored, expected, atol=2e-2, rtol=2e-3)
    assert keys == [f"{shard:05d}{row:04d}" for shard, rows in ((0, 5), (2, 4)) for row in range(rows)]


def test_plain_webdataset_reads_the_cache(latents: Artifact) -> None:
    samples = list(webdataset.WebDataset(latents.storage.path("000000.tar"), shardshuffle=False, empty_check=False))
    assert len(samples) == 5
    assert {"__key__", "latent.npy", "tokens.npy"} <= samples[0].keys()


def test_every_caption_of_a_sample_is_tokenized(latents: Artifact) -> None:
    from ldm_core.tokenizers.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_vocabulary_file(latents.storage.path("vocab.txt"), max_length=8)
    for sample in read_with_facts(latents.storage, "000002.tar"):
        tokens = decode_npy(sample["tokens.npy"])
        assert (tokens.dtype, tokens.shape) == (np.uint16, (2, 8))
        np.testing.assert_array_equal(tokens, tokenizer.encode(json.loads(sample["json"])["captions"]))
    assert latents.details["empty_tokens"] == tokenizer.encode([""])[0].tolist()
    assert latents.details["tokenizer_sha256"] == tokenizer.digest
    assert latents.details["vocabulary_size"] == tokenizer.vocabulary_size


def test_details_describe_the_cache(latents: Artifact, upstream: dict[str, Artifact]) -> None:
    moments = [
        decode_npy(sample["latent.npy"]).astype(np.float64)
        for record in latents.shards()
        for sample in read_shard(Path(latents.storage.path(record.name)))
    ]
    mean, logvar = np.stack(moments).transpose(1, 0, 2, 3, 4)
    variance = np.square(mean).mean() + np.exp(logvar).mean() - mean.mean() ** 2
    details = latents.details
    assert details["scale_factor"] == pytest.approx(1 / np.sqrt(variance), rel=1e-12)
    assert (details["samples"], details["latent_shape"], details["moments"]) == (9, [4, 4, 4], 2)
    assert details["encoder_sha256"] == upstream["autoencoder"].details["encoder_sha256"]


def test_number_of_workers_and_threads_changes_neither_bytes_nor_key(
    latents: Artifact, root: Path, upstream: dict[str, Artifact]
) -> None:
    config = CONFIG.model_copy(update={"workers": 2, "decode_threads": 1})
    keys = {name: artifact.key for name, artifact in upstream.items()}
    assert artifact_key(STAGE.identity(config, 0, keys)) == artifact_key(STAGE.identity(CONFIG, 7, keys))
    again = run_stage(STAGE, config, root, upstream, key="two-workers")
    assert contents(again) == contents(latents)
    assert again.details == latents.details


def encode_in_this_process(root: Path, upstream: dict[str, Artifact]) -> dict[str, str]:
    """Return sha256 of every file that an uninterrupted run writes."""
    writer = ArtifactWriter("latents", "whole", Storage(str(root / "latents" / "whole")))
    kind_of(CONFIG.condition).prepare(PairsRows(upstream["pairs"]), writer)
    encode = ShardEncoder(
        pairs=upstream["pairs"], first_stage=upstream["autoencoder"], writer=writer, config=CONFIG, device="cpu"
    )
    for record in upstream["pairs"].shards():
        encode({"shard": record.name, "rows": record.rows, "sha256": record.sha256})
    copy_held_out(upstream["pairs"], writer)
    return {record.name: record.sha256 for record in writer.committed()}


def test_killed_run_goes_on_where_it_was_and_ends_with_the_same_bytes(
    ray_cluster: None, own_threads: None, tmp_path: Path
) -> None:
    """Kill -9 of the driver, and with it of its workers, after the first shard, and what else it can leave behind."""
    upstream = {"pairs": pairs_artifact(tmp_path, rows=(20,) * 6), "autoencoder": first_stage_artifact(tmp_path)}
    uninterrupted = encode_in_this_process(tmp_path, upstream)
    commits = tmp_path / "latents" / "killed" / "commits"
    script, address = "tests.pipelines.stages.latents.killed_run", ray.get_runtime_context().gcs_address
    process = subprocess.Popen(
        [sys.executable, "-m", script, str(tmp_path), address, "1", "unfinished"],
        cwd=Path(__file__).parents[4],
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not (commits / "000000.tar.json").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (commits.parent / "manifest.json").exists()
    first = (commits.parent / "000000.tar").stat().st_mtime_ns
    # A kill between the data and its commit record leaves the one without the other.
    (commits / "stats__000000.json.json").unlink(missing_ok=True)
    (commits.parent / "000005.tar").write_bytes(b"cut off")
    resumed = run_stage(STAGE, CONFIG, tmp_path, upstream, key="killed")
    assert contents(resumed) == uninterrupted
    assert (commits.parent / "000000.tar").stat().st_mtime_ns == first, "a committed shard was written again"


def test_missing_pairs_shard_is_one_line_through_the_wrappers_of_ray(
    ray_cluster: None, tmp_path: Path, upstream: dict[str, Artifact]
) -> None:
    pairs = pairs_artifact(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\n")
    condition = {"kind": "text", "tokenizer": {"vocabulary": str(tmp_path / "vocab.txt"), "max_length": 8}}
    Path(pairs.storage.path("000002.tar")).unlink()
    with pytest.raises(Exception) as caught:
        run_stage(
            STAGE, latents_config(condition=condition, batch_size=2, workers=1), tmp_path, {**upstream, "pairs": pairs}
        )
    expected = r".*/000002\.tar is missing: .*run `ldm run RECIPE --force pairs` to rebuild it"
    assert re.fullmatch(expected, str(caught.value))
    assert not (tmp_path / "latents" / "key" / "manifest.json").exists()


def test_pairs_without_samples_are_refused(tmp_path: Path, upstream: dict[str, Artifact]) -> None:
    with pytest.raises(UserError, match="holds no samples"):
        run_stage(STAGE, CONFIG, tmp_path, {**upstream, "pairs": pairs_artifact(tmp_path, rows=(0, 0))})


def test_pairs_of_another_format_are_refused(tmp_path: Path, upstream: dict[str, Artifact]) -> None:
    with pytest.raises(UserError, match=r"holds autoencoder of format \d+, but pairs of format \d+ is needed"):
        run_stage(STAGE, CONFIG, tmp_path, {**upstream, "pairs": upstream["autoencoder"]})


class DiesAtTheThird(EncodeShard):
    """Its worker dies at the third shard, each time."""

    def __call__(self, shard: DecodedShard) -> EncodedShard:
        if shard.item["shard"] == "000002.tar":
            os._exit(1)
        return super().__call__(shard)


@pytest.mark.timeout(300)
def test_a_shard_that_kills_its_worker_is_left_out(
    no_actor_is_left: None, root: Path, upstream: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(work, "EncodeShard", DiesAtTheThird)
    artifact = run_stage(STAGE, CONFIG.model_copy(update={"max_poisoned_share": 0.5}), root, upstream, key="poison")
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert [record.name for record in artifact.shards()] == ["000000.tar", "000001.tar"]
    assert (artifact.details["poisoned_shards"], artifact.details["samples"]) == (1, 5)
    assert artifact.storage.read_json("poison/000002.json") == {"rows": 4}


def test_more_shards_that_kill_their_worker_than_may_be_are_refused(tmp_path: Path) -> None:
    writer = ArtifactWriter("latents", "key", Storage(str(tmp_path)))
    poisoned = Poisoned(writer, 3, CONFIG.max_poisoned_share)
    with pytest.raises(UserError, match=r"encoding 000002.tar kills its worker each time, and 1 of 3 shards are more"):
        poisoned.set_aside({"shard": "000002.tar", "rows": 4})
    assert not writer.storage.exists("poison")
