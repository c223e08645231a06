"""CLIP's lower-casing byte-pair encoding (Radford et al. 2021)."""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence

from ldm_core.tokenizers.tokenizer import Tokenizer

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
# Words, single digits, and runs of other symbols.
CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_tokenizer(
    vocabulary: Mapping[str, int], merges: Sequence[str], *, max_length: int = 77, pad_token: str = CLIP_END
) -> Tokenizer:
    """Build CLIP's tokenizer from its vocabulary and merges.

    Args:
        vocabulary: id of every token, the content of vocab.json.
        merges: pairs of tokens, best first: the lines of merges.txt without its header.
        max_length: number of tokens that a caption is cut or padded to.
        pad_token: padding token; OpenAI's models were trained with the end token, OpenCLIP's with "!", id 0.

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
        BPE(dict(vocabulary), pairs, unk_token=CLIP_END, continuing_subword_prefix="", end_of_word_suffix="</w>")
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
    return Tokenizer(backend, max_length=max_length, pad_token=pad_token)


def open_clip_tokenizer(*, max_length: int = 77) -> Tokenizer:
    """Build CLIP's tokenizer from the vocabulary in the open_clip package, padding with id 0 as OpenCLIP does."""
    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    original = SimpleTokenizer()
    # OpenCLIP's names of the two special tokens are not OpenAI's.
    renamed = {"<start_of_text>": CLIP_START, "<end_of_text>": CLIP_END}
    vocabulary = {renamed.get(token, token): index for token, index in original.encoder.items()}
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    # After the header, as many merges as there are tokens beyond 2 x 256 bytes and the two special ones.
    merges = lines[1 : len(vocabulary) - 2 * 256 - 2 + 1]
    return clip_tokenizer(vocabulary, merges, max_length=max_length, pad_token="!")
