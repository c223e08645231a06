"""Classifier-free guidance: its formula, one batched call, and nothing computed in vain."""

import pytest
import torch
from torch import Tensor

from ldm_core.guidance import classifier_free


class Recorder:
    """A conditional denoiser, linear in its context, that remembers what it was called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.concat: list[Tensor | None] = []

    def __call__(self, x: Tensor, t: Tensor, *, context: Tensor | None = None, concat: Tensor | None = None) -> Tensor:
        assert context is not None
        assert len(context) == len(t) == len(x)
        self.batches.append(len(x))
        self.concat.append(concat)
        return 0.1 * x + context.mean(dim=(1, 2)).view(-1, 1, 1, 1)


X = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
T = torch.tensor([5, 5, 5])
CONTEXT = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))
EMPTY = torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_guidance_extrapolates_from_the_unconditional_prediction(scale: float) -> None:
    denoise = Recorder()
    unconditional = denoise(X, T, context=EMPTY.expand(3, -1, -1))
    conditional = denoise(X, T, context=CONTEXT)
    guided = classifier_free(denoise, CONTEXT, EMPTY, scale)(X, T)
    torch.testing.assert_close(guided, unconditional + scale * (conditional - unconditional))


def test_both_halves_take_one_call_and_a_scale_of_one_only_half_of_it() -> None:
    denoise = Recorder()
    classifier_free(denoise, CONTEXT, EMPTY, 3.0)(X, T)
    classifier_free(denoise, CONTEXT, EMPTY, 1.0)(X, T)
    assert denoise.batches == [6, 3]


def test_channels_to_concatenate_reach_both_halves() -> None:
    denoise = Recorder()
    concat = torch.randn(3, 1, 2, 2)
    classifier_free(denoise, CONTEXT, EMPTY, 3.0, concat)(X, T)
    assert denoise.concat[0] is not None
    assert torch.equal(denoise.concat[0], torch.cat([concat, concat]))


def test_one_context_serves_a_whole_batch() -> None:
    alone = classifier_free(Recorder(), CONTEXT[:1], EMPTY, 3.0)(X, T)
    repeated = classifier_free(Recorder(), CONTEXT[:1].expand(3, -1, -1), EMPTY.expand(3, -1, -1), 3.0)(X, T)
    assert torch.equal(alone, repeated)


def test_contexts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"alike in length and width, got \(3, 7, 6\) and \(1, 5, 6\)"):
        classifier_free(Recorder(), CONTEXT, EMPTY[:, :5], 3.0)
    with pytest.raises(ValueError, match="one for each of the 3 samples, got 2"):
        classifier_free(Recorder(), CONTEXT[:2], EMPTY, 3.0)(X, T)
    with pytest.raises(ValueError, match="guidance_scale must be a finite number, got nan"):
        classifier_free(Recorder(), CONTEXT, EMPTY, float("nan"))
