"""The recipe's `filters`: rules about a row's columns, its caption and its picture that leave rows out.

A row that breaks several rules has the status of the first. They are applied by kind (columns, caption, picture, model)
and by name, never in the order of the recipe, which the artifact's key does not know.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from pipelines.stages.pairs.config import PairsConfig, Rule
from pipelines.stages.pairs.rows import RejectedError, Row
from pipelines.stages.pairs.sources.columns import find_column

CAPTION_VALUES = frozenset({"caption", "caption_words", "caption_characters"})
PICTURE_VALUES = frozenset({"width", "height", "size", "aspect", "entropy", "sharpness"})
MODEL_VALUES = frozenset({"clip_score", "aesthetic_score"})


def column_filters(config: PairsConfig) -> dict[str, Rule]:
    """Return the rules about columns of the source, by name and in the order of names."""
    return {
        n: config.filters[n] for n in sorted(config.filters.keys() - CAPTION_VALUES - PICTURE_VALUES - MODEL_VALUES)
    }


def check_row(row: Row, config: PairsConfig) -> None:
    """Apply the rules about a row's columns and caption, before its picture is fetched.

    Raises:
        RejectedError: `filtered:NAME` of the first rule that fails.
    """
    if not config.filters:
        return
    for name, rule in column_filters(config).items():
        column = _column(tuple(row.extra), name)
        _check(name, rule, row.extra[column] if column is not None else None)
    caption = row.captions[0] if row.captions else ""
    check_values(
        {"caption": caption, "caption_words": len(caption.split()), "caption_characters": len(caption)}, config
    )


# All rows of a source have the same columns, and names are compared in many spellings.
@functools.lru_cache(maxsize=1024)
def _column(names: tuple[str, ...], wanted: str) -> str | None:
    return find_column(names, wanted)


def check_values(values: Mapping[str, Any], config: PairsConfig) -> None:
    """Apply the rules about these values in the order of names; other rules are not applied.

    Raises:
        RejectedError: `filtered:NAME` of the first rule that fails.
    """
    for name in sorted(config.filters.keys() & values.keys()):
        _check(name, config.filters[name], values[name])


def _check(name: str, rule: Rule, value: Any) -> None:
    if not _passes(rule, value):
        raise RejectedError(f"filtered:{name}")


def _passes(rule: Rule, value: Any) -> bool:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return rule.keep_missing
    if rule.min is not None or rule.max is not None:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return False
        if math.isnan(number):
            return rule.keep_missing
        if (rule.min is not None and number < rule.min) or (rule.max is not None and number > rule.max):
            return False
    text = str(value)
    folded = text.casefold()
    return not (
        (rule.one_of is not None and folded not in {item.casefold() for item in rule.one_of})
        or (rule.not_one_of is not None and folded in {item.casefold() for item in rule.not_one_of})
        or (rule.matches is not None and not re.search(rule.matches, text))
        or (rule.not_matches is not None and re.search(rule.not_matches, text))
    )
