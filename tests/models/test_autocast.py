"""Functions that run a model do so under the caller's autocast, and leave nothing in its cache."""

import copy

import pytest
import torch
from support import compiled, squares
from torch import nn

import fewbit


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64))


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.fixture
def x():
    return torch.randn(128, 64)


class TestPlans:
    def test_of_a_report_hold_for_the_autocast_of_the_report(self, x):
        model = network()
        with autocast():
            inside = fewbit.memory(model, x)
            reference = inside.plan(bits=4)
        outside = fewbit.memory(model, x)
        assert outside.activation_bytes > 1.5 * inside.activation_bytes
        plan = inside.plan(bits=4)
        assert (plan.before_bytes, plan.after_bytes) == (reference.before_bytes, reference.after_bytes)
        true = outside.plan(bits=4)
        with autocast():
            plan = outside.plan(bits=4)
        assert (plan.before_bytes, plan.after_bytes) == (true.before_bytes, true.after_bytes)

    @pytest.mark.parametrize("fake", [False, True])
    def test_tell_what_a_conversion_keeps(self, x, fake):
        model = network()
        with autocast():
            plan = fewbit.memory(model, x, fake=fake).plan(bits=4)
            kept = fewbit.memory(fewbit.convert(model, bits=4), x).activation_bytes
        assert plan.after_bytes == pytest.approx(kept, rel=0.01)


RUNS = {
    "memory": lambda model, batches: fewbit.memory(model, batches[0]).plan(bits=4),
    "calibrate": lambda model, batches: fewbit.calibrate(model, batches),
    "calibrate by gradients": lambda model, batches: fewbit.calibrate(model, batches, squares),
    "allocate": lambda model, batches: fewbit.allocate(model, batches, squares, budget=0.9),
    "fidelity": lambda model, batches: fewbit.fidelity(model, batches, squares),
}


@pytest.mark.parametrize("name", RUNS)
class TestRuns:
    def test_are_under_autocast(self, name, x):
        model, seen = fewbit.convert(network(), bits=4), []
        model[0].register_forward_hook(lambda _, args, output: seen.append(output.dtype))
        with autocast():
            RUNS[name](model, [x, x + 1])
        assert set(seen) == {torch.bfloat16}

    def test_take_no_gradient_from_the_training_that_follows(self, name, x):
        model = fewbit.convert(network(), bits={"activation": 4})
        with autocast():
            for each in (name, "calibrate", name):
                RUNS[each](model, [x, x + 1])
            squares(model, x).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(16), nn.RMSNorm(16), nn.GroupNorm(2, 16), nn.BatchNorm1d(16)], ids=lambda norm: type(norm).__name__
)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_compiled_norms_behind_linear_layers(norm, dtype):
    """Fake tensors have a layer norm's statistics in the dtype of the input, real ones in that of the weight."""
    torch.manual_seed(0)
    model, x = fewbit.convert(nn.Sequential(nn.Linear(16, 16), copy.deepcopy(norm)), bits=4), torch.randn(8, 16)
    found = []
    for function in (model, compiled(model)):
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            y = function(x)
        y.float().square().sum().backward()
        found.append([y.detach(), *(each.grad for each in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
