"""Plain JPEGs: read by their markers, decoded at the smallest sufficient scale.

Plain means 8-bit Huffman-coded grey or colour. All other JPEGs, and whatever looks odd, are left to `raster`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.pictures.resize import Size
from pipelines.stages.pairs.rows import RejectedError

# The scales of decoding, in eighths. libjpeg-turbo has vector code for these only: 3/8 takes longer than 4/8, 5/8 to
# 7/8 longer than 8/8, and their pictures are worse.
EIGHTHS = (1, 2, 4, 8)
# A picture is decoded at least this many times as large as it is stored. Closer to the stored size the block-wise
# reduction shows: at exactly half size sharp photographs reach 38 dB.
MARGIN = 1.5
# A progressive file's coefficients stay in memory until its end, and its scans can be repeated without end.
MAX_COEFFICIENT_BYTES = 400 << 20
MAX_SCANS = 64

_START = b"\xff\xd8\xff"
_END_OF_IMAGE, _START_OF_SCAN, _APP1, _APP2 = 0xD9, 0xDA, 0xE1, 0xE2
_WITHOUT_LENGTH = range(0xD0, 0xDA)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)
_EXIF, _ICC = b"Exif\0\0", b"ICC_PROFILE\0"
ORIENTATION_TAG = 0x0112
# In entropy-coded data 0xff is followed by 0 (a literal), another 0xff (fill) or a restart marker.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
# A few stray bytes before the end are common and harmless; more of them mean that what is before them is damaged.
_STRAY = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_MOST_STRAY_BYTES = 4
_UNKNOWN_SAMPLING = "Could not determine subsampling"


class UnusualError(Exception):
    """A file that may be sound, but not for this decoder."""


@dataclass(frozen=True)
class Jpeg:
    """A plain JPEG whose header was read.

    Attributes:
        data: the file.
        width, height: pixels as stored, before turning.
        turn: EXIF orientation, 1 to 8.
        profile: its ICC profile, if any.
        is_color: whether it has three components; otherwise it is grey.
        first_scan: the position of the first scan's marker.
        format: as Pillow names it.
    """

    data: bytes
    width: int
    height: int
    turn: int
    profile: bytes | None
    is_color: bool
    first_scan: int
    format: str = "JPEG"

    def load(self, least: Size, config: PairsConfig) -> np.ndarray:
        """Decode to uint8 (H, W, 3) RGB, at least MARGIN times as large as `least` if the file is.

        Raises:
            RejectedError: `decode_error`, even if only the end is missing.
            UnusualError: the file may be sound, but this decoder cannot tell.
        """
        eighths = _eighths((self.width, self.height), least, config.jpeg_scale)
        size = (0, 0) if eighths == 8 else (-(-self.width * eighths // 8), -(-self.height * eighths // 8))
        try:
            return simplejpeg.decode_jpeg(self.data, "RGB", min_width=size[0], min_height=size[1])
        except ValueError as error:
            stray = _STRAY.search(str(error))
            if (stray and int(stray[1]) <= _MOST_STRAY_BYTES) or _UNKNOWN_SAMPLING in str(error):
                raise UnusualError from None
            raise RejectedError("decode_error") from None

    def is_exactly(self, encode: str) -> bool:
        """Tell whether the file is an RGB picture of the format `encode` and nothing more."""
        # Bytes after the end could be anything: a zip archive, a page with scripts.
        return encode == "jpg" and self.is_color and _end_of_image(self.data, self.first_scan) == len(self.data)


def _eighths(size: Size, least: Size, jpeg_scale: str) -> int:
    if jpeg_scale == "full" or size == least:
        return 8
    enough = [n for n in EIGHTHS if size[0] * n >= 8 * MARGIN * least[0] and size[1] * n >= 8 * MARGIN * least[1]]
    if jpeg_scale == "next":
        enough = enough[1:]
    return enough[0] if enough else 8


def read_jpeg(data: bytes) -> Jpeg | None:
    """Read the header of a plain JPEG; None for anything else.

    Raises:
        RejectedError: `too_large` if decoding would take too much memory or time.
    """
    if not data.startswith(_START):
        return None
    frame, exif, profile = b"", b"", []
    position = 2
    try:
        while True:
            marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
            if data[position] != 0xFF or marker < 0xC0 or marker == 0xFF or marker in _WITHOUT_LENGTH or length < 2:
                return None
            segment = data[position + 4 : position + 2 + length]
            if marker == _START_OF_SCAN:
                break
            if marker in _FRAMES:
                if frame or marker not in _PLAIN_FRAMES:
                    return None
                frame, is_progressive = segment, marker == 0xC2
            elif marker == _APP1 and segment.startswith(_EXIF) and not exif:
                exif = segment
            elif marker == _APP2 and segment.startswith(_ICC):
                profile.append(segment[len(_ICC) :])
            position += 2 + length
        precision, components = frame[0], frame[5]
        height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
        samples = [(value >> 4) * (value & 15) for value in frame[7 : 7 + 3 * components : 3]]
        scan_components = segment[0]
    except IndexError:
        return None
    if precision != 8 or components not in (1, 3) or not (width and height) or (profile and components == 1):
        return None
    if is_progressive or scan_components < components:
        coefficients = width * height * sum(samples) // max(1, *samples)
        if 2 * coefficients > MAX_COEFFICIENT_BYTES or has_too_many_scans(data):
            raise RejectedError("too_large")
    # A profile comes in pieces, in any order; each begins with its number and the number of pieces.
    joined = b"".join(piece[2:] for piece in sorted(profile, key=lambda piece: piece[:1])) or None
    return Jpeg(data, width, height, _orientation(exif), joined, components == 3, position)


def has_too_many_scans(data: bytes) -> bool:
    """Tell whether a JPEG would be decoded again and again: each scan of a progressive file takes a whole pass."""
    # In entropy-coded data no other marker can be mistaken for this one.
    return data.count(b"\xff\xda") > MAX_SCANS


def _end_of_image(data: bytes, position: int) -> int:
    """Return where the image ends whose first scan is at `position`; -1 if it does not end."""
    while found := _MARKER.search(data, position):
        marker, position = data[found.start() + 1], found.end()
        if marker == _END_OF_IMAGE:
            return position
        position += int.from_bytes(data[position : position + 2])
    return -1


def _orientation(exif: bytes) -> int:
    if not exif:
        return 1
    block = Image.Exif()
    try:
        block.load(exif)
        return orientation(block)
    except Exception:  # A broken EXIF block does not make the picture unreadable; Pillow raises anything on it.
        return 1


def orientation(exif: Image.Exif) -> int:
    """Return the orientation (1 to 8) of an EXIF block; 1, upright, if it gives none that is valid."""
    value = exif.get(ORIENTATION_TAG, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
