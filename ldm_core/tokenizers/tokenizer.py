"""Captions to token ids, cut and padded to one length.

One class holds every kind of tokenizer. A WordPiece over a plain vocabulary, as the paper's text-to-image model has it
(Sec. 4.3.1), is written as vocab.txt; any other as a tokenizer.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ldm_core.model_files import TOKENIZER_FILE, VOCABULARY_FILE
from ldm_core.tokenizers.wordpiece import MAX_VOCABULARY_SIZE, PAD, parse_vocabulary, storable, wordpiece_backend

# The class of the `tokenizers` package is imported where it is used: ldm_core imports without optional libraries.
if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class Tokenizer:
    """A tokenizer of the `tokenizers` package that cuts and pads captions to one length.

    Args:
        backend: the package's tokenizer; its truncation and padding are set here.
        max_length: number of tokens that a caption is cut or padded to, special tokens included.
        pad_token: token that captions are padded with; None keeps the backend's own.
        vocabulary: for BERT's WordPiece, its tokens in the order of their ids, which say everything about it; None for
            any other kind.

    Raises:
        ValueError: max_length < 2, the padding token is unknown or absent, or ids do not fit uint16.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_length: int = 77,
        pad_token: str | None = None,
        vocabulary: Sequence[str] | None = None,
    ) -> None:
        if max_length < 2:
            raise ValueError(f"max_length must leave room for the first and last token, got {max_length}")
        pad_token = pad_token or (backend.padding or {}).get("pad_token")
        pad_id = None if pad_token is None else backend.token_to_id(pad_token)
        if pad_id is None:
            raise ValueError(f"a tokenizer must know its padding token, got {pad_token!r}: give pad_token")
        if backend.get_vocab_size() > MAX_VOCABULARY_SIZE:
            raise ValueError(
                f"a vocabulary may hold {MAX_VOCABULARY_SIZE} tokens (ids are uint16), got {backend.get_vocab_size()}"
            )
        backend.enable_truncation(max_length)
        backend.enable_padding(length=max_length, pad_id=pad_id, pad_token=pad_token)
        self.max_length = max_length
        self.pad_id: int = pad_id
        self.vocabulary = None if vocabulary is None else list(vocabulary)
        self._backend = backend

    @classmethod
    def from_vocabulary(cls, vocabulary: Sequence[str], *, max_length: int = 77) -> Tokenizer:
        """Build BERT's WordPiece over a list of tokens, e.g. the result of `wordpiece.build_vocabulary`.

        Args:
            vocabulary: distinct tokens, BERT's five special ones among them; a token's place is its id, and "##" marks
                the continuation of a word.
            max_length: number of tokens that a caption is cut or padded to, [CLS] and [SEP] included.

        Raises:
            ValueError: a special token is missing, a token is empty or repeated, or ids do not fit uint16.
        """
        backend = wordpiece_backend(vocabulary)
        return cls(backend, max_length=max_length, pad_token=PAD, vocabulary=vocabulary)

    @classmethod
    def from_vocabulary_bytes(cls, data: bytes, *, source: str, max_length: int = 77) -> Tokenizer:
        """Build BERT's WordPiece from the content of a vocab.txt, one token per line; `source` names it in errors.

        Raises:
            ValueError: the content is not UTF-8 or not a vocabulary.
        """
        return cls.from_vocabulary(parse_vocabulary(data, source=source), max_length=max_length)

    @classmethod
    def from_vocabulary_file(cls, path: str | Path, *, max_length: int = 77) -> Tokenizer:
        """Read BERT's WordPiece from a vocab.txt, one token per line, as BERT publishes it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not UTF-8 or not a vocabulary.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no vocabulary file at {path}: give the path of a vocab.txt")
        return cls.from_vocabulary_bytes(path.read_bytes(), source=str(path), max_length=max_length)

    @classmethod
    def from_json(cls, text: str, *, max_length: int = 77, pad_token: str | None = None) -> Tokenizer:
        """Build a tokenizer of any kind from the content of a tokenizer.json.

        Raises:
            ValueError: the text is no tokenizer, its padding token is unknown or absent, or ids do not fit uint16.
        """
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(text)
        except Exception as error:  # the package raises plain Exception
            raise ValueError(f"a tokenizer must be a whole tokenizer.json, this one is not: {error}") from error
        return cls(backend, max_length=max_length, pad_token=pad_token)

    @classmethod
    def from_json_file(cls, path: str | Path, *, max_length: int = 77, pad_token: str | None = None) -> Tokenizer:
        """Read a tokenizer of any kind from a tokenizer.json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: as `from_json`.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}: give the path of a tokenizer.json")
        return cls.from_json(path.read_text(encoding="utf-8"), max_length=max_length, pad_token=pad_token)

    def with_pad_token(self, pad_token: str) -> Tokenizer:
        """Return the same tokenizer with another padding token. Raises ValueError for a token it does not know."""
        return type(self).from_json(self._backend.to_str(), max_length=self.max_length, pad_token=pad_token)

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
        return self._backend.get_vocab_size()

    @property
    def is_wordpiece(self) -> bool:
        """True for BERT's WordPiece, which its vocabulary describes completely."""
        return self.vocabulary is not None

    @property
    def file_name(self) -> str:
        """Name of the file that this kind of tokenizer is kept in: vocab.txt or tokenizer.json."""
        return VOCABULARY_FILE if self.is_wordpiece else TOKENIZER_FILE

    @property
    def digest(self) -> str:
        """sha256 (hex) of the tokenizer as `write` writes it."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def encode(self, captions: Sequence[str]) -> npt.NDArray[np.uint16]:
        """Return the token ids of captions, cut and padded to max_length.

        Args:
            captions: N strings; the empty string is the empty caption of classifier-free guidance.

        Returns:
            (N, max_length) uint16.

        Raises:
            TypeError: one string is given instead of a list.
        """
        if isinstance(captions, str):
            raise TypeError("encode takes a list of captions, got one string: write [caption]")
        encodings = self._backend.encode_batch([storable(caption) for caption in captions])
        return np.array([encoding.ids for encoding in encodings], dtype=np.uint16).reshape(-1, self.max_length)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a tokenizer.json, whatever the kind."""
        content: dict[str, Any] = json.loads(self._backend.to_str())
        return content

    def to_bytes(self) -> bytes:
        """Return the content of the file that the tokenizer is kept in, see `file_name`."""
        if self.vocabulary is not None:
            return "".join(f"{token}\n" for token in self.vocabulary).encode("utf-8")
        return (self._backend.to_str(pretty=True) + "\n").encode("utf-8")

    def write(self, path: str | Path) -> None:
        """Write the tokenizer as a vocab.txt or tokenizer.json, see `file_name`."""
        Path(path).write_bytes(self.to_bytes())
