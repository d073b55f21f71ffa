"""fidelity: what it takes and refuses, what it stores, and that it leaves everything as it was."""

import copy
import random
import weakref
from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import coded_mlp, squares
from torch import nn

import fewbit
from fewbit.autograd import exact as exact_mode
from fewbit.errors import InputError
from fewbit.models.gradients import streams


def remembered(model):
    """A function that checks that everything is as it is now."""
    kept = copy.deepcopy(model)
    gradients = {name: (each.grad, each.grad.clone()) for name, each in model.named_parameters()}
    buffers = [(buffer, buffer._version) for buffer in model.buffers()]
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    hooks = [dict(each._post_accumulate_grad_hooks or {}) for each in model.parameters()]

    def check():
        for name, each in model.named_parameters():
            grad, content = gradients[name]
            assert each.grad is grad
            assert torch.equal(grad, content)
        assert all(map(torch.equal, model.state_dict().values(), kept.state_dict().values()))
        assert all(mine is buffer for mine, (buffer, _) in zip(model.buffers(), buffers, strict=True))
        assert [each.training for each in model.modules()] == [each.training for each in kept.modules()]
        assert torch.equal(torch.get_rng_state(), numbers[0])
        assert random.getstate() == numbers[1]
        assert np.array_equal(np.random.get_state()[1], numbers[2])  # noqa: NPY002
        assert hooks == [dict(each._post_accumulate_grad_hooks or {}) for each in model.parameters()]
        assert not exact_mode.active

    return check


class TestLeavesAllAsItWas:
    @pytest.fixture
    def model(self, batches):
        model = coded_mlp(dropout=0.5)
        squares(model, batches[0]).backward()
        model[4].eval()
        return model

    def test_after_a_report(self, model, batches):
        before = remembered(model)

        def loss(model, batch):
            model.train()
            model.extra = 1
            model.register_buffer("later", torch.ones(1))
            random.random(), np.random.rand()  # noqa: NPY002
            return squares(model, batch)

        assert fewbit.fidelity(model, batches, loss).whole.error > 0
        before()

    @pytest.mark.parametrize("failing", [1, 2, 3, 4])
    def test_after_an_exception_half_way(self, model, batches, failing):
        before = remembered(model)
        calls = []

        def loss(model, batch):
            calls.append(batch)
            if len(calls) == failing:
                raise KeyError
            return squares(model, batch)

        with pytest.raises(KeyError):
            fewbit.fidelity(model, batches, loss)
        before()

    def test_after_an_exception_in_backward(self, model, batches):
        before = remembered(model)

        def loss(model, batch):
            output = model(batch)
            output.register_hook(lambda _: (_ for _ in ()).throw(KeyError()))
            return output.square().mean()

        with pytest.raises(KeyError):
            fewbit.fidelity(model, batches, loss)
        before()

    def test_gradients_of_others_too(self, batches):
        scale, model = nn.Parameter(torch.ones(())), coded_mlp()
        data = [batch.requires_grad_() for batch in batches]
        fewbit.fidelity(model, data, lambda model, x: scale * squares(model, x))
        assert scale.grad is None
        assert all(batch.grad is None for batch in data)

    def test_buffers_are_the_same_for_every_batch(self, model, batches):
        seen = []

        def loss(model, batch):
            seen.append(model[1].running_mean.clone())
            return squares(model, batch)

        fewbit.fidelity(model, batches, loss)
        assert all(torch.equal(each, seen[0]) for each in seen)

    def test_without_gradients_outside(self, model, batches):
        before = remembered(model)
        with torch.no_grad():
            assert fewbit.fidelity(model, batches, squares).whole.error > 0
        before()


def test_one_gradient_is_stored_not_all():
    """Of 6 equal weights: during backward there are never more gradients than parameters, plus two for the current one."""
    layers = 6
    model = fewbit.convert(
        nn.Sequential(*(nn.Sequential(nn.Linear(50, 50, bias=False), nn.GELU()) for _ in range(layers))), bits={"activation": 2}
    )
    alive, peak = weakref.WeakSet(), [0]

    class Tracked:
        pass

    taken = streams.Stream.take_exact, streams.Stream.take_coded

    def tracking(take):
        def run(self, gradient):
            if gradient is not None:
                tag = Tracked()
                gradient.tag = tag  # it lives as long as the tensor
                alive.add(tag)
            assert self.parameter.grad is None
            take(self, gradient)
            del gradient
            peak[0] = max(peak[0], len(alive) + sum(each.grad is not None for each in model.parameters()))

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams.Stream, "take_exact", tracking(taken[0]))
        patch.setattr(streams.Stream, "take_coded", tracking(taken[1]))
        fewbit.fidelity(model, [torch.randn(4, 50) for _ in range(4)], squares)
    assert layers <= peak[0] <= layers + 1


class TestRefuses:
    def test_what_is_no_model(self):
        with pytest.raises(InputError, match=r"fidelity takes a torch\.nn\.Module first, got int"):
            fewbit.fidelity(3, [], squares)

    def test_arguments_in_the_old_order(self, batches):
        rule = r"fidelity\(model, batches, loss_fn\) goes through an iterable of batches, such as a list or a DataLoader; got "
        with pytest.raises(InputError, match=rule + "function"):
            fewbit.fidelity(coded_mlp(), squares, batches)
        with pytest.raises(InputError, match=rule + "int"):
            fewbit.fidelity(coded_mlp(), 3)
        with pytest.raises(
            InputError, match="loss_fn must be a function of the model and a batch that returns the loss, got list"
        ):
            fewbit.fidelity(coded_mlp(), batches, batches)

    def test_no_batches(self):
        with pytest.raises(InputError, match="gave none"):
            fewbit.fidelity(coded_mlp(), iter(()), squares)

    def test_no_trainable_parameter(self, batches):
        with pytest.raises(InputError, match="no parameter"):
            fewbit.fidelity(coded_mlp().requires_grad_(False), batches, squares)

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (lambda model, x: model(x), r"one element, got shape \(16, 4\)"),
            (lambda model, x: 1.0, "got float"),
            (lambda model, x: squares(model, x).detach(), "depends on no parameter"),
        ],
        ids=["vector", "number", "detached"],
    )
    def test_losses(self, batches, loss, message):
        with pytest.raises(InputError, match=message):
            fewbit.fidelity(coded_mlp(), batches, loss)

    def test_backward_in_loss(self, batches):
        def loss(model, batch):
            found = squares(model, batch)
            found.backward(retain_graph=True)
            return found

        with pytest.raises(InputError, match="must not call backward"):
            fewbit.fidelity(coded_mlp(), batches, loss)

    def test_optimizers_that_step_within_backward(self, batches):
        model = coded_mlp()
        model[0].weight.register_post_accumulate_grad_hook(lambda _: None)
        with pytest.raises(InputError, match=r"0\.weight has a hook"):
            fewbit.fidelity(model, batches, squares)

    def test_groups(self, batches):
        with pytest.raises(InputError, match="by must be one of 'pattern'"):
            fewbit.fidelity(coded_mlp(), batches, squares, by="layer")
        with pytest.raises(InputError, match="'all' means the whole gradient"):
            fewbit.fidelity(coded_mlp(), batches, squares, by=lambda name: "all")


class WithLoss(nn.Module):
    """A model whose output has a loss, as in Hugging Face's models."""

    def __init__(self, form):
        super().__init__()
        self.inner, self.form = coded_mlp(), form

    def forward(self, x, scale=1.0):
        loss = scale * self.inner(x).square().mean()
        return {"logits": x, "loss": loss} if self.form == "mapping" else SimpleNamespace(loss=loss)


class TestOwnLoss:
    @pytest.mark.parametrize("form", ["mapping", "attribute"])
    def test_is_that_of_the_output(self, form, batches):
        model = WithLoss(form)
        found = fewbit.fidelity(model, batches)
        given = fewbit.fidelity(model, batches, lambda model, x: model.inner(x).square().mean())
        assert found.to_dict() == given.to_dict()
        assert found.whole.error > 0

    def test_batches_may_be_tensors_arguments_or_names(self, batches):
        model, expected = WithLoss("mapping"), None
        forms = (
            lambda x: x,
            lambda x: (x,),
            lambda x: [x, 1.0],
            lambda x: (x, 1.0),
            lambda x: {"x": x},
            lambda x: UserDict(scale=1.0, x=x),
        )
        for form in forms:
            found = fewbit.fidelity(model, map(form, batches)).to_dict()
            expected = expected or found
            assert found == expected

    def test_there_is_none(self, batches):
        with pytest.raises(InputError, match="the model's output has no `loss`; give loss_fn, a function of the model and"):
            fewbit.fidelity(coded_mlp(), batches)
        model = WithLoss("mapping")
        model.inner = nn.Identity()
        model.scale = nn.Parameter(torch.ones(()))
        with pytest.raises(InputError, match="the loss depends on no parameter"):
            fewbit.fidelity(model, batches)

    def test_batches_that_the_model_does_not_take(self, batches):
        with pytest.raises(
            InputError, match=r"the model does not take this batch \(.*'labels'\): a batch is a tensor, a tuple or"
        ):
            fewbit.fidelity(WithLoss("mapping"), [{"x": each, "labels": each} for each in batches])


def test_within_exact_there_is_nothing_to_compare(batches):
    with fewbit.exact(), pytest.raises(InputError, match="there are none; call it outside"):
        fewbit.fidelity(coded_mlp(), batches, squares)
