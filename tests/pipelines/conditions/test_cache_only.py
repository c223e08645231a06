"""Layouts, semantic maps, small pictures and masked pictures: what is cached is read back as what it was made from."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from jobs.recipes import recipe_path
from ldm_core.conditioning import MaskedImage, MaskedImageConditioner, MaskedLatent
from ldm_core.configs.conditioning import Box, LayoutConfig, MaskedImageConfig
from ldm_core.images import to_unit_range
from pipelines.conditions.config import Condition
from pipelines.conditions.kind import Kind, Pair
from pipelines.conditions.kinds import kind_of
from pipelines.conditions.layout import decode_boxes
from pipelines.conditions.low_resolution import decode_small_picture
from pipelines.conditions.masked_image import decode_masked, draw_masks
from pipelines.conditions.semantic_map import decode_map
from pipelines.errors import MisuseError, UserError
from pipelines.run.plan import Selection, check
from pipelines.run.recipe import load_recipe
from pipelines.shards.format import read_shard
from pipelines.stages.autoencoder.artifact import load_first_stage
from pipelines.stages.pairs.artifact import decode_image
from pipelines.store.storage import Storage
from tests.tiny_artifacts import encoded_latents_artifact, first_stage_artifact, pairs_artifact

DEMO = recipe_path("demo")
# Of a source of 400 x 200 pixels its middle was stored, at a quarter of the size.
FACTS = {"original_width": 400, "original_height": 200, "width": 50, "height": 50}


def kind(**condition: Any) -> Kind:
    parsed: Any = TypeAdapter(Condition).validate_python(condition)
    return kind_of(parsed)


def encode(of: Kind, *pairs: Pair) -> list[dict[str, bytes]]:
    return of.encoder(Storage("unused"), "cpu", None).encode(pairs)


def boxes(*given: Any) -> list[dict[str, bytes]]:
    facts = {**FACTS, "boxes": list(given)}
    return encode(kind(kind="layout", classes=("cat", "dog")), Pair("k", facts))


def test_boxes_are_those_of_the_part_that_is_stored_and_make_the_tokens_of_the_layout() -> None:
    files = boxes(
        {"bbox": [150, 50, 100, 100], "category": "dog"},
        {"bbox": [0, 0, 200, 200], "label": "cat"},
        {"bbox": [0, 0, 90, 200], "category": "cat"},
    )
    found = decode_boxes(files[0])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[1, 0.25, 0.25, 0.5, 0.5], [0, 0, 0, 0.5, 1]])
    config = LayoutConfig(width=8, layers=1)
    made = [Box(label=int(label), x=x, y=y, width=w, height=h) for label, x, y, w, h in found.tolist()]
    assert config.encode(made).shape == (config.max_length,)


def test_a_picture_without_boxes_is_a_layout_without_objects() -> None:
    assert decode_boxes(boxes()[0]).shape == (0, 5)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ({"bbox": [1, 2, 3, 4], "category": "cow"}, "has a box of cow, which condition.classes lacks: add it"),
        ({"bbox": [1, 2, 3], "category": "cat"}, 'sample k needs boxes such as {"bbox": [x, y, width, height]'),
        ("cat", "sample k needs boxes such as"),
    ],
)
def test_a_box_that_is_none_is_refused_in_one_line(box: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        boxes(box)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pairs_without_a_column_of_boxes_are_refused() -> None:
    with pytest.raises(UserError, match=r"sample k needs a list of boxes as 'boxes', got None: set condition\.column"):
        encode(kind(kind="layout", classes=("cat",)), Pair("k", FACTS))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_semantic_map_is_cached_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 5, (8, 8), dtype=np.uint8)
    pair = Pair("k", {}, np.zeros((8, 8, 3), np.uint8), {"map.png": png(pixels)})
    files = encode(kind(kind="semantic_map", classes=5), pair)
    np.testing.assert_array_equal(decode_map(files[0]), pixels)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "sample k has no map.png, which condition semantic_map needs of its pairs"),
        ({"map.png": b"nothing"}, "map.png of sample k is no PNG of 8 bits a pixel"),
        ({"map.png": png(np.zeros((8, 8, 3), np.uint8))}, "map.png of sample k is no PNG of 8 bits a pixel: mode RGB"),
        ({"map.png": png(np.zeros((4, 8), np.uint8))}, "must have the picture's size (8, 8) and classes below 5"),
        ({"map.png": png(np.full((8, 8), 5, np.uint8))}, "got size (8, 8) and classes up to 5"),
    ],
)
def test_a_map_that_does_not_fit_its_picture_is_refused_in_one_line(files: dict[str, bytes], message: str) -> None:
    with pytest.raises(UserError) as caught:
        encode(kind(kind="semantic_map", classes=5), Pair("k", {}, np.zeros((8, 8, 3), np.uint8), files))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_small_and_masked_pictures_are_those_of_the_pairs(tmp_path: Path) -> None:
    pairs, first_stage = pairs_artifact(tmp_path, rows=(3,)), first_stage_artifact(tmp_path)
    images = [decode_image(sample["png"]) for sample in read_shard(Path(pairs.storage.path("000000.tar")))]
    small = encoded_latents_artifact(
        tmp_path, pairs, first_stage, name="small", condition={"kind": "low_resolution", "factor": 8}
    )
    for sample, image in zip(read_shard(Path(small.storage.path("000000.tar"))), images, strict=True):
        expected = Image.fromarray(image).resize((4, 4), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(decode_small_picture(sample), np.asarray(expected))
    masked = encoded_latents_artifact(
        tmp_path, pairs, first_stage, name="masked", condition={"kind": "masked_image", "masks": 2}
    )
    network: Any = load_first_stage(first_stage, "cpu")
    live = MaskedImageConditioner(MaskedImageConfig(), encode=lambda images: network.encode(images).mode())
    for sample, image in zip(read_shard(Path(masked.storage.path("000000.tar"))), images, strict=True):
        latents, masks = decode_masked(sample)
        picture = to_unit_range(torch.from_numpy(image).permute(2, 0, 1)[None]).expand(2, -1, -1, -1)
        drawn = torch.from_numpy(draw_masks(image, 2))[:, None]
        with torch.no_grad():
            concat = live(MaskedImage(image=picture, mask=drawn)).concat
        assert concat is not None
        cached = MaskedLatent(latent=torch.from_numpy(latents).float(), mask=torch.from_numpy(masks)[:, None])
        trained = MaskedImageConditioner(MaskedImageConfig(), encode=None)
        torch.testing.assert_close(trained(cached).concat, concat, rtol=2e-3, atol=2e-3)


def test_masks_follow_from_the_picture_and_none_is_empty() -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 48, 3), dtype=np.uint8)
    masks = [draw_masks(image, 4) for image in images]
    np.testing.assert_array_equal(draw_masks(images[0], 2), masks[0][:2])
    assert all(set(np.unique(mask)) <= {0, 1} for mask in masks)
    shares = np.stack(masks).mean(axis=(2, 3))
    assert shares.min() > 0
    assert 0.1 < shares.mean() < 0.6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("condition={kind: layout, classes: [cat]}", "pairs.resize=border"), "pairs.resize must not be border"),
        (("condition={kind: low_resolution, factor: 2}",), "must be the first stage's downsampling factor, 8, got 2"),
    ],
)
def test_pairs_that_do_not_fit_are_refused_before_anything_runs(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        check(load_recipe(DEMO, overrides), Selection(only="latents"))


@pytest.mark.parametrize(
    "condition",
    [
        "{kind: layout, classes: [cat]}",
        "{kind: semantic_map, classes: 5}",
        "{kind: low_resolution, factor: 8}",
        "masked_image",
    ],
)
def test_latents_are_made_of_them_and_training_is_refused_in_one_line(condition: str) -> None:
    recipe = load_recipe(DEMO, (f"condition={condition}",))
    check(recipe, Selection(last="latents"))
    with pytest.raises(MisuseError, match=r"its latents are cached, but nothing is trained on them: add --to latents"):
        check(recipe, Selection())
