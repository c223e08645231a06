"""Captions to token ids. Needs the `tokenizers` package, which is imported when a tokenizer is built.

tokenizer      the tokenizer itself, whatever its kind: cut, pad, write, read
wordpiece      BERT's WordPiece, as the paper's text transformer reads captions; a vocabulary for a small data set
clip           CLIP's byte-pair encoding; the one that open_clip ships
from_folder    a tokenizer as the transformers library keeps it
"""
