"""Filters: each rule leaves out what it says, and its name is the status."""

from typing import Any

import pytest

from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.filters import check_row, check_values, column_filters
from pipelines.stages.pairs.rows import RejectedError, Row
from pipelines.store.ledger import artifact_key


def status(filters: dict[str, Any], captions: tuple[str, ...] = ("a red circle",), **extra: Any) -> str:
    try:
        check_row(Row(index=0, captions=captions, extra=extra), config(filters))
    except RejectedError as error:
        return error.status
    return "ok"


def config(filters: dict[str, Any]) -> PairsConfig:
    return PairsConfig.model_validate({"source": "x", "filters": filters})


@pytest.mark.parametrize(
    ("rule", "value", "passes"),
    [
        ({"min": 0.3}, 0.3, True),
        ({"min": 0.3}, 0.29, False),
        ({"max": 0.1}, "0.05", True),
        ({"max": 0.1}, "not a number", False),
        ({"min": 0.3}, None, False),
        ({"min": 0.3}, float("nan"), False),
        ({"min": 0.3}, "nan", False),
        ({"min": 0.3}, 10**400, False),
        ({"min": 0.3, "keep_missing": True}, None, True),
        ({"min": 1, "max": 2}, 3, False),
        ({"one_of": ["EN", "de"]}, "en", True),
        ({"one_of": ["EN", "de"]}, "fr", False),
        ({"not_one_of": ["NSFW"]}, "nsfw", False),
        ({"matches": r"\d+"}, "route 66", True),
        ({"matches": r"^\d+$"}, "route 66", False),
        ({"not_matches": "(?i)click here"}, "Click HERE now", False),
        ({"not_matches": "(?i)click here"}, "a cat", True),
    ],
)
def test_a_rule_judges_one_value(rule: dict[str, Any], value: Any, passes: bool) -> None:
    assert status({"score": rule}, Score=value) == ("ok" if passes else "filtered:score")


def test_columns_are_found_under_the_names_that_data_sets_use() -> None:
    assert status({"similarity": {"min": 0.3}}, clip_similarity_vitl14=0.2) == "filtered:similarity"
    assert status({"aesthetic": {"min": 5}}, aesthetic_score_laion_v2=6.1) == "ok"
    assert status({"punsafe": {"max": 0.1}}, pwatermark=0.9) == "filtered:punsafe"


def test_captions_are_measured() -> None:
    assert status({"caption_words": {"min": 4}}) == "filtered:caption_words"
    assert status({"caption_characters": {"max": 12}}) == "ok"
    assert status({"caption": {"not_matches": "circle"}}) == "filtered:caption"
    # The first caption is the one that is stored as the text.
    assert status({"caption_words": {"max": 2}}, captions=("two words", "and many more of them")) == "ok"


def test_pictures_and_models_are_judged_where_their_values_are_known() -> None:
    rules = {"width": {"min": 100}, "aspect": {"max": 2}, "clip_score": {"min": 0.2}, "entropy": {"min": 3}}
    values = {"source": "x", "filters": rules, "scoring": {"clip": "folder"}}
    judged = PairsConfig.model_validate(values)
    assert column_filters(judged) == {}
    check_values({"width": 100, "height": 3, "aspect": 2.0}, judged)
    for name, value in (("width", 99), ("aspect", 2.1), ("clip_score", 0.1), ("entropy", 0.0)):
        with pytest.raises(RejectedError, match=f"filtered:{name}"):
            check_values({name: value}, judged)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"filters": {"similarity": {}}}, "needs one of min, max"),
        ({"filters": {"caption": {"matches": "("}}}, "is not a regular expression"),
        ({"filters": {"clip_score": {"min": 0.2}}}, "needs a model: give pairs.scoring.clip"),
        ({"filters": {"aesthetic_score": {"min": 5}}, "scoring": {"clip": "x"}}, "needs pairs.scoring.aesthetic_head"),
        ({"near_duplicates": 3, "deduplicate": False}, "needs deduplicate: true"),
        ({"resize": "buckets", "image_size": 100}, "multiple of buckets.step, 64; got 100"),
        ({"download": {"allow_addresses": ["10.0.0.1/8"]}}, "takes networks"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairsConfig.model_validate({"source": "x", **values})


def test_the_order_of_the_recipe_decides_neither_the_status_nor_the_key() -> None:
    rules = {
        "size": {"min": 9},
        "caption_words": {"min": 9},
        "similarity": {"min": 9},
        "aspect": {"max": 0},
        "caption": {"matches": "square"},
        "punsafe": {"max": 0},
    }
    turned = dict(reversed(rules.items()))
    for filters in (rules, turned):
        row = {"similarity": 0.1, "punsafe": 0.5}
        assert status(filters, **row) == "filtered:punsafe", "columns come first, by name"
        assert status(filters, **(row | {"punsafe": 0})) == "filtered:similarity"
        assert status(filters, similarity=9, punsafe=0) == "filtered:caption"
        with pytest.raises(RejectedError, match="filtered:aspect"):
            check_values({"width": 8, "size": 8, "aspect": 1.0}, config(filters))
    assert artifact_key(config(rules).identity()) == artifact_key(config(turned).identity())
