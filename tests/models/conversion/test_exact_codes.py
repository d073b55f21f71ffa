"""Dropout, pooling and padding in models: converted with any bits, coded by `patch`, and lossless."""

import copy
import logging

import pytest
import torch
from support import bytes_kept, gradients, squares, types
from torch import nn
from torch.nn import functional

import fewbit


def model():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3)),
        *(nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 4)),
    )


EXACT = [2, 3, 5, 6, 7, 9]


def batch():
    return torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def of_batch(model):
    torch.manual_seed(3)
    return gradients(model, batch())


class Max(nn.MaxPool2d):
    """A subclass that leaves `forward` as it is."""

    def extra_repr(self):
        return "mine"


class Own(nn.Dropout):
    """One that replaces it."""

    def forward(self, input):
        return super().forward(input) + 1


@pytest.mark.parametrize("bits", [{"attention": 4}, {"rest": 8}, {"recurrent": 1}], ids=str)
def test_whatever_kinds_are_named(bits):
    """If no other module is coded, gradients are torch's, bit for bit."""
    net = model()
    before, text = types(net), repr(net)
    exact = of_batch(copy.deepcopy(net))
    of_torch = bytes_kept(net, batch())
    fewbit.convert(net, bits)
    assert [i for i, module in enumerate(net) if type(module) is not before[i + 1]] == EXACT
    assert [type(net[i]) for i in EXACT] == [getattr(fewbit, before[i + 1].__name__) for i in EXACT]
    found = of_batch(net)
    assert all(torch.equal(found[name], exact[name]) for name in exact)
    assert bytes_kept(net, batch()) < of_torch - 64 * 8 * 16 * 16 * 8  # only the indices of the first pooling
    assert repr(net) == text
    assert types(fewbit.revert(net)) == before
    assert not any("_before_fewbit" in vars(each) for each in net.modules())


def test_the_filter_holds_for_them():
    net = fewbit.convert(model(), 4, lambda module, _: isinstance(module, (nn.Conv2d, nn.Dropout)))
    assert [type(net[i]) for i in EXACT[:-1]] == [type(model()[i]) for i in EXACT[:-1]]
    assert type(net[9]) is fewbit.Dropout


def test_subclasses():
    net = fewbit.convert(nn.Sequential(Max(2), Own(0.5)), 4)
    assert isinstance(net[0], fewbit.MaxPool2d)
    assert isinstance(net[0], Max)
    assert repr(net[0]) == "Max(mine)"
    assert type(net[1]).__bases__[-1] is Own
    assert type(fewbit.revert(net)[0]) is Max


def test_what_is_told(caplog):
    caplog.set_level(logging.INFO, logger="fewbit")
    fewbit.convert(model(), 4)
    assert caplog.messages == [
        "convert: 10 of 12 modules of the Sequential: 3 linear at 4 bits, 1 norm at 4 bits, 6 by exact codes"
    ]


@pytest.mark.parametrize("bits", [4, {"activation": 3}, {"linear": 2}], ids=str)
@pytest.mark.parametrize("fake", [False, True])
def test_plans_are_kept(bits, fake):
    net = model()
    plan = fewbit.memory(net, batch(), fake=fake).plan(bits)
    whole = fewbit.memory(fewbit.convert(net, bits), batch()).activation_bytes
    assert abs(plan.after_bytes - whole) <= 0.01 * whole
    fewbit.revert(net)
    plan.convert()
    best = fewbit.memory(net, batch()).activation_bytes
    assert abs(plan.best_bytes - best) <= 0.01 * best
    assert best <= whole < plan.before_bytes


def test_other_functions_on_models():
    """Functions that look for tables leave exact codes alone."""
    net = fewbit.convert(nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 4)), 4)
    batches = [torch.randn(64, 8) for _ in range(3)]
    fewbit.calibrate(net, batches)
    fewbit.allocate(net, batches, budget=0.9)
    with fewbit.watch(net) as watching:
        net(batches[0]).sum().backward()
    watching.report()
    assert type(net[2]) is fewbit.Dropout
    lossless = fewbit.convert(nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.1), nn.Linear(64, 4)), {"rest": 8})
    report = fewbit.fidelity(lossless, batches, squares)
    assert report.whole.error == report.losses_differ == 0


class Functions(nn.Module):
    """All of it as calls, in both ways to return indices."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        x = functional.max_pool2d(functional.pad(self.conv(x), (1, 1, 1, 1), mode="reflect"), kernel_size=2)
        x, _ = functional.max_pool2d(functional.avg_pool2d(input=x, kernel_size=2), 2, return_indices=True)
        x, _ = functional.adaptive_max_pool2d_with_indices(x, 3)
        return functional.dropout(functional.adaptive_avg_pool2d(x, 2), p=0.1)


class TestPatch:
    def test_codes_them_with_any_bits(self):
        net = Functions()
        exact, of_torch = of_batch(net), bytes_kept(net, batch())
        for bits in (4, {"activation": 3}):
            with fewbit.patch({"recurrent": 8} if bits == 4 else bits):
                found, kept = of_batch(net), bytes_kept(net, batch())
            assert all(torch.equal(found[name], exact[name]) for name in exact)
            assert kept < of_torch / 5

    def test_leaves_them_alone_where_activations_are_named(self):
        net = Functions()
        with fewbit.patch(activations=()):
            kept = bytes_kept(net, batch())
        assert kept == bytes_kept(net, batch())

    @pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d", "dropout"])
    def test_each(self, name):
        x, arguments = torch.randn(4, 3, 32, 32, requires_grad=True), {"dropout": (0.5,)}.get(name, (3,))
        function = getattr(functional, name)
        of_torch = bytes_kept(lambda: function(x * 1, *arguments))
        with fewbit.patch(2):
            assert bytes_kept(lambda: function(x * 1, *arguments)) < of_torch / 7

    def test_arguments_that_torch_refuses(self):
        x = torch.randn(4, 3, 32, 32, requires_grad=True)
        with fewbit.patch(), pytest.raises(TypeError):
            functional.avg_pool2d(x, 2, nonsense=1)
        with fewbit.patch(), pytest.raises(RuntimeError, match="pad should be at most half"):
            functional.max_pool2d(x, 2, padding=3)

    def test_other_tensors_are_torchs(self):
        x = torch.randn(4, 3, 8, 8, dtype=torch.complex64, requires_grad=True)
        with fewbit.patch():
            assert functional.pad(x, (1, 1, 1, 1), "reflect").shape == (4, 3, 10, 10)
        whole = torch.randint(9, (4, 3, 8, 8))
        expected = functional.max_pool2d(whole, 2)
        with fewbit.patch():
            assert torch.equal(functional.max_pool2d(whole, 2), expected)


def test_a_convolution_that_pads_by_reflection():
    """A converted one keeps codes of what it pads, and nothing of its input."""
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"))
    x = torch.randn(8, 8, 16, 16, requires_grad=True)
    padded, n = 8 * 8 * 18 * 18, 8 * 8 * 16 * 16
    fewbit.convert(net, {"linear": 4})
    assert padded // 2 <= bytes_kept(lambda: net(x * 1), leave_out=tuple(net.parameters())) < padded // 2 + n
