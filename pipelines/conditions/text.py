"""Captions, through a text transformer that is trained together with the UNet (paper, Sec. 4.3.1).

Latents cache `KEY.tokens.npy`, (captions, L) uint16 token ids of all captions, and `vocab.txt` once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_core.conditioning.interface import Encode
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.text import TextTransformerConfig
from ldm_core.configs.unet import UNetConfig
from ldm_core.model_files import VOCABULARY_FILE
from ldm_core.tokenizers.joined import AnyTokenizer
from ldm_core.tokenizers.tokenizer import Tokenizer
from pipelines.conditions.config import TextCondition
from pipelines.conditions.examples import CaptionExamples
from pipelines.conditions.kind import Pair, Rows
from pipelines.conditions.vocabulary import commit_vocabulary, load_vocabulary
from pipelines.errors import UserError
from pipelines.shards.format import encode_npy
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact, digest_json
from pipelines.store.storage import Storage

TOKENS = "tokens.npy"


class Text:
    """The kind `text`."""

    files: tuple[str, ...] = (TOKENS,)
    from_facts = True

    def __init__(self, config: TextCondition) -> None:
        self.config = config

    def prepare(self, rows: Rows, writer: ArtifactWriter) -> None:
        commit_vocabulary(self.config.tokenizer, rows, writer)

    def digest(self, storage: Storage) -> str:
        tokenizer = load_vocabulary(storage, self.config.tokenizer)
        return digest_json([tokenizer.digest, tokenizer.max_length])

    def encoder(self, storage: Storage, device: str, encode_images: Encode | None) -> CaptionTokens:
        return CaptionTokens(load_vocabulary(storage, self.config.tokenizer))

    def details(self, storage: Storage) -> dict[str, Any]:
        tokenizer = load_vocabulary(storage, self.config.tokenizer)
        return {
            "tokenizer_sha256": tokenizer.digest,
            "vocabulary_size": tokenizer.vocabulary_size,
            "max_length": tokenizer.max_length,
            "pad_id": tokenizer.pad_id,
            "empty_tokens": tokenizer.encode([""])[0].tolist(),
        }

    def conditioner(self, latents: Artifact, unet: UNetConfig) -> TextTransformerConfig:
        facts = latents.details
        return self.config.transformer.build(
            vocabulary_size=facts["vocabulary_size"], max_length=facts["max_length"], pad_id=facts["pad_id"]
        )

    def frozen(self, latents: Artifact, device: torch.device) -> None:
        return None

    def examples(self, latents: Artifact) -> CaptionExamples:
        return CaptionExamples(TOKENS, latents.details["empty_tokens"], self.config.dropout)

    def prompts(self, latents: Artifact, model: LatentDiffusionConfig) -> CaptionPrompts:
        storage = latents.storage
        vocabulary = storage.read_bytes(VOCABULARY_FILE)
        return CaptionPrompts(
            Tokenizer.from_vocabulary_bytes(
                vocabulary, source=f"{storage.url}/{VOCABULARY_FILE}", max_length=latents.details["max_length"]
            )
        )

    def preview_prompts(self, latents: Artifact, samples: Iterable[Mapping[str, Any]], count: int) -> list[str]:
        return distinct_captions(samples, count)

    def prompt_of(self, facts: Mapping[str, Any]) -> str:
        return first_caption(facts)


class CaptionTokens:
    """Tokenizes captions."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, pairs: Sequence[Pair]) -> list[dict[str, bytes]]:
        captions = [captions_of(pair) for pair in pairs]
        tokens = self.tokenizer.encode([caption for each in captions for caption in each])
        ends = np.cumsum([len(each) for each in captions])
        return [{TOKENS: encode_npy(ids)} for ids in np.split(tokens, ends[:-1])]


class CaptionPrompts:
    """Prompts as captions, for models whose tokenizer lies beside their weights."""

    guided = True

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        self.tokenizer = tokenizer

    def inputs(self, prompts: Sequence[str]) -> Tensor:
        return torch.from_numpy(self.tokenizer.encode(list(prompts)).astype(np.int64))

    def unconditional(self) -> Tensor:
        return self.inputs([""])


def captions_of(pair: Pair) -> list[str]:
    """Return the captions of a sample. Raises UserError if there are none."""
    if not pair.facts["captions"]:
        raise UserError(f"sample {pair.key} has no caption, which the condition needs: set pairs.captions to required")
    return [str(caption) for caption in pair.facts["captions"]]


def first_caption(facts: Mapping[str, Any]) -> str:
    """Return the caption that stands for a sample."""
    return str(facts["captions"][0])


def distinct_captions(samples: Iterable[Mapping[str, Any]], count: int) -> list[str]:
    """Return the first captions of samples, each once, until there are `count`."""
    distinct: dict[str, None] = {}
    for facts in samples:
        distinct.setdefault(first_caption(facts))
        if len(distinct) == count:
            break
    return list(distinct)
