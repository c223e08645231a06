"""Preparing networks: what is chosen, that fp32 on a CPU stays as it is, and that equal blocks are compiled once."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_core import presets
from ldm_core.latent_diffusion import DiffusionNetwork, LatentDiffusion
from ldm_core.prepare import MOST_GRAPHS, StepGraphs, _prefer_fused_attention, c_compiler, compiles, prepare
from tests.random_weights import without_zeros

INPUTS = (torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.randint(0, 1000, (2, 9)))


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    torch.manual_seed(0)
    preset = presets.get("tiny-txt2img")
    small = replace(preset.unet, model_channels=32, num_res_blocks=1, channel_mult=(1,), attention_downsampling=(1,))
    model = replace(preset, unet=small).build()
    without_zeros(model.unet)
    return model


@pytest.fixture
def network(model: LatentDiffusion) -> DiffusionNetwork:
    return copy.deepcopy(model).network()


def sampled(model: LatentDiffusion) -> Tensor:
    captions = torch.randint(0, 1000, (1, 9), generator=torch.Generator().manual_seed(0))
    return model.sample(captions, seeds=[0], num_steps=2, guidance_scale=2.0, unconditional=torch.zeros_like(captions))


def test_fp32_on_a_cpu_is_bitwise_what_it_is_unprepared(model: LatentDiffusion, network: DiffusionNetwork) -> None:
    expected = network(*INPUTS)
    prepared = prepare(network, for_="training", precision="fp32")
    with prepared.autocast():
        assert torch.equal(network(*INPUTS), expected)
    other = copy.deepcopy(model)
    prepare(other, for_="sampling", precision="fp32")
    assert torch.equal(sampled(other), sampled(model))


def test_bf16_in_training_keeps_the_weights_in_float32(network: DiffusionNetwork) -> None:
    expected = network(*INPUTS)
    prepared = prepare(network, for_="training", precision="bf16")
    with prepared.autocast():
        found = network(*INPUTS)
    assert found.dtype == torch.bfloat16
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


def test_bf16_in_sampling_casts_the_weights_and_gives_the_same_picture_but_for_rounding(model: LatentDiffusion) -> None:
    half = copy.deepcopy(model).train()
    prepared = prepare(half, for_="sampling", precision="bf16")
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in half.parameters())
    assert not half.training
    assert not torch.is_autocast_enabled("cpu")
    with prepared.autocast():
        assert not torch.is_autocast_enabled("cpu"), "cast weights need none"
    expected = sampled(model)
    assert (sampled(half) - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_takes_bf16_where_it_has_instructions_for_it(
    has_bf16: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm_core.prepare.has_bf16", lambda device: has_bf16)
    chosen = prepare(nn.Linear(1, 1), for_="sampling")
    assert (chosen.precision, chosen.compiled, chosen.channels_last) == (precision, False, False)


def test_equal_blocks_are_compiled_once_and_compute_the_same(
    network: DiffusionNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = network(*INPUTS)
    # The graphs are the compiler's; code for them would take minutes.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    prepare(network, for_="training", precision="fp32", compile=True)
    torch._dynamo.utils.counters.clear()
    assert network.conditioner is not None
    network.conditioner(INPUTS[2])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "two layers"
    torch.testing.assert_close(network(*INPUTS), expected)
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_the_fused_attention_kernels_are_tried_from_the_fastest_on() -> None:
    before = torch._C._get_sdp_priority_order()
    try:
        _prefer_fused_attention()
        assert torch._C._get_sdp_priority_order() == [3, 1, 2, 0, 4]
    finally:
        torch._C._set_sdp_priority_order(before)


class Recomputed(StepGraphs):
    """Replays a step by computing it again, from the same buffers into the same answer: what a CUDA graph does."""

    captured = 0

    def _capture(self, compute: Callable[[], Any]) -> tuple[Callable[[], None], Any]:  # type: ignore[override]
        self.captured += 1
        answer = compute()
        return lambda: answer.copy_(compute()), answer


@torch.no_grad()
def test_a_captured_step_serves_every_step_of_every_run(model: LatentDiffusion) -> None:
    other = copy.deepcopy(model)
    other.run_step = graphs = Recomputed()
    z, t = torch.randn(3, 2, 4, 4, 4), torch.tensor([[700, 700], [300, 300], [5, 5]])
    empty = torch.zeros(1, 9, dtype=torch.long)
    for seed in (1, 2):  # two runs with captions of their own
        captions = torch.randint(0, 1000, (2, 9), generator=torch.Generator().manual_seed(seed))
        settings: dict[str, Any] = {"unconditional": empty, "guidance_scale": 3.0}
        plain, replayed = (each.guided_denoiser(captions, **settings) for each in (model, other))
        answers = [replayed(z[step], t[step]) for step in range(3)]
        for step, answer in enumerate(answers):
            torch.testing.assert_close(answer, plain(z[step], t[step]))
    assert graphs.captured == 1
    other.guided_denoiser(captions, unconditional=empty, guidance_scale=4.0)(z[0], t[0])
    assert graphs.captured == 2, "another scale is another step"
    with torch.enable_grad():
        x = z[0].clone().requires_grad_()
        other.guided_denoiser(captions)(x, t[0]).sum().backward()  # type: ignore[union-attr]
    assert x.grad is not None
    assert graphs.captured == 2, "a graph records no gradients"


@torch.no_grad()
def test_a_captured_step_reads_what_its_caller_changed_in_place() -> None:
    graphs, concat, x, t = Recomputed(), torch.zeros(1), torch.ones(1), torch.tensor([3])

    def step(x: Tensor, t: Tensor, context: None, concat: Tensor | None) -> Tensor:
        assert concat is not None
        return x + concat

    found = [float(graphs(step, "key", x, t, None, concat.fill_(value))) for value in (1.0, 2.0, 3.0)]
    assert found == [2.0, 3.0, 4.0]
    for size in range(2, 12):
        graphs(step, "key", torch.ones(size), t, None, torch.zeros(size))
    assert len(graphs._captured) == MOST_GRAPHS


@torch.no_grad()
def test_where_steps_cannot_be_captured_they_are_run_as_they_are(model: LatentDiffusion) -> None:
    class Failing(StepGraphs):
        def _capture(self, compute: Callable[[], Any]) -> tuple[Callable[[], None], Any]:  # type: ignore[override]
            raise RuntimeError("operation not permitted when stream is capturing")

    other = copy.deepcopy(model)
    other.run_step = Failing()
    with pytest.warns(UserWarning, match="are not captured as CUDA graphs, which is slower: operation not permitted"):
        found = sampled(other)
    assert torch.equal(found, sampled(model))


def test_without_a_c_compiler_nothing_is_compiled_and_who_asks_for_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_core.prepare.shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"no C compiler is here to compile networks with .*: install one"):
        prepare(nn.Linear(1, 1), for_="training", compile=True)
    with pytest.warns(UserWarning, match="they run uncompiled, which is slower"):
        assert not compiles(torch.device("cuda"), None)
    monkeypatch.undo()
    assert compiles(torch.device("cuda"), None) == (c_compiler() is not None)
