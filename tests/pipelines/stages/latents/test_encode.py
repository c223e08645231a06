"""What is done with one shard, without Ray."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_core.networks.posterior import DiagonalGaussian
from ldm_core.tokenizers.tokenizer import Tokenizer
from pipelines.conditions.kinds import kind_of
from pipelines.errors import UserError
from pipelines.shards.format import decode_npy, encode_npy, read_shard, write_shard
from pipelines.shards.index import scan_shard
from pipelines.stages.latents import shard as shard_module
from pipelines.stages.latents.config import LatentsConfig
from pipelines.stages.latents.encoding.shards import EncodedShard
from pipelines.stages.latents.rows import PairsRows
from pipelines.stages.latents.shard import Written
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage, sha256_file
from tests.shard_encoder import ShardEncoder
from tests.tiny_artifacts import first_stage_artifact, latents_config, pair_sample, pairs_artifact

pytestmark = pytest.mark.usefixtures("own_threads")
CONFIG = latents_config(batch_size=3)


def encoder(
    root: Path, *, preset: str = "tiny-kl-f8", config: LatentsConfig = CONFIG, rows: tuple[int, ...] = (4,)
) -> ShardEncoder:
    pairs = pairs_artifact(root, rows=rows)
    writer = ArtifactWriter("latents", "key", Storage(str(root / "latents" / "key")))
    kind_of(config.condition).prepare(PairsRows(pairs), writer)
    return ShardEncoder(
        pairs=pairs,
        first_stage=first_stage_artifact(root, preset=preset),
        writer=writer,
        config=config,
        device="cpu",
    )


def item(pairs: Artifact, number: int = 0) -> dict[str, object]:
    record = list(pairs.shards())[number]
    return {"shard": record.name, "rows": record.rows, "sha256": record.sha256}


def replace_shard(pairs: Artifact, samples: list[tuple[str, dict[str, bytes]]]) -> dict[str, object]:
    """Put another shard in the place of the first; return the item that names it as the manifest would."""
    path = Path(pairs.storage.path("000000.tar"))
    rows = write_shard(path, samples)
    return {"shard": "000000.tar", "rows": rows, "sha256": sha256_file(path)}


def test_latent_of_a_sample_does_not_depend_on_the_samples_after_its_batch(tmp_path: Path) -> None:
    encode = encoder(tmp_path, rows=(7,))
    samples = list(read_shard(Path(encode.pairs.storage.path("000000.tar"))))
    encode(item(encode.pairs))
    whole = [s["latent.npy"] for s in read_shard(Path(encode.writer.storage.path("000000.tar")))]
    encode.writer.storage.remove()
    first = [(s["__key__"], {name: s[name] for name in ("png", "json")}) for s in samples[:3]]
    encode(replace_shard(encode.pairs, first))
    assert [s["latent.npy"] for s in read_shard(Path(encode.writer.storage.path("000000.tar")))] == whole[:3]


def test_a_shard_has_the_bytes_of_plain_encoding(tmp_path: Path) -> None:
    encode = encoder(tmp_path, rows=(7,))
    samples = list(read_shard(Path(encode.pairs.storage.path("000000.tar"))))
    tokenizer = Tokenizer.from_vocabulary_file(encode.writer.storage.path("vocab.txt"), max_length=8)
    plain = []
    for start in range(0, 7, CONFIG.batch_size):
        batch = samples[start : start + CONFIG.batch_size]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in batch])
        with torch.inference_mode():
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
            moments = encode.first_stage.encode(images).moments.half().numpy()
        for sample, latent in zip(batch, moments, strict=True):
            tokens = tokenizer.encode(json.loads(sample["json"])["captions"])
            files = {"latent.npy": encode_npy(latent), "tokens.npy": encode_npy(tokens)}
            plain.append((sample["__key__"], files))
    write_shard(tmp_path / "plain.tar", plain)
    encode(item(encode.pairs))
    assert Path(encode.writer.storage.path("000000.tar")).read_bytes() == (tmp_path / "plain.tar").read_bytes()


def test_first_stage_of_the_vq_kind_is_cached_before_quantization(tmp_path: Path) -> None:
    encode = encoder(tmp_path, preset="tiny-vq-f4")
    encode(item(encode.pairs))
    shapes = {decode_npy(s["latent.npy"]).shape for s in read_shard(Path(encode.writer.storage.path("000000.tar")))}
    assert shapes == {(1, 3, 8, 8)}


def test_bf16_is_close_to_fp32(tmp_path: Path) -> None:
    latents = []
    for precision in ("fp32", "bf16"):
        encode = encoder(tmp_path / precision, config=CONFIG.model_copy(update={"precision": precision}))
        encode(item(encode.pairs))
        shard = Path(encode.writer.storage.path("000000.tar"))
        latents.append(np.stack([decode_npy(s["latent.npy"]).astype(float) for s in read_shard(shard)]))
    assert 0 < np.abs(latents[0] - latents[1]).max() < 0.1


def files_of(encode: ShardEncoder) -> dict[str, bytes]:
    return {record.name: encode.writer.storage.read_bytes(record.name) for record in encode.writer.committed()}


@pytest.mark.parametrize("lost", ["stats/000000.json", "index/000000.arrow"])
def test_what_is_missing_beside_a_committed_shard_is_made_from_it(tmp_path: Path, lost: str) -> None:
    encode = encoder(tmp_path)
    work = item(encode.pairs)
    encode(work)
    before = files_of(encode)
    encode.writer.storage.remove(lost)
    encode.writer.storage.remove(f"commits/{lost.replace('/', '__')}.json")
    encode(work)
    assert files_of(encode) == before


def test_a_committed_shard_with_other_bytes_is_not_indexed_as_if_it_were_whole(tmp_path: Path) -> None:
    encode = encoder(tmp_path)
    encode(item(encode.pairs))
    encode.writer.storage.remove("index/000000.arrow")
    encode.writer.storage.remove("commits/index__000000.arrow.json")
    path = Path(encode.writer.storage.path("000000.tar"))
    data = bytearray(path.read_bytes())
    data[data.index(b"\x93NUMPY") + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"000000.tar is committed, but not of the 000000.tar that is there"):
        encode(item(encode.pairs))


def test_what_is_committed_whole_is_not_read_again(tmp_path: Path) -> None:
    encode = encoder(tmp_path)
    first = encode(item(encode.pairs))
    # Of the size that was committed: a look at the bytes would tell.
    size = encode.writer.storage.size("000000.tar")
    encode.writer.storage.write_bytes("000000.tar", bytes(size))
    assert encode(item(encode.pairs)) == first


def test_an_index_of_another_shard_is_never_kept_beside_a_new_one(tmp_path: Path) -> None:
    encode = encoder(tmp_path)
    encode(item(encode.pairs))
    # As somebody does who is told that a committed shard has another size now.
    encode.writer.storage.remove("000000.tar")
    encode.writer.storage.remove("commits/000000.tar.json")
    with torch.no_grad():
        encode.first_stage.quant_conv.bias[0] = 1.0
    with pytest.raises(UserError, match=r"index/000000.arrow is committed, but not of the 000000.tar that is there"):
        encode(item(encode.pairs))


def test_the_index_is_that_of_the_shard_and_has_the_json_of_its_pairs(tmp_path: Path) -> None:
    encode = encoder(tmp_path)
    encode(item(encode.pairs))
    facts = [sample["json"] for sample in read_shard(Path(encode.pairs.storage.path("000000.tar")))]
    with encode.writer.storage.open("000000.tar") as file:
        index = scan_shard(file, checksums=True).with_facts(facts)
    assert index.encode() == encode.writer.storage.read_bytes("index/000000.arrow")


def test_a_shard_of_other_samples_than_its_pairs_is_not_taken_for_it(tmp_path: Path) -> None:
    encode = encoder(tmp_path)
    write_shard(
        encode.writer.storage.path("000000.tar"), [("strange", {"latent.npy": encode_npy(np.ones((2, 4, 4, 4)))})]
    )
    with pytest.raises(UserError, match=r"000000\.tar holds samples that its pairs do not: remove it and run the same"):
        encode(item(encode.pairs))


def test_json_that_no_reader_of_the_index_would_take_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_module, "MOST_INDEX_BYTES", 2000)
    encode = encoder(tmp_path)
    facts = json.dumps({"captions": ["red"], "notes": "long " * 400}).encode()
    white = io.BytesIO()
    Image.new("RGB", (32, 32), (255, 0, 51)).save(white, "PNG")
    with pytest.raises(
        UserError, match=r"facts of the 1 samples of 000000\.tar take .*: set pairs\.rows_per_shard lower"
    ):
        encode(replace_shard(encode.pairs, [("000000000", {"png": white.getvalue(), "json": facts})]))


def test_truncated_shard_is_refused(tmp_path: Path) -> None:
    encode = encoder(tmp_path)
    work = item(encode.pairs)
    shard = Path(encode.pairs.storage.path("000000.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(
        UserError, match=r"000000\.tar has the sha256 .* instead of .*: it was damaged after it was com"
    ):
        encode(work)
    assert not encode.writer.storage.exists("000000.tar")


def test_shard_with_fewer_samples_than_its_manifest_says_is_refused(tmp_path: Path) -> None:
    encode = encoder(tmp_path)
    with pytest.raises(UserError, match="holds 4 samples instead of 5"):
        encode({**item(encode.pairs), "rows": 5})
    assert "000000.tar" not in encode.writer.committed()


def encode_white_to(encode: ShardEncoder, white: float) -> None:
    """Have the first stage encode white pictures, and no others, to a value."""
    first_stage, original = encode.first_stage, encode.first_stage.encode

    def overflow(images: torch.Tensor) -> DiagonalGaussian:
        posterior = original(images)
        is_white = (images.amin(dim=(1, 2, 3)) == 1)[:, None, None, None]
        return DiagonalGaussian(torch.where(is_white, white, posterior.mean), posterior.logvar)

    first_stage.encode = overflow


def with_white(encode: ShardEncoder) -> dict[str, object]:
    """Make the third of the shard's samples white; return the item."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (255, 255, 255)).save(buffer, "PNG")
    samples = []
    for sample in read_shard(Path(encode.pairs.storage.path("000000.tar"))):
        samples.append((sample.pop("__key__"), sample))
    samples[2][1]["png"] = buffer.getvalue()
    return replace_shard(encode.pairs, samples)


@pytest.mark.parametrize("value", [70_000.0, float("nan"), -float("inf")])
def test_a_picture_whose_latent_is_not_finite_is_left_out_with_a_status(tmp_path: Path, value: float) -> None:
    encode = encoder(tmp_path, rows=(5,))
    work = with_white(encode)
    encode_white_to(encode, value)
    result = encode(work)
    assert (result["rows"], result["unencodable"]) == (5, ["000000002"])
    storage = encode.writer.storage
    assert encode.writer.committed()["000000.tar"].rows == 4
    stored = list(read_shard(Path(storage.path("000000.tar"))))
    assert [sample["__key__"] for sample in stored] == ["000000000", "000000001", "000000003", "000000004"]
    statistics = storage.read_json("stats/000000.json")
    assert statistics["unencodable"] == {"000000002": 2}
    assert statistics["channels"]["count"] == 4 * 4 * 4
    # Whoever finds the shard in place, and not what was known when it was written, comes to the same.
    before = files_of(encode)
    for name in ("000000.tar", "index/000000.arrow", "stats/000000.json"):
        storage.remove(f"commits/{name.replace('/', '__')}.json")
    storage.remove("stats")
    assert encode(work)["unencodable"] == ["000000002"]
    assert files_of(encode) == before


def test_a_shard_without_any_latent_is_empty(tmp_path: Path) -> None:
    encode = encoder(tmp_path)
    with torch.no_grad():
        encode.first_stage.quant_conv.bias[0] = 70_000.0
    assert len(encode(item(encode.pairs))["unencodable"]) == 4
    assert encode.writer.committed()["000000.tar"].rows == 0
    assert encode.writer.storage.read_json("stats/000000.json")["shape"] is None


def test_pictures_of_several_sizes_are_refused(tmp_path: Path) -> None:
    encode = encoder(tmp_path)
    random = np.random.default_rng(0)
    work = replace_shard(encode.pairs, [pair_sample(random, "000000000", 32), pair_sample(random, "000000001", 64)])
    with pytest.raises(UserError, match=r"pictures must have one size.*set pairs\.resize=center_crop"):
        encode(work)


def test_pictures_that_do_not_fit_the_first_stage_are_refused(tmp_path: Path) -> None:
    encode = encoder(tmp_path)
    work = replace_shard(encode.pairs, [pair_sample(np.random.default_rng(0), "000000000", 20)])
    with pytest.raises(UserError, match="000000000 does not fit the first stage: images must be"):
        encode(work)


def test_pictures_are_read_as_rgb_in_minus_one_to_one(tmp_path: Path) -> None:
    encode = encoder(tmp_path)
    seen = []
    encode.first_stage.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (255, 0, 51)).save(buffer, "PNG")
    encode(replace_shard(encode.pairs, [("000000000", {"png": buffer.getvalue(), "json": b'{"captions": ["red"]}'})]))
    np.testing.assert_allclose(seen[0][0, :, 0, 0], [1.0, -1.0, -0.6], atol=1e-6)


def test_pairs_with_a_flipped_bit_are_refused_though_they_can_be_read(tmp_path: Path) -> None:
    encode = encoder(tmp_path)
    work = item(encode.pairs)
    shard = Path(encode.pairs.storage.path("000000.tar"))
    damaged = bytearray(shard.read_bytes())
    damaged[-2000] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(UserError, match=r"000000\.tar has the sha256 .*run `ldm run RECIPE --force pairs`"):
        encode(work)
    assert encode.writer.storage.names("*.tar") == []


def test_of_two_actors_at_one_shard_the_first_ones_bytes_stand(tmp_path: Path) -> None:
    encode = encoder(tmp_path)
    # The other one, on other hardware, is done just before this one: its latents differ.
    other = encoder(tmp_path / "other")
    with torch.no_grad():
        other.first_stage.quant_conv.bias[0] = 1.0
    other(item(other.pairs))
    theirs, original = files_of(other), encode.write._write

    def write(shard: EncodedShard, path: Path) -> Written:
        encode.writer.storage.write_bytes("000000.tar", theirs["000000.tar"])
        return original(shard, path)

    encode.write._write = write  # type: ignore[method-assign]
    encode(item(encode.pairs))
    # Index and statistics too are those of the file that stands.
    assert files_of(encode) == theirs
    record = encode.writer.committed()["000000.tar"]
    assert record.sha256 == hashlib.sha256(theirs["000000.tar"]).hexdigest()
