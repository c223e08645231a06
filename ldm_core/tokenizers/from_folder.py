"""Tokenizers as the transformers library keeps them: tokenizer.json, or CLIP's vocab.json and merges.txt."""

from __future__ import annotations

import json
from pathlib import Path

from ldm_core.model_files import TOKENIZER_FILE
from ldm_core.tokenizers.clip import CLIP_END, clip_tokenizer
from ldm_core.tokenizers.tokenizer import Tokenizer


def tokenizer_from_folder(folder: str | Path, *, max_length: int = 77) -> Tokenizer:
    """Read the tokenizer of a folder of the transformers library.

    Raises:
        FileNotFoundError: there is neither a tokenizer.json nor CLIP's pair of files.
        ValueError: the files are no tokenizer.
    """
    folder = Path(folder)
    pad_token = _pad_token(folder)
    if (folder / TOKENIZER_FILE).is_file():
        return Tokenizer.from_json_file(folder / TOKENIZER_FILE, max_length=max_length, pad_token=pad_token)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise FileNotFoundError(f"no tokenizer in {folder}: it needs tokenizer.json, or vocab.json and merges.txt")
    lines = merges.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#version")]
    ids = json.loads(vocabulary.read_text(encoding="utf-8"))
    return clip_tokenizer(ids, lines, max_length=max_length, pad_token=pad_token or CLIP_END)


def _pad_token(folder: Path) -> str | None:
    """Return the padding token that the folder's settings name, or None."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            token = json.loads((folder / name).read_text(encoding="utf-8")).get("pad_token")
            if token is not None:
                return token["content"] if isinstance(token, dict) else str(token)
    return None
