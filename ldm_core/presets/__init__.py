"""The published models by name, as typed configurations.

`get(name)` gives a whole model, `first_stage(name)` and `unet(name)` its parts; the `tiny-*` ones, one of each kind,
are for tests and for machines without a GPU.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.unet import UNetConfig
from ldm_core.presets.first_stages import FIRST_STAGE_CONFIGS
from ldm_core.presets.unets import UNET_CONFIGS

if TYPE_CHECKING:
    from ldm_core.configs.model import LatentDiffusionConfig
    from ldm_core.presets.models import MODEL_CONFIGS as MODEL_CONFIGS

T = TypeVar("T")


def __getattr__(name: str) -> Any:
    # Lazy, because whole models import torch, and a recipe asks for first stages and UNets only.
    if name == "MODEL_CONFIGS":
        from ldm_core.presets.models import MODEL_CONFIGS

        return MODEL_CONFIGS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def names() -> list[str]:
    """Names that `get` knows, sorted."""
    from ldm_core.presets.models import MODEL_CONFIGS

    return sorted(MODEL_CONFIGS)


def get(name: str) -> LatentDiffusionConfig:
    """The configuration of a whole model; `get(name).build()` makes one with random weights.

    Raises:
        ValueError: no such preset; the message names the nearest.
    """
    from ldm_core.presets.models import MODEL_CONFIGS

    return _lookup(MODEL_CONFIGS, name, "model")


def first_stage(name: str) -> FirstStageConfig:
    """The configuration of a first stage by its name in the paper's Table 8.

    Raises:
        ValueError: no such preset; the message names the nearest.
    """
    return _lookup(FIRST_STAGE_CONFIGS, name, "first stage")


def unet(name: str) -> UNetConfig:
    """The configuration of a published model's UNet.

    Raises:
        ValueError: no such preset; the message names the nearest.
    """
    return _lookup(UNET_CONFIGS, name, "UNet")


def _lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    if name not in table:
        nearest = difflib.get_close_matches(name, table, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown {kind} preset {name!r}; the nearest is {nearest!r}, all are {sorted(table)}")
    return table[name]
