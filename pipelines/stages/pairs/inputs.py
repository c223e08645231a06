"""The inputs of the pairs stage, digested for its key and counted for estimates; needs neither torch nor Ray."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.errors import UserError
from pipelines.stages.pairs.config import PairsConfig, Scoring
from pipelines.stages.pairs.rows import Source
from pipelines.stages.pairs.sources.open import open_listed, open_source
from pipelines.stages.pairs.sources.tars import TarSource
from pipelines.store.storage import sha256_file

_CLIP_FILES = re.compile(r".*\.(json|txt|safetensors|bin)")


def source_digests(config: PairsConfig) -> dict[str, str]:
    """Digest the source by its contents, and the files of the models that score samples."""
    source, listing = open_listed(config)
    return {"source": source.digest(listing, config.identify_by), **model_digests(config.scoring)}


def model_digests(scoring: Scoring | None) -> dict[str, str]:
    """Digest the files of the models that score samples.

    Raises:
        UserError: there is no such folder or file.
    """
    if scoring is None:
        return {}
    folder = Path(scoring.clip)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: pairs.scoring.clip must be the folder of a CLIP model")
    files = [path for path in sorted(folder.iterdir()) if _CLIP_FILES.fullmatch(path.name)]
    found = {f"clip/{path.name}": sha256_file(path) for path in files}
    if scoring.aesthetic_head is not None:
        found["aesthetic_head"] = sha256_file(scoring.aesthetic_head)
    return found


def count_rows(config: PairsConfig) -> int | None:
    """Count the input rows for estimates; None if that would mean reading the whole source over a network."""
    source = open_source(config)
    if isinstance(source, TarSource) and any("://" in url for url in source.urls):
        return None
    return limited_rows(source, config)


def limited_rows(source: Source, config: PairsConfig) -> int:
    """Return how many of the source's rows the recipe asks for."""
    total = source.total
    return total if config.limit is None else min(total, config.limit)
