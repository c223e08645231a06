"""Tokenizer folders of diffusers' pipelines: BERT's vocab.txt, or CLIP's vocab.json and merges.txt."""

from __future__ import annotations

from pathlib import Path

from ldm_core.model_files import VOCABULARY_FILE
from ldm_core.tokenizers.clip import CLIP_END, CLIP_START
from ldm_core.tokenizers.from_folder import tokenizer_from_folder
from ldm_core.tokenizers.tokenizer import Tokenizer
from ldm_core.tokenizers.wordpiece import END, MASK, PAD, START, UNKNOWN
from ldm_core.weights.weights_files import read_json, write_json

SETTINGS_FILE = "tokenizer_config.json"


def write_bert(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that transformers' `BertTokenizer` reads.

    Raises:
        ValueError: it is another kind of tokenizer.
    """
    if not tokenizer.is_wordpiece:
        raise ValueError("LDMTextToImagePipeline takes captions by BERT's tokenizer, the model has another kind")
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": tokenizer.max_length,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "cls_token": START,
        "sep_token": END,
        "mask_token": MASK,
    }
    write_json(folder / SETTINGS_FILE, settings)
    tokenizer.write(folder / VOCABULARY_FILE)


def read_bert(folder: Path, *, max_length: int) -> Tokenizer:
    """Read the tokenizer of a `BertTokenizer`'s folder.

    Raises:
        FileNotFoundError: its vocab.txt is missing.
        ValueError: it keeps capital letters, or its vocabulary is damaged.
    """
    settings = read_json(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
    if not settings.get("do_lower_case", True):
        raise ValueError(f"{folder} must be a lower-casing BERT tokenizer, it sets do_lower_case to false")
    return Tokenizer.from_vocabulary_file(folder / VOCABULARY_FILE, max_length=max_length)


def write_clip(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that transformers' `CLIPTokenizer` reads.

    Raises:
        ValueError: it is another kind of tokenizer.
    """
    content = tokenizer.to_dict()
    model = content["model"]
    if model.get("end_of_word_suffix") != "</w>" or CLIP_START not in model.get("vocab", {}):
        raise ValueError("StableDiffusionPipeline takes captions by CLIP's tokenizer, the model has another kind")
    # No tokenizer.json: their class would prefer it to these two files, and read it in its own version's way.
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


def read_clip(folder: Path, *, max_length: int) -> Tokenizer:
    """Read the tokenizer of a `CLIPTokenizer`'s folder. Raises FileNotFoundError or ValueError if there is none."""
    return tokenizer_from_folder(folder, max_length=max_length)
