"""Captions, through pretrained text encoders that are never trained: CLIP, OpenCLIP, any of the transformers library.

Latents cache what the encoder gives, so that training needs no encoder:

KEY.text.npy            (n, D) float16, the last hidden states of all captions of a sample, one after the other
KEY.text_lengths.npy    (captions,) uint16, how many of them each caption has
null_text.npy           (n, D) float16, the empty caption's, once
text_encoder.json       the encoder's configuration and the digest of its weights, once

Padding that the encoder does not attend to is not stored, and the UNet does not see it either. CLIP's is stored: its
attention is causal, so that the states at padding depend on the caption, and published models are fed all 77 of them.
A second encoder has the same files under `text2`. The UNet is fed both side by side, as SDXL is: a place of the context
holds what each gives for its token there, zeros after the last one.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm_core.conditioning import Conditioner, Conditioning, drop
from ldm_core.conditioning.frozen_text import FrozenClipConditioner, FrozenTextConditioner, JoinedTextConditioner
from ldm_core.conditioning.interface import Encode
from ldm_core.configs.conditioning import ConditionerConfig, conditioner_from_dict, conditioner_to_dict
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.text import ClipTextConfig, FrozenTextConfig, JoinedTextConfig
from ldm_core.configs.unet import UNetConfig
from ldm_core.pretrained import TextEncoder, open_clip_text_encoder, text_encoder
from ldm_core.tokenizers.joined import JoinedTokenizer
from pipelines.conditions.config import FrozenTextCondition, TextEncoderConfig
from pipelines.conditions.kind import Cached, Encoder, Pair, Rows
from pipelines.conditions.text import CaptionPrompts, captions_of, distinct_captions, first_caption
from pipelines.errors import UserError
from pipelines.shards.format import decode_npy, encode_npy
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact, digest_json
from pipelines.store.storage import Storage, encode_json

# Captions of one pass of the encoder.
BATCH = 64


class FrozenText:
    """The kind `frozen_text`."""

    from_facts = False

    def __init__(self, config: FrozenTextCondition) -> None:
        self.config = config
        self.files: tuple[str, ...] = tuple(
            file for number in range(len(config.encoders)) for file in (_states(number), _lengths(number))
        )

    def prepare(self, rows: Rows, writer: ArtifactWriter) -> None:
        for number, encoder in enumerate(self.config.encoders):
            loaded = _Loaded(encoder)
            writer.commit_once(_about(number), loaded.write_about)
            writer.commit_once(_null(number), loaded.write_null)

    def digest(self, storage: Storage) -> str:
        return digest_json([storage.read_json(_about(number)) for number in range(len(self.config.encoders))])

    def encoder(self, storage: Storage, device: str, encode_images: Encode | None) -> Encoder:
        opened = [_opened(encoder) for encoder in self.config.encoders]
        for number, (config, each) in enumerate(zip(self.config.encoders, opened, strict=True)):
            # Every node has files of its own.
            if each.about != (known := storage.read_json(_about(number))):
                raise UserError(
                    f"the text encoder at {config.path} on {socket.gethostname()} is another "
                    f"({each.about['weights_sha256'][:12]}…) than the one that this run began with "
                    f"({known['weights_sha256'][:12]}…): put the same files on every node"
                )
        return CaptionStates([(each, device) for each in opened])

    def details(self, storage: Storage) -> dict[str, Any]:
        about = [storage.read_json(_about(number)) for number in range(len(self.config.encoders))]
        return {
            "text_encoders": [each["weights_sha256"] for each in about],
            "text_shapes": [[each["conditioner"]["max_length"], each["conditioner"]["width"]] for each in about],
        }

    def conditioner(self, latents: Artifact, unet: UNetConfig) -> ConditionerConfig:
        configs: list[Any] = [
            conditioner_from_dict(latents.storage.read_json(_about(number))["conditioner"], _about(number))
            for number in range(len(self.config.encoders))
        ]
        return JoinedTextConfig(encoders=tuple(configs)) if len(configs) > 1 else configs[0]

    def frozen(self, latents: Artifact, device: torch.device) -> Conditioner:
        opened = [_opened(encoder) for encoder in self.config.encoders]
        for number, (config, each) in enumerate(zip(self.config.encoders, opened, strict=True)):
            if each.about != (known := latents.storage.read_json(_about(number))):
                raise UserError(
                    f"latents {latents.key} were made with another text encoder ({known['weights_sha256'][:12]}…) "
                    f"than {config.path} is ({each.about['weights_sha256'][:12]}…): put that one back, or run "
                    "`ldm run RECIPE --from latents`"
                )
        if len(opened) == 1:
            return opened[0].conditioner.to(device)
        joined = JoinedTextConfig(encoders=tuple(each.config for each in opened))
        return JoinedTextConditioner(joined, [each.conditioner for each in opened]).to(device)

    def examples(self, latents: Artifact) -> CaptionStateExamples:
        encoders, storage = range(len(self.config.encoders)), latents.storage
        about = [storage.read_json(_about(number))["conditioner"] for number in encoders]
        return CaptionStateExamples(
            self.files,
            joined_states([decode_npy(storage.read_bytes(_null(number))) for number in encoders]),
            latents.details["text_shapes"][0][0],
            masked=all(each.get("mask_padding", False) for each in about),
            dropout=self.config.dropout,
        )

    def prompts(self, latents: Artifact, model: LatentDiffusionConfig) -> CaptionPrompts:
        tokenizers = [_opened(encoder).tokenizer for encoder in self.config.encoders]
        return CaptionPrompts(JoinedTokenizer(tokenizers) if len(tokenizers) > 1 else tokenizers[0])

    def preview_prompts(self, latents: Artifact, samples: Iterable[Mapping[str, Any]], count: int) -> list[str]:
        return distinct_captions(samples, count)

    def prompt_of(self, facts: Mapping[str, Any]) -> str:
        return first_caption(facts)


def _prefix(number: int) -> str:
    return f"text{number + 1}" if number else "text"


def _states(number: int) -> str:
    return f"{_prefix(number)}.npy"


def _lengths(number: int) -> str:
    return f"{_prefix(number)}_lengths.npy"


def _null(number: int) -> str:
    return f"null_{_prefix(number)}.npy"


def _about(number: int) -> str:
    return f"{_prefix(number)}_encoder.json"


class OpenedEncoder:
    """A text encoder as a recipe names it.

    Attributes:
        conditioner, config, tokenizer: its network, the configuration of that, and its tokenizer.
        about: its configuration and the digest of its weights, as JSON values.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        found = _load(config)
        self.tokenizer = found.tokenizer
        shape: ClipTextConfig | FrozenTextConfig = found.conditioner.config
        if isinstance(shape, FrozenTextConfig):
            # As the encoder was trained: what it does not attend to, the UNet does not either.
            masked = shape.pad_id is not None
            if masked and shape.pad_id != found.tokenizer.pad_id:
                raise UserError(
                    f"the tokenizer in {config.path} pads with id {found.tokenizer.pad_id}, but its config.json says "
                    f"{shape.pad_id}: put the tokenizer there that the encoder was trained with"
                )
            shape = replace(shape, max_length=found.tokenizer.max_length, mask_padding=masked)
        elif found.tokenizer.max_length != shape.max_length:
            raise UserError(
                f"condition.encoders: max_length of a CLIP must be its own, {shape.max_length}, "
                f"got {found.tokenizer.max_length}: leave it out"
            )
        self.masked = isinstance(shape, FrozenTextConfig) and shape.mask_padding
        found.conditioner.config = self.config = shape
        self.conditioner: FrozenClipConditioner | FrozenTextConditioner = found.conditioner
        self.about: dict[str, Any] = {
            "conditioner": conditioner_to_dict(shape),
            "tokenizer_sha256": found.tokenizer.digest,
            "weights_sha256": found.digest,
        }

    @torch.inference_mode()
    def __call__(self, captions: Sequence[str], device: str) -> list[NDArray[np.float16]]:
        """Return the (n, D) states that are stored of each caption."""
        self.conditioner.to(device)
        states: list[NDArray[np.float16]] = []
        for start in range(0, len(captions), BATCH):
            tokens = self.tokenizer.encode(captions[start : start + BATCH]).astype(np.int64)
            if self.masked:
                # What is not stored need not be computed.
                shown = np.flatnonzero((tokens != self.tokenizer.pad_id).any(axis=0))
                tokens = tokens[:, : int(shown.max(initial=0)) + 1]
            given = self.conditioner(torch.from_numpy(tokens).to(device))
            assert given.context is not None
            context = given.context.half().cpu().numpy()
            mask = np.ones(context.shape[:2], bool) if given.mask is None else given.mask.cpu().numpy()
            states += [each[real] for each, real in zip(context, mask, strict=True)]
        return states


class _Loaded:
    """An encoder that is loaded when it is first asked for."""

    def __init__(self, config: TextEncoderConfig) -> None:
        self.config = config

    @cached_property
    def encoder(self) -> OpenedEncoder:
        return _opened(self.config)

    def write_about(self, path: Path) -> None:
        path.write_bytes(encode_json(self.encoder.about))

    def write_null(self, path: Path) -> None:
        null = self.encoder([""], "cpu")[0]
        if not np.isfinite(null).all():
            raise UserError(
                f"the text encoder at {self.config.path} gives values that are not finite in fp16 for the empty caption"
            )
        path.write_bytes(encode_npy(null))


def _opened(config: TextEncoderConfig) -> OpenedEncoder:
    try:
        return OpenedEncoder(config)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"condition.encoders: {' '.join(str(error).split())}") from error


def _load(config: TextEncoderConfig) -> TextEncoder:
    if config.open_clip is not None:
        return open_clip_text_encoder(config.open_clip, config.path, unused_layers=config.unused_layers)
    return text_encoder(Path(config.path).expanduser(), max_length=config.max_length)


class CaptionStates:
    """Encodes captions by one or two encoders, each on its device."""

    def __init__(self, encoders: Sequence[tuple[OpenedEncoder, str]]) -> None:
        self.encoders = encoders

    def encode(self, pairs: Sequence[Pair]) -> list[dict[str, bytes]]:
        captions = [captions_of(pair) for pair in pairs]
        every = [caption for each in captions for caption in each]
        files: list[dict[str, bytes]] = [{} for _ in pairs]
        for number, (encoder, device) in enumerate(self.encoders):
            states = iter(encoder(every, device))
            for pair, own, sample in zip(pairs, captions, files, strict=True):
                of_sample = [next(states) for _ in own]
                stored = np.concatenate(of_sample)
                if not np.isfinite(stored).all():
                    raise UserError(f"the text encoder gives values that are not finite in fp16 for sample {pair.key}")
                sample[_states(number)] = encode_npy(stored)
                sample[_lengths(number)] = encode_npy(np.array([len(each) for each in of_sample], np.uint16))
        return files


class CaptionStateExamples:
    """Draws the states of one of a picture's captions, filled up to one length; those of two encoders side by side.

    Args:
        files: extensions of the states and of their lengths, of each encoder.
        null: (n, D) states of the empty caption, which guidance needs (Ho & Salimans 2021).
        length: L, the longest that a caption can be.
        masked: whether the UNet does not attend to what is filled up.
        dropout: share of captions that are replaced by the empty one.
    """

    def __init__(
        self, files: tuple[str, ...], null: NDArray[np.float16], length: int, *, masked: bool, dropout: float
    ) -> None:
        self.files, self.length, self.masked, self.dropout = files, length, masked, dropout
        self.null = self._filled([null])

    def decode(self, files: Mapping[str, bytes]) -> Cached:
        return tuple(decode_npy(files[name]) for name in self.files)

    def draw(self, cached: Cached, random: np.random.Generator) -> NDArray[Any]:
        # Of all encoders the same caption.
        number = random.integers(len(cached[1]))
        files = zip(cached[::2], cached[1::2], strict=True)
        return joined_states([_of_caption(states, lengths, number) for states, lengths in files])

    def batch(self, drawn: Sequence[NDArray[Any]], uniform: Tensor) -> dict[str, Tensor]:
        filled = self._filled(drawn)
        return {name: drop(tensor, self.null[name], self.dropout, uniform) for name, tensor in filled.items()}

    def _filled(self, drawn: Sequence[NDArray[Any]]) -> dict[str, Tensor]:
        """Return (B, L, D) states and, if it is needed, (B, L) which of them are real."""
        context = np.zeros((len(drawn), self.length, drawn[0].shape[1]), np.float16)
        mask = np.zeros(context.shape[:2], bool)
        for row, states in enumerate(drawn):
            context[row, : len(states)] = states
            mask[row, : len(states)] = True
        return {"context": torch.from_numpy(context)} | ({"mask": torch.from_numpy(mask)} if self.masked else {})

    def inputs(self, batch: Mapping[str, Tensor]) -> Conditioning:
        return Conditioning(context=batch["context"].float(), mask=batch.get("mask"))


def _of_caption(states: NDArray[Any], lengths: NDArray[Any], number: int | np.integer[Any]) -> NDArray[Any]:
    end = int(lengths[: number + 1].sum())
    return states[end - int(lengths[number]) : end]


def joined_states(of_encoders: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return the (n, D) states of a caption by each encoder side by side, zeros after the last of each."""
    if len(of_encoders) == 1:
        return of_encoders[0]
    longest = max(len(states) for states in of_encoders)
    return np.concatenate([np.pad(each, ((0, longest - len(each)), (0, 0))) for each in of_encoders], axis=1)
