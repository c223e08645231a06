"""Two frozen text encoders side by side: cached, trained on, saved and sampled as one context."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_core import checkpoint, presets
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.text import JoinedTextConfig
from ldm_core.configs.unet import UNetConfig
from ldm_core.latent_diffusion import DiffusionNetwork
from ldm_core.pretrained import text_encoder
from ldm_core.tokenizers.joined import JoinedTokenizer
from pipelines.conditions.config import FrozenTextCondition
from pipelines.conditions.frozen_text import FrozenText, OpenedEncoder
from pipelines.errors import UserError
from pipelines.stages.diffusion.config import SamplingConfig
from pipelines.stages.diffusion.model_folder import load_folder
from pipelines.stages.diffusion.sampling import sample_prompts
from pipelines.store.storage import Storage
from tests.pipelines.conditions.encoders import CAPTIONS, LENGTH, MINILM, UNET, cached, clip, live, prepared
from tests.random_weights import without_zeros

# A kind, what it reads of a latents artifact, and what is cached of each sample.
Prepared = tuple[FrozenText, Any, list[dict[str, bytes]]]
CLIP_LENGTH = 77
WIDTH = 384 + 32


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip(tmp_path_factory.mktemp("encoders") / "clip")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Prepared:
    """A real encoder, which does not attend to padding, and a CLIP, which does."""
    minilm = {"path": str(MINILM), "max_length": CLIP_LENGTH}
    kind, latents = prepared(tmp_path_factory.mktemp("latents"), minilm, {"path": str(clip_folder)})
    return kind, latents, cached(kind, latents)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Two encoders that do not attend to padding."""
    encoder = {"path": str(MINILM), "max_length": LENGTH}
    kind, latents = prepared(tmp_path_factory.mktemp("latents"), encoder, encoder)
    return kind, latents, cached(kind, latents)


def test_two_encoders_are_cached_side_by_side(both: Prepared) -> None:
    kind, latents, samples = both
    assert kind.files == ("text.npy", "text_lengths.npy", "text2.npy", "text2_lengths.npy")
    assert [set(sample) for sample in samples] == [set(kind.files)] * 2
    assert latents.details["text_shapes"] == [[CLIP_LENGTH, 384], [CLIP_LENGTH, 32]]


def trained_on(prepared: Prepared, dropped: bool = False) -> Any:
    """Return the conditioning that training makes of the second sample's only caption."""
    kind, latents, samples = prepared
    examples = kind.examples(latents)
    drawn = examples.draw(examples.decode(samples[1]), 0.5)
    arrays = examples.batch([drawn], np.array([0.0 if dropped else 1.0]))
    return examples.inputs({name: torch.from_numpy(array) for name, array in arrays.items()})


def test_the_cache_of_one_of_two_encoders_is_that_of_the_encoder_alone(tmp_path: Path, both: Prepared) -> None:
    alone = cached(*prepared(tmp_path, {"path": str(MINILM), "max_length": CLIP_LENGTH}))
    for one, two in zip(alone, both[2], strict=True):
        assert {name: two[name] for name in one} == one


def test_a_cache_of_two_encoders_equals_both_run_live(both: Prepared, clip_folder: Path) -> None:
    conditioning = trained_on(both)
    states, mask = live(CAPTIONS[1], CLIP_LENGTH)
    encoder = text_encoder(clip_folder)
    of_clip = encoder.conditioner(torch.from_numpy(encoder.tokenizer.encode(CAPTIONS[1]).astype(np.int64))).context
    assert of_clip is not None
    expected = torch.cat([states * mask[..., None], of_clip], dim=2)
    torch.testing.assert_close(conditioning.context, expected, rtol=2e-3, atol=2e-3)
    assert conditioning.mask is None, "CLIP is fed at all 77 places"


def test_one_caption_is_drawn_from_both_and_dropped_from_both(both: Prepared) -> None:
    kind, latents, samples = both
    examples, random = kind.examples(latents), np.random.default_rng(0)
    sample = examples.decode(samples[0])
    (first, second), _ = live(CAPTIONS[0], CLIP_LENGTH)
    for _ in range(20):
        drawn = torch.from_numpy(examples.draw(sample, random.random())).float()
        number = int((drawn[1, :384] - first[1]).abs().max() > (drawn[1, :384] - second[1]).abs().max())
        own = sample[2][number * CLIP_LENGTH : (number + 1) * CLIP_LENGTH]
        np.testing.assert_array_equal(drawn[:, 384:], own.astype(np.float32))
    dropped = trained_on(both, dropped=True).context
    null = kind.frozen(latents, torch.device("cpu"))(kind.prompts(latents, None).unconditional())  # type: ignore[arg-type]
    torch.testing.assert_close(dropped, null.context, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("encoders", "width"), [("both", WIDTH), ("twice", 2 * 384)])
def test_the_network_sees_in_training_what_the_whole_model_sees_when_it_is_sampled(
    encoders: str, width: int, request: pytest.FixtureRequest
) -> None:
    kind, latents, _ = request.getfixturevalue(encoders)
    unet = UNetConfig(**{**UNET, "context_dim": width})
    config = LatentDiffusionConfig(
        first_stage=presets.first_stage("tiny-kl-f8"), unet=unet, conditioner=kind.conditioner(latents, unet)
    )
    network = without_zeros(config.build_network())
    assert network.conditioner is None, "frozen encoders are no part of what is trained"
    whole = DiffusionNetwork(network.unet, kind.frozen(latents, torch.device("cpu")))
    inputs = trained_on(request.getfixturevalue(encoders))
    tokens = kind.prompts(latents, config).inputs(CAPTIONS[1])
    assert (inputs.mask is not None) == (encoders == "twice")
    z, t = torch.randn(1, 4, 4, 4), torch.tensor([500])
    with torch.no_grad():
        torch.testing.assert_close(network(z, t, inputs), whole(z, t, tokens), rtol=5e-3, atol=5e-3)


def test_a_caption_that_names_the_padding_token_is_cached_as_it_is_seen_live(twice: Prepared) -> None:
    kind, latents, _ = twice
    caption = "a [PAD] red circle"
    states = OpenedEncoder(kind.config.encoders[0])([caption], "cpu")[0]
    given = kind.frozen(latents, torch.device("cpu"))(kind.prompts(latents, None).inputs([caption]))  # type: ignore[arg-type]
    assert given.context is not None
    assert given.mask is not None
    assert int(given.mask.sum()) == len(states)
    joined = np.concatenate([states, states], axis=1).astype(np.float32)
    np.testing.assert_allclose(given.context[0, : len(states)], joined, rtol=2e-3, atol=2e-3)


@pytest.fixture(scope="module")
def folder(both: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model with two encoders, as training saves it."""
    kind, latents, _ = both
    unet = UNetConfig(**{**UNET, "context_dim": WIDTH})
    config = LatentDiffusionConfig(
        first_stage=presets.first_stage("tiny-kl-f8"), unet=unet, conditioner=kind.conditioner(latents, unet)
    )
    torch.manual_seed(0)
    model = without_zeros(config.build())
    model.conditioner = kind.frozen(latents, torch.device("cpu"))
    target = tmp_path_factory.mktemp("model")
    checkpoint.save(model, target, tokenizer=kind.prompts(latents, config).tokenizer)
    return target


def test_a_saved_model_has_both_encoders_and_both_tokenizers(folder: Path, both: Prepared) -> None:
    kind, latents, _ = both
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_2.json"}
    model, prompts = load_folder(Storage(str(folder)), "cpu")
    assert isinstance(model.config.conditioner, JoinedTextConfig)
    before = kind.frozen(latents, torch.device("cpu"))
    given = kind.prompts(latents, model.config)
    assert model.conditioner is not None
    read = model.conditioner(prompts.inputs(CAPTIONS[0])).context
    torch.testing.assert_close(read, before(given.inputs(CAPTIONS[0])).context)


def test_it_is_sampled_with_guidance_and_prompts_count(folder: Path) -> None:
    model, prompts = load_folder(Storage(str(folder)), "cpu")
    sampling = SamplingConfig(num_steps=2, guidance_scale=3.0)
    one, other = sample_prompts(model, prompts, ["a red circle", "blue"], [5, 5], sampling)
    assert one.shape == (32, 32, 3)
    assert (one != other).any()


def test_a_tokenizer_too_few_is_refused(folder: Path, tmp_path: Path) -> None:
    model = checkpoint.load(folder)
    tokenizer = checkpoint.load_tokenizer(folder)
    assert isinstance(tokenizer, JoinedTokenizer)
    with pytest.raises(ValueError, match="must have a tokenizer for each of its 2 text encoders, got 1"):
        checkpoint.save(model, tmp_path, tokenizer=tokenizer.tokenizers[0])
    (alone := tmp_path / "alone").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (alone / name).hardlink_to(folder / name)
    with pytest.raises(FileNotFoundError, match=r"lacks vocab_2\.txt"):
        checkpoint.load_tokenizer(alone)


def test_another_second_encoder_than_the_cache_was_made_with_is_refused(both: Prepared, tmp_path: Path) -> None:
    kind, latents, _ = both
    other = {"kind": "frozen_text", "encoders": [each.model_dump() for each in kind.config.encoders]}
    torch.manual_seed(1)
    other["encoders"][1]["path"] = str(clip(tmp_path / "clip", seed=1))
    with pytest.raises(UserError, match=r"latents 0123 were made with another text encoder .* than .*clip is"):
        FrozenText(FrozenTextCondition.model_validate(other)).frozen(latents, torch.device("cpu"))


@pytest.mark.parametrize(
    ("length", "width", "message"),
    [
        (
            LENGTH,
            WIDTH,
            "condition.encoders must take as many tokens of a caption, got 12 and 77: set max_length: 12 for the one",
        ),
        (
            CLIP_LENGTH,
            384,
            "diffusion.unet.context_dim must be the sum of the text encoders' widths, 416, got 384",
        ),
    ],
)
def test_encoders_that_do_not_fit_are_refused_by_the_plan(
    length: int, width: int, message: str, clip_folder: Path
) -> None:
    encoders = [{"path": str(MINILM), "max_length": length}, {"path": str(clip_folder)}]
    condition = FrozenTextCondition.model_validate({"kind": "frozen_text", "encoders": encoders})

    class Diffusion:
        unet = UNetConfig(**{**UNET, "context_dim": width})

    with pytest.raises(ValueError) as caught:
        condition.check_model({"diffusion": Diffusion})
    assert str(caught.value).startswith(message)
