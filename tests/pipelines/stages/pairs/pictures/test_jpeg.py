"""JPEGs: damage is an error, oddities are not, and bombs cost nothing."""

import io
from typing import Literal

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines.stages.pairs.pictures.color import needs_conversion
from pipelines.stages.pairs.pictures.jpeg import MAX_SCANS, read_jpeg
from tests.pipelines.stages.pairs.picture_files import encoded, made, make, psnr, scene, status_of

PHOTO = encoded(scene(0), "JPEG", quality=90)
PROGRESSIVE = encoded(scene(0), "JPEG", quality=90, progressive=True)


@pytest.mark.parametrize("data", [PHOTO, PROGRESSIVE], ids=["baseline", "progressive"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_picture_cut_anywhere_is_an_error(data: bytes, kept: float) -> None:
    assert status_of(data) == "ok"
    assert status_of(data[: int(len(data) * kept)]) == "decode_error"


def test_an_end_mark_in_the_middle_is_an_error() -> None:
    half = len(PHOTO) // 2
    assert status_of(PHOTO[:half] + b"\xff\xd9" + PHOTO[half + 2 :]) == "decode_error"


def test_whatever_follows_the_end_is_ignored_and_not_stored() -> None:
    polyglot = PHOTO + b"PK\x03\x04" + bytes(500)
    assert made(polyglot).data == made(PHOTO).data
    stored = made(polyglot, resize="none", encode="jpg").data
    assert b"PK\x03\x04" not in stored
    assert made(PHOTO, resize="none", encode="jpg").data == PHOTO


def test_stray_bytes_between_segments_do_no_harm() -> None:
    table = PHOTO.index(b"\xff\xdb")
    assert (make(PHOTO[:table] + b"junk" + PHOTO[table:]) == make(PHOTO)).mean() > 0.95


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours_are_close_to_pillows(mode: str) -> None:
    data = encoded(scene(0).convert(mode), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert psnr(make(data, resize="none"), expected) > 45


def profile_of(space: Literal["sRGB", "LAB"]) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()


def wide_gamut_profile() -> bytes:
    """Return sRGB's profile with red and blue exchanged: its pictures cannot be mistaken for any others."""
    data = bytearray(profile_of("sRGB"))
    red, blue = (data.index(name, 128) for name in (b"rXYZ", b"bXYZ"))
    data[red : red + 4], data[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(data).replace("sRGB".encode("utf-16-be"), "odd!".encode("utf-16-be")).replace(b"sRGB", b"odd!")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_colours_are_converted_from_the_profile(kind: str) -> None:
    red = Image.new("RGB", (40, 40), (255, 0, 0))
    assert make(encoded(red, kind, icc_profile=wide_gamut_profile()))[5, 5].argmax() == 2
    assert make(encoded(red, kind, icc_profile=profile_of("sRGB")))[5, 5].argmax() == 0


def test_profiles_that_are_broken_or_of_another_space_are_ignored() -> None:
    for profile in (b"broken", profile_of("sRGB")[:200], profile_of("LAB"), bytes(5 << 20)):
        assert not needs_conversion(profile)
        small = profile[:60_000]
        assert (make(encoded(scene(0), "JPEG", icc_profile=small)) == make(encoded(scene(0), "JPEG"))).all()


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_scan_bomb_is_refused_before_it_is_decoded(mode: str, decoders_called: list[str]) -> None:
    data = encoded(Image.new(mode, (4000, 4000)), "JPEG", progressive=True)
    first = data.index(b"\xff\xda")
    second = data.index(b"\xff\xda", first + 2)
    bomb = data[:first] + data[first:second] * 3000 + data[second:]
    assert status_of(bomb) == "too_large"
    assert not decoders_called
    assert data.count(b"\xff\xda") < MAX_SCANS
    assert status_of(data) == "ok"
    assert decoders_called


def test_frames_that_only_claim_a_size_are_refused_before_memory_is_taken() -> None:
    frame = PHOTO.index(b"\xff\xc0") + 5
    claims = PHOTO[:frame] + (65_500).to_bytes(2) * 2 + PHOTO[frame + 4 :]
    assert status_of(claims) == "too_large"
    long = PHOTO[:frame] + (1500).to_bytes(2) + (65_500).to_bytes(2) + PHOTO[frame + 4 :]
    assert status_of(long) == "decode_error"


@pytest.mark.parametrize("marker", [0xC3, 0xC5, 0xC9, 0xCA, 0xCB])
def test_other_processes_are_left_to_pillow(marker: int) -> None:
    frame = PHOTO.index(b"\xff\xc0")
    odd = PHOTO[: frame + 1] + bytes([marker]) + PHOTO[frame + 2 :]
    assert read_jpeg(odd) is None
    assert status_of(odd) in {"ok", "decode_error"}


def test_twelve_bits_have_a_status() -> None:
    frame = PHOTO.index(b"\xff\xc0")
    assert status_of(PHOTO[: frame + 4] + b"\x0c" + PHOTO[frame + 5 :]) == "decode_error"


def test_every_single_damaged_byte_of_the_header_has_a_status() -> None:
    small = encoded(scene(0, (64, 48)), "JPEG", icc_profile=profile_of("sRGB"))
    for position in range(2, small.index(b"\xff\xda") + 12):
        damaged = small[:position] + bytes([small[position] ^ 0xA5]) + small[position + 1 :]
        assert status_of(damaged, upscale=True) in {"ok", "decode_error", "too_large", "too_small", "not_an_image"}


def test_damaged_picture_data_is_an_error_and_a_stray_byte_at_the_end_is_not() -> None:
    random = np.random.default_rng(0)
    buffer = io.BytesIO()
    noise = Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).resize((400, 300), Image.Resampling.BICUBIC)
    noise.save(buffer, "JPEG", quality=85)
    good = buffer.getvalue()
    assert status_of(good[:-2] + b"\0" + good[-2:]) == "ok"
    statuses = []
    for _ in range(40):
        damaged = bytearray(good)
        place = int(random.integers(len(good) // 3, len(good) // 2))
        damaged[place : place + 20] = random.integers(1, 255, 20, np.uint8).tobytes()
        statuses.append(status_of(bytes(damaged)))
    # Some damage leaves a stream that is a valid picture, only another one: nothing can tell.
    assert statuses.count("decode_error") > 20
