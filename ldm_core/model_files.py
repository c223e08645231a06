"""Names of the files in a model folder; imported without torch."""

WEIGHTS_STEM = "model"
WEIGHTS_FILE = f"{WEIGHTS_STEM}.safetensors"
# Beside the shards model-00001-of-0000N.safetensors, instead of one weights file.
WEIGHTS_INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
CONFIG_FILE = "config.json"
# BERT's WordPiece is one token per line; every other tokenizer is a JSON of the `tokenizers` library.
VOCABULARY_FILE = "vocab.txt"
TOKENIZER_FILE = "tokenizer.json"
# Patterns of everything that belongs to a model.
MODEL_FILES = (f"{WEIGHTS_STEM}*.safetensors", WEIGHTS_INDEX_FILE, CONFIG_FILE, "vocab*.txt", "tokenizer*.json")


def numbered(name: str, number: int) -> str:
    """Return the name of a tokenizer's file: as it is for a model's first one, `tokenizer_2.json` for the second."""
    stem, dot, extension = name.rpartition(".")
    return f"{stem}_{number + 1}{dot}{extension}" if number else name
