"""Contact sheets: random samples, always the same, whatever the tar and wherever it is."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import UserError
from pipelines.inspection.inspect import inspect_path, write_contact_sheet
from pipelines.shards import tar_windows
from pipelines.shards.format import write_shard
from pipelines.shards.tar_windows import Tar, random_samples
from pipelines.stages.pairs.summary import contact_sheet
from pipelines.stages.pairs.summary.contact_sheet import CELL_PIXELS, tars_of
from pipelines.store.storage import Storage
from tests.pipelines.store.s3 import BUCKET, S3
from tests.tiny_artifacts import first_stage_artifact, pairs_artifact

GAP = 4
# What is beside a picture of another shape, and what stands for a picture that cannot be decoded.
GREY, RED = (238, 238, 238), (200, 120, 120)


def noise_tar(storage: Storage, name: str, samples: int, size: int) -> Tar:
    """Write a tar of samples of random bytes, each of the given size."""
    draw = random.Random(name)
    with storage.writer(name) as path:
        write_shard(
            path,
            [(f"{name[1:6]}{i:04d}", {"jpg": draw.randbytes(size), "txt": f"{i}".encode()}) for i in range(samples)],
        )
    return Tar(storage, name, storage.size(name))


def encoded(size: tuple[int, int], colour: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def plain_tar(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def cells_of_sheet(tar: Path) -> list[NDArray[np.int64]]:
    """Return the pictures of a tar's contact sheet of one line, each (CELL_PIXELS, CELL_PIXELS, 3)."""
    target = tar.with_suffix(".sheet.png")
    write_contact_sheet(str(tar), target)
    sheet = np.asarray(Image.open(target)).astype(int)
    starts = range(GAP, sheet.shape[1] - GAP, CELL_PIXELS + GAP)
    assert sheet.shape[1] == len(starts) * (CELL_PIXELS + GAP) + GAP
    return [sheet[GAP : GAP + CELL_PIXELS, start : start + CELL_PIXELS] for start in starts]


def test_samples_are_whole_spread_and_always_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    tars = [noise_tar(storage, f"{shard:06d}.tar", 300, 5_000) for shard in range(4)]
    read: list[int] = []
    original = tar_windows._read

    def counted(tar: Tar, start: int, size: int) -> bytes:
        read.append(size)
        return original(tar, start, size)

    monkeypatch.setattr(tar_windows, "_read", counted)
    samples = dict(random_samples(tars, 24))
    assert len(samples) == 24
    assert dict(random_samples(tars[::-1], 24)) == samples
    for key, sample in samples.items():
        assert (sample.keys(), len(sample["jpg"])) == ({"jpg", "txt"}, 5_000)
        assert int(sample["txt"]) == int(key[-4:])
    for shard in range(4):
        rows = [int(key[-4:]) for key in samples if key.startswith(f"{shard:05d}")]
        assert len(rows) == 6
        assert max(rows) - min(rows) > 100
    assert sum(read) <= 2 * 24 * tar_windows.WINDOW_BYTES[0]


@pytest.mark.parametrize("count", [5, 100])
def test_small_and_empty_tars_give_all_they_have(tmp_path: Path, count: int) -> None:
    storage = Storage(str(tmp_path))
    tars = [noise_tar(storage, f"{shard:06d}.tar", samples, 100) for shard, samples in enumerate((3, 0, 4))]
    assert len(random_samples(tars, count)) == min(count, 7)
    assert random_samples([Tar(storage, "gone.tar", 50_000)], 5) == []


def test_samples_larger_than_a_window_are_found_too(tmp_path: Path) -> None:
    tar = noise_tar(Storage(str(tmp_path)), "000000.tar", 5, 3 * tar_windows.WINDOW_BYTES[0])
    samples = dict(random_samples([tar], 3))
    assert {len(sample["jpg"]) for sample in samples.values()} == {3 * tar_windows.WINDOW_BYTES[0]}


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_other_people_are_drawn(tmp_path: Path, format: int) -> None:
    long_name = "folder/" + "n" * 80 + "/deep/picture"
    path = plain_tar(
        tmp_path / "plain.tar",
        {
            "a/wide.JPG": encoded((400, 100), "red", "JPEG"),
            "a/wide.txt": b"wide",
            "b/broken.png": encoded((8, 8), "blue")[:40],
            f"{long_name}.tall.webp": encoded((10, 40), "lime", "WEBP"),
            f"{long_name}.json": json.dumps({"captions": [3, "tall \x1b[2J"]}).encode(),
            "c/text.txt": b"no picture",
        },
        format,
    )
    wide, broken, tall = cells_of_sheet(path)
    middle = CELL_PIXELS // 2
    assert np.abs(wide[middle, [2, -3]] - (254, 0, 0)).max() < 6
    assert (wide[2, middle] == GREY).all()
    assert (broken == RED).all()
    assert np.abs(tall[[2, -3], middle] - (0, 255, 0)).max() < 12
    assert (tall[middle, 2] == GREY).all()


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = {"a.png": encoded((9, 11), "blue"), "b.png": encoded((10, 10), "blue")}
    path = plain_tar(tmp_path / "large.tar", pictures)
    monkeypatch.setattr(contact_sheet, "MOST_PIXELS", 99)
    largest, too_large = cells_of_sheet(path)
    assert (largest[CELL_PIXELS // 2, CELL_PIXELS // 2] == (0, 0, 255)).all()
    assert (too_large == RED).all()


def test_a_contact_sheet_needs_pictures(tmp_path: Path) -> None:
    target = tmp_path / "sheet.png"
    for url in (first_stage_artifact(tmp_path).storage.url, pairs_artifact(tmp_path, rows=(0,)).storage.url):
        with pytest.raises(UserError, match="has no samples with pictures: give an artifact of pairs, a finished one"):
            write_contact_sheet(url, target)
    with pytest.raises(UserError, match=r"no\.tar is missing"):
        write_contact_sheet(str(tmp_path / "no.tar"), target)
    artifact = pairs_artifact(tmp_path, name="more")
    with pytest.raises(UserError, match=r"cannot write .*: say another place"):
        write_contact_sheet(artifact.storage.url, tmp_path / "nowhere" / "sheet.png")


def test_an_artifact_in_a_bucket_looks_as_it_does_on_disk(tmp_path: Path, s3: S3) -> None:
    local = pairs_artifact(tmp_path).storage
    remote = Storage(f"s3://{BUCKET}/look/pairs/pairs")
    for name in local.names("*.*"):
        remote.write_bytes(name, local.read_bytes(name))
    assert [tar.bytes for tar in tars_of(remote)] == [tar.bytes for tar in tars_of(local)]
    for storage, name in ((local, "local.png"), (remote, "remote.png")):
        write_contact_sheet(storage.url, tmp_path / name)
    assert (tmp_path / "local.png").read_bytes() == (tmp_path / "remote.png").read_bytes()
    assert inspect_path(remote.url) == inspect_path(local.url) | {"url": remote.url}
    remote.remove("manifest.json")
    remote.write_json("commits/000000.tar.json", {})
    assert inspect_path(remote.url)["kind"] == "unfinished"
    write_contact_sheet(remote.url, tmp_path / "unfinished.png")
    assert (tmp_path / "unfinished.png").read_bytes() == (tmp_path / "local.png").read_bytes()
