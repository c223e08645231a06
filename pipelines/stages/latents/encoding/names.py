"""Names of the files that latents are cached in; processes of the loader import this, so that it needs next to nothing.

A file a view, rather than one array of all: training reads the bytes of the view it picks, and whoever knows of no
views finds in `latent.npy` what is there without them, the picture as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from typing import TypeVar

T = TypeVar("T")


def latent_file(view: int) -> str:
    """Return the extension of a view's latent: `latent.npy`, `latent.1.npy`, …"""
    return f"latent.{view}.npy" if view else "latent.npy"


def latent_files(files: Mapping[str, T]) -> dict[str, T]:
    """Return the latents among the files of a sample, by extension, in the order of the views."""
    return {name: files[name] for name in takewhile(files.__contains__, map(latent_file, count()))}
