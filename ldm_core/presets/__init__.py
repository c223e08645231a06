"""The published models by name, as typed configurations.

`get(name)` returns a whole model's, `first_stage(name)` and `unet(name)` those of its parts. The `tiny-*` presets, one
of each kind, are for tests and for machines without a GPU.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.unet import UNetConfig
from ldm_core.presets.first_stages import FIRST_STAGE_CONFIGS
from ldm_core.presets.models import MODEL_CONFIGS
from ldm_core.presets.unets import UNET_CONFIGS

__all__ = ["FIRST_STAGE_CONFIGS", "MODEL_CONFIGS", "UNET_CONFIGS", "first_stage", "get", "names", "unet"]

T = TypeVar("T")


def names() -> list[str]:
    """Return the names that `get` knows, sorted."""
    return sorted(MODEL_CONFIGS)


def get(name: str) -> LatentDiffusionConfig:
    """Return the configuration of a whole model; `get(name).build()` makes one with random weights.

    Raises:
        ValueError: no such preset; the message names the nearest.
    """
    return _lookup(MODEL_CONFIGS, name, "model")


def first_stage(name: str) -> FirstStageConfig:
    """Return the configuration of a first stage by its name in the paper's Table 8.

    Raises:
        ValueError: no such preset; the message names the nearest.
    """
    return _lookup(FIRST_STAGE_CONFIGS, name, "first stage")


def unet(name: str) -> UNetConfig:
    """Return the configuration of a published model's UNet.

    Raises:
        ValueError: no such preset; the message names the nearest.
    """
    return _lookup(UNET_CONFIGS, name, "UNet")


def _lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    if name not in table:
        nearest = difflib.get_close_matches(name, table, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown {kind} preset {name!r}; the nearest is {nearest!r}, all are {sorted(table)}")
    return table[name]
