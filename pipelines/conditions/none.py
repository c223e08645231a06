"""No condition: nothing is cached, and nothing is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ldm_core.conditioning.interface import Encode
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.unet import UNetConfig
from pipelines.conditions.config import NoCondition
from pipelines.conditions.examples import NoExamples
from pipelines.conditions.kind import Pair, Rows
from pipelines.errors import UserError
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage


class Unconditional:
    """The kind `none`; also its own encoder, since there is nothing to know."""

    files: tuple[str, ...] = ()
    from_facts = True

    def __init__(self, config: NoCondition) -> None:
        self.config = config

    def prepare(self, rows: Rows, writer: ArtifactWriter) -> None:
        return None

    def digest(self, storage: Storage) -> str:
        return ""

    def encoder(self, storage: Storage, device: str, encode_images: Encode | None) -> Unconditional:
        return self

    def encode(self, pairs: Sequence[Pair]) -> list[dict[str, bytes]]:
        return [{} for _ in pairs]

    def details(self, storage: Storage) -> dict[str, Any]:
        return {}

    def conditioner(self, latents: Artifact, unet: UNetConfig) -> None:
        return None

    def frozen(self, latents: Artifact, device: torch.device) -> None:
        return None

    def examples(self, latents: Artifact) -> NoExamples:
        return NoExamples()

    def prompts(self, latents: Artifact, model: LatentDiffusionConfig) -> NoPrompts:
        return NoPrompts()

    def preview_prompts(self, latents: Artifact, samples: Iterable[Mapping[str, Any]], count: int) -> list[str]:
        return [""] * count

    def prompt_of(self, facts: Mapping[str, Any]) -> str:
        return ""


class NoPrompts:
    """What an unconditional model is asked for: empty prompts, one a picture."""

    tokenizer = None
    guided = False

    def inputs(self, prompts: Sequence[str]) -> None:
        if asked := next((prompt for prompt in prompts if prompt), None):
            raise UserError(f"this model is unconditional and takes no prompts, got {asked[:80]!r}: leave them out")

    def unconditional(self) -> None:
        return None
