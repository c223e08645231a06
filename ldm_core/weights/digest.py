"""The sha256 of files, which caches are keyed by and results are reported with."""

import hashlib
from collections.abc import Sequence
from pathlib import Path


def sha256_of_files(paths: Sequence[Path]) -> str:
    """Return the sha256 (hex) of one file; of several, the sha256 of their digests in this order."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()
