"""Where the vocabulary comes from, and what is said when it cannot."""

from pathlib import Path

import pytest

from ldm_core.tokenizers.wordpiece import build_vocabulary
from pipelines.conditions import vocabulary
from pipelines.conditions.config import TokenizerConfig
from pipelines.conditions.vocabulary import commit_vocabulary, vocabulary_digest
from pipelines.errors import UserError
from pipelines.shards.format import decode_json, read_shard
from pipelines.stages.latents import rows
from pipelines.stages.latents.rows import PairsRows
from pipelines.store.commits import ArtifactWriter
from pipelines.store.storage import Storage
from tests.tiny_artifacts import WORDS, pairs_artifact

VOCABULARY = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\ncircle\n"


def writer(root: Path) -> ArtifactWriter:
    return ArtifactWriter("latents", "key", Storage(str(root / "latents" / "key")))


def test_given_vocabulary_is_committed_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "given.txt").write_text(VOCABULARY)
    config = TokenizerConfig(vocabulary=str(tmp_path / "given.txt"), max_length=5)
    tokenizer = commit_vocabulary(config, PairsRows(pairs_artifact(tmp_path)), writer(tmp_path))
    assert tokenizer.encode(["red circle"]).tolist() == [[2, 5, 6, 3, 0]]
    assert writer(tmp_path).storage.read_bytes("vocab.txt").decode() == VOCABULARY


def test_vocabulary_of_the_captions_knows_their_words(tmp_path: Path) -> None:
    tokenizer = commit_vocabulary(TokenizerConfig(size=64), PairsRows(pairs_artifact(tmp_path)), writer(tmp_path))
    assert {"red", "circle", "square"} <= set(tokenizer.vocabulary)


def test_vocabulary_is_that_of_all_captions_in_the_tars_however_they_are_dealt_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pairs_artifact(tmp_path, rows=(3, 0, 4, 2))
    captions = [
        caption
        for record in pairs.shards()
        for sample in read_shard(Path(pairs.storage.path(record.name)))
        for caption in decode_json(sample["json"])["captions"]
    ]
    assert len(captions) == 18
    expected = build_vocabulary(captions, size=64)
    for shards in (256, 1):
        monkeypatch.setattr(rows, "SHARDS_PER_TASK", shards)
        tokenizer = commit_vocabulary(TokenizerConfig(size=64), PairsRows(pairs), writer(tmp_path / str(shards)))
        assert list(tokenizer.vocabulary) == expected


def test_of_too_many_words_the_rare_ones_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pairs_artifact(tmp_path, rows=(9, 9, 9))
    monkeypatch.setattr(rows, "SHARDS_PER_TASK", 1)
    monkeypatch.setattr(vocabulary, "MOST_WORDS", 3)
    tokenizer = commit_vocabulary(TokenizerConfig(size=64), PairsRows(pairs), writer(tmp_path))
    assert 3 <= len([token for token in tokenizer.vocabulary if token in WORDS]) < len(WORDS)


def test_committed_vocabulary_stays_when_the_run_goes_on(tmp_path: Path) -> None:
    pairs = pairs_artifact(tmp_path)
    first = commit_vocabulary(TokenizerConfig(size=64), PairsRows(pairs), writer(tmp_path))
    pairs.storage.remove("000000.parquet")
    assert commit_vocabulary(TokenizerConfig(size=64), PairsRows(pairs), writer(tmp_path)).digest == first.digest


def test_key_knows_the_file_by_its_contents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(VOCABULARY)
    (tmp_path / "b.txt").write_text(VOCABULARY)
    (tmp_path / "c.txt").write_text(VOCABULARY + "square\n")
    digests = [vocabulary_digest(TokenizerConfig(vocabulary=str(tmp_path / f"{name}.txt"))) for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    identities = [TokenizerConfig(vocabulary=str(tmp_path / f"{name}.txt")).identity() for name in "ab"]
    assert identities[0] == identities[1]


def test_missing_vocabulary_is_said_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt is missing"):
        vocabulary_digest(TokenizerConfig(vocabulary=str(tmp_path / "nowhere.txt")))


@pytest.mark.parametrize("text", ["red\ncircle\n", "", "\x89PNG\n", VOCABULARY + "red\n"])
def test_file_that_is_no_vocabulary_is_refused_on_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "wrong.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"tokenizer\.vocabulary .*wrong\.txt is not a WordPiece vocabulary") as caught:
        vocabulary_digest(TokenizerConfig(vocabulary=str(tmp_path / "wrong.txt")))
    assert "\n" not in str(caught.value)
