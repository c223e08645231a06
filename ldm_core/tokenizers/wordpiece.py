"""BERT's lower-casing WordPiece, as in the paper's text-to-image model (Sec. 4.3.1).

Given BERT's vocabulary the ids are those of `bert-base-uncased`; `build_vocabulary` makes one for a small data set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from tokenizers.normalizers import BertNormalizer

PAD, UNKNOWN, START, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL_TOKENS = (PAD, UNKNOWN, START, END, MASK)
# Ids are stored as uint16 in the latent shards.
MAX_VOCABULARY_SIZE = 2**16
# WordPiece answers [UNK] for longer words, so they are no use in a vocabulary.
MAX_WORD_CHARACTERS = 100


def wordpiece_backend(vocabulary: Sequence[str]) -> Backend:
    """Build the `tokenizers` package's WordPiece as BERT has it: [CLS] words [SEP].

    Raises:
        ValueError: a special token is missing, a token is empty or repeated, or ids do not fit uint16.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import BertProcessing

    _check_vocabulary(vocabulary)
    ids = {token: index for index, token in enumerate(vocabulary)}
    backend = Backend(WordPiece(ids, unk_token=UNKNOWN, max_input_chars_per_word=MAX_WORD_CHARACTERS))
    backend.normalizer = _normalizer()
    backend.pre_tokenizer = BertPreTokenizer()
    backend.post_processor = BertProcessing((END, ids[END]), (START, ids[START]))
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return backend


def parse_vocabulary(data: bytes, *, source: str) -> list[str]:
    """Return the tokens of a vocab.txt from its content; `source` names it in the error.

    Raises:
        ValueError: the content is not UTF-8.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"a vocabulary file must be UTF-8 text, {source} is not: {error.reason}") from error
    # Not splitlines(): tokens may be characters that Unicode takes for line ends.
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def build_vocabulary(captions: Iterable[str], *, size: int) -> list[str]:
    """Build a WordPiece vocabulary of whole words: `vocabulary_of` the words of these captions."""
    return vocabulary_of(count_words(captions), size=size)


def vocabulary_of(words: Mapping[str, int], *, size: int) -> list[str]:
    """Build a WordPiece vocabulary of whole words for a small data set.

    The special tokens come first, then the characters seen and their continuations (at most half of the remaining
    room, so that rare words can be spelt out), then the most frequent words. Ties are broken alphabetically, so the
    result depends on the multiset of captions alone.

    Args:
        words: how often each word occurs in the data set's captions, as `count_words` counts them.
        size: largest number of tokens in the vocabulary.

    Returns:
        At most `size` distinct tokens.

    Raises:
        ValueError: unless 16 <= size <= 65536.
    """
    # Not `tokenizers.trainers.WordPieceTrainer`: it merges pairs as BPE does, so that a small vocabulary fills up with
    # word pieces, and it would change the bytes of vocab.txt, on which the artifacts' keys depend.
    if not 16 <= size <= MAX_VOCABULARY_SIZE:
        raise ValueError(f"vocabulary size must be between 16 and {MAX_VOCABULARY_SIZE}, got {size}")
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    vocabulary = list(SPECIAL_TOKENS)
    # Each character takes two tokens: at the start of a word and, marked by ##, within it.
    room_for_characters = (size - len(vocabulary)) // 4
    spelt = sorted(most_frequent(characters)[:room_for_characters])
    vocabulary += spelt + [f"##{character}" for character in spelt]
    known = set(vocabulary)
    new_words = [word for word in most_frequent(words) if word not in known]
    return vocabulary + new_words[: size - len(vocabulary)]


def storable(caption: str) -> str:
    """Replace lone surrogates, which JSON can smuggle in and UTF-8 cannot hold."""
    return caption.encode("utf-8", "replace").decode("utf-8")


def count_words(captions: Iterable[str]) -> Counter[str]:
    """Count how often each word occurs, words being what BERT splits a caption into before WordPiece."""
    from tokenizers.pre_tokenizers import BertPreTokenizer

    normalizer, splitter = _normalizer(), BertPreTokenizer()
    words: Counter[str] = Counter()
    for caption in captions:
        normalized = normalizer.normalize_str(storable(caption))
        words.update(word for word, _ in splitter.pre_tokenize_str(normalized))
    return Counter({word: count for word, count in words.items() if len(word) <= MAX_WORD_CHARACTERS})


def most_frequent(counts: Mapping[str, int]) -> list[str]:
    """Return words by falling frequency, ties in alphabetical order."""
    return sorted(counts, key=lambda item: (-counts[item], item))


def _normalizer() -> BertNormalizer:
    """Return BERT's normalizer: no control characters, spaces around Chinese characters, no accents, lower case."""
    from tokenizers.normalizers import BertNormalizer

    # strip_accents=None follows `lowercase`, as in BERT.
    return BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True)


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
