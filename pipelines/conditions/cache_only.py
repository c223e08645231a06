"""Conditions whose latents are cached in their final form, and which no stage after `latents` runs yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch

from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.unet import UNetConfig
from pipelines.conditions.config import ConditionBase
from pipelines.conditions.kind import Encode, Encoder, Rows
from pipelines.errors import MisuseError
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact, digest_json
from pipelines.store.storage import Storage


class CacheOnly:
    """A kind that `latents` caches.

    Args:
        config: its configuration, all that decides what is cached.
        files: extensions of the files that are cached of each sample.
        from_facts: whether the encoder needs neither pictures nor a network.
        open_encoder: makes what encodes them, on a device, from a function that encodes images.
    """

    def __init__(
        self,
        config: ConditionBase,
        files: tuple[str, ...],
        open_encoder: Callable[[str, Encode | None], Encoder],
        *,
        from_facts: bool = False,
    ) -> None:
        self.config, self.files, self.open_encoder, self.from_facts = config, files, open_encoder, from_facts

    def prepare(self, rows: Rows, writer: ArtifactWriter) -> None:
        return None

    def digest(self, storage: Storage) -> str:
        return digest_json(self.config.cached_identity())

    def encoder(self, storage: Storage, device: str, encode_images: Encode | None) -> Encoder:
        return self.open_encoder(device, encode_images)

    def details(self, storage: Storage) -> dict[str, Any]:
        return {}

    def _not_yet(self) -> NoReturn:
        raise MisuseError(
            f"condition {self.config.kind}: its latents are cached, but nothing is trained on them: add --to latents"
        )

    def conditioner(self, latents: Artifact, unet: UNetConfig) -> NoReturn:
        self._not_yet()

    def frozen(self, latents: Artifact, device: torch.device) -> NoReturn:
        self._not_yet()

    def examples(self, latents: Artifact) -> NoReturn:
        self._not_yet()

    def prompts(self, latents: Artifact, model: LatentDiffusionConfig) -> NoReturn:
        self._not_yet()

    def preview_prompts(self, latents: Artifact, samples: Iterable[Mapping[str, Any]], count: int) -> NoReturn:
        self._not_yet()

    def prompt_of(self, facts: Mapping[str, Any]) -> NoReturn:
        self._not_yet()
