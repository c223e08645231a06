"""Captions to token ids.

wordpiece    BERT's WordPiece, as the paper's text transformer reads captions
from_file    a tokenizer.json or a vocabulary that another program wrote
open_clip    CLIP's byte-pair encoding, with the vocabulary that open_clip ships
"""
