"""What stages ask of a kind of condition.

A kind is a small class made from its configuration. `latents` asks it what to cache, `diffusion` how what is cached
becomes the input of the network, `evaluate` and `ldm sample` how prompts do.

Shapes: B is the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ldm_core.conditioning import Conditioner
from ldm_core.conditioning.interface import Encode
from ldm_core.configs.conditioning import ConditionerConfig
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.unet import UNetConfig
from ldm_core.tokenizers.joined import AnyTokenizer
from pipelines.conditions.examples import Examples
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage


@dataclass(frozen=True)
class Pair:
    """A sample of pairs, decoded.

    Attributes:
        key: its key.
        facts: its json: `captions`, and the columns of the source.
        image: the stored picture, (H, W, 3) uint8; None for kinds that are encoded from facts alone.
        files: its files by extension, encoded, but for its picture; none for these kinds.
    """

    key: str
    facts: Mapping[str, Any]
    image: NDArray[np.uint8] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


class Rows(Protocol):
    """The samples of all pairs, read from their tables: no tar is opened. Results are in the order of the shards."""

    def captions(self, summarise: Callable[[Iterable[list[str]]], Any]) -> Iterator[Any]:
        """Call a function on the captions of the samples that are trained on, lists of some shards at a time."""
        ...

    def values(self, column: str, summarise: Callable[[Iterable[list[Any]]], Any]) -> Iterator[Any]:
        """Call a function on a column of all samples, lists of some shards at a time. Raises UserError without it."""
        ...


class Encoder(Protocol):
    """Encodes the conditions of samples, as they are cached."""

    def encode(self, pairs: Sequence[Pair]) -> list[dict[str, bytes]]:
        """Return the files of each sample by extension.

        Raises:
            UserError: a sample lacks what this condition needs.
        """
        ...


class Prompts(Protocol):
    """Makes the inputs of a model's conditioner from what a person asks for.

    Attributes:
        guided: whether there is a condition to be guided by. Without one, every guidance scale is the same.
    """

    guided: bool

    @property
    def tokenizer(self) -> AnyTokenizer | None:
        """The tokenizer of the captions, or those of its text encoders; None for a model that takes none."""
        ...

    def inputs(self, prompts: Sequence[str]) -> Any:
        """Return the conditioner's inputs for a batch of prompts. Raises UserError for a prompt that it cannot show."""
        ...

    def unconditional(self) -> Any:
        """Return the null condition of guidance (1, ...); None for a model that has none."""
        ...


class Kind(Protocol):
    """One kind of condition."""

    @property
    def from_facts(self) -> bool:
        """Whether `Encoder.encode` is quick and needs neither a picture nor a network.

        Latents that are taken over from another artifact are then written again beside new files; otherwise the files
        are taken over too.
        """
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """The extensions of the files that are cached of each sample."""
        ...

    def prepare(self, rows: Rows, writer: ArtifactWriter) -> None:
        """Commit what is cached once for all samples, such as the vocabulary.

        Raises:
            UserError: the pairs do not carry what this kind needs.
        """
        ...

    def digest(self, storage: Storage) -> str:
        """Return the digest of all that decides what is cached besides the pairs, after `prepare`."""
        ...

    def encoder(self, storage: Storage, device: str, encode_images: Encode | None) -> Encoder:
        """Return what encodes the conditions of samples, after `prepare`.

        Args:
            storage: the folder of the artifact of latents.
            device: where networks run.
            encode_images: maps images (B, 3, H, W) to unscaled latents; None where there is no first stage; no kind
                whose files are made `from_facts` needs it.
        """
        ...

    def details(self, storage: Storage) -> dict[str, Any]:
        """Return the facts of the cache for the manifest of the latents, after `prepare`."""
        ...

    def conditioner(self, latents: Artifact, unet: UNetConfig) -> ConditionerConfig | None:
        """Return the configuration of the model's conditioner; None for an unconditional model."""
        ...

    def frozen(self, latents: Artifact, device: torch.device) -> Conditioner | None:
        """Return the model's conditioner if it is never trained, with its weights; None if training has it.

        Raises:
            UserError: it is not the one that the latents were made with.
        """
        ...

    def examples(self, latents: Artifact) -> Examples:
        """Return what makes the network's input in training."""
        ...

    def prompts(self, latents: Artifact, model: LatentDiffusionConfig) -> Prompts:
        """Return what makes a model's input from prompts while it is trained."""
        ...

    def preview_prompts(self, latents: Artifact, samples: Iterable[Mapping[str, Any]], count: int) -> list[str]:
        """Return at most `count` prompts for previews, from the facts of samples, held-out ones first."""
        ...

    def prompt_of(self, facts: Mapping[str, Any]) -> str:
        """Return the prompt that asks for a sample of pairs, from its json."""
        ...
