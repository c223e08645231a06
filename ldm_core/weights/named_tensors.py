"""Tensors by name, read only when asked for; differences in names and shapes, described on one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn

Shape = tuple[int, ...]


class NamedTensors(Mapping[str, Tensor]):
    """A mapping of names to tensors that knows every shape and reads a tensor when it is looked up.

    Args:
        source: file or folder that they come from, for error messages.
        shapes: shape of every tensor by name.
        read: reads the tensor of a name.
    """

    def __init__(self, source: str, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]) -> None:
        self.source = source
        self.shapes = dict(shapes)
        self._read = read

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> NamedTensors:
        """Wrap a state dict, under its own names or others."""
        return cls("the model", {name: tuple(tensor.shape) for name, tensor in state.items()}, state.__getitem__)

    @classmethod
    def of_module(cls, module: nn.Module) -> NamedTensors:
        """Wrap a module's state dict."""
        return cls.of_state(module.state_dict())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def renamed(self, rename: Callable[[str], str | None]) -> NamedTensors:
        """Return the same tensors under other names, without those renamed to None."""
        origin = {new: name for name in self.shapes if (new := rename(name)) is not None}
        shapes = {new: self.shapes[name] for new, name in origin.items()}
        return NamedTensors(self.source, shapes, lambda name: self._read(origin[name]))

    def under(self, prefix: str) -> NamedTensors:
        """Return the tensors whose names begin with the prefix, under names without it."""
        return self.renamed(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)


def merged(source: str, parts: Iterable[NamedTensors]) -> NamedTensors:
    """Merge the tensors of several files into one mapping.

    Raises:
        ValueError: two files hold a tensor of the same name.
    """
    owner: dict[str, NamedTensors] = {}
    for part in parts:
        if twice := sorted(owner.keys() & part.shapes.keys()):
            raise ValueError(f"{source} must hold each tensor once, got {some(twice)} in two files")
        owner |= dict.fromkeys(part, part)
    shapes = {name: part.shapes[name] for name, part in owner.items()}
    return NamedTensors(source, shapes, lambda name: owner[name][name])


def differences(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> str:
    """Describe on one line how the names and shapes found differ from the expected ones; empty if they do not."""
    misshapen = [
        f"{name} {found[name]} instead of {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": misshapen,
    }
    return "; ".join(f"{kind}: {some(names)}" for kind, names in kinds.items() if names)


def some(names: list[str], limit: int = 8) -> str:
    """List the first few names, and say how many more there are."""
    shown = ", ".join(name[:200] for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
