"""The counts of `fewbit.memory`, compared with bytes counted by hand and by `fewbit.measuring`."""

import csv
import io
import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SwiGLU
from torch import nn
from torch.utils.checkpoint import checkpoint

import fewbit
from fewbit import demo
from fewbit.measuring import saved_storages
from fewbit.models.grouping import label

ROWS, WIDTH, HIDDEN = 32, 16, 64
UNIT = ROWS * HIDDEN * 4  # one float32 tensor of the hidden width


def mlp(activation, trainable=True):
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), activation, nn.Linear(HIDDEN, WIDTH)).requires_grad_(trainable)


def batch(gradient=False):
    return torch.randn(ROWS, WIDTH, requires_grad=gradient)


def independent_total(model, *args):
    """All that autograd saves, and the same without parameters, buffers and inputs, counted by other code."""
    seen, apart = {}, (*model.parameters(), *model.buffers(), *args)
    with saved_storages(seen):
        held = model(*args)
    owned = {tensor.untyped_storage().data_ptr() for tensor in apart}
    assert held is not None
    return sum(seen.values()), sum(number for address, number in seen.items() if address not in owned)


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(
    ("make", "gradient", "units"),
    [
        (lambda: mlp(nn.ReLU()), False, 1),
        (lambda: mlp(nn.Tanh()), False, 1),
        (lambda: mlp(nn.GELU()), False, 2),
        (lambda: mlp(nn.SiLU()), False, 2),
        (lambda: mlp(nn.ReLU(), trainable=False), True, 1),
        (lambda: mlp(nn.GELU(), trainable=False), True, 1),
        (lambda: mlp(nn.GELU(), trainable=False), False, 0),
        (lambda: SwiGLU(WIDTH, HIDDEN), False, 4),
        (lambda: SwiGLU(WIDTH, HIDDEN).requires_grad_(False), True, 3),
    ],
)
def test_units_kept(make, gradient, units, fake):
    report = fewbit.memory(make(), batch(gradient), fake=fake)
    assert report.activation_bytes == units * UNIT


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "gradient", "units"), [(lambda: mlp(nn.GELU()), False, 2), (lambda: SwiGLU(WIDTH, HIDDEN), False, 3)]
)
def test_units_kept_by_compiled_models(make, gradient, units):
    model, x = make(), batch(gradient)
    compiled = torch.compile(model, backend="aot_eager_decomp_partition")
    report = fewbit.memory(compiled, x)
    assert report.activation_bytes == units * UNIT
    assert {row["operation"] for row in report.rows()} == {"CompiledFunction"}
    assert {row["module"] for row in report.rows()} == {""}  # the compiled one


def test_a_row_for_each_storage_with_those_who_share_it():
    report = fewbit.memory(mlp(nn.ReLU()), batch())
    (kept,) = [row for row in report.rows() if row["role"] == "activations"]
    assert kept == {
        "module": "1",
        "operation": "Relu",
        "role": "activations",
        "dtype": "float32",
        "shape": f"{ROWS}x{HIDDEN}",
        "bytes": UNIT,
        "share": 1.0,
        "shared_with": "2 Addmm",
    }
    assert report.by_module() == {"1": UNIT}
    assert report.totals()["inputs"] == ROWS * WIDTH * 4
    assert report.totals()["parameters"] == WIDTH * HIDDEN * 4  # of the second layer, for its input's gradient


def test_layer_norm_batch_norm_and_dropout_by_hand():
    report = fewbit.memory(nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 1)), batch())
    assert report.by_module() == {"1": UNIT + 2 * ROWS * 4, "2": UNIT}  # mean and scale of each row
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Dropout(0.5), nn.Linear(HIDDEN, 1))
    report = fewbit.memory(model, batch())
    assert report.by_module() == {"1": UNIT + 2 * HIDDEN * 4, "2": UNIT, "3": UNIT}
    assert report.totals()["buffers"] == 2 * HIDDEN * 4  # running statistics, which are saved too
    assert fewbit.memory(model.eval(), batch()).by_module() == {"1": UNIT, "3": UNIT}
    assert fewbit.memory(model, batch()).totals()["mode"] == "evaluation"


def test_views_and_expanded_tensors_count_as_their_storage():
    class Views(nn.Module):
        def forward(self, x):
            hidden = x + 1
            wide = hidden.new_ones(1, 1).requires_grad_().exp().expand(ROWS, WIDTH)
            return hidden.t().sin() + hidden.view(-1).cos().view(ROWS, WIDTH).t() + (hidden * wide).t()

    report = fewbit.memory(Views(), batch(True))
    assert report.activation_bytes == ROWS * WIDTH * 4 + 4
    assert [len(storage.savers) for storage in report.storages if storage.bytes > 4] == [3]


def test_tied_weights_are_one_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens).exp())

    tokens = torch.randint(50, (4, 8))
    for fake in (False, True):
        found = fewbit.memory(Tied(), tokens, fake=fake).totals()
        assert found["parameters"] == 50 * WIDTH * 4
        assert found["activations"] == 4 * 8 * WIDTH * 4  # exp's output, which the head reads
        assert found["inputs"] == 4 * 8 * 8


def test_a_module_of_two_parents_keeps_once_for_each_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
            self.right = nn.Sequential(self.left[1], self.left[0])

        def forward(self, x):
            return self.right(self.left(x))

    report = fewbit.memory(Twice(), batch(True))
    unit = ROWS * WIDTH * 4
    assert report.by_module() == {"left.1": 2 * unit, "left.0": unit}
    assert report.activation_bytes == independent_total(report.forward.model, report.forward.batch)[1]


def test_checkpointed_regions_keep_their_input_alone():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.calls = nn.Linear(WIDTH, WIDTH), mlp(nn.GELU()), 0

        def forward(self, x):
            return checkpoint(self.run, self.first(x), use_reentrant=False)

        def run(self, x):
            self.calls += 1
            return self.inner(x)

    model = Checkpointed()
    report = fewbit.memory(model, batch())
    assert [row["operation"] for row in report.rows() if row["role"] == "activations"] == ["checkpoint"]
    assert report.activation_bytes == ROWS * WIDTH * 4
    assert model.calls == 0  # as before; it ran once, not once more for the count


def test_recursion_and_methods_other_than_forward():
    class Nested(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.inner = Nested(depth - 1) if depth else None

        def step(self, x):
            return x.sin()

        def forward(self, x):
            return self.step(x if self.inner is None else self.inner.forward(x))

    found = fewbit.memory(Nested(2), batch(True)).by_module()
    assert found == {"inner": ROWS * WIDTH * 4, "": ROWS * WIDTH * 4}  # the innermost keeps its input, which is the model's


def test_what_the_output_does_not_need_is_not_counted():
    class Wasteful(nn.Module):
        def forward(self, x):
            x.sin().cos().exp()
            return x.sin()

    assert fewbit.memory(Wasteful(), batch(True)).activation_bytes == 0


def test_python_functions_and_coded_modules_are_named():
    report = fewbit.memory(mlp(fewbit.GELU(bits=3)), batch())
    operations = {row["module"]: row["operation"] for row in report.rows() if row["bytes"]}
    assert operations["1"] == "CodedActivation"
    assert report.by_module()["1"] == ROWS * HIDDEN * 3 / 8 + 1  # the number of the rung


def test_autocast_is_followed():
    model = mlp(nn.GELU())
    with torch.autocast("cpu", torch.bfloat16):
        report = fewbit.memory(model, batch())
        assert report.activation_bytes == independent_total(model, report.forward.batch)[1]
    assert report.by_module()["1"] == UNIT // 2


def test_sparse_tensors_and_subclasses_count_their_parts():
    class Sparse(nn.Module):
        def forward(self, x):
            return torch.sparse.mm((torch.eye(ROWS) * 2).to_sparse(), x.exp())

    found = fewbit.memory(Sparse(), batch(True)).by_module()[""]
    assert found == ROWS * WIDTH * 4 + ROWS * 2 * 8 + ROWS * 4  # exp's output; indices and values


def test_exports(tmp_path):
    report = fewbit.memory(demo.GPT(None), torch.randint(256, (2, 16)))
    found = json.loads(report.to_json(tmp_path / "a.json"))
    assert sum(row["bytes"] for row in found["rows"] if row["role"] == "activations") == found["activations"]
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert len(rows) == len(report.rows())
    report.plot(tmp_path / "a.png")
    text = str(report)
    assert "blocks.0-3.act" in text
    assert max(map(len, text.splitlines())) <= report.width


def test_hundreds_of_layers_print_as_one():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(200)])
    text = str(fewbit.memory(model, torch.randn(4, 8)))
    assert "0-199.1" in text
    assert len(text.splitlines()) < 20
    assert label([f"a.{i}" for i in (0, 2, 4, 6, 9)]) == "a.*"


LAYERS = {
    "linear": lambda: nn.Linear(8, 8),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "norm": lambda: nn.LayerNorm(8),
    "batch": lambda: nn.BatchNorm1d(8),
    "drop": lambda: nn.Dropout(0.3),
    "coded": lambda: fewbit.SiLU(bits=2),
    "coded linear": lambda: fewbit.Linear(8, 8, bits=3),
}


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=7), st.integers(0, 2**7), st.booleans())
def test_rows_sum_to_what_is_measured_otherwise(names, frozen, gradient):
    """For any small net: all storages, and only activations, on real tensors and on fake ones."""
    torch.manual_seed(random.Random(str(names)).randint(0, 100))
    model = nn.Sequential(*[LAYERS[name]() for name in names])
    for i, module in enumerate(model):
        module.requires_grad_(not frozen >> i & 1)
    x = torch.randn(16, 8, requires_grad=gradient)
    if not (gradient or any(parameter.requires_grad for parameter in model.parameters())):
        return
    report = fewbit.memory(model, x)
    everything, activations = independent_total(model, x)
    assert sum(row["bytes"] for row in report.rows()) == everything
    assert report.activation_bytes == activations == sum(report.by_module().values())
    assert fewbit.memory(model, x, fake=True).activation_bytes == activations
