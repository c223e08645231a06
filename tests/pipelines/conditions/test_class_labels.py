"""Classes: their names, what is cached of them, what is trained on, and what is asked for."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_core import presets
from ldm_core.configs.conditioning import ClassConfig
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.unet import UNetConfig
from pipelines.conditions.class_labels import CLASS, ClassLabels, ClassPrompts
from pipelines.conditions.config import ClassCondition
from pipelines.conditions.examples import ClassExamples
from pipelines.conditions.kind import Pair
from pipelines.errors import UserError
from pipelines.store.commits import ArtifactWriter
from pipelines.store.storage import Storage
from tests.tiny import TINY_UNET


class Values:
    """Rows whose values are these lists, one a shard."""

    def __init__(self, *shards: list[Any]) -> None:
        self.shards = shards

    def captions(self, summarise: Callable[[Iterable[list[str]]], Any]) -> Iterator[Any]:
        raise AssertionError("classes need no captions")

    def values(self, column: str, summarise: Callable[[Iterable[list[Any]]], Any]) -> Iterator[Any]:
        return iter([summarise([shard]) for shard in self.shards])


def prepared(folder: Path, *shards: list[Any], **settings: Any) -> tuple[ClassLabels, Storage]:
    kind = ClassLabels(ClassCondition(kind="class", **settings))
    writer = ArtifactWriter("latents", "key", Storage(str(folder)))
    kind.prepare(Values(*shards), writer)
    return kind, writer.storage


@pytest.mark.parametrize(
    ("shards", "names"),
    [
        ([["hat", "dress"], ["shirt", "hat"]], ["dress", "hat", "shirt"]),
        ([[10, 9], [2]], ["2", "9", "10"]),
        ([["b", 3]], ["3", "b"]),
    ],
)
def test_classes_are_those_of_the_pairs_in_order(shards: list[list[Any]], names: list[str], tmp_path: Path) -> None:
    kind, storage = prepared(tmp_path, *shards)
    assert storage.read_json("classes.json") == names
    assert kind.details(storage) == {"classes": len(names)}


def test_given_classes_keep_their_order_and_may_be_more_than_there_are(tmp_path: Path) -> None:
    kind, storage = prepared(tmp_path, ["hat"], classes=("shirt", "hat"))
    assert storage.read_json("classes.json") == ["shirt", "hat"]
    files = kind.encoder(storage, "cpu", None).encode([Pair("k", {"label": "hat"})])
    label = kind.examples(_Latents(storage)).decode(files[0])[0]  # type: ignore[arg-type]
    assert (label.shape, label.dtype, int(label)) == ((), np.int32, 1)


class _Latents:
    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.details = {"classes": len(storage.read_json("classes.json"))}


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        (["hat", None], {}, "some pairs have no 'label', which names their class: leave them out with a rule on it"),
        (["hat", 1.5], {}, "some pairs have no 'label'"),
        (["hat", "cap"], {"classes": ("hat",)}, "condition.classes lacks cap, which pairs have as 'label': add them"),
    ],
)
def test_missing_and_unknown_labels_are_refused_in_one_line(
    values: list[Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, values, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_of_captions_is_no_column_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.conditions.class_labels.MOST_CLASSES", 3)
    with pytest.raises(UserError, match=r"more than 3 distinct values, too many for classes: set condition\.column"):
        prepared(tmp_path, ["a", "b"], ["c", "d"])


def test_classes_are_dropped_as_often_as_configured() -> None:
    examples = ClassExamples(CLASS, 10, 0.25)
    uniform = np.random.default_rng(0).random(8000)
    labels = [np.array(number % 10, np.int32) for number in range(8000)]
    drawn = examples.batch(labels, uniform)["labels"]
    assert (drawn == 10).mean() == pytest.approx(0.25, abs=0.02)
    kept = drawn != 10
    assert np.array_equal(drawn[kept], (np.arange(8000) % 10)[kept])


def model(**settings: Any) -> LatentDiffusionConfig:
    return LatentDiffusionConfig(
        first_stage=presets.first_stage("tiny-kl-f8"),
        unet=UNetConfig(**TINY_UNET),
        conditioner=ClassConfig(width=TINY_UNET["context_dim"], **settings),
    )


def test_a_model_knows_its_classes_by_name(tmp_path: Path) -> None:
    kind, storage = prepared(tmp_path, ["hat", "dress"])
    config = kind.conditioner(_Latents(storage), UNetConfig(**TINY_UNET))  # type: ignore[arg-type]
    assert config == ClassConfig(classes=3, width=32, unconditional_class=True, names=("dress", "hat"))
    whole = model(classes=3, unconditional_class=True, names=("dress", "hat"))
    again = LatentDiffusionConfig.from_dict(whole.to_dict())
    assert again == whole
    prompts = ClassPrompts(again.conditioner)
    assert prompts.inputs(["hat", " dress ", ""]).tolist() == [1, 0, 2]
    assert prompts.unconditional() is not None
    with pytest.raises(UserError, match="names of classes, and 'hats' is none; did you mean 'hat'"):
        prompts.inputs(["hats"])


def test_a_model_without_names_is_asked_by_number_and_one_without_a_null_class_cannot_be_asked_for_nothing() -> None:
    prompts = ClassPrompts(ClassConfig(classes=5, width=8))
    assert prompts.inputs(["4"]).tolist() == [4]
    assert prompts.unconditional() is None
    for wrong in ("5", "-1", "hat", ""):
        with pytest.raises(UserError, match="its classes are 0 to 4"):
            prompts.inputs([wrong])


def test_as_many_names_as_labels() -> None:
    with pytest.raises(ValueError, match="names must be one a label, 2, got 1"):
        ClassConfig(classes=3, width=8, unconditional_class=True, names=("hat",))
