"""The CLIP tokenizer that open_clip ships."""

from __future__ import annotations

from ldm_core.tokenizers.from_file import FileTokenizer


def open_clip_tokenizer(*, max_length: int = 77) -> FileTokenizer:
    """CLIP's tokenizer from the vocabulary that the open_clip package ships, padding with id 0 as OpenCLIP does."""
    import gzip

    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    original = SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): index for token, index in original.encoder.items()}
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    # After the header, as many merges as there are tokens beyond 2 x 256 bytes and the two special ones.
    merges = lines[1 : len(vocabulary) - 2 * 256 - 2 + 1]
    return FileTokenizer.clip(vocabulary, merges, max_length=max_length, pad_token="!")
