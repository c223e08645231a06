"""Captions to token ids: BERT's lower-casing WordPiece, as in the paper's text-to-image model (Sec. 4.3.1).

Given BERT's vocabulary the ids are those of `bert-base-uncased`; small data sets can have a vocabulary of
their own. Needs the `tokenizers` package, imported where it is used.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers.normalizers import BertNormalizer

PAD, UNKNOWN, START, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL_TOKENS = (PAD, UNKNOWN, START, END, MASK)
# Ids are stored as uint16 in the latent shards.
MAX_VOCABULARY_SIZE = 2**16
# WordPiece answers [UNK] for longer words, so they are no use in a vocabulary.
MAX_WORD_CHARACTERS = 100


class Tokenizer:
    """WordPiece over a vocabulary of which a token's place is its id.

    Args:
        vocabulary: distinct tokens, with the five special ones of BERT among them; "##" marks a continuation.
        max_length: tokens a caption is cut or padded to, [CLS] and [SEP] included.

    Raises:
        ValueError: for a vocabulary without a special token, with a duplicate or an empty token, or with more
            tokens than uint16 holds, and for max_length < 2.
    """

    def __init__(self, vocabulary: Sequence[str], *, max_length: int = 77) -> None:
        _check_vocabulary(vocabulary)
        if max_length < 2:
            raise ValueError(f"max_length must leave room for [CLS] and [SEP], got {max_length}")
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import WordPiece
        from tokenizers.pre_tokenizers import BertPreTokenizer
        from tokenizers.processors import BertProcessing

        self.vocabulary = list(vocabulary)
        self.max_length = max_length
        ids = {token: index for index, token in enumerate(vocabulary)}
        backend = Backend(WordPiece(ids, unk_token=UNKNOWN, max_input_chars_per_word=MAX_WORD_CHARACTERS))
        backend.normalizer = _normalizer()
        backend.pre_tokenizer = BertPreTokenizer()
        backend.post_processor = BertProcessing((END, ids[END]), (START, ids[START]))
        backend.add_special_tokens(list(SPECIAL_TOKENS))
        backend.enable_truncation(max_length)
        backend.enable_padding(length=max_length, pad_id=ids[PAD], pad_token=PAD)
        self._backend = backend

    @classmethod
    def from_vocabulary(cls, vocabulary: Sequence[str], *, max_length: int = 77) -> "Tokenizer":
        """A tokenizer over a list of tokens, e.g. `build_vocabulary`'s."""
        return cls(vocabulary, max_length=max_length)

    @classmethod
    def from_vocabulary_file(cls, path: str | Path, *, max_length: int = 77) -> "Tokenizer":
        """A tokenizer over a vocab.txt, one token a line, as BERT publishes it.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is not UTF-8 or not a vocabulary.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no vocabulary file at {path}: give the path of a vocab.txt")
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"a vocabulary file must be UTF-8 text, {path} is not: {error.reason}") from error
        # Not splitlines(): tokens may be characters that Unicode takes for line ends.
        return cls(text.replace("\r\n", "\n").removesuffix("\n").split("\n"), max_length=max_length)

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
        return len(self.vocabulary)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the vocabulary as `write` writes it."""
        return hashlib.sha256(self._file_bytes()).hexdigest()

    def encode(self, captions: Sequence[str]) -> npt.NDArray[np.uint16]:
        """Token ids of captions: [CLS] words [SEP], cut to max_length, padded with [PAD].

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
        """Write the vocabulary as a vocab.txt."""
        Path(path).write_bytes(self._file_bytes())

    def _file_bytes(self) -> bytes:
        return "".join(f"{token}\n" for token in self.vocabulary).encode("utf-8")


def build_vocabulary(captions: Iterable[str], *, size: int) -> list[str]:
    """A WordPiece vocabulary of whole words for a small data set.

    The special tokens, then the characters seen with their continuations (at most half of the room, so that
    rare words can be spelt out), then the most frequent words. Ties are broken alphabetically, so the result
    depends on the multiset of captions alone.

    Args:
        captions: the data set's captions, each as often as it occurs.
        size: most tokens that the vocabulary may have.

    Returns:
        At most `size` distinct tokens.

    Raises:
        ValueError: unless 16 <= size <= 65536.
    """
    if not 16 <= size <= MAX_VOCABULARY_SIZE:
        raise ValueError(f"vocabulary size must be between 16 and {MAX_VOCABULARY_SIZE}, got {size}")
    words = _count_words(captions)
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    vocabulary = list(SPECIAL_TOKENS)
    room_for_characters = (size - len(vocabulary)) // 4
    spelt = sorted(_most_frequent(characters)[:room_for_characters])
    vocabulary += spelt + [f"##{character}" for character in spelt]
    known = set(vocabulary)
    new_words = [word for word in _most_frequent(words) if word not in known]
    return vocabulary + new_words[: size - len(vocabulary)]


def _count_words(captions: Iterable[str]) -> Counter[str]:
    """How often each word occurs, words being what BERT splits a caption into before WordPiece."""
    from tokenizers.pre_tokenizers import BertPreTokenizer

    normalizer, splitter = _normalizer(), BertPreTokenizer()
    words: Counter[str] = Counter()
    for caption in captions:
        normalized = normalizer.normalize_str(storable(caption))
        words.update(word for word, _ in splitter.pre_tokenize_str(normalized))
    return Counter({word: count for word, count in words.items() if len(word) <= MAX_WORD_CHARACTERS})


def _most_frequent(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda item: (-counts[item], item))


def _normalizer() -> "BertNormalizer":
    """BERT's cleaning of text: control characters, Chinese characters apart, accents off, lower case."""
    from tokenizers.normalizers import BertNormalizer

    return BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True)


def storable(caption: str) -> str:
    """The caption with lone surrogates (which JSON can smuggle in and UTF-8 cannot hold) replaced."""
    return caption.encode("utf-8", "replace").decode("utf-8")


def _check_vocabulary(vocabulary: Sequence[str]) -> None:
    if len(vocabulary) > MAX_VOCABULARY_SIZE:
        raise ValueError(f"a vocabulary may hold {MAX_VOCABULARY_SIZE} tokens (ids are uint16), got {len(vocabulary)}")
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(
            f"a BERT vocabulary must hold {', '.join(SPECIAL_TOKENS)}, "
            f"this one of {len(vocabulary)} tokens lacks {', '.join(missing)}"
        )
    repeated = [token for token, count in Counter(vocabulary).items() if count > 1]
    if repeated:
        raise ValueError(f"a vocabulary must hold each token once, got {repeated[0]!r} several times")
    if any(not token or "\n" in token for token in vocabulary):
        raise ValueError("a vocabulary must hold one token a line, got an empty token or one with a line break")
