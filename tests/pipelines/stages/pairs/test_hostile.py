"""Hostile files of formats other than JPEG: a status each, little memory, nothing decoded that is not needed."""

import io
import json
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.stages.pairs.pictures import raster
from tests.pipelines.stages.pairs.picture_files import encoded, made, make, scene, status_of

SMALL = scene(0, (96, 64))
FORMATS: dict[str, dict[str, object]] = {
    "PNG": {},
    "WEBP": {"quality": 80},
    "GIF": {},
    "AVIF": {},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "JPEG2000": {},
}


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *extra: bytes, rows: int = 0, depth: int = 8, color: int = 2) -> bytes:
    """Return a PNG that claims a size and holds some black rows."""
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[color]
    packer = zlib.compressobj(1)
    row = bytes(1 + -(-width * channels * depth // 8))
    body = b"".join([*(packer.compress(row) for _ in range(rows)), packer.flush()])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiled_tiff(tile: int) -> bytes:
    """Return a TIFF of 64x64 pixels whose one tile claims to be `tile` pixels wide and high."""
    tags = {256: 64, 257: 64, 258: 8, 259: 5, 262: 1, 277: 1, 322: tile, 323: tile, 324: 200, 325: 50}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)).ljust(260, b"\0")


def webp_canvas(side: int) -> bytes:
    data = bytearray(encoded(SMALL, "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"))
    assert data[12:16] == b"VP8X"
    data[24:30] = (side - 1).to_bytes(3, "little") * 2
    return bytes(data)


ZEROS = zlib.compress(bytes(64 << 20), 9)
BOMBS = {
    "png 50k": (png(50_000, 50_000), {"too_large"}),
    "gif screen": (b"GIF89a" + b"\xff\xff" * 2 + encoded(SMALL, "GIF")[10:], {"too_large"}),
    "webp canvas": (webp_canvas(16_384), {"too_large", "decode_error"}),
    "tiff tile": (tiled_tiff(65_520), {"too_large"}),
    "tiff larger tile": (tiled_tiff(1 << 30), {"too_large"}),
}
# What must be opened to be judged, and the most MiB that this may take.
OPENED_BOMBS = {
    "png of few rows": (png(9_000, 9_000, rows=40), 128),
    "png text": (png(40, 40, chunk(b"zTXt", b"a\0\0" + ZEROS), rows=40), 32),
    "png profile": (png(40, 40, chunk(b"iCCP", b"a\0\0" + ZEROS), rows=40), 32),
}
IN_A_FRESH_PROCESS = """
import json, resource, sys
from tests.pipelines.stages.pairs.picture_files import status_of
data, options = sys.stdin.buffer.read(), json.loads(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = status_of(data, **options)
print(status, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def status_and_memory(data: bytes, **options: Any) -> tuple[str, int]:
    """Return the status of a picture, and the MiB that it took at its worst."""
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, json.dumps(options)]
    status, mebibytes = subprocess.run(command, input=data, capture_output=True, check=True).stdout.split()
    return status.decode(), int(mebibytes)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_are_decoded(name: str, decoders_called: list[str]) -> None:
    data, statuses = BOMBS[name]
    assert status_of(data) in statuses
    assert not decoders_called
    assert status_of(encoded(SMALL)) == "ok"
    assert decoders_called


@pytest.mark.parametrize("name", OPENED_BOMBS)
def test_bombs_that_are_opened_take_little_memory(name: str) -> None:
    data, most_mebibytes = OPENED_BOMBS[name]
    status, mebibytes = status_and_memory(data)
    assert status in {"ok", "decode_error"}
    assert mebibytes < most_mebibytes


def test_the_largest_pictures_that_are_taken_stay_within_the_memory() -> None:
    data = png(7000, 6000, rows=6000, color=6)
    status, mebibytes = status_and_memory(data, image_size=256, resize="keep_ratio")
    assert status == "ok"
    assert mebibytes < 300


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_have_a_status(kind: str) -> None:
    data = encoded(SMALL, kind, **FORMATS[kind])
    assert status_of(data) == "ok"
    random = np.random.default_rng(0)
    known = {"ok", "decode_error", "too_large", "too_small", "not_an_image"}
    for _ in range(60):
        damaged = bytearray(data)
        for position in random.integers(0, min(len(data), 400), 3):
            damaged[position] ^= int(random.integers(1, 256))
        assert status_of(bytes(damaged)) in known
    for kept in (0.2, 0.5, 0.8):
        assert status_of(data[: int(len(data) * kept)]) in {"decode_error", "not_an_image"}


def test_a_png_that_breaks_off_within_its_pixels_is_an_error() -> None:
    data = encoded(SMALL)
    exif = chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0")
    for whole in (data, data[:33] + exif + data[33:]):
        assert status_of(whole[: whole.index(b"IEND") - 30]) == "decode_error"


def test_a_picture_that_is_also_a_page_is_stored_without_the_page() -> None:
    page = b"<script>alert(1)</script>"
    assert page not in made(encoded(SMALL) + page, resize="none").data


@pytest.mark.parametrize(("kind", "encode"), [("PNG", "png"), ("WEBP", "webp")])
def test_what_would_not_change_is_stored_as_it_is(kind: str, encode: str) -> None:
    options = {"resize": "keep_ratio", "image_size": 64, "encode": encode}
    data = encoded(SMALL, kind)
    assert made(data, **options).data == data
    assert made(data, pass_through=False, **options).data != data
    turned = Image.Exif()
    turned[0x0112] = 3
    translucent = SMALL.convert("RGBA")
    translucent.putalpha(128)
    changed = [
        data + b"more",
        encoded(SMALL, kind, exif=turned),
        encoded(translucent, kind),
        encoded(SMALL, kind, save_all=True, append_images=[scene(1, SMALL.size)]),
        encoded(scene(0, (97, 65)), kind),
    ]
    for other in changed:
        assert made(other, **options).data != other


def test_of_a_very_long_animation_only_the_first_frame_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    frames = [Image.fromarray(random.integers(0, 256, (64, 64), np.uint8)) for _ in range(600)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    reads: list[int] = []

    class File(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            piece = super().read(size)
            reads.append(len(piece))
            return piece

    monkeypatch.setattr(raster, "io", SimpleNamespace(BytesIO=File))
    assert status_of(data) == "ok"
    assert 0 < sum(reads) < len(data) / 10


def test_deep_colours_become_eight_bits() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0))
    row = b"\0" + struct.pack(">HHH", 0x1234, 0x8000, 0xFFFF) * 40
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(row * 40)) + chunk(b"IEND", b"")
    assert np.abs(make(data).astype(int) - (0x12, 0x80, 0xFF)).max() <= 1
    assert made(data, resize="none").data != data


def test_format_is_told_by_content() -> None:
    for kind, options in FORMATS.items():
        assert made(encoded(SMALL, kind, **options)).format == kind
    assert Image.open(io.BytesIO(made(encoded(SMALL, "GIF")).data)).format == "PNG"
