"""Shards: deterministic, plain WebDataset, and never half-read in silence."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipelines.errors import UserError
from pipelines.shards.format import ShardWriter, decode_npy, encode_npy, read_shard, write_shard
from pipelines.stages.pairs.artifact import decode_image, image_of

SAMPLES = [
    ("000000000", {"txt": "naïve café 猫".encode(), "jpg": b"\x00\x01" * 700, "json": b"{}"}),
    ("000000002", {"txt": b"", "jpg": b"", "json": json.dumps({"a": 1}).encode()}),
]


def test_what_is_written_is_read_back_in_order(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "a.tar", SAMPLES) == 2
    read = list(read_shard(tmp_path / "a.tar"))
    assert [(sample.pop("__key__"), sample) for sample in read] == SAMPLES


def test_bytes_depend_on_nothing_but_the_samples(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", SAMPLES)
    reordered = [(key, dict(reversed(files.items()))) for key, files in SAMPLES]
    write_shard(tmp_path / "other name.tar", iter(reordered))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "other name.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def content(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> str:
    with ShardWriter(path) as shard:
        for key, files in samples:
            shard.add(key, files)
    return shard.content


def test_shards_of_the_same_samples_have_the_same_content_whatever_their_keys(tmp_path: Path) -> None:
    known = content(tmp_path / "a.tar", SAMPLES)
    assert content(tmp_path / "b.tar", [(f"9{key}", files) for key, files in SAMPLES]) == known
    assert (tmp_path / "a.tar").read_bytes() != (tmp_path / "b.tar").read_bytes()
    (first, files), second = SAMPLES
    others = [
        [second, SAMPLES[0]],
        [SAMPLES[0]],
        [(first, {**files, "txt": b"other"}), second],
        [(first, {name.replace("jpg", "png"): data for name, data in files.items()}), second],
        # One sample with the files of two, and bytes that move from one file to the next.
        [("1", {"a": b"x", "b": b"y"})],
        [("1", {"a": b"x"}), ("2", {"b": b"y"})],
        [("1", {"a": b"xb 1\ny", "b": b""})],
    ]
    assert len({known, *(content(tmp_path / "c.tar", samples) for samples in others)}) == 1 + len(others)


def test_plain_webdataset_reads_the_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", SAMPLES)
    found = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in found] == ["000000000", "000000002"]
    assert found[0]["txt"].decode() == "naïve café 猫"


def test_a_shard_without_samples_is_a_valid_tar(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "empty.tar", []) == 0
    assert list(read_shard(tmp_path / "empty.tar")) == []


# In the header, at the boundary between two members, inside the data, and before the end mark.
@pytest.mark.parametrize("length", [0, 100, 512, 1024, 1500, 3000, 4096])
def test_a_truncated_shard_is_named_in_a_user_error(tmp_path: Path, length: int) -> None:
    path = tmp_path / "000007.tar"
    write_shard(path, SAMPLES)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"000007\.tar is truncated or damaged"):
        list(read_shard(path))


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, SAMPLES)
    data = bytearray(path.read_bytes())
    position = data.index(b"000000002.jpg")
    data[position] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match="truncated or damaged"):
        list(read_shard(path))


def test_a_missing_shard_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        list(read_shard(tmp_path / "none.tar"))


@pytest.mark.parametrize("dtype", [np.float16, np.uint16, np.float64])
def test_arrays_survive_the_round_trip(dtype: type) -> None:
    array: np.ndarray = np.arange(24).reshape(2, 3, 4).astype(dtype)
    again = decode_npy(encode_npy(array))
    assert again.dtype == dtype
    assert np.array_equal(again, array)


def test_pickled_and_truncated_arrays_are_refused() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        decode_npy(buffer.getvalue())
    with pytest.raises(ValueError):
        decode_npy(encode_npy(np.zeros(100))[:-5])
    with pytest.raises(ValueError):
        decode_npy(b"")


def test_stored_pictures_decode_to_rgb_arrays() -> None:
    buffer = io.BytesIO()
    Image.new("L", (5, 3), 200).save(buffer, "PNG")
    array = decode_image(image_of({"__key__": "0", "png": buffer.getvalue()}))
    assert array.shape == (3, 5, 3)
    assert array.dtype == np.uint8
    assert (array == 200).all()
    with pytest.raises(UserError, match="sample 7 has no picture"):
        image_of({"__key__": "7", "txt": b""})


def test_our_headers_are_those_of_tarfile(tmp_path: Path) -> None:
    samples = [
        ("a" * 60, {"jpg": bytes(1000)}),
        ("ключ", {"txt": b""}),
        ("b" * 120, {"json": b"{}", "txt": bytes(512)}),
    ]
    with ShardWriter(tmp_path / "ours.tar") as shard:
        for key, files in samples:
            shard.add(key, files)
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for key, files in samples:
            for extension, data in sorted(files.items()):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))
    ours = (tmp_path / "ours.tar").read_bytes()
    assert ours == (tmp_path / "theirs.tar").read_bytes()
    assert (shard.rows, shard.bytes, shard.sha256) == (3, len(ours), hashlib.sha256(ours).hexdigest())
