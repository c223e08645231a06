"""The vocabulary behind cached token ids: a given file, or one built from the captions of the pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ldm_core.model_files import VOCABULARY_FILE
from pipelines.conditions.config import TokenizerConfig
from pipelines.errors import UserError
from pipelines.store.commits import ArtifactWriter
from pipelines.store.location import Location
from pipelines.store.storage import Storage, sha256_file

if TYPE_CHECKING:
    from ldm_core.tokenizers.tokenizer import Tokenizer
    from pipelines.conditions.kind import Rows

# Some hundred megabytes while words are counted. A vocabulary holds a few ten thousand of them, and is exact for data
# sets of fewer words than this.
MOST_WORDS = 1_000_000


def vocabulary_digest(config: TokenizerConfig) -> dict[str, str]:
    """Return the vocabulary's part of the artifact's key: the sha256 of a given file.

    Raises:
        UserError: the file is missing or is no vocabulary.
    """
    if config.vocabulary is None:
        return {}
    digest = sha256_file(config.vocabulary)
    # Read here as well, where the plan is made: nobody should train a first stage before learning that it is damaged.
    _tokenizer(Location.of(config.vocabulary).read(), config, origin=config.vocabulary)
    return {"vocabulary": digest}


def commit_vocabulary(config: TokenizerConfig, rows: Rows, writer: ArtifactWriter) -> Tokenizer:
    """Return the tokenizer over the committed `vocab.txt`, after writing that file if it is not committed yet.

    Args:
        config: the tokenizer's section of the recipe.
        rows: the samples of the pairs.
        writer: writes the artifact of latents.

    Raises:
        UserError: the given file is no vocabulary, or a table of the pairs is damaged.
    """
    writer.commit_once(VOCABULARY_FILE, lambda path: _make(config, rows).write(path))
    return load_vocabulary(writer.storage, config)


def load_vocabulary(storage: Storage, config: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer over an artifact's `vocab.txt`."""
    return _tokenizer(storage.read_bytes(VOCABULARY_FILE), config, origin=f"{storage.url}/{VOCABULARY_FILE}")


def _make(config: TokenizerConfig, rows: Rows) -> Tokenizer:
    from ldm_core.tokenizers.tokenizer import Tokenizer
    from ldm_core.tokenizers.wordpiece import vocabulary_of

    if config.vocabulary is not None:
        return _tokenizer(Location.of(config.vocabulary).read(), config, origin=config.vocabulary)
    # In the order of the shards: which words are forgotten depends on it, and a vocabulary must not depend on chance.
    words = vocabulary_of(_sum(rows.captions(_count)), size=config.size)
    return Tokenizer.from_vocabulary(words, max_length=config.max_length)


def _count(captions: Iterable[list[str]]) -> Counter[str]:
    # A plan digests the vocabulary, and does not wait for the tokenizers.
    from ldm_core.tokenizers.wordpiece import count_words

    return _sum(map(count_words, captions))


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """Add counts of words; of more words than MOST_WORDS those that are rare so far are forgotten."""
    from ldm_core.tokenizers.wordpiece import most_frequent

    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
        # Not at every word above the limit: forgetting costs a sort.
        if len(total) > 2 * MOST_WORDS:
            total = Counter({word: total[word] for word in most_frequent(total)[:MOST_WORDS]})
    return total


def _tokenizer(data: bytes, config: TokenizerConfig, *, origin: str) -> Tokenizer:
    from ldm_core.tokenizers.tokenizer import Tokenizer

    try:
        return Tokenizer.from_vocabulary_bytes(data, source="it", max_length=config.max_length)
    except ValueError as error:
        raise UserError(
            f"condition.tokenizer.vocabulary {origin} is not a WordPiece vocabulary ({error}); "
            "give a vocab.txt with one token a line, or leave it out to build one from the captions"
        ) from error
