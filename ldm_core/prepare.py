"""Make a network fast to train or to sample: precision, memory format, compilation and attention kernels.

What it chooses by itself, by device:

    GPU                              bf16, channels_last, compiled block by block, cuDNN's attention before flash
    CPU with instructions for bf16   bf16, eager: on others bf16 is emulated and slower than fp32
    any other CPU                    fp32, eager: nothing is changed

bf16 is autocast in training, where the weights stay in float32, and weights cast once for sampling. TF32 is left as it
is: fp32 means fp32. In fp32, all that it does changes at most the last bits, and on a CPU not even these.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
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

COMPILERS = ("cc", "gcc", "clang")
# What networks are made of many times over. Equal blocks are compiled once, which a whole network would not be.
BLOCKS = (UNetBlock, TextTransformerLayer, ClipTextLayer, ResidualBlock, SelfAttentionBlock)
# Compiled for each combination of block, batch and size; a UNet has twenty different blocks of one class, and beyond
# the limit, by default eight, torch would go on uncompiled.
MOST_COMPILED = 2048
# On Hopper cuDNN's attention is the fastest. Where none of these applies, scores take O(N^2) memory.
ATTENTION_BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
# Passes before a graph is captured: what is compiled, chosen or allocated at first must be over by then.
WARM_UP_PASSES = 3
# Each has buffers of its own for what a step computes.
MOST_GRAPHS = 8
# Of the inputs of a step those before the context, which callers may change in place.
CHANGING = 3


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` has chosen.

    Attributes:
        device: where the network is.
        purpose: what it is prepared for.
        precision: of forward and backward passes; in training the weights are float32 whatever it is.
        channels_last: whether the weights, and with them the activations, are in that memory format.
        compiled: whether the blocks are compiled.
        graphs: whether steps of sampling are replayed as CUDA graphs.
    """

    device: torch.device
    purpose: Purpose
    precision: Precision
    channels_last: bool
    compiled: bool
    graphs: bool

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the region for forward passes of a network prepared for training; backward passes go outside."""
        enabled = self.purpose == "training" and self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def uncompiled(self) -> AbstractContextManager[Any]:
        """Return a region in which compiled blocks run as they are written: for a few passes of other sizes."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()


def prepare(
    network: nn.Module,
    *,
    for_: Purpose,
    precision: Precision | None = None,
    compile: bool | None = None,
    graphs: bool | None = None,
) -> Prepared:
    """Make a network fast on the device that it is on, in place.

    Args:
        network: a network to train, or a model to sample from; also a part of one, such as a first stage. For sampling
            it is put into evaluation mode, its gradients are switched off, and in bf16 its weights are cast.
        for_: "training" or "sampling".
        precision: None takes what the device is fast in; see the module.
        compile: compile the blocks. Each is compiled anew for another batch or size, and none for any size, which would
            be slower: keep to few. None compiles on GPUs if there is a C compiler. It takes minutes at the first pass.
        graphs: replay each step of a model's sampling as one CUDA graph, see `StepGraphs`. None does on GPUs.

    Returns:
        What was chosen. Forward passes in training go into its `autocast`.

    Raises:
        ValueError: compile is True, and there is no C compiler.

    For the whole process, compiling raises dynamo's limit of recompilations, and a GPU changes the order in which torch
    tries its attention kernels.
    """
    device = next(network.parameters()).device
    on_gpu = device.type == "cuda"
    chosen = Prepared(
        device=device,
        purpose=for_,
        precision=precision or ("bf16" if has_bf16(device) else "fp32"),
        channels_last=on_gpu,
        compiled=compiles(device, compile),
        graphs=on_gpu and graphs is not False and for_ == "sampling" and isinstance(network, LatentDiffusion),
    )
    if for_ == "sampling":
        network.eval().requires_grad_(False)
        if chosen.precision == "bf16":
            network.to(torch.bfloat16)
    if chosen.channels_last:
        network.to(memory_format=torch.channels_last)
    if chosen.compiled:
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MOST_COMPILED
        for block in _outermost(network, BLOCKS):
            block.compile(dynamic=False)
    if on_gpu:
        _prefer_fused_attention()
    if chosen.graphs:
        assert isinstance(network, LatentDiffusion)
        network.run_step = StepGraphs()
    return chosen


class StepGraphs:
    """Runs steps of sampling as CUDA graphs: one for each kind of step (with or without guidance) and shapes.

    A step of a UNet is a thousand kernels, which at small batches take longer to launch than to run; as a graph they
    are launched at once. A graph reads fixed buffers: x, t and concat are copied there at every step, a prepared
    context (keys and values of all layers) once a run. It serves other runs as well, as long as the weights stay where
    they are. The newest MOST_GRAPHS are kept. Where capturing fails, steps are run as they are from then on, with a
    warning.

    Written without a GPU at hand; its tests replay by computing again.
    """

    def __init__(self) -> None:
        self._captured: OrderedDict[Any, _CapturedStep] = OrderedDict()
        self._fails = False

    def __call__(
        self, step: Callable[..., Any], key: object, x: Tensor, t: Tensor, context: Any, concat: Tensor | None
    ) -> Any:
        """Return `step(x, t, context, concat)`, where nothing records gradients from the graph that has this key."""
        if torch.is_grad_enabled() or self._fails:
            return step(x, t, context, concat)
        leaves, tree = pytree.tree_flatten((x, t, concat, context))
        shapes = tuple((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if (found := self._captured.get((key, shapes, tree))) is None:
            try:

                def of_leaves(leaves: list[Any]) -> Any:
                    x, t, concat, context = pytree.tree_unflatten(leaves, tree)
                    return step(x, t, context, concat)

                found = _CapturedStep(of_leaves, leaves, self._capture)
            except RuntimeError as error:
                self._fails = True
                warnings.warn(
                    f"steps of sampling are not captured as CUDA graphs, which is slower: {error}", stacklevel=2
                )
                return step(x, t, context, concat)
            self._captured[key, shapes, tree] = found
            while len(self._captured) > MOST_GRAPHS:
                self._captured.popitem(last=False)
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
    """A step on fixed buffers. Its inputs are x, t and concat, which may be None, then the leaves of the context."""

    def __init__(
        self,
        step: Callable[[list[Any]], Any],
        leaves: list[Any],
        capture: Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]],
    ) -> None:
        self._buffers = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._context = leaves[CHANGING:]
        self._replay, self._answer = capture(lambda: step(self._buffers))

    def __call__(self, leaves: list[Any]) -> Any:
        context = leaves[CHANGING:]
        # Prepared contexts are nobody's to change, so that one that is there already need not be copied again.
        changed = [new is not old for new, old in zip(context, self._context, strict=True)]
        for buffer, leaf, copied in zip(self._buffers, leaves, [True] * CHANGING + changed, strict=True):
            if copied and isinstance(leaf, Tensor):
                buffer.copy_(leaf)
        # Held, so that no other tensor is taken for one of these.
        self._context = context
        self._replay()
        # Samplers keep answers, and the next step overwrites this one.
        return pytree.tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, self._answer)


def has_bf16(device: torch.device) -> bool:
    """Tell whether a device multiplies in bf16: GPUs from Ampere on, CPUs with AVX512-BF16 or AMX that torch uses."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and torch.cpu._is_avx512_bf16_supported()


pytree.register_dataclass(PreparedContext)


def c_compiler() -> str | None:
    """Return the C compiler that torch.compile finds on this machine; None if there is none."""
    names = (os.environ.get("CC"), *COMPILERS)
    return next((found for name in names if name and (found := shutil.which(name))), None)


def compiles(device: torch.device, wanted: bool | None) -> bool:
    """Return whether to compile on a device: what is wanted, or on GPUs alone; Triton and Inductor need a C compiler.

    Raises:
        ValueError: it is wanted, and there is none.
    """
    if wanted is False or (wanted is None and device.type != "cuda"):
        return False
    if c_compiler():
        return True
    what = f"no C compiler is here to compile networks with (looked for {', '.join(COMPILERS)} and CC)"
    if wanted:
        raise ValueError(f"{what}: install one, or leave compile out")
    warnings.warn(f"{what}: they run uncompiled, which is slower", stacklevel=3)
    return False


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
