"""Decoding: by content, upright, RGB, one size, bounded; what cannot be decoded says why."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.stages.pairs.artifact import decode_image
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.pictures.transcode import make_picture
from tests.pipelines.stages.pairs.picture_files import encoded, make, status_of
from tests.pipelines.stages.pairs.web_server import picture


def test_center_crop_gives_a_square_of_exactly_the_size_asked_for() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    assert np.abs(make(encoded(wide))[:, 2:-2].astype(int) - (0, 0, 255)).max() <= 2
    assert status_of(encoded(Image.new("RGB", (7, 5)))) == "too_small"
    assert make(encoded(Image.new("RGB", (7, 5))), upscale=True).shape == (32, 32, 3)


def test_keep_ratio_shrinks_the_shorter_side_and_never_enlarges() -> None:
    assert make(encoded(Image.new("RGB", (300, 100))), resize="keep_ratio").shape == (32, 96, 3)
    assert make(encoded(Image.new("RGB", (20, 10))), resize="keep_ratio").shape == (10, 20, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_photographs_come_out_upright(orientation: int) -> None:
    upright = Image.new("RGB", (96, 64), "white")
    upright.paste("red", (0, 0, 48, 32))
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        made = make_picture(
            encoded(stored, kind, exif=exif),
            PairsConfig.model_validate({"source": "x", "image_size": 32, "resize": "keep_ratio"}),
        )
        assert (made.original_width, made.original_height, made.width, made.height) == (96, 64, 48, 32), kind
        pixels = decode_image(made.data).astype(int)
        red = (pixels[..., 0] > 180) & (pixels[..., 1] < 80)
        assert red[2:14, 2:22].all(), kind
        assert not red[18:].any(), kind
        assert not red[:, 26:].any(), kind
        assert not Image.open(io.BytesIO(made.data)).getexif()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (40, 40), 100), (100, 100, 100)),
        (Image.new("1", (40, 40), 1), (255, 255, 255)),
        (Image.new("RGBA", (40, 40), (200, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (40, 40), (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("LA", (40, 40), (0, 0)), (255, 255, 255)),
        (Image.fromarray(np.full((40, 40), 40_000, np.uint16)), (156, 156, 156)),
        (Image.new("RGB", (40, 40), (9, 99, 199)).quantize(4), (9, 99, 199)),
    ],
    ids=["grey", "bitmap", "transparent", "half transparent", "grey with alpha", "16 bits", "palette"],
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert np.abs(make(encoded(image)).astype(int) - expected).max() <= 1


def test_cmyk_jpegs_become_rgb() -> None:
    pixels = make(encoded(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 12


def test_a_transparent_palette_entry_becomes_white() -> None:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert (make(encoded(image, "GIF", transparency=0)) == 255).all()


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert (make(data) == (255, 0, 0)).all(), kind


def test_a_large_jpeg_gives_what_its_full_decoding_gives() -> None:
    data = picture(0, (1600, 1200))
    expected = (
        Image.open(io.BytesIO(data)).convert("RGB").resize((32, 32), Image.Resampling.LANCZOS, (200, 0, 1400, 1200))
    )
    assert np.abs(make(data).astype(int) - np.asarray(expected).astype(int)).mean() < 2


def test_the_same_bytes_come_out_each_time() -> None:
    for encode in ("jpg", "webp", "png"):
        config = PairsConfig.model_validate({"source": "x", "image_size": 32, "encode": encode})
        first, second = (make_picture(picture(5, (99, 80)), config) for _ in range(2))
        assert first == second
        assert (first.original_width, first.original_height) == (99, 80)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes that claims a size."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = b"IDAT" + zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


@pytest.mark.parametrize(
    ("data", "options", "status"),
    [
        (b"", {}, "not_an_image"),
        (b"<html>404</html>", {}, "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {}, "not_an_image"),
        (picture()[:-200], {}, "decode_error"),
        (picture()[:300], {}, "decode_error"),
        (png_header(100_000, 100_000), {}, "too_large"),
        (png_header(100, 100), {}, "decode_error"),
        (picture(), {"max_image_bytes": 100}, "too_large"),
        (picture(size=(48, 40)), {"max_image_pixels": 1000}, "too_large"),
        (picture(size=(48, 40)), {"min_size": 41}, "too_small"),
        (picture(size=(48, 40)), {"min_size": 40}, "ok"),
        (picture(size=(20_000, 2)), {"resize": "keep_ratio", "encode": "webp"}, "encode_error"),
    ],
)
def test_what_is_not_kept_says_why(data: bytes, options: dict[str, Any], status: str) -> None:
    assert status_of(data, **options) == status


@pytest.mark.shared
@pytest.mark.filterwarnings("ignore")
def test_hostile_files_each_get_a_status(shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "hostile" / "manifest.jsonl").read_text().splitlines()]
    found = {row["file"]: status_of((shared_data / "hostile" / row["file"]).read_bytes(), upscale=True) for row in rows}
    assert set(found.values()) <= {"ok", "not_an_image", "decode_error", "too_large", "too_small"}
    assert {found[row["file"]] for row in rows if row["category"] == "bomb_or_dos"} <= {"too_large", "decode_error"}
    # What Pillow decodes whole and we take for a picture must come through, whatever its name says.
    readable = {row["file"] for row in rows if row["pillow_13_0_0"]["outcome"] == "ok"}
    named = {row["file"] for row in rows if row["category"] in ("wrong_extension", "orientation", "bit_depth", "alpha")}
    assert {name for name in readable & named if found[name] != "ok"} == set()
    assert sum(status == "ok" for status in found.values()) >= 100
