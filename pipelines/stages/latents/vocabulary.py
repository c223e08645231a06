"""The vocabulary of the cached token ids: a given file, or one built from the captions of the pairs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec

from pipelines.errors import UserError
from pipelines.stages.latents.config import TokenizerConfig
from pipelines.stages.pairs.artifact import all_captions
from pipelines.store.ledger import Artifact, ArtifactWriter
from pipelines.store.storage import Storage, sha256_file

if TYPE_CHECKING:
    from ldm_core.tokenizers.wordpiece import Tokenizer

VOCABULARY_FILE = "vocab.txt"


def vocabulary_digest(config: TokenizerConfig) -> dict[str, str]:
    """What the vocabulary adds to the artifact's key: the sha256 of a given file.

    Raises:
        UserError: the file is missing or is no vocabulary. Said here, where the key is made, so that nobody
            waits for a first stage to train before learning it.
    """
    if config.vocabulary is None:
        return {}
    digest = sha256_file(config.vocabulary)
    with fsspec.open(config.vocabulary, "rb") as file:
        _tokenizer(file.read(), config, origin=config.vocabulary)
    return {"vocabulary": digest}


def commit_vocabulary(config: TokenizerConfig, pairs: Artifact, writer: ArtifactWriter) -> Tokenizer:
    """The tokenizer over the committed `vocab.txt`, which is written first where it is not yet there.

    Raises:
        UserError: the given file is no vocabulary, or a shard of the pairs is damaged.
    """
    if VOCABULARY_FILE not in writer.committed():
        with writer.storage.writer(VOCABULARY_FILE) as path:
            _make(config, pairs).write(path)
        writer.commit(VOCABULARY_FILE)
    return load_vocabulary(writer.storage, config)


def load_vocabulary(storage: Storage, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer over an artifact's `vocab.txt`."""
    return _tokenizer(storage.read_bytes(VOCABULARY_FILE), config, origin=f"{storage.url}/{VOCABULARY_FILE}")


def _make(config: TokenizerConfig, pairs: Artifact) -> Tokenizer:
    from ldm_core.tokenizers.wordpiece import Tokenizer, build_vocabulary

    if config.vocabulary is not None:
        with fsspec.open(config.vocabulary, "rb") as file:
            return _tokenizer(file.read(), config, origin=config.vocabulary)
    words = build_vocabulary(all_captions(pairs), size=config.size)
    return Tokenizer.from_vocabulary(words, max_length=config.max_length)


def _tokenizer(data: bytes, config: TokenizerConfig, *, origin: str) -> Tokenizer:
    from ldm_core.tokenizers.wordpiece import Tokenizer

    # The tokenizer reads a local file; the vocabulary may lie in a bucket.
    with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
        path = Path(folder) / VOCABULARY_FILE
        path.write_bytes(data)
        try:
            return Tokenizer.from_vocabulary_file(path, max_length=config.max_length)
        except ValueError as error:
            reason = str(error).replace(str(path), "it")
            raise UserError(
                f"latents.tokenizer.vocabulary {origin} is not a WordPiece vocabulary ({reason}); "
                "give a vocab.txt with one token a line, or leave it out to build one from the captions"
            ) from error
