"""The tokenizer folders of diffusers' pipelines: BERT's vocab.txt, CLIP's vocab.json and merges.txt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ldm_core.weights.weights_files import read_json, write_json

if TYPE_CHECKING:
    from ldm_core.checkpoint import AnyTokenizer
    from ldm_core.tokenizers.from_file import FileTokenizer
    from ldm_core.tokenizers.wordpiece import Tokenizer

SETTINGS_FILE = "tokenizer_config.json"


def write_bert(tokenizer: AnyTokenizer, folder: Path) -> None:
    """Write what transformers' `BertTokenizer` reads.

    Raises:
        ValueError: it is another kind of tokenizer.
    """
    from ldm_core.tokenizers.wordpiece import Tokenizer

    if not isinstance(tokenizer, Tokenizer):
        raise ValueError("LDMTextToImagePipeline takes captions by BERT's tokenizer, the model has another kind")
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": tokenizer.max_length,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    write_json(folder / SETTINGS_FILE, settings)
    tokenizer.write(folder / "vocab.txt")


def read_bert(folder: Path, *, max_length: int) -> Tokenizer:
    """The tokenizer of a `BertTokenizer`'s folder.

    Raises:
        FileNotFoundError: its vocab.txt is missing.
        ValueError: it keeps capital letters, or the vocabulary is none.
    """
    from ldm_core.tokenizers.wordpiece import Tokenizer

    settings = read_json(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
    if not settings.get("do_lower_case", True):
        raise ValueError(f"{folder} must be a lower-casing BERT tokenizer, it sets do_lower_case to false")
    return Tokenizer.from_vocabulary_file(folder / "vocab.txt", max_length=max_length)


def write_clip(tokenizer: AnyTokenizer, folder: Path) -> None:
    """Write what transformers' `CLIPTokenizer` reads.

    Raises:
        ValueError: it is another kind of tokenizer.
    """
    from ldm_core.tokenizers.from_file import CLIP_END, CLIP_START, FileTokenizer

    content = {}
    if isinstance(tokenizer, FileTokenizer):
        tokenizer.write(folder / "tokenizer.json")
        content = read_json(folder / "tokenizer.json")
        # Their class would take this file before the two below, in its own version's way.
        (folder / "tokenizer.json").unlink()
    model = content.get("model", {})
    if model.get("end_of_word_suffix") != "</w>" or CLIP_START not in model.get("vocab", {}):
        raise ValueError("StableDiffusionPipeline takes captions by CLIP's tokenizer, the model has another kind")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    write_json(folder / "vocab.json", model["vocab"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
        "model_max_length": tokenizer.max_length,
        "pad_token": content["padding"]["pad_token"],
        "unk_token": CLIP_END,
        "bos_token": CLIP_START,
        "eos_token": CLIP_END,
    }
    write_json(folder / SETTINGS_FILE, settings)


def read_clip(folder: Path, *, max_length: int) -> FileTokenizer:
    """The tokenizer of a `CLIPTokenizer`'s folder. Raises FileNotFoundError or ValueError where there is none."""
    from ldm_core.tokenizers.from_file import tokenizer_from_folder

    return tokenizer_from_folder(folder, max_length=max_length)
