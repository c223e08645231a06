"""Captions to token ids by any tokenizer that comes as a file: tokenizer.json, or CLIP's vocabulary and merges.

The BERT tokenizer of the paper's own text transformer is in `tokenizer`. Needs the `tokenizers` package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ldm_core.tokenizers.wordpiece import MAX_VOCABULARY_SIZE, storable

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
# Words, single digits, and runs of other symbols (Radford et al. 2021).
CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class FileTokenizer:
    """A tokenizer of the `tokenizers` package, cutting and padding captions to one length.

    Args:
        text: the content of a tokenizer.json.
        max_length: tokens a caption is cut or padded to, special tokens included.
        pad_token: fills captions up; None keeps the file's own padding token.

    Raises:
        ValueError: the text is no tokenizer, the padding token is unknown or absent, or ids do not fit uint16.
    """

    def __init__(self, text: str, *, max_length: int = 77, pad_token: str | None = None) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(text)
        except Exception as error:  # the package raises plain Exception
            raise ValueError(f"a tokenizer must be a whole tokenizer.json, this one is not: {error}") from error
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
        self._backend = backend

    @classmethod
    def from_file(cls, path: str | Path, *, max_length: int = 77, pad_token: str | None = None) -> FileTokenizer:
        """The tokenizer of a tokenizer.json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a tokenizer.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}: give the path of a tokenizer.json")
        return cls(path.read_text(encoding="utf-8"), max_length=max_length, pad_token=pad_token)

    @classmethod
    def clip(
        cls, vocabulary: dict[str, int], merges: Sequence[str], *, max_length: int = 77, pad_token: str = CLIP_END
    ) -> FileTokenizer:
        """CLIP's lower-casing byte-pair encoding.

        Args:
            vocabulary: id of every token, vocab.json.
            merges: pairs of tokens, best first, the lines of merges.txt without its header.
            max_length: tokens a caption is cut or padded to.
            pad_token: OpenAI's models were trained with the end token, OpenCLIP's with "!", id 0.

        Raises:
            ValueError: the vocabulary lacks the start or end token.
        """
        from tokenizers import Regex
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE
        from tokenizers.normalizers import NFC, Lowercase, Replace
        from tokenizers.normalizers import Sequence as Normalizers
        from tokenizers.pre_tokenizers import ByteLevel, Split
        from tokenizers.pre_tokenizers import Sequence as Splitters
        from tokenizers.processors import RobertaProcessing

        missing = [token for token in (CLIP_START, CLIP_END) if token not in vocabulary]
        if missing:
            raise ValueError(f"a CLIP vocabulary must hold {CLIP_START} and {CLIP_END}, it lacks {', '.join(missing)}")
        pairs = [(first, second) for first, second in (line.split() for line in merges)]
        backend = Backend(
            BPE(vocabulary, pairs, unk_token=CLIP_END, continuing_subword_prefix="", end_of_word_suffix="</w>")
        )
        backend.normalizer = Normalizers([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])
        backend.pre_tokenizer = Splitters(
            [Split(Regex(CLIP_PATTERN), behavior="removed", invert=True), ByteLevel(add_prefix_space=False)]
        )
        backend.post_processor = RobertaProcessing(
            (CLIP_END, vocabulary[CLIP_END]),
            (CLIP_START, vocabulary[CLIP_START]),
            trim_offsets=False,
            add_prefix_space=False,
        )
        backend.add_special_tokens([CLIP_START, CLIP_END])
        return cls(backend.to_str(), max_length=max_length, pad_token=pad_token)

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
        size: int = self._backend.get_vocab_size()
        return size

    @property
    def digest(self) -> str:
        """sha256 (hex) of the tokenizer as `write` writes it."""
        return hashlib.sha256(self._file_bytes()).hexdigest()

    def encode(self, captions: Sequence[str]) -> npt.NDArray[np.uint16]:
        """Token ids of captions, cut and padded to max_length.

        Args:
            captions: N strings; the empty string is the empty caption of classifier-free guidance.

        Returns:
            (N, max_length) uint16.

        Raises:
            TypeError: when given one string instead of a list.
        """
        if isinstance(captions, str):
            raise TypeError("encode takes a list of captions, got one string: write [caption]")
        encodings = self._backend.encode_batch([storable(caption) for caption in captions])
        return np.array([encoding.ids for encoding in encodings], dtype=np.uint16).reshape(-1, self.max_length)

    def write(self, path: str | Path) -> None:
        """Write it as a tokenizer.json, padding and length included."""
        Path(path).write_bytes(self._file_bytes())

    def _file_bytes(self) -> bytes:
        text: str = self._backend.to_str(pretty=True)
        return (text + "\n").encode("utf-8")


def tokenizer_from_folder(folder: str | Path, *, max_length: int = 77) -> FileTokenizer:
    """The tokenizer of a folder of the transformers library: tokenizer.json, or CLIP's vocab.json and merges.txt.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the files are no tokenizer.
    """
    folder = Path(folder)
    pad_token = _pad_token(folder)
    if (folder / "tokenizer.json").is_file():
        return FileTokenizer.from_file(folder / "tokenizer.json", max_length=max_length, pad_token=pad_token)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise FileNotFoundError(f"no tokenizer in {folder}: it needs tokenizer.json, or vocab.json and merges.txt")
    lines = merges.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#version")]
    ids = json.loads(vocabulary.read_text(encoding="utf-8"))
    return FileTokenizer.clip(ids, lines, max_length=max_length, pad_token=pad_token or CLIP_END)


def _pad_token(folder: Path) -> str | None:
    """The padding token that the folder's settings name."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            token = json.loads((folder / name).read_text(encoding="utf-8")).get("pad_token")
            if token is not None:
                return token["content"] if isinstance(token, dict) else str(token)
    return None
