"""Map our names of weights to another program's: one table per format, used to read and to write.

For every type of module a table gives their path of each child. `entries` walks a model by it, down to single tensors,
and fails if a weight of ours has no name: an incomplete table is a bug.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm_core.networks.attention import SelfAttentionBlock
from ldm_core.weights.named_tensors import NamedTensors, Shape, differences


@dataclass(frozen=True)
class Transform:
    """Conversion of one tensor of ours to one or several of theirs, and back, bit for bit.

    Args:
        split: turns ours into theirs.
        join: turns theirs into ours.
    """

    split: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor]], Tensor]


SAME = Transform(lambda ours: (ours,), lambda theirs: theirs[0])


def pointwise(trailing: int) -> Transform:
    """Reshape weights of a 1x1 convolution, (O, I, 1, 1), to (O, I) and this many trailing ones; keep biases."""

    def split(ours: Tensor) -> Sequence[Tensor]:
        return (ours if ours.ndim == 1 else ours.reshape(*ours.shape[:2], *(1,) * trailing),)

    def join(theirs: Sequence[Tensor]) -> Tensor:
        (tensor,) = theirs
        return tensor if tensor.ndim == 1 else tensor.reshape(*tensor.shape[:2], 1, 1)

    return Transform(split, join)


def fused_heads(num_heads: int, trailing: int) -> Transform:
    """Split our fused projection, channels (head, [query, key, value], d), into three with channels (head, d)."""
    shape = pointwise(trailing)

    def split(ours: Tensor) -> Sequence[Tensor]:
        parts = ours.unflatten(0, (num_heads, 3, -1)).unbind(1)
        return [shape.split(part.flatten(0, 1))[0] for part in parts]

    def join(theirs: Sequence[Tensor]) -> Tensor:
        parts = [shape.join([part]).unflatten(0, (num_heads, -1)) for part in theirs]
        return torch.stack(parts, dim=1).flatten(0, 2)

    return Transform(split, join)


@dataclass(frozen=True)
class Place:
    """Place of a child's weights in their model: its paths (several for a fused layer) and the conversion."""

    paths: tuple[str, ...]
    transform: Transform = SAME


Children = Mapping[str, str | Place]
Row = Children | Callable[[Any], Children]
Table = Mapping[type[nn.Module], Row]


@dataclass(frozen=True)
class Entry:
    """One tensor of ours: its name here, its names there, and the conversion between the two."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform


def entries(module: nn.Module, table: Table, *, ours: str = "", theirs: str = "") -> list[Entry]:
    """List every weight of a module with its name here and its names there.

    Args:
        module: a module of ours, on any device ("meta" will do).
        table: for each type of module with children, their path of each child by our path of it (both may be dotted).
        ours, theirs: prefixes of the names, such as "unet." and "model.diffusion_model.".
    """
    listed = list(_walk(module, table, ours.removesuffix("."), Place((theirs.removesuffix("."),))))
    found = sorted(entry.ours for entry in listed)
    expected = sorted(_join(ours.removesuffix("."), name) for name in module.state_dict())
    assert found == expected, f"the table misses {set(expected) ^ set(found)}"
    names = [name for entry in listed for name in entry.theirs]
    assert len(names) == len(set(names)), "the table gives two weights one name"
    return listed


def _walk(module: nn.Module, table: Table, ours: str, place: Place) -> Iterator[Entry]:
    described = table.get(type(module))
    if described is None and isinstance(module, nn.ModuleList):
        described = {str(i): str(i) for i in range(len(module))}
    if described is None:
        for name in module.state_dict():
            yield Entry(_join(ours, name), tuple(_join(path, name) for path in place.paths), place.transform)
        return
    (path,) = place.paths
    for child, where in (described(module) if callable(described) else described).items():
        below = Place((where,)) if isinstance(where, str) else where
        part = _child(module, child)
        if part is not None:
            inner = Place(tuple(_join(path, each) for each in below.paths), below.transform)
            yield from _walk(part, table, _join(ours, child), inner)


def _child(module: nn.Module, path: str) -> nn.Module | None:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
        if found is None:
            return None
    assert isinstance(found, nn.Module)
    return found


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def fused_attention(paths: tuple[str, str, str], output: str, norm: str, *, trailing: int) -> Callable[[Any], Children]:
    """Return the row of a table for `SelfAttentionBlock` if their queries, keys and values are separate layers."""

    def children(block: SelfAttentionBlock) -> Children:
        return {
            "norm": norm,
            "query_key_value": Place(paths, fused_heads(block.num_heads, trailing)),
            "project_out": Place((output,), pointwise(trailing)),
        }

    return children


def their_shapes(listed: Iterable[Entry], ours: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the shapes of their tensors, given ours."""
    shapes: dict[str, Shape] = {}
    for entry in listed:
        parts = entry.transform.split(torch.empty(ours[entry.ours], device="meta"))
        shapes |= {name: tuple(part.shape) for name, part in zip(entry.theirs, parts, strict=True)}
    return shapes


def to_theirs(listed: Iterable[Entry], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our tensors under their names, as views wherever the memory layout allows it."""
    theirs: dict[str, Tensor] = {}
    for entry in listed:
        theirs |= zip(entry.theirs, entry.transform.split(ours[entry.ours].detach()), strict=True)
    return theirs


def to_ours(listed: Sequence[Entry], ours: Mapping[str, Shape], theirs: NamedTensors, subject: str) -> NamedTensors:
    """Return their tensors under our names, still read one by one.

    Args:
        listed: every weight of ours with its names, see `entries`.
        ours: our shapes, by our names.
        theirs: the tensors in their file: the weights and nothing else.
        subject: what the weights should belong to, for the message.

    Raises:
        ValueError: names or shapes are not the expected ones; they are listed.
    """
    if wrong := differences(their_shapes(listed, ours), theirs.shapes):
        raise ValueError(f"the weights in {theirs.source} must be those of {subject}, {wrong}")
    by_name = {entry.ours: entry for entry in listed}

    def read(name: str) -> Tensor:
        entry = by_name[name]
        return entry.transform.join([theirs[each] for each in entry.theirs])

    return NamedTensors(theirs.source, ours, read)
