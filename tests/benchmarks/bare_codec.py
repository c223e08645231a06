"""The codec alone: what resizing a photograph costs with nothing around it, for `bench_pairs` to compare with.

`python -m tests.benchmarks.bare_codec FOLDER_OF_JPEGS` prints milliseconds of CPU a picture.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OPENCV_IPP", "avx2")
import cv2
import simplejpeg

from pipelines.compute.host_memory import keep_freed_memory

cv2.setNumThreads(1)
# Without this glibc gives memory back after each picture, and the next one costs a third more in page faults.
keep_freed_memory()


def bare_codec(data: bytes, size: int, *, antialias: bool = True) -> bytes:
    """Decode at a scale, resize, encode: the fastest way found to a shorter side of `size` px, JPEG quality 95, 4:4:4.

    Args:
        data: an upright colour JPEG of at least 3 x `size`, at most 6 x `size` pixels.
        antialias: the small blur before the cubic that `make_picture` does too; about 8 % of the time.
    """
    # 4/8 has vector code, 3/8 does not: it is the faster one and the better picture.
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=1.5 * size, min_width=1.5 * size)
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    if antialias:
        pixels = cv2.GaussianBlur(pixels, (3, 3), 0.65 * math.sqrt(1 / scale - 1))
    small = cv2.resize(pixels, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_CUBIC)
    return simplejpeg.encode_jpeg(small, 95, "RGB", "444")


def cpu_ms(functions: dict[str, Callable[[bytes], object]], files: list[bytes], repeats: int = 7) -> dict[str, float]:
    """Return the least mean CPU time of one call over some passes; the functions take turns."""
    passes: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.process_time()
            for data in files:
                function(data)
            passes[name].append((time.process_time() - start) / len(files) * 1e3)
    return {name: min(values) for name, values in passes.items()}


def main() -> None:
    from pipelines.stages.pairs.config import PairsConfig
    from pipelines.stages.pairs.pictures.transcode import make_picture

    files = [path.read_bytes() for path in sorted(Path(sys.argv[1]).glob("*.jpg"))[:200]]
    config = PairsConfig(source="-", image_size=256, resize="keep_ratio")
    functions: dict[str, Callable[[bytes], object]] = {
        "bare codec": lambda data: bare_codec(data, 256),
        "bare codec without antialiasing": lambda data: bare_codec(data, 256, antialias=False),
        "make_picture": lambda data: make_picture(data, config),
    }
    for name, value in cpu_ms(functions, files).items():
        print(f"{name}: {value:.3f} ms")


if __name__ == "__main__":
    main()
