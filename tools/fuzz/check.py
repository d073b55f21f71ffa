"""Compare a network exact and coded: what must be the same, and how far gradients may be from the exact ones.

**The bound of gradients.** How much the error of a code matters to a gradient depends on the network. For example, the gradient
of a bias before a batch norm is zero by cancellation, so any relative error of it is infinite. Each gradient is therefore
compared with the effect of noise of the same size. The exact network runs again, and every tensor that torch keeps for backward
is multiplied by 1 + δ n. n is standard normal noise. δ is the error of a code of so many bits for a normal number (60 % at 1
bit, 34 %, 19 %, 9.7 %, 5 %, 2.5 %, 1.3 %, 0.6 % at 8), or the resolution of the dtype, if that is larger. Tables of activations
are made for standard normal inputs, whatever the inputs are. So δ n is also added to an activation's derivative, and to its
output if that is kept. The incoming gradient only gets noise of the dtype's resolution. The `scale` of a gradient g is the root
mean square of the change that all this noise makes, plus δ |g|. It accounts for cancellation, depth and every layer, and does
not depend on fewbit. The error of a coded gradient may be `BOUNDS[bits]` times its scale.

Errors of codes are the same for equal numbers. So if many numbers are equal, these errors add up where noise averages out.
`python -m tools.fuzz --quantiles` prints the errors of gradients as multiples of their scale. If nothing is wrong, they are 0.1
to 0.3 at the median and about 1 for the worst in a hundred, at all bits. If something is wrong, they are in the thousands. The
bounds were chosen from these figures.

If only the kind "linear" is coded, then only gradients of weights of linear layers and convolutions may differ by more than
rounding. All other gradients are compared with the scale of δ = 0.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fewbit
from fewbit.measuring import saved_storages
from tools.fuzz.networks import Autocast, Checkpoint, Draw, Network
from tools.fuzz.noise import noise_of, noisy

Tensor = torch.Tensor

BOUNDS = {0: 200.0, **dict.fromkeys(range(1, 9), 20.0)}  # bits -> multiple of the scale; at 0 bits only rounding may differ
NEGLIGIBLE = 1e-15  # a negligible error, since incoming gradients have size 1
NOISES = 3  # runs with noise
PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


@dataclass
class Outcome:
    """The result of a pass."""

    error: BaseException | None = None
    passed: str = "nothing"  # how far it came: nothing, forward, backward
    y: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)  # parameters, buffers, the input, and the state of random numbers
    gradients: dict[str, Tensor] = field(default_factory=dict)
    kept: int = 0  # bytes kept for backward, without parameters and buffers
    tensors: int = 0  # how many tensors hold these bytes


@dataclass(frozen=True)
class Failure:
    """One thing that is wrong.

    kind    words that many failures share
    detail  words for this failure only
    """

    kind: str
    detail: str = ""


@dataclass(frozen=True)
class Way:
    """A way to code a network: by `convert` or `patch`, with bits as these take them, eager or compiled."""

    by: str
    bits: Any
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.by}, bits={self.bits}{', compiled' * self.compiled}"

    @property
    def fewest(self) -> int:
        """Bits of the coarsest code."""
        return self.bits if isinstance(self.bits, int) else min(self.bits.values())

    def outcome(self, net: Network, module: nn.Module) -> Outcome:
        """The outcome of the network with this exact module. `convert` changes the module."""
        if self.by == "patch":
            return run(net, module, lambda: fewbit.patch(self.bits), compiled=self.compiled)
        return run(net, fewbit.convert(module, self.bits), compiled=self.compiled)


def ways(seed: int) -> Iterator[Way]:
    """The ways in which the network of that seed is coded."""
    draw = Draw(seed + 1_000_003)
    for by in ("convert", "patch"):
        bits: Any = draw.randint(1, 8)
        if draw.chance(0.3):
            kinds = draw.sample(["activation", "linear", "norm", "product"], draw.choice([1, 1, 2, 3]))
            bits = {kind: draw.randint(1, 8) for kind in kinds}
        yield Way(by, bits)
    if draw.chance(0.06):
        yield Way(draw.choice(["convert", "patch"]), draw.randint(1, 8), compiled=True)


def run(
    net: Network,
    module: nn.Module,
    around: Callable[[], AbstractContextManager] = nullcontext,
    noise: tuple[int, float] | None = None,
    compiled: bool = False,
) -> Outcome:
    """Run a forward and a backward pass.

    around   the context of both
    noise    a seed and δ, for noise in what is kept for backward
    """
    found, x = Outcome(), net.x.clone().requires_grad_(net.needs)
    module.zero_grad()
    torch.manual_seed(net.seed)
    owned = {each.untyped_storage().data_ptr() for each in (*module.parameters(), *module.buffers())}
    call: Any = torch.compile(module, backend="aot_eager") if compiled else module
    seen: dict[int, int] = {}
    hooks = saved_storages(seen, leave_out=owned) if noise is None else noisy(*noise, owned)
    try:
        with around():
            with nullcontext() if compiled else hooks:
                y = call(x)
            found.passed, found.y = "forward", y.detach()
            found.kept, found.tensors = sum(seen.values()), len(seen)
            found.state = {name: each.detach().clone() for name, each in module.state_dict().items()}
            found.state |= {"the input": x.detach().clone(), "random numbers": torch.get_rng_state()}
            if x.is_cuda:
                found.state["random numbers of the device"] = torch.cuda.get_rng_state(x.device)
            if y.requires_grad:
                y.backward(_incoming(net, y, noise))
                found.passed = "backward"
    except Exception as error:
        found.error = error
    leaves = {"the input": x, **dict(module.named_parameters())}
    found.gradients = {name: each.grad.detach().clone() for name, each in leaves.items() if each.grad is not None}
    return found


def _incoming(net: Network, y: Tensor, noise: tuple[int, float] | None) -> Tensor:
    """The incoming gradient, which is random. It gets noise of the dtype's resolution if there is noise."""
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(net.seed)).to(y)
    if noise is None:
        return grad
    return grad * (1 + _resolution(net) * torch.randn(y.shape, generator=torch.Generator().manual_seed(noise[0]))).to(y)


def _resolution(net: Network) -> float:
    """The resolution of the coarsest dtype that the network computes in."""
    casts = any(isinstance(each, Autocast) for each in net.module.modules())
    return torch.finfo(torch.bfloat16 if casts else net.x.dtype).eps


def bytes_allowed(exact: Outcome) -> float:
    """The bytes that a network may keep if all kinds are coded. Each code is padded by up to 512 bytes. Rows and channels are
    often only a few numbers long here, and then their statistics take more than codes save."""
    return 1.125 * exact.kept + 1024 * (exact.tensors + 1)


class Judge:
    """Judges coded runs of a network. It knows the exact run, and the effect of noise on the gradients."""

    def __init__(self, net: Network, measure: bool = False):
        """measure: find the scale of each gradient, even if its error is so small that no scale is needed"""
        self.net, self.measure = net, measure
        self.exact = self.run_exact()
        self.scales: dict[float, dict[str, float] | None] = {}
        self.ratios: list[tuple[int, float]] = []  # bits, and the error of a gradient as a multiple of its scale
        self.coded = 0  # runs in which some gradient came from codes

    def run_exact(self, **options: Any) -> Outcome:
        module = copy.deepcopy(self.net.module)
        for each in module.modules():
            if isinstance(each, Checkpoint) and "noise" in options:  # when it runs again in backward, nothing would get noise
                each.active = False
        return run(self.net, module, **options)

    def scale(self, size: float) -> dict[str, float] | None:
        """Name -> how far noise of this size moves each gradient; None if that cannot be found."""
        if size not in self.scales:
            runs = [self.run_exact(noise=(seed, size)) for seed in range(NOISES)]
            found: dict[str, float] | None = {}
            for name, grad in self.exact.gradients.items():
                if any(each.error is not None or name not in each.gradients for each in runs):
                    found = None
                    break
                errors = [distance(each.gradients[name], grad) for each in runs]
                least = max(size, _resolution(self.net)) * distance(grad * 0, grad) + NEGLIGIBLE
                found[name] = (sum(each**2 for each in errors) / NOISES) ** 0.5 + least
            self.scales[size] = found
        return self.scales[size]

    def failures(self, way: Way) -> list[Failure]:
        """The failures of the network, coded in this way."""
        exact, module = self.exact, copy.deepcopy(self.net.module)
        if way.compiled:
            torch.compiler.reset()
            exact = self.run_exact(compiled=True)
            torch.compiler.reset()
        found = [*self.compare(way, exact, way.outcome(self.net, module))]
        if way.by == "convert" and not way.compiled:
            found += self.reverted(module)
        return found

    def reverted(self, module: nn.Module) -> Iterator[Failure]:
        """Failures if `revert` does not give back the exact model. The model's state is that after one pass."""
        exact = copy.deepcopy(self.net.module)
        fewbit.revert(module).load_state_dict(exact.state_dict())
        if [type(each) for each in module.modules()] != [type(each) for each in exact.modules()]:
            yield Failure("revert: other classes")
        again = run(self.net, module)
        for name, grad in self.exact.gradients.items():
            if name not in again.gradients or not same(grad, again.gradients[name]):
                yield Failure("revert: other gradients", name)
                return

    def compare(self, way: Way, exact: Outcome, coded: Outcome) -> Iterator[Failure]:
        """The differences that are not allowed."""
        if exact.error is not None or coded.error is not None:
            stage = {"nothing": "forward", "forward": "backward", "backward": "after"}[coded.passed]
            if exact.error is None:
                yield Failure(f"{stage} raises {type(coded.error).__name__}: {_first_words(coded.error)}")
            elif coded.error is None:
                # codes may replace a tensor that was overwritten; compilers trace backward in the forward pass
                if exact.passed == "nothing" and not way.compiled:
                    yield Failure(f"{stage} raises nothing, exact {type(exact.error).__name__}: {_first_words(exact.error)}")
            elif not isinstance(coded.error, type(exact.error)):
                names = f"{type(coded.error).__name__}, not {type(exact.error).__name__}"
                yield Failure(f"{stage} raises {names}: {_first_words(coded.error)}", str(exact.error))
            if exact.passed == "nothing" or coded.passed == "nothing":
                return
        yield from self._same_forward(exact, coded)
        if exact.error is None and coded.error is None:
            yield from self._near(way, exact, coded)
            if isinstance(way.bits, int) and not way.compiled and coded.kept > bytes_allowed(exact):
                yield Failure("bytes: more kept than exact", f"{coded.kept} > {exact.kept}")

    def _same_forward(self, exact: Outcome, coded: Outcome) -> Iterator[Failure]:
        y, other = exact.y, coded.y
        assert isinstance(y, Tensor), "both came to an output"
        assert isinstance(other, Tensor)
        alike = near if y.is_cuda else same
        if not alike(y, other):
            worst = (y - other).abs().max().item() if y.shape == other.shape and y.numel() else "shape"
            yield Failure("output: other values", f"{worst}")
        for what in ("stride", "dtype", "requires_grad"):
            one, two = (getattr(each, what) for each in (y, other))
            if (one() if callable(one) else one) != (two() if callable(two) else two):
                yield Failure(f"output: other {what}")
        for name, tensor in exact.state.items():
            if not alike(tensor, coded.state[name]):
                yield Failure(f"state: other {name.rpartition('.')[2]}", name)

    def _near(self, way: Way, exact: Outcome, coded: Outcome) -> Iterator[Failure]:
        if exact.gradients.keys() != coded.gradients.keys():
            names = exact.gradients.keys() ^ coded.gradients.keys()
            yield Failure("gradients: not of the same tensors", ", ".join(sorted(names)))
            return
        self.coded += any(not same(grad, coded.gradients[name]) for name, grad in exact.gradients.items())
        for name, grad in exact.gradients.items():
            other = coded.gradients[name]
            if (grad.shape, grad.dtype, grad.layout) != (other.shape, other.dtype, other.layout):
                yield Failure("gradients: other shape or dtype", name)
            elif not (grad.isfinite() <= other.isfinite()).all():
                yield Failure("gradients: not finite where exact is", name)
            else:
                yield from self._within_bound(way, name, grad, other)

    def _within_bound(self, way: Way, name: str, grad: Tensor, other: Tensor) -> Iterator[Failure]:
        bits = 0 if self._is_exact(way, name) else way.fewest
        noise = noise_of(bits) if bits else 0.0
        error, norm = distance(other, grad), distance(grad * 0, grad)
        if not self.measure and error <= BOUNDS[bits] * max(noise, _resolution(self.net)) * norm:
            return
        scale = (self.scale(noise) or {}).get(name, math.inf)
        if error and scale < math.inf:
            ratio = error / scale if scale else math.inf
            self.ratios.append((bits, ratio))
            if ratio > BOUNDS[bits]:
                kind = "gradients: error beyond the bound" if bits else "gradients: not exact"
                yield Failure(kind, f"{name}: {error:.3g}, {ratio:.3g} times its scale, norm {norm:.3g}")

    def _is_exact(self, way: Way, name: str) -> bool:
        """Whether the gradient must be exact. With only the kind "linear", this holds for all gradients except those of weights
        of linear layers and convolutions."""
        if way.bits != {"linear": way.fewest}:
            return False
        if name == "the input":
            return True
        parameter = self.net.module.get_parameter(name)
        owners = [each for each in self.net.module.modules() if any(p is parameter for p in each.parameters(recurse=False))]
        return not any(isinstance(each, PRODUCTS) for each in owners) or name.endswith("bias")


def same(one: Tensor, other: Tensor) -> bool:
    """Whether both have the same bits. Any NaN equals any other."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.nan_to_num(0.123), other.nan_to_num(0.123))


def near(one: Tensor, other: Tensor) -> bool:
    """Whether both agree to a few roundings of the largest number. On CUDA devices, activations may differ from torch's by one
    unit in the last place."""
    if same(one, other):
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype) or not torch.equal(one.isfinite(), other.isfinite()):
        return False
    return (
        one.is_floating_point()
        and distance(one, other) <= 16 * torch.finfo(one.dtype).eps * distance(one * 0, one) + NEGLIGIBLE
    )


def distance(one: Tensor, other: Tensor) -> float:
    """The Euclidean distance, over the places where `other` is finite."""
    finite = other.isfinite()
    return (torch.where(finite, one.double(), 0.0) - torch.where(finite, other.double(), 0.0)).norm().item()


def _first_words(error: BaseException | None, words: int = 12) -> str:
    """The first words of the message, without the name of an activation or layer with which fewbit begins it."""
    found = str(error).split()[:words]
    return " ".join(["…", *found[1:]] if isinstance(error, fewbit.FewbitError) else found)
