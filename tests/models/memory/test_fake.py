"""Fake tensors that do not tell what a model keeps: the model runs on real ones, or the report says so."""

import logging

import pytest
import torch
from torch import nn

import fewbit
from fewbit.torch_internals import fake_tensor_class


class TestWorkspaces:
    """The workspace of an LSTM on a CPU is larger than all else that it keeps."""

    @pytest.mark.parametrize("model", [nn.LSTM(8, 16), nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LSTM(8, 16))])
    def test_are_named(self, model):
        x, name = torch.randn(20, 4, 8), "2" if isinstance(model, nn.Sequential) else "the model itself"
        real = fewbit.memory(model, x)
        assert real.note == ""
        with pytest.warns(UserWarning, match=f"fake tensors do not tell the size of the workspaces of {name}"):
            report = fewbit.memory(model, x, fake=True)
        assert report.activation_bytes < 0.5 * real.activation_bytes
        assert report.note == report.totals()["note"] != ""
        assert "do not tell the size of the workspaces" in " ".join(str(report).split())

    def test_make_plans_run_the_model(self):
        model, x = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8), nn.LSTM(8, 16)), torch.randn(20, 4, 8)
        report = fewbit.memory(model, x)
        plan = report.plan(bits=4)
        assert "the converted model on real tensors" in plan.how
        assert plan.before_bytes == report.activation_bytes
        fewbit.convert(model, bits=4)
        assert plan.after_bytes == fewbit.memory(model, x).activation_bytes

    def test_are_named_by_plans_on_fake_tensors_alone(self):
        model, x = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.LSTM(64, 16)), torch.randn(20, 4, 8)
        with pytest.warns(UserWarning, match="workspaces"):
            plan = fewbit.memory(model, x, fake=True).plan(bits=4)
        assert "workspaces of 2;" in plan.how


class MasksFakes(nn.Module):
    """Makes a mask only on fake tensors, as transformers does. It is a small part of what is kept."""

    def __init__(self, part):
        super().__init__()
        self.body, self.part = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16)), part

    def forward(self, x):
        y = self.body(x)
        if isinstance(x, fake_tensor_class()):
            mask = torch.ones(int(self.part * 2 * 64 * 256))
            y = y + (self.body[0].weight.sum() * mask).sum()
        return y


@pytest.mark.parametrize(("part", "how"), [(0.0002, "on fake tensors"), (0.005, "on real tensors")])
def test_what_models_do_on_fake_tensors_alone_is_held_against_what_the_coded_one_keeps(part, how):
    """0.5 % of the exact bytes is more than 1 % of the coded bytes, which are an eighth of them."""
    model, x = MasksFakes(part), torch.randn(64, 16)
    plan = fewbit.memory(model, x).plan(bits=4)
    assert how in plan.how
    fewbit.convert(model, bits=4)
    assert plan.after_bytes == pytest.approx(fewbit.memory(model, x).activation_bytes, rel=0.01)


def test_torchs_log_of_what_fails_on_fake_tensors_is_left_out(caplog):
    class Grouped(nn.Module):
        """A module whose operation has no fake form for this dtype, as in mixtures of experts."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 16, 16))

        def forward(self, x):
            return torch._grouped_mm(x, self.weight, offs=torch.tensor([8, 16], dtype=torch.int32))

    with caplog.at_level(logging.INFO):
        plan = fewbit.memory(nn.Sequential(Grouped(), nn.GELU()), torch.randn(16, 16)).plan(bits=4)
    assert "since fake tensors do not serve (RuntimeError" in plan.how
    assert "meta" not in caplog.text
