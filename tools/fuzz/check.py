"""A network exact and coded: what has to be the same, and how far gradients may be from the exact ones.

**The bound of gradients.** How much the error of a code matters to a gradient depends on the network: behind a batch norm the
gradient of a bias is zero by cancellation, and any error is infinite beside it. So each gradient is compared with what noise of
the same size does to it. The exact network runs again with every tensor that torch keeps for backward multiplied by 1 + δ n,
where n is standard normal noise and δ the error of a code of so many bits for a normal number (60 % at 1 bit, 34 %, 19 %,
9.7 %, 5 %, 2.5 %, 1.3 %, 0.6 % at 8), or the resolution of the dtype, if that is more. Tables of activations are for standard
normal inputs, whatever comes; so δ n is added besides to an activation's derivative and to its output where that is kept. The
gradient that comes in gets noise of the dtype's resolution alone. The root mean square of how far all that leads a gradient g
astray, plus δ |g|, is its `scale`: it knows of cancellation, of depth and of every layer, and nothing of fewbit. A coded
gradient may err by `BOUNDS[bits]` times its scale.

Errors of codes have no noise's luck: they are the same for equal numbers, so that where many numbers are equal they add up
where noise averages out. `python -m tools.fuzz --quantiles` prints by how many times their scale gradients err: at all bits
0.1 to 0.3 times at the median and about once for the worst in a hundred, where nothing is wrong; where something is, thousands
of times. From that the bounds were taken.

Where the kind "linear" alone is coded, only weights of linear layers and convolutions may differ by more than rounding: all
other gradients are held to the scale of δ = 0.
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

BOUNDS = {0: 200.0, **dict.fromkeys(range(1, 9), 20.0)}  # times the scale, by bits; at 0 nothing but rounding may differ
NEGLIGIBLE = 1e-15  # an error that is none beside gradients of size 1, as those that come in are
NOISES = 3  # runs with noise
PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


@dataclass
class Outcome:
    """What a pass left."""

    error: BaseException | None = None
    passed: str = "nothing"  # how far it came: nothing, forward, backward
    y: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)  # parameters, buffers, the input, and the state of random numbers
    gradients: dict[str, Tensor] = field(default_factory=dict)
    kept: int = 0  # bytes, for backward, that are neither parameters nor buffers
    tensors: int = 0  # in which they lie


@dataclass(frozen=True)
class Failure:
    """One thing that should not be.

    kind    what, in words that many failures share
    detail  the rest
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
        """Of the network with this module, an exact one, which `convert` changes."""
        if self.by == "patch":
            return run(net, module, lambda: fewbit.patch(self.bits), compiled=self.compiled)
        return run(net, fewbit.convert(module, self.bits), compiled=self.compiled)


def ways(seed: int) -> Iterator[Way]:
    """How the network of that seed is to be coded."""
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
    """A forward and a backward pass.

    around   the context of both
    noise    a seed and δ: noise in what is kept for backward
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
    """The gradient that comes in, random; with noise of the dtype's resolution, where there is any."""
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(net.seed)).to(y)
    if noise is None:
        return grad
    return grad * (1 + _resolution(net) * torch.randn(y.shape, generator=torch.Generator().manual_seed(noise[0]))).to(y)


def _resolution(net: Network) -> float:
    """Of the coarsest dtype that the network computes in."""
    casts = any(isinstance(each, Autocast) for each in net.module.modules())
    return torch.finfo(torch.bfloat16 if casts else net.x.dtype).eps


def bytes_allowed(exact: Outcome) -> float:
    """Of a network whose kinds are all coded. Each code is padded by up to 512 bytes; and where rows or channels are a few
    numbers long, as here they often are, their statistics cost more than codes save."""
    return 1.125 * exact.kept + 1024 * (exact.tensors + 1)


class Judge:
    """Knows the exact run of a network, and what noise does to its gradients."""

    def __init__(self, net: Network, measure: bool = False):
        """measure: find the scale of each gradient, also of those that err so little that none is needed"""
        self.net, self.measure = net, measure
        self.exact = self.run_exact()
        self.scales: dict[float, dict[str, float] | None] = {}
        self.ratios: list[tuple[int, float]] = []  # by how many times its scale a gradient errs, with the bits
        self.coded = 0  # runs in which some gradient came from codes

    def run_exact(self, **options: Any) -> Outcome:
        module = copy.deepcopy(self.net.module)
        for each in module.modules():
            if isinstance(each, Checkpoint) and "noise" in options:  # what it runs again in backward would get no noise
                each.active = False
        return run(self.net, module, **options)

    def scale(self, size: float) -> dict[str, float] | None:
        """By name how far noise of this size leads each gradient astray; None where that cannot be said."""
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
        """What fails where the network is coded this way."""
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
        """Whether `revert` gives back the exact model. Its state is that after one pass."""
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
        """What differs that may not."""
        if exact.error is not None or coded.error is not None:
            stage = {"nothing": "forward", "forward": "backward", "backward": "after"}[coded.passed]
            if exact.error is None:
                yield Failure(f"{stage} raises {type(coded.error).__name__}: {_first_words(coded.error)}")
            elif coded.error is None:
                # in backward, which compilers trace in the forward pass, a tensor that codes replace may have been overwritten
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
        """Whether the contract says so: with the kind "linear" alone, all but the weights of linear layers and convolutions."""
        if way.bits != {"linear": way.fewest}:
            return False
        if name == "the input":
            return True
        parameter = self.net.module.get_parameter(name)
        owners = [each for each in self.net.module.modules() if any(p is parameter for p in each.parameters(recurse=False))]
        return not any(isinstance(each, PRODUCTS) for each in owners) or name.endswith("bias")


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, but that NaN is NaN."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.nan_to_num(0.123), other.nan_to_num(0.123))


def near(one: Tensor, other: Tensor) -> bool:
    """To a few roundings of the largest: on CUDA devices activations are one unit in the last place from torch's at most."""
    if same(one, other):
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype) or not torch.equal(one.isfinite(), other.isfinite()):
        return False
    return (
        one.is_floating_point()
        and distance(one, other) <= 16 * torch.finfo(one.dtype).eps * distance(one * 0, one) + NEGLIGIBLE
    )


def distance(one: Tensor, other: Tensor) -> float:
    """Euclidean, over what is finite in `other`."""
    finite = other.isfinite()
    return (torch.where(finite, one.double(), 0.0) - torch.where(finite, other.double(), 0.0)).norm().item()


def _first_words(error: BaseException | None, words: int = 12) -> str:
    """The start of the message, without the name of an activation or layer that fewbit puts first."""
    found = str(error).split()[:words]
    return " ".join(["…", *found[1:]] if isinstance(error, fewbit.FewbitError) else found)
