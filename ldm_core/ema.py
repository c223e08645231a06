"""Moving averages of a network's weights, kept in float32 outside the graph.

The paper samples from averaged weights; decay and warm-up follow its code release. `PowerEMA` keeps averages whose
length is chosen after training (EDM2: Karras et al. 2024, Sec. 3 and appendix C).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# The relative length of a uniform average: no power profile is longer.
LONGEST = 12**-0.5


class EMA:
    """The average of every floating-point parameter and buffer of a module, but for parameters that are frozen.

    Args:
        module: the network being trained, unwrapped and on its final device, with what is frozen frozen; `update` reads
            and `swapped` writes the tensors that it holds now.
        decay: share of the old average that an update keeps; or a function that gives it for the n-th update, n >= 1,
            as `power_decay` does.
        warmup: keep less at the beginning, min(decay, (1 + n) / (10 + n)) at the n-th update; only of a fixed decay.

    Attributes:
        shadow: averages by the names of the module's state dict, float32 on the module's device; inside `swapped` they
            are the module's own weights.
        num_updates: number of updates so far.

    Raises:
        ValueError: unless 0 <= decay < 1, or if the module has nothing to average.
    """

    def __init__(
        self, module: nn.Module, *, decay: float | Callable[[int], float] = 0.9999, warmup: bool = True
    ) -> None:
        if not callable(decay) and not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay must be at least 0 and below 1, got {decay}")
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self._module = module
        self._swapped = False
        self._source, self._frozen = _floating_tensors(module)
        if not self._source:
            raise ValueError("EMA averages floating-point weights, this module has none")
        self.shadow: dict[str, Tensor] = {
            name: tensor.detach().to(torch.float32, copy=True) for name, tensor in self._source.items()
        }
        # The fused update needs one dtype. Other weights are widened into these buffers first, by one fused copy;
        # `swapped` keeps them there.
        self._widened = {
            name: torch.empty_like(self.shadow[name])
            for name, tensor in self._source.items()
            if tensor.dtype != torch.float32
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module's current weights; call after each optimizer step.

        Raises:
            ValueError: if the module's weights were replaced by other tensors (`load_state_dict(..., assign=True)`).
        """
        self._check_source()
        self.num_updates += 1
        if callable(self.decay):
            decay = self.decay(self.num_updates)
        else:
            warm = (1 + self.num_updates) / (10 + self.num_updates)
            decay = min(self.decay, warm) if self.warmup else self.decay
        if self._widened:
            torch._foreach_copy_(list(self._widened.values()), [self._source[name] for name in self._widened])
        weights = [self._widened.get(name, tensor) for name, tensor in self._source.items()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1.0 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the module compute with the average inside the context; afterwards its own weights are back.

        Weights and averages change places one tensor at a time, so that it takes no more memory than the largest. The
        weights must not be changed inside.

        Raises:
            ValueError: as `update`.
        """
        self._check_source()
        self._swapped = True
        exchanged: list[str] = []
        try:
            for name in self._source:
                self._exchange(name, back=False)
                exchanged.append(name)
            yield
        finally:
            # Backwards: a weight under two names changes places twice.
            for name in reversed(exchanged):
                self._exchange(name, back=True)
            self._swapped = False

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` continues from: {"num_updates": int, "shadow": {name: float32 tensor}}.

        Raises:
            ValueError: as `update`.
        """
        self._check_source()
        return {"num_updates": self.num_updates, "shadow": dict(self.shadow)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict()` returned; averages of what is frozen now are left out.

        Raises:
            ValueError: if names or shapes are not this module's.
        """
        self._check_source()
        saved: dict[str, Tensor] = {k: tensor for k, tensor in state["shadow"].items() if k not in self._frozen}
        wrong = sorted(saved.keys() ^ self.shadow.keys())
        wrong += sorted(k for k in saved.keys() & self.shadow.keys() if saved[k].shape != self.shadow[k].shape)
        if wrong:
            raise ValueError(
                f"the saved EMA must hold this network's tensors, {len(wrong)} differ in name or shape "
                f"({', '.join(wrong[:5])}): build the network from the checkpoint's own config"
            )
        self.num_updates = int(state["num_updates"])
        for name, average in self.shadow.items():
            average.copy_(saved[name])

    def _check_source(self) -> None:
        if self._swapped:
            raise ValueError("weights and average have changed places: do this outside of `swapped`")
        # One tensor stands for all, because weights are replaced together or not at all.
        name, tensor = next(iter(self._source.items()))
        path, _, last = name.rpartition(".")
        if getattr(self._module.get_submodule(path), last) is not tensor:
            raise ValueError(
                f"the averaged module now holds other tensors ({name}): make a new EMA after assigning weights"
            )

    @torch.no_grad()
    def _exchange(self, name: str, *, back: bool) -> None:
        """Let a weight and its average change places, or change back."""
        # Copied into the module's own storage: compiled graphs, optimizers and DDP hold on to these tensors.
        weight, average = self._source[name], self.shadow[name]
        if (widened := self._widened.get(name)) is None:
            own = weight.clone()
            weight.copy_(average)
            average.copy_(own)
        elif back:
            weight.copy_(widened)
        else:
            # The average stays where it is: in the weight's own dtype it would lose digits.
            widened.copy_(weight)
            weight.copy_(average)


def _floating_tensors(module: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """Return a module's floating-point parameters and buffers themselves, and the names of frozen parameters."""
    # Themselves, so that a change of layout is seen.
    state = module.state_dict(keep_vars=True)
    frozen = {name for name, tensor in state.items() if isinstance(tensor, nn.Parameter) and not tensor.requires_grad}
    return {name: each for name, each in state.items() if each.is_floating_point() and name not in frozen}, frozen


def power_decay(sigma_rel: float) -> Callable[[int], float]:
    """Return the decay of a power-function average: (1 - 1/n)^(gamma + 1) at the n-th update (Karras et al., Eq. 2).

    Args:
        sigma_rel: its relative length, see `gamma_of`.

    Raises:
        ValueError: as `gamma_of`.
    """
    gamma = gamma_of(sigma_rel)
    return lambda update: (1.0 - 1.0 / update) ** (gamma + 1.0)


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of the profile tau^gamma over the steps tau = 0 ... t of training (Karras et al., Eq. 1).

    Args:
        sigma_rel: standard deviation of the profile as a share of t, above 0 (the last weights alone) and at most
            12^-1/2 = 0.289 (gamma = 0, all alike); 0.05 to 0.25 are usual.

    Raises:
        ValueError: sigma_rel is out of range.
    """
    if not 0.0 < sigma_rel <= LONGEST:
        raise ValueError(f"sigma_rel must be above 0 and at most 12^-1/2 = {LONGEST:.4f}, got {sigma_rel}")
    # Eq. (3), sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), as a polynomial of gamma.
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


@dataclass(frozen=True)
class Snapshot:
    """A power-function average at some time in training.

    Attributes:
        num_updates: t, the number of updates until then.
        sigma_rel: its relative length.
        weights: the averages by name; any mapping, so that those on disk can be read one by one (`open_safetensors`).
    """

    num_updates: int
    sigma_rel: float
    weights: Mapping[str, Tensor]


class PowerEMA:
    """Power-function averages of a module's weights, of several lengths (Karras et al. 2024, Sec. 3.1).

    Unlike with a fixed decay, the length of the average grows with training. From snapshots of two lengths taken every
    few thousand steps, `reconstruct` makes an average of any other length afterwards.

    Args:
        module: as for `EMA`.
        sigma_rels: relative lengths to keep, see `gamma_of`.

    Attributes:
        averages: an `EMA` for each length.

    Raises:
        ValueError: as `EMA` and `gamma_of`, or there are no lengths.
    """

    def __init__(self, module: nn.Module, *, sigma_rels: Sequence[float] = (0.05, 0.10)) -> None:
        if not sigma_rels:
            raise ValueError("PowerEMA needs at least one relative length, got none")
        self.averages = {each: EMA(module, decay=power_decay(each)) for each in sigma_rels}

    def update(self) -> None:
        """Move the averages towards the module's current weights; call after each optimizer step. Raises as `EMA`."""
        for average in self.averages.values():
            average.update()

    def snapshots(self) -> list[Snapshot]:
        """Return a copy of each average, on the CPU."""
        return [
            Snapshot(
                average.num_updates,
                sigma_rel,
                {name: tensor.to("cpu", copy=True) for name, tensor in average.state_dict()["shadow"].items()},
            )
            for sigma_rel, average in self.averages.items()
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` continues from: the state of each `EMA` by its relative length."""
        return {str(sigma_rel): average.state_dict() for sigma_rel, average in self.averages.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict()` returned. Raises ValueError for other lengths or another module."""
        lengths = [str(sigma_rel) for sigma_rel in self.averages]
        if sorted(state) != sorted(lengths):
            raise ValueError(f"the saved averages must be of relative lengths {lengths}, got {sorted(state)}")
        for sigma_rel, average in self.averages.items():
            average.load_state_dict(state[str(sigma_rel)])


def reconstruct(
    snapshots: Sequence[Snapshot], sigma_rel: float, *, num_updates: int | None = None
) -> dict[str, Tensor]:
    """Combine snapshots to the average of another length, or at another time (Karras et al. 2024, Sec. 3.2).

    Args:
        snapshots: of the same module, of at least two lengths at several times for a good fit; each is read once.
        sigma_rel: the relative length wanted, see `gamma_of`.
        num_updates: t, the time wanted; None is that of the last snapshot.

    Returns:
        Averages by name, float32 on the CPU, for `load_state_dict(..., strict=False)`.

    Raises:
        ValueError: there are no snapshots, they are of different modules, or sigma_rel or num_updates are out of range.
    """
    if not snapshots:
        raise ValueError("an average is reconstructed from snapshots, got none")
    last = max(snapshot.num_updates for snapshot in snapshots)
    time = last if num_updates is None else num_updates
    if not 1 <= time <= last:
        raise ValueError(f"num_updates must be between 1 and the last snapshot's {last}, got {time}")
    names = list(snapshots[0].weights)
    if any(snapshot.weights.keys() != set(names) for snapshot in snapshots):
        raise ValueError("the snapshots must be of one module, they hold tensors of different names")
    shares = reconstruction_shares(
        [(snapshot.num_updates, snapshot.sigma_rel) for snapshot in snapshots], (time, sigma_rel)
    )
    # In float64, because large shares of both signs cancel; tensor by tensor, because all may not fit into memory.
    return {
        name: sum(
            (share * each.weights[name].double().cpu() for share, each in zip(shares.tolist(), snapshots, strict=True)),
            start=torch.zeros((), dtype=torch.float64),
        ).float()
        for name in names
    }


def reconstruction_shares(snapshots: Sequence[tuple[int, float]], wanted: tuple[int, float]) -> NDArray[np.floating]:
    """Return the shares of snapshots whose profiles sum to the wanted one, by least squares (appendix C.2).

    Args:
        snapshots: number of updates and relative length of each.
        wanted: those of the average to reconstruct.

    Returns:
        (number of snapshots,) shares; they sum to about 1.
    """
    times, lengths = np.array(snapshots, dtype=np.float64).reshape(-1, 2).T
    gammas = np.array([gamma_of(each) for each in lengths])
    time, gamma = np.float64(wanted[0]), np.float64(gamma_of(wanted[1]))
    products = _profile_product(times[:, None], gammas[:, None], times[None], gammas[None])
    # Snapshots close to each other make the system nearly singular, which `lstsq` bears and `solve` does not.
    return np.linalg.lstsq(products, _profile_product(times, gammas, time, gamma), rcond=None)[0]


def _profile_product(t_a: Any, gamma_a: Any, t_b: Any, gamma_b: Any) -> NDArray[np.float64]:
    """Return the inner product of two profiles, (gamma + 1) / t^(gamma + 1) tau^gamma up to t (appendix C.2)."""
    shorter, longer = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    # The exponent of the profile that ends later: what it has of itself where the other one is.
    of_longer = np.where(t_a < t_b, gamma_b, gamma_a)
    product: NDArray[np.float64] = (
        (gamma_a + 1) * (gamma_b + 1) * (shorter / longer) ** of_longer / ((gamma_a + gamma_b + 1) * longer)
    )
    return product
