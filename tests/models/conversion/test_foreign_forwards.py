"""Modules whose `forward` others have replaced by a function, as hooks of Hugging Face's accelerate do."""

import copy
import functools
import logging
import types

import pytest
import torch
from support import gradients
from torch import nn

import fewbit


def by_attribute(module):
    """As accelerate.hooks.add_hook_to_module does."""
    module._old_forward = module.forward

    def forward(module, *args):
        return module._old_forward(*args)

    module.forward = functools.update_wrapper(functools.partial(forward, module), module._old_forward)


def by_closure(module):
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args):
        return inner(*args)

    module.forward = forward


def by_method(module):
    inner = module.forward
    module.forward = types.MethodType(lambda self, *args: inner(*args), module)


def twice(module):
    by_attribute(module)
    by_closure(module)


def bare(module):
    module.forward = module.forward


def accelerates(module):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(module, ModelHook())


WAYS = [by_attribute, by_closure, by_method, twice, bare, accelerates]


def network():
    torch.manual_seed(0)
    convolution = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*convolution, nn.Linear(20, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))


@pytest.fixture
def x():
    return torch.randn(6, 3, 5)


def wrap(model, way):
    for module in model:
        way(module)
    return model


def same(found, true):
    return found.keys() == true.keys() and all(torch.equal(found[name], true[name]) for name in true)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
class TestWrapped:
    def test_before_conversion(self, way, x):
        exact, coded = gradients(network(), x), gradients(fewbit.convert(network(), bits=3), x)
        model = wrap(network(), way)
        fewbit.convert(model, bits=3)
        assert same(gradients(model, x), coded)
        assert not same(coded, exact)
        fewbit.revert(model)
        assert same(gradients(model, x), exact)
        assert same(gradients(fewbit.convert(model, bits=3), x), coded)

    def test_after_conversion(self, way, x):
        exact, coded = gradients(network(), x), gradients(fewbit.convert(network(), bits=3), x)
        model = wrap(fewbit.convert(network(), bits=3), way)
        assert same(gradients(model, x), coded)
        assert same(gradients(fewbit.revert(model), x), exact)

    def test_plans_leave_it_as_it_was(self, way, x):
        model, exact = wrap(network(), way), gradients(network(), x)
        plan = fewbit.memory(model, x).plan(bits=3)
        assert plan.candidates == {"0", "1", "2", "4", "5", "6", "7"}
        assert same(gradients(model, x), exact)


def test_what_accelerate_takes_away(x):
    from accelerate.hooks import remove_hook_from_module

    exact = gradients(network(), x)
    for when in ("before", "after"):
        model = network()
        if when == "before":
            wrap(model, accelerates)
        fewbit.convert(model, bits=3)
        if when == "after":
            wrap(model, accelerates)
        for module in model:
            remove_hook_from_module(module)
        coded = gradients(model, x)
        assert not same(coded, exact)
        assert same(gradients(fewbit.revert(model), x), exact)


def test_copies(x):
    model = wrap(fewbit.convert(network(), bits=3), by_attribute)
    other = copy.deepcopy(model)
    exact = gradients(network(), x)
    assert same(gradients(fewbit.revert(other), x), exact)
    assert not same(gradients(model, x), exact)


def test_a_forward_that_shows_no_call_of_its_own_stays_and_is_named(caplog):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].forward = lambda x: 2 * x
    with caplog.at_level(logging.INFO, "fewbit"):
        fewbit.convert(model, bits=3)
    assert "left exact: 0 (1 module), since others have replaced the forward; convert before that" in caplog.text
    assert type(model[0]) is nn.Linear
    with pytest.warns(fewbit.ConversionWarning, match="left exact: the model itself .* since others"):
        fewbit.convert(model[0], bits=3)
