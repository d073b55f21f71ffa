"""Inputs near the ends of a dtype, and inputs that are not finite: gradients are finite exactly where torch's are."""

import pytest
import torch
from layer_oracles import CASES, leaves
from torch import nn

import fewbit

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # from torch
SOME_BITS = {torch.float16: (1, 8), torch.bfloat16: (2, 4), torch.float32: (4, 8), torch.float64: (1, 2)}


def ends(dtype):
    """Numbers near the ends of the dtype, and in the middle of its range."""
    info = torch.finfo(dtype)
    return {
        "largest": info.max,
        "half of the largest": info.max / 2,
        "root of the largest": info.max**0.5,
        "one": 1.0,
        "smallest": info.tiny,
        "below the smallest": info.smallest_normal / 4,
    }


def one_element(x, end):
    x.view(-1)[x.numel() // 2] = end
    return x


def one_row(x, end):
    x[x.shape[0] // 2] *= end / 8
    return x


def one_channel(x, end):
    channel = 1 if x.dim() > 2 else -1
    x.select(channel, 0).mul_(end / 8)
    return x


PLACES = {
    "all": lambda x, end: x.clamp(-1, 1) * end,
    "all of one sign": lambda x, end: x.abs().clamp(max=1) * end,
    "signs alone": lambda x, end: x.sign() * end,
    "constant": lambda x, end: torch.full_like(x, end),
    "an element": one_element,
    "an element among zeros": lambda x, end: one_element(torch.zeros_like(x), end),
    "a row": one_row,
    "a channel": one_channel,
    "every other": lambda x, end: torch.where(torch.arange(x.numel()).view(x.shape) % 2 == 0, torch.zeros_like(x), end),
}


def both_gradients(layer, coded, x, parameters, grad):
    """torch's and ours, by name."""
    found = []
    for call in (layer, coded):
        own_x, own = leaves(x, parameters)
        y = call(own_x, own)
        grads = torch.autograd.grad(y, [own_x, *own.values()], grad, allow_unused=True)
        found.append(dict(zip(["x", *own], grads, strict=True)))
    return found


def hidden_or_lost(exact, found, exactly=False):
    """The names of gradients that are not finite although torch's are; with `exactly`, also the other way round."""
    wrong = []
    for name, each in exact.items():
        if each is not None:
            torchs, ours = each.isfinite(), found[name].isfinite()
            if not torch.equal(torchs, ours) if exactly else (torchs & ~ours).any():
                wrong.append(name)
    return wrong


@pytest.mark.parametrize(
    ("dtype", "all_bits"),
    [(torch.float16, (4,)), *(pytest.param(dtype, bits, marks=pytest.mark.slow) for dtype, bits in SOME_BITS.items())],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_finite_where_torchs_are(name, dtype, all_bits):
    case, wrong = CASES[name], []
    for place, put in PLACES.items():
        for end, number in ends(dtype).items():
            torch.manual_seed(0)
            x, parameters = case.make(dtype)
            x, parameters = put(x.clone(), number), {name: 1e-3 * each for name, each in parameters.items()}
            try:
                y = case.exact(x, parameters)
            except RuntimeError as error:
                pytest.skip(f"torch has no such operation: {error}")
            if not y.isfinite().all():
                continue
            grad = (1e-3 * torch.randn(y.shape)).to(dtype)  # so small that errors of the codes do not make sums overflow
            for bits in all_bits:
                exact, found = both_gradients(
                    case.exact, lambda x, own, bits=bits: case.coded(x, own, bits=bits), x, parameters, grad
                )
                wrong += [(place, end, bits, each) for each in hidden_or_lost(exact, found)]
    assert not wrong


LAYERS = {
    "linear": lambda: nn.Linear(16, 12),
    "layer norm": lambda: nn.LayerNorm(16),
    "rms norm": lambda: nn.RMSNorm(16),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardtanh": nn.Hardtanh,
    "glu": nn.GLU,
    "gelu, linear": lambda: nn.Sequential(nn.GELU(), nn.Linear(16, 12)),
    "norm, gelu, linear": lambda: nn.Sequential(nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 12)),
    "norms, linear": lambda: nn.Sequential(nn.RMSNorm(16), nn.LayerNorm(16), nn.Linear(16, 12)),
    "glu, linear": lambda: nn.Sequential(nn.Linear(16, 16), nn.GLU(), nn.Linear(8, 12)),
    "dropout, linear": lambda: nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 12)),
}
IMAGE_LAYERS = {
    "convolution": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "grouped convolution": lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2),
    "transposed convolution": lambda: nn.ConvTranspose2d(4, 6, 3),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "batch norm, evaluated": lambda: nn.BatchNorm2d(4).eval(),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "batch norm, relu, convolution": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3)),
    "the same, evaluated": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3)).eval(),
    "group norm, relu, convolution": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 6, 3)),
}


def masked_gradients(module, data, place):
    """Gradients by name, for a loss in which the damaged part has no share."""
    x = data.clone().requires_grad_()
    torch.manual_seed(1)
    y = module(x)
    grad = torch.ones_like(y)
    grad[place[0]] = 0
    own = dict(module.named_parameters())
    grads = torch.autograd.grad(y, [x, *own.values()], grad)
    return dict(zip(["x", *own], grads, strict=True))


NOT_FINITE = [float("nan"), *(pytest.param(value, marks=pytest.mark.slow) for value in (float("inf"), -float("inf")))]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", [*LAYERS, *IMAGE_LAYERS])
class TestOneThatIsNotFinite:
    """One element that is not finite, in a row that has no share in the loss."""

    def made(self, name, value):
        torch.manual_seed(0)
        if name in LAYERS:
            module, data, place = LAYERS[name](), torch.randn(64, 16), (3, 5)
        else:
            module, data, place = IMAGE_LAYERS[name](), torch.randn(8, 4, 12, 12), (3, 2, 5, 6)
        data[place] = value
        return module, data, place

    def test_damages_what_it_damages_in_torch(self, name, value):
        module, data, place = self.made(name, value)
        exact = masked_gradients(module, data, place)
        found = masked_gradients(fewbit.convert(module, bits=4), data, place)
        assert not hidden_or_lost(exact, found, exactly=True)

    @pytest.mark.parametrize("call", ["activation", "layer"])
    def test_under_patch(self, name, value, call):
        kinds = {"activation": {"activation": 4}, "layer": 4}[call]
        module, data, place = self.made(name, value)
        exact = masked_gradients(module, data, place)
        with fewbit.patch(bits=kinds):
            found = masked_gradients(module, data, place)
        assert not hidden_or_lost(exact, found, exactly=True)

    @pytest.mark.usefixtures("fresh_compiler")
    def test_does_not_spread_in_compiled_code(self, name, value):
        """No element is inspected there, and an element that only a pointwise activation would lose has a finite gradient. But
        no weight learns from numbers that are not finite: all elements of the channel are lost."""
        module, data, place = self.made(name, value)
        exact = masked_gradients(module, data, place)
        compiled = torch.compile(fewbit.convert(module, bits=4), backend="aot_eager")
        found = masked_gradients(compiled, data, place)
        found = {each.removeprefix("_orig_mod."): grad for each, grad in found.items()}
        of_channels = [
            {each: grad.flatten(2).sum(2) if "weight" in each and grad.dim() > 2 else grad for each, grad in grads.items()}
            for grads in (exact, found)
        ]
        if not (name == "rms norm" and value in (torch.inf, -torch.inf)):  # all of its weight is lost; torch loses one element
            assert not hidden_or_lost(*of_channels)
        for each, grad in found.items():
            assert grad.isfinite().all() == exact[each].isfinite().all() or "weight" not in each
