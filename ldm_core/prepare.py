"""Make a network fast: the one place that sets precision, memory format, compilation and attention kernels.

What it chooses by itself, by device:

    GPU                              bf16, channels_last, compiled block by block, cuDNN's attention before flash
    CPU with instructions for bf16   bf16, eager: on others bf16 is emulated and slower than fp32
    any other CPU                    fp32, eager: nothing is changed

bf16 is autocast in training, where the weights stay in float32, and weights cast once for sampling. TF32 is left as it
is: fp32 means fp32. In fp32, all that it does changes at most the last bits, and on a CPU not even these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils import _pytree as pytree

from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.networks.attention import SelfAttentionBlock
from ldm_core.networks.blocks import ResidualBlock
from ldm_core.networks.clip_text import ClipTextLayer
from ldm_core.networks.text_transformer import TextTransformerLayer
from ldm_core.networks.unet import PreparedContext, UNetBlock

Precision = Literal["fp32", "bf16"]
Purpose = Literal["training", "sampling"]

# What networks are made of many times over. Equal blocks are compiled once, which a whole network would not be.
BLOCKS = (UNetBlock, TextTransformerLayer, ClipTextLayer, ResidualBlock, SelfAttentionBlock)
# Compiled for each combination of block, batch and size: beyond eight, torch would go on uncompiled.
MOST_SHAPES = 256
# On Hopper cuDNN's attention is the fastest. Where none of these applies, scores take O(N^2) memory.
ATTENTION_BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
# Passes before a graph is captured: what is compiled, chosen or allocated at first must be over by then.
WARM_UP_PASSES = 3


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` has chosen.

    Attributes:
        device: where the network is.
        purpose: what it is prepared for.
        precision: of forward and backward passes; in training the weights are float32 whatever it is.
        channels_last: whether the weights, and with them the activations, are in that memory format.
        compiled: whether the blocks are compiled.
    """

    device: torch.device
    purpose: Purpose
    precision: Precision
    channels_last: bool
    compiled: bool

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the region for forward passes of a network prepared for training; backward passes go outside."""
        enabled = self.purpose == "training" and self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


def prepare(
    network: nn.Module, *, for_: Purpose, precision: Precision | None = None, compile: bool | None = None
) -> Prepared:
    """Make a network fast on the device that it is on, in place.

    Args:
        network: a network to train, or a model to sample from; also a part of one, such as a first stage. For sampling
            it is put into evaluation mode, its gradients are switched off, and in bf16 its weights are cast.
        for_: "training" or "sampling".
        precision: None takes what the device is fast in; see the module.
        compile: compile the blocks. Each is compiled anew for another batch or size, and none for any size, which would
            be slower: keep to few. None compiles on GPUs. It takes a C++ compiler, and minutes at the first pass.

    Returns:
        What was chosen. Forward passes in training go into its `autocast`.
    """
    device = next(network.parameters()).device
    on_gpu = device.type == "cuda"
    chosen = Prepared(
        device=device,
        purpose=for_,
        precision=precision or ("bf16" if on_gpu or (device.type == "cpu" and cpu_has_bf16()) else "fp32"),
        channels_last=on_gpu,
        compiled=on_gpu if compile is None else compile,
    )
    if for_ == "sampling":
        network.eval().requires_grad_(False)
        if chosen.precision == "bf16":
            network.to(torch.bfloat16)
    if chosen.channels_last:
        network.to(memory_format=torch.channels_last)
    if chosen.compiled:
        torch._dynamo.config.recompile_limit = MOST_SHAPES
        for block in _outermost(network, BLOCKS):
            block.compile(dynamic=False)
    if on_gpu:
        _prefer_fused_attention()
        if for_ == "sampling" and isinstance(network, LatentDiffusion):
            network.run_step = StepGraphs()
    return chosen


class StepGraphs:
    """Runs steps of sampling as CUDA graphs, one for each step and shapes of its inputs.

    A step of a UNet is a thousand kernels, which at small batches take longer to launch than to run; as a graph they
    are launched at once. A graph reads fixed buffers: x and t are copied there at every step, a condition (keys and
    values of all layers, mostly) once a run. It serves other runs as well, as long as the weights stay where they are.

    Written without a GPU at hand; its tests replay by computing again.
    """

    def __init__(self) -> None:
        self._captured: dict[Any, _CapturedStep] = {}

    def __call__(self, step: Callable[..., Any], key: object, x: Tensor, t: Tensor, *condition: Any) -> Any:
        """Return `step(x, t, *condition)`, where nothing records gradients from the graph that has this key."""
        if torch.is_grad_enabled():
            return step(x, t, *condition)
        leaves, tree = pytree.tree_flatten((x, t, *condition))
        shapes = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        found = self._captured.get((key, shapes, tree))
        if found is None:
            found = self._captured[key, shapes, tree] = _CapturedStep(
                lambda leaves: step(*pytree.tree_unflatten(leaves, tree)), leaves, self._capture
            )
        return found(leaves)

    @staticmethod
    def _capture(compute: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return what computes anew, and where the answer then is."""
        # On a stream of its own, as capturing asks for.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = compute()
        return graph.replay, answer


class _CapturedStep:
    """A step on fixed buffers. Its inputs are x and t, then the leaves of the condition."""

    def __init__(
        self,
        step: Callable[[list[Any]], Any],
        leaves: list[Any],
        capture: Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]],
    ) -> None:
        self._buffers = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._condition = leaves[2:]
        self._replay, self._answer = capture(lambda: step(self._buffers))

    def __call__(self, leaves: list[Any]) -> Any:
        buffers, condition = self._buffers, leaves[2:]
        changed = [new is not old for new, old in zip(condition, self._condition, strict=True)]
        for buffer, leaf, copied in zip(buffers, leaves, [True, True, *changed], strict=True):
            if copied and isinstance(leaf, Tensor):
                buffer.copy_(leaf)
        # Held, so that no other tensor is taken for one of these.
        self._condition = condition
        self._replay()
        # Samplers keep answers, and the next step overwrites this one.
        return pytree.tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, self._answer)


def cpu_has_bf16() -> bool:
    """Tell whether this CPU multiplies in bf16 (AVX512-BF16 or AMX), as far as torch makes use of it."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and torch.cpu._is_avx512_bf16_supported()


pytree.register_dataclass(PreparedContext)


def _outermost(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    """Yield the modules of some kinds that lie in none of these themselves."""
    for child in module.children():
        if isinstance(child, kinds):
            yield child
        else:
            yield from _outermost(child, kinds)


def _prefer_fused_attention() -> None:
    """Have this process try the fused kernels from the fastest on; torch's own order has cuDNN's last."""
    first = [int(backend.value) for backend in ATTENTION_BACKENDS]
    rest = [backend for backend in torch._C._get_sdp_priority_order() if backend not in first]
    torch._C._set_sdp_priority_order(first + rest)
