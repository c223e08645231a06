"""The vocabulary behind the cached token ids: a given file, or one built from the captions of the pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ldm_core.model_files import VOCABULARY_FILE
from pipelines.errors import UserError
from pipelines.stages.latents.config import TokenizerConfig
from pipelines.stages.pairs.artifact import all_captions
from pipelines.store.ledger import Artifact, ArtifactWriter
from pipelines.store.location import Location
from pipelines.store.storage import Storage, sha256_file

if TYPE_CHECKING:
    from ldm_core.tokenizers.tokenizer import Tokenizer


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


def commit_vocabulary(config: TokenizerConfig, pairs: Artifact, writer: ArtifactWriter) -> Tokenizer:
    """Return the tokenizer over the committed `vocab.txt`, after writing that file if it is not committed yet.

    Raises:
        UserError: the given file is no vocabulary, or a shard of the pairs is damaged.
    """
    writer.commit_once(VOCABULARY_FILE, lambda path: _make(config, pairs).write(path))
    return load_vocabulary(writer.storage, config)


def load_vocabulary(storage: Storage, config: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer over an artifact's `vocab.txt`."""
    return _tokenizer(storage.read_bytes(VOCABULARY_FILE), config, origin=f"{storage.url}/{VOCABULARY_FILE}")


def _make(config: TokenizerConfig, pairs: Artifact) -> Tokenizer:
    from ldm_core.tokenizers.tokenizer import Tokenizer
    from ldm_core.tokenizers.wordpiece import build_vocabulary

    if config.vocabulary is not None:
        return _tokenizer(Location.of(config.vocabulary).read(), config, origin=config.vocabulary)
    words = build_vocabulary(all_captions(pairs), size=config.size)
    return Tokenizer.from_vocabulary(words, max_length=config.max_length)


def _tokenizer(data: bytes, config: TokenizerConfig, *, origin: str) -> Tokenizer:
    from ldm_core.tokenizers.tokenizer import Tokenizer

    try:
        return Tokenizer.from_vocabulary_bytes(data, source="it", max_length=config.max_length)
    except ValueError as error:
        raise UserError(
            f"latents.tokenizer.vocabulary {origin} is not a WordPiece vocabulary ({error}); "
            "give a vocab.txt with one token a line, or leave it out to build one from the captions"
        ) from error
