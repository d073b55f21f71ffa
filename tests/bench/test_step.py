"""One training step: what it runs, keeps and holds; blocks and their checkpoints; the built-in models."""

import copy

import pytest
import torch
from torch import nn

import fewbit
from fewbit.bench import models
from fewbit.bench.models import Subject
from fewbit.bench.step import Step, moved
from fewbit.errors import InputError
from fewbit.models.blocks import blocks, checkpoint_blocks

CPU = torch.device("cpu")


class MLP(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


def mlps(number=3):
    return nn.Sequential(*(MLP() for _ in range(number)))


def grads(step):
    step()
    return [parameter.grad.clone() for parameter in step.model.parameters()]


class TestStep:
    def test_every_step_begins_without_gradients(self):
        batch = torch.randn(4, 8, requires_grad=True)
        step = Step(Subject(mlps(), batch))
        first = grads(step)
        of_input = batch.grad.clone()
        assert all(map(torch.equal, first, grads(step)))
        assert torch.equal(batch.grad, of_input)

    def test_backward_begins_at_all_outputs(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(8, 2), nn.Linear(8, 2)

            def forward(self, x):
                return {"first": self.a(x), "second": [self.b(x), x]}

        assert all(grad.norm() > 0 for grad in grads(Step(Subject(Two(), torch.randn(4, 8)))))

    def test_the_sum_over_a_norm_would_have_no_gradient(self):
        assert all(grad.norm() > 0.1 for grad in grads(Step(Subject(nn.Sequential(MLP(), nn.LayerNorm(8)), torch.randn(4, 8)))))

    def test_losses(self):
        class WithLoss(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, x):
                return {"loss": self.model(x).square().mean()}

        model, x = mlps(), torch.randn(4, 8)
        model(x).square().mean().backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        given = Subject(model, {"any": x}, lambda model, batch: model(batch["any"]).square().mean())
        for subject in (given, Subject(WithLoss(model), x)):
            assert all(map(torch.equal, grads(Step(subject)), expected))

    @pytest.mark.parametrize("bits", [None, 4])
    def test_kept_bytes_are_those_of_the_report(self, bits):
        model, x = mlps(), torch.randn(64, 8)
        model = model if bits is None else fewbit.convert(model, bits=bits)
        expected = fewbit.memory(model, x).activation_bytes
        assert Step(Subject(model, x)).kept_bytes() == expected > 0
        with_loss = Step(Subject(model, x, lambda model, x: model(x).square().sum()))
        assert with_loss.kept_bytes() == expected + x.nbytes  # the square keeps it

    def test_peak_is_without_the_model(self):
        model, x = mlps(), torch.randn(4096, 8)
        step = Step(Subject(model, x))
        step()
        kept = step.kept_bytes()
        assert kept < step.peak_bytes(CPU) < 2 * kept
        assert step.peak_bytes(CPU) == step.peak_bytes(CPU)
        assert step.peak_bytes(torch.device("meta")) is None

    @pytest.mark.parametrize("model", [mlps().requires_grad_(False), nn.Identity()], ids=["frozen", "without parameters"])
    def test_nothing_to_differentiate(self, model):
        with pytest.raises(InputError, match="the model returns no tensor that needs a gradient; is all of it frozen"):
            Step(Subject(model, torch.randn(4, 8)))()

    def test_a_batch_that_does_not_fit(self):
        with pytest.raises(InputError, match="the model does not take this batch"):
            Step(Subject(mlps(), (torch.randn(4, 8), 3)))()


class TestBlocks:
    def test_levels(self):
        stages = nn.ModuleList([nn.Sequential(MLP(), MLP()), nn.Sequential(MLP(), MLP(), MLP())])
        outer, inner = blocks(nn.Sequential(nn.Linear(2, 2), stages, nn.Sequential(MLP())))
        assert [type(block) for block in outer] == [nn.Sequential] * 2 + [MLP]
        assert [type(block) for block in inner] == [MLP] * 5
        shared, other = MLP(), MLP()
        assert blocks(nn.Sequential(shared, shared, other)) == [[shared, other]]

    @pytest.mark.parametrize(
        "model",
        [
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),  # layers are no blocks
            nn.Sequential(MLP(), nn.Sequential(nn.ReLU())),  # of two classes
            MLP(),
            nn.ModuleDict({"a": MLP(), "b": MLP()}),
        ],
        ids=["layers", "classes", "alone", "dict"],
    )
    def test_none(self, model):
        assert blocks(model) == []

    def test_checkpoints_keep_inputs_and_give_the_same_gradient(self):
        model, x = mlps(), torch.randn(64, 8)
        copied = checkpoint_blocks(copy.deepcopy(model))
        exact, step = Step(Subject(model, x)), Step(Subject(copied, x))
        assert all(map(torch.equal, grads(exact), grads(step)))
        assert step.kept_bytes() == 2 * x.nbytes  # the inputs of the second and the third block
        assert exact.kept_bytes() == 2 * x.nbytes + 3 * 2 * 2 * x.nbytes


class TestModels:
    @pytest.mark.parametrize("name", models.BUILT_IN)
    def test_blocks_and_batch(self, name):
        subject = models.BUILT_IN[name](3, 64, 2, 16)
        assert [len(level) for level in blocks(subject.model)] == [3]
        assert subject.model(subject.batch).shape == subject.batch.shape
        assert all(grad.norm() > 0 for grad in grads(Step(subject)))
        assert models.BUILT_IN[name]().batch.requires_grad

    def test_llama_sees_the_past_alone_and_how_far_it_is(self):
        attention = models.LlamaAttention(64, 8)
        x = torch.randn(1, 8, 64)
        changed = x.clone()
        changed[:, 5:] += 1
        assert torch.allclose(attention(x)[:, :5], attention(changed)[:, :5], atol=1e-6)
        assert not torch.allclose(attention(x)[:, 5:], attention(changed)[:, 5:], atol=1e-3)
        same = torch.randn(64).expand(1, 1, 8, 64)
        scores = attention.turned(same) @ attention.turned(same).mT
        torch.testing.assert_close(scores[0, 0, 1:, 1:], scores[0, 0, :-1, :-1])  # only distance matters
        assert not torch.allclose(scores[0, 0, 0, 1:], scores[0, 0, 0, :-1], atol=1e-3)

    def test_moved(self):
        model, loss = nn.Linear(8, 2), lambda model, batch: model(batch["x"]).sum()
        batch = {"x": torch.randn(4, 8, requires_grad=True), "labels": torch.arange(4), "name": "some"}
        subject = moved(Subject(model, batch, loss), CPU, torch.bfloat16)
        assert subject.model.weight.dtype == subject.batch["x"].dtype == torch.bfloat16
        assert subject.batch["labels"].dtype == torch.int64
        assert subject.batch["x"].is_leaf
        assert subject.batch["x"].requires_grad
        assert (subject.batch["name"], subject.loss_fn) == ("some", loss)

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            (nn.Linear(2, 2), r"a factory must return \(model, batch\) or \(model, batch, loss_fn\), got \(Linear\)"),
            ((nn.Linear(2, 2),), r"got \(Linear\)"),
            (("model", torch.ones(2)), r"got \(str, Tensor\)"),
            ((nn.Linear(2, 2), torch.ones(2), 3), "a factory's loss_fn must be a function of the model and a batch, got int"),
        ],
        ids=["model alone", "tuple of one", "no model", "no loss"],
    )
    def test_what_no_factory_may_return(self, made, message):
        with pytest.raises(InputError, match=message):
            Subject.of(made)

    def test_what_factories_return(self):
        model, batch = nn.Linear(2, 2), torch.ones(2)
        assert Subject.of((model, batch)) == Subject.of((model, batch, None)) == Subject(model, batch)
        assert Subject.of((model, batch, torch.sum)).loss_fn is torch.sum
