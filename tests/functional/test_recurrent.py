"""Recurrent layers and cells: torch's outputs, and the exact derivative of each step at the decoded values."""

import copy
import itertools
import pickle

import pytest
import torch
from layer_oracles import relative
from support import bytes_kept, types
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fewbit
from fewbit.autograd import sharing
from fewbit.errors import InputError

IN, HIDDEN, BATCH, STEPS = 12, 16, 6, 9
LENGTHS = [3, 9, 1, 9, 5, 4]
KINDS = {"LSTM": {}, "GRU": {}, "RNN": {}, "RNN, ReLU": {"nonlinearity": "relu"}}


def layer(kind, dtype=torch.float32, width=IN, hidden=HIDDEN, seed=0, **options):
    torch.manual_seed(seed)
    return getattr(nn, kind.partition(",")[0])(width, hidden, dtype=dtype, **KINDS[kind], **options)


def coded(module, bits=4):
    return fewbit.convert(copy.deepcopy(module), bits=bits)


def inputs(module, packed=False, states=True, dtype=torch.float32):
    """The input and the states before the first step, which all need gradients; and a function that calls a module."""
    numbers = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype).requires_grad_()

    x = random(BATCH, STEPS, IN) if module.batch_first else random(STEPS, BATCH, IN)
    layers = module.num_layers * (1 + module.bidirectional)
    hx = [random(layers, BATCH, getattr(module, "proj_size", 0) or HIDDEN)]
    hx += [random(layers, BATCH, HIDDEN)] if isinstance(module, nn.LSTM) else []
    given = (tuple(hx) if len(hx) > 1 else hx[0],) if states else ()

    def call(module):
        read = x * 1  # others may keep codes of it, since it is not a leaf
        if packed:
            read = pack_padded_sequence(read, LENGTHS, module.batch_first, enforce_sorted=False)
        torch.manual_seed(2)
        return module(read, *given)

    return call, [x, *(hx if states else [])]


def floats(output):
    """All floating-point tensors in nested tuples."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    return [tensor for each in output or () for tensor in floats(each)]


def run(module, call, leaves):
    """All outputs, the next random number, and the gradients of the leaves and of the parameters."""
    outputs = floats(call(module))
    after = torch.rand(1)
    numbers = torch.Generator().manual_seed(3)
    directions = [torch.randn(each.shape, generator=numbers, dtype=torch.float64).to(each.dtype) for each in outputs]
    wanted = [*leaves, *module.parameters()]
    found = torch.autograd.grad(outputs, wanted, directions, allow_unused=True)
    return outputs, after, found


OPTIONS = [
    {},
    {"batch_first": True},
    {"bidirectional": True},
    {"num_layers": 3},
    {"bias": False, "num_layers": 2},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.3},
]


class TestOutputs:
    """torch's own outputs, bit for bit, for all options; gradients near torch's with 8 bits."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("options", [*OPTIONS, {"proj_size": 5, "num_layers": 2, "bidirectional": True}], ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # from torch
    def test_options(self, kind, options, dtype):
        if "proj_size" in options and kind != "LSTM":
            pytest.skip("torch projects the outputs of LSTMs alone")
        module = layer(kind, dtype, **options)
        ours = coded(module, bits=8)
        assert type(ours).__name__ == type(module).__name__
        assert type(ours).__module__ == "fewbit.nn.recurrent"
        for packed, states in itertools.product((False, True), repeat=2):
            call, leaves = inputs(module, packed, states, dtype)
            (outputs, after, true), (y, ours_after, found) = run(module, call, leaves), run(ours, call, leaves)
            assert torch.equal(after, ours_after)
            for exact, each in zip(outputs, y, strict=True):
                assert torch.equal(each, exact)
                assert each.stride() == exact.stride()
                assert not each._is_view()
            for exact, each in zip(true, found, strict=True):
                assert each.dtype == exact.dtype
                assert relative(each, exact) < (0.15 if "ReLU" in kind or dtype == torch.bfloat16 else 0.05)

    def test_one_sequence_without_a_batch(self):
        module, x = layer("LSTM"), torch.randn(STEPS, IN, requires_grad=True)
        for exact, each in zip(floats(module(x)), floats(coded(module)(x)), strict=True):
            assert torch.equal(exact, each)

    def test_evaluation_has_no_dropout(self):
        module = layer("LSTM", num_layers=2, dropout=0.5).eval()
        call, leaves = inputs(module)
        for exact, each in zip(run(module, call, leaves)[0], run(coded(module), call, leaves)[0], strict=True):
            assert torch.equal(exact, each)


def step_of(kind, gates_x, gates_h, h, c):
    """One step written out: the new output and the new cell."""
    if kind == "LSTM":
        i, f, g, o = (gates_x + gates_h).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if kind == "GRU":
        (r, z, n), (hr, hz, hn) = gates_x.chunk(3, -1), gates_h.chunk(3, -1)
        r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
        n = (n + r * hn).tanh()
        return (1 - z) * n + z * h, c
    return (gates_x + gates_h).tanh() if kind == "RNN" else (gates_x + gates_h).relu(), c


def at_codes(kind, x, known, h, c, weights, lengths, reverse):
    """The outputs (steps, batch, n) of one direction, by autograd. Each step starts from the decoded output of the step before.

    x, known  (steps, batch, n): the decoded input and outputs; h, c: the states before the first step
    """
    w_ih, w_hh, b_ih, b_hh = weights
    outputs, number = [None] * len(x), torch.tensor(lengths)
    for step in reversed(range(len(x))) if reverse else range(len(x)):
        new, cell = step_of(kind, x[step] @ w_ih.t() + b_ih, h @ w_hh.t() + b_hh, h, c)
        if kind == "RNN, ReLU":  # the signs of outputs are exact
            new = (x[step] @ w_ih.t() + b_ih + h @ w_hh.t() + b_hh) * (known[step] > 0)
        there = (number > step).unsqueeze(1)
        outputs[step] = new * there
        h = torch.where(there, known[step] + (new - new.detach()), h)  # the known value, with the gradient of the step
        c = torch.where(there, cell, c)
    return torch.stack(outputs), h, c


class TestGradients:
    """The gradients of a written-out network whose steps start from the decoded outputs."""

    @pytest.mark.parametrize("lengths", [[STEPS] * BATCH, [9, 9, 5, 4, 3, 1]], ids=["equal", "packed"])
    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_is_the_derivative_at_the_codes(self, kind, bidirectional, lengths):
        module = layer(kind, torch.float64, bidirectional=bidirectional)
        ours, directions = coded(module, bits=3), 1 + bidirectional
        numbers = torch.Generator().manual_seed(4)
        x, *states = (
            torch.randn(shape, generator=numbers, dtype=torch.float64, requires_grad=True)
            for shape in ((STEPS, BATCH, IN), *((directions, BATCH, HIDDEN),) * (1 + (kind == "LSTM")))
        )
        packed = pack_padded_sequence(x, lengths)
        read = packed.data if lengths[-1] < STEPS else x * 1
        hx = [each * 1 for each in states]  # not leaves, so their codes are found
        given = tuple(hx) if len(hx) > 1 else hx[0]
        y = ours(packed._replace(data=read), given)[0].data if lengths[-1] < STEPS else ours(read, given)[0]
        rows, known, *first = (sharing.find(each).rebuild(sharing.find(each).kept, y.dtype) for each in (read, y, *hx))
        if lengths[-1] < STEPS:
            rows, known = (_padded(packed, each) for each in (rows, known))
        grad = torch.randn(STEPS, BATCH, directions * HIDDEN, generator=numbers, dtype=torch.float64)
        there = (torch.tensor(lengths) > torch.arange(STEPS).unsqueeze(1)).unsqueeze(2)
        loss = (y * (pack_padded_sequence(grad, lengths).data if lengths[-1] < STEPS else grad)).sum()
        found = torch.autograd.grad(loss, [x, *states, *ours.parameters()])
        leaves = [each.detach().requires_grad_() for each in (rows, *first, *module.parameters())]
        rows, first, weights = leaves[0], leaves[1 : 1 + len(first)], leaves[1 + len(first) :]
        outputs = []
        for d in range(directions):
            c = first[1][d] if kind == "LSTM" else torch.zeros(())
            place, own = slice(d * HIDDEN, (d + 1) * HIDDEN), weights[4 * d : 4 * d + 4]
            outputs.append(at_codes(kind, rows, known[..., place], first[0][d], c, own, lengths, d == 1)[0])
        expected = torch.autograd.grad((torch.cat(outputs, -1) * grad * there).sum(), leaves)
        for each, true in zip(found, expected, strict=True):
            torch.testing.assert_close(each, true, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("wanted", ["x", "weights", "states"])
    def test_what_needs_a_gradient_alone(self, wanted):
        ours = coded(layer("LSTM", num_layers=2, bidirectional=True))
        call, leaves = inputs(ours)
        every = run(ours, call, leaves)[2]
        chosen = {"x": leaves[:1], "weights": [*ours.parameters()], "states": leaves[1:]}[wanted]
        for each in (*leaves, *ours.parameters()):
            each.requires_grad_(any(each is one for one in chosen))
        outputs, numbers = floats(call(ours)), torch.Generator().manual_seed(3)
        directions = [torch.randn(each.shape, generator=numbers, dtype=torch.float64).float() for each in outputs]
        found = torch.autograd.grad(outputs, chosen, directions)
        expected = [grad for grad, each in zip(every, (*leaves, *ours.parameters()), strict=True) if each.requires_grad]
        for each, true in zip(found, expected, strict=True):  # tensors that need no gradient are kept as they are
            assert relative(each, true) < 0.2

    @pytest.mark.parametrize("kind", ["LSTM", "GRU"])
    def test_errors_do_not_grow_with_the_number_of_steps(self, kind):
        errors = {}
        for steps in (16, 256):
            module = layer(kind, width=32, hidden=32)
            x = torch.randn(steps, 8, 32, generator=torch.Generator().manual_seed(5)).requires_grad_()
            grads = []
            for each in (module, coded(module)):
                y, _ = each(x * 1)
                grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
                found = torch.autograd.grad(y, [x, *each.parameters()], grad)
                grads.append(torch.cat([one.flatten() for one in found]))
            errors[steps] = relative(grads[1], grads[0])
        assert errors[16] < 0.12
        assert errors[256] < 1.2 * errors[16]

    def test_errors_of_stochastic_rounding_average_out(self):
        module, x = layer("LSTM"), torch.randn(STEPS, BATCH, IN, requires_grad=True)
        exact = torch.autograd.grad(module(x * 1)[0].sum(), module.weight_ih_l0)[0]
        ours = fewbit.LSTM(IN, HIDDEN, bits=3, rounding="stochastic")
        ours.load_state_dict(module.state_dict())
        found = [torch.autograd.grad(ours(x * 1)[0].sum(), ours.weight_ih_l0)[0] for _ in range(200)]
        assert relative(torch.stack(found).mean(0), exact) < 0.5 * relative(found[0], exact)

    @pytest.mark.parametrize("kind", KINDS)
    def test_second_derivatives_are_refused(self, kind):
        ours, x = coded(layer(kind)), torch.randn(STEPS, BATCH, IN, requires_grad=True)
        (grad,) = torch.autograd.grad(ours(x * 1)[0].square().sum(), x, create_graph=True)
        with pytest.raises(InputError, match="derivative"):
            grad.sum().backward()

    def test_second_derivatives_by_any_output_are_refused(self):
        ours, weight = coded(layer("LSTM")), torch.ones((), requires_grad=True)
        x = torch.randn(STEPS, BATCH, IN, requires_grad=True)
        y, (h, _) = ours(x * 1)
        (grad,) = torch.autograd.grad(y.sum() + (weight * h).sum(), x, create_graph=True)
        with pytest.raises(InputError, match="derivative"):
            grad.sum().backward(inputs=[weight])

    @pytest.mark.parametrize("kind", KINDS)
    def test_gradients_accumulate(self, kind):
        """Each has its own memory, which may be changed in place."""
        ours = coded(layer(kind, bidirectional=True), bits=8)
        call, leaves = inputs(ours)
        expected = run(ours, call, leaves)[2]
        for each in (*leaves, *ours.parameters()):
            each.grad = None
        for _ in range(2):
            outputs, numbers = floats(call(ours)), torch.Generator().manual_seed(3)
            directions = [torch.randn(each.shape, generator=numbers, dtype=torch.float64).float() for each in outputs]
            torch.autograd.backward(outputs, directions)
        for each, true in zip((*leaves, *ours.parameters()), expected, strict=True):
            torch.testing.assert_close(each.grad, 2 * true)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("sizes", [(3, 1, 6, 8), (3, 2, 6, 4), (64, 8, 16, 16)], ids=str)
    @pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True}], ids=str)
    def test_outputs_may_be_changed_in_place(self, kind, sizes, options):
        steps, batch, width, hidden = sizes
        module, results = layer(kind, width=width, hidden=hidden, **options), []
        x = torch.randn(steps, batch, width)
        for in_place in (False, True):
            ours = coded(module, bits=8)
            y, _ = ours(x * 1)
            y = y.mul_(3) if in_place else y * 3
            y.sin().sum().backward()
            results.append([each.grad for each in ours.parameters()])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)

    def test_batches_of_gradients_are_refused(self):
        ours, x = coded(layer("GRU")), torch.randn(STEPS, BATCH, IN, requires_grad=True)
        y, _ = ours(x * 1)
        with pytest.raises(InputError, match="one at a time"):
            torch.autograd.grad(y, x, torch.ones(2, *y.shape), is_grads_batched=True)

    def test_where_saved_tensors_may_be_changed(self):
        ours, x = coded(layer("LSTM")), torch.randn(STEPS, BATCH, IN, requires_grad=True)
        expected = torch.autograd.grad(ours(x * 1)[0].sum(), x)[0]
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            torch.testing.assert_close(torch.autograd.grad(ours(x * 1)[0].sum(), x)[0], expected)

    @pytest.mark.parametrize("place", ["x", "h"])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_what_is_not_finite_is_left_to_torch(self, place, value):
        module = layer("LSTM", num_layers=2)
        call, leaves = inputs(module)
        with torch.no_grad():
            leaves[place == "h"][0, 0, 0] = value
        for exact, each in zip(run(module, call, leaves)[2], run(coded(module), call, leaves)[2], strict=True):
            finite = exact.isfinite()
            assert torch.equal(each.isfinite(), finite)
            assert not finite.any() or relative(each[finite], exact[finite]) < 0.1  # layers that read finite numbers keep codes


def _padded(packed, rows):
    return nn.utils.rnn.pad_packed_sequence(packed._replace(data=rows), total_length=STEPS)[0]


class TestWhatIsKept:
    @pytest.mark.parametrize("kind", KINDS)
    def test_codes_of_input_and_outputs_alone(self, kind):
        steps, batch, width = 64, 16, 64
        module = layer(kind, width=width, hidden=width, num_layers=2)
        x = torch.randn(steps, batch, width, requires_grad=True)
        head = nn.Linear(width, width)
        ours = coded(nn.ModuleList([module, head]))

        def called():
            y, _ = ours[0](x * 1)
            return ours[1](y)  # it keeps the codes that the layer has made

        n = steps * batch * width
        bits = 4 * 3 + 2 * ("ReLU" in kind)  # the input, and the outputs of both layers, with their signs
        statistics = 3 * 4 * (steps * batch + 2 * width)
        kept = bytes_kept(called, leave_out=[*ours.parameters()])
        assert n * bits // 8 <= kept <= n * bits // 8 + statistics + 64

    @pytest.mark.parametrize(("kind", "share"), [("LSTM", 0.05), ("GRU", 0.06)])
    def test_share_of_exact(self, kind, share):
        module = layer(kind, width=128, hidden=128, num_layers=2)
        x = (torch.randn(64, 16, 128, requires_grad=True) * 1,)
        exact = fewbit.memory(module, x).activation_bytes
        assert 0 < fewbit.memory(coded(module), x).activation_bytes < share * exact

    def test_plan_says_it(self):
        module, x = layer("LSTM", width=64, num_layers=2), torch.randn(32, 8, 64)
        plan = fewbit.memory(module, x).plan(bits=4)
        exact = fewbit.memory(module, x).activation_bytes
        plan.convert()
        assert type(module) is fewbit.LSTM
        assert plan.after_bytes == fewbit.memory(module, x).activation_bytes < 0.1 * exact

    @pytest.mark.parametrize("frozen", ["all", "ih"])
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize(
        ("kind", "width", "hidden"), [("RNN", 512, 8), ("RNN", 256, 64), ("GRU", 256, 8), ("LSTM", 512, 8)]
    )
    def test_no_more_than_exact_where_weights_are_frozen(self, kind, width, hidden, bits, frozen):
        module, x = layer(kind, width=width, hidden=hidden), torch.randn(16, 8, width, requires_grad=True)
        for name, each in module.named_parameters():
            each.requires_grad_(frozen != "all" and frozen not in name)
        ours = coded(module, bits)
        exact, kept = (bytes_kept(lambda each=each: each(x * 1), leave_out=[*each.parameters()]) for each in (module, ours))
        assert kept <= exact

    def test_nothing_without_gradients(self):
        ours, x = coded(layer("GRU")), torch.randn(STEPS, BATCH, IN)
        with torch.no_grad():
            assert ours(x)[0].grad_fn is None
        ours.requires_grad_(False)
        assert ours(x)[0].grad_fn is None

    def test_exact_mode(self):
        module, x = layer("LSTM"), torch.randn(STEPS, BATCH, IN)
        with fewbit.exact():
            assert bytes_kept(coded(module), x) == bytes_kept(module, x)


CELLS = {"LSTMCell": {}, "GRUCell": {}, "RNNCell": {}, "RNNCell, ReLU": {"nonlinearity": "relu"}}


class TestCells:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("kind", CELLS)
    def test_as_torchs(self, kind, bias):
        torch.manual_seed(0)
        module = getattr(nn, kind.partition(",")[0])(IN, HIDDEN, bias=bias, **CELLS[kind])
        ours = coded(module, bits=8)
        x = torch.randn(5, BATCH, IN, requires_grad=True)
        results = []
        for each in (module, ours):
            state, outputs = None, []
            for step in x.unbind():
                state = each(step, state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            y = torch.stack(outputs)
            results.append((y, torch.autograd.grad(y.sin().sum(), [x, *each.parameters()])))
        (y, true), (found_y, found) = results
        assert torch.equal(y, found_y)
        for exact, each in zip(true, found, strict=True):
            assert relative(each, exact) < (0.1 if "ReLU" in kind else 0.03)

    @pytest.mark.parametrize("kind", CELLS)
    def test_keeps_codes_of_what_it_reads(self, kind):
        ours = coded(getattr(nn, kind.partition(",")[0])(64, 64, **CELLS[kind]))
        x, *states = (torch.randn(128, 64, requires_grad=True) * 1 for _ in range(3))
        states = tuple(states) if "LSTM" in kind else states[0]
        number = 3 if "LSTM" in kind else 2
        kept = bytes_kept(lambda: ours(x, states), leave_out=[*ours.parameters()])
        n = 128 * 64
        assert kept <= number * (n // 2 + 4 * (128 + 2 * 64)) + ("ReLU" in kind) * n // 8 + 64

    def test_without_a_batch(self):
        module, x = nn.LSTMCell(IN, HIDDEN), torch.randn(IN, requires_grad=True)
        for exact, each in zip(module(x), coded(module)(x), strict=True):
            assert torch.equal(exact, each)


class Tagger(nn.Module):
    def __init__(self, kind="LSTM"):
        super().__init__()
        self.embed, self.layers, self.head = (
            nn.Embedding(20, IN),
            layer(kind, num_layers=2, batch_first=True),
            nn.Linear(HIDDEN, 3),
        )

    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens))[0])


class OwnForward(nn.LSTM):
    """A subclass that does more than torch's."""

    def forward(self, x, hx=None):
        return super().forward(x * 2, hx)


class TestConversion:
    def test_kind_and_back(self):
        model = Tagger()
        before, keys = types(model), list(model.state_dict())
        fewbit.convert(model, bits={"recurrent": 4})
        assert type(model.layers) is fewbit.LSTM
        assert type(model.head) is nn.Linear
        assert "bits=4" in repr(model.layers)
        assert list(model.state_dict()) == keys
        assert types(fewbit.revert(model)) == before

    def test_copies_and_pickles(self):
        model, x = coded(Tagger()), torch.randint(20, (4, 7))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert types(other) == types(model)
            assert torch.equal(other(x), model(x))

    def test_a_forward_of_its_own(self):
        module, x = OwnForward(32, 32), torch.randn(64, 8, 32)
        ours = coded(module)
        assert torch.equal(ours(x)[0], module(x)[0])
        assert fewbit.memory(ours, x).activation_bytes < 0.1 * fewbit.memory(module, x).activation_bytes

    def test_patch(self):
        module, x = layer("GRU", width=32, hidden=32), torch.randn(64, 8, 32)
        with fewbit.patch(bits=4):
            y = module(x)[0]
            kept = bytes_kept(module, x)
        assert torch.equal(y, module(x)[0])
        assert kept < 0.2 * bytes_kept(module, x)

    def test_larger_bits_for_linear_layers_are_shared(self):
        setting = {"recurrent": 2, "linear": 4}
        assert fewbit.convert(Tagger(), bits=setting).layers.bits == 4

    @pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler checks it
    def test_graph_breaks_of_compilers_keep_codes(self):
        model, x = Tagger(), torch.randint(20, (4, 16))
        ours = coded(model)
        compiled = torch.compile(ours, backend="aot_eager")
        assert torch.equal(compiled(x), model(x))
        compiled(x).sum().backward()
        found, true = (fewbit.memory(each, x).activation_bytes for each in (ours, model))
        assert found < 0.5 * true
        assert relative(ours.layers.weight_hh_l0.grad, _grad(model, x)) < 0.2

    def test_cells_in_compiled_code_are_torchs(self):
        module, x = nn.GRUCell(IN, HIDDEN), torch.randn(BATCH, IN)
        ours = torch.compile(coded(module), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(ours(x), module(x))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointed(self, reentrant):
        ours, x = coded(layer("LSTM", num_layers=2, dropout=0.2)), torch.randn(STEPS, BATCH, IN, requires_grad=True)
        found = []
        for call in (ours, lambda x: checkpoint(ours, x, use_reentrant=reentrant)):
            ours.zero_grad()
            torch.manual_seed(7)
            call(x * 1)[0].square().sum().backward()
            found.append([each.grad.clone() for each in ours.parameters()])
        for one, other in zip(*found, strict=True):
            assert relative(one, other) < 0.2  # codes of a checkpointed input belong to a tensor that is new to it

    @pytest.mark.filterwarnings("ignore")  # from torch, about mixed dtypes
    def test_autocast(self):
        module, x = layer("LSTM", num_layers=2), torch.randn(STEPS, BATCH, IN, requires_grad=True)
        ours, results = coded(module, bits=8), []
        for each in (module, ours):
            with torch.autocast("cpu", torch.bfloat16):
                y, _ = each(x * 1)
            results.append((y, torch.autograd.grad(y.float().square().sum(), [x, *each.parameters()])))
        (y, true), (found_y, found) = results
        assert torch.equal(y, found_y)
        assert y.dtype == found_y.dtype
        for exact, each in zip(true, found, strict=True):
            assert each.dtype == exact.dtype
            assert relative(each, exact) < 0.1


def _grad(model, x):
    model.zero_grad()
    model(x).sum().backward()
    return model.layers.weight_hh_l0.grad


class TestFunctions:
    def test_zeros_need_not_be_given(self):
        module, x = layer("LSTM", num_layers=2), torch.randn(STEPS, BATCH, IN, requires_grad=True)
        options = (True, 2, 0.0, True, False, False)
        y, h, c = fewbit.functional.lstm(x, None, module._flat_weights, *options)
        for each, exact in zip((y, h, c), floats(module(x)), strict=True):
            assert torch.equal(each, exact)
        cell = nn.LSTMCell(IN, HIDDEN)
        h, c = fewbit.functional.lstm_cell(x[0], None, *cell.parameters())
        assert torch.equal(h, cell(x[0])[0])

    def test_packed_form(self):
        module, x = layer("GRU"), torch.randn(STEPS, BATCH, IN, requires_grad=True)
        packed = pack_padded_sequence(x, [9, 9, 5, 4, 3, 1])
        zeros = torch.zeros(1, BATCH, HIDDEN)
        arguments = (packed.data, packed.batch_sizes, zeros, module._flat_weights, True, 1, 0.0, True, False)
        for each, exact in zip(fewbit.functional.gru(*arguments, bits=3), torch.gru(*arguments), strict=True):
            assert torch.equal(each, exact)

    def test_states_of_another_number_of_layers(self):
        module, x = layer("GRU", num_layers=2), torch.randn(STEPS, BATCH, IN, requires_grad=True)
        options = (True, 2, 0.0, True, False, False)
        for function in (torch.gru, fewbit.functional.gru):
            with pytest.raises(RuntimeError, match="hidden states"):
                function(x, torch.zeros(1, BATCH, HIDDEN), module._flat_weights, *options)
            with pytest.raises(RuntimeError, match="number of RNN parameters"):
                function(x, torch.zeros(2, BATCH, HIDDEN), module._flat_weights[:-1], *options)

    def test_another_number_of_states(self):
        x, h = torch.randn(STEPS, BATCH, IN, requires_grad=True), torch.zeros(1, BATCH, HIDDEN)
        module, options = layer("LSTM"), (True, 1, 0.0, True, False, False)
        for hx in (h, (h,), (h, h, h)):
            with pytest.raises(
                InputError, match=r"lstm takes as hx a pair of tensors, outputs and cells, .* got (Tensor|tuple) of"
            ):
                fewbit.functional.lstm(x, hx, module._flat_weights, *options)
        with pytest.raises(InputError, match="gru takes as hx a tensor, the outputs"):
            fewbit.functional.gru(x, (h,), layer("GRU")._flat_weights, *options)
        with pytest.raises(InputError, match="lstm takes as hx a pair"):
            fewbit.functional.lstm_cell(x[0], h[0], *nn.LSTMCell(IN, HIDDEN).parameters())

    @pytest.mark.parametrize("kind", KINDS)
    def test_states_of_any_strides(self, kind):
        module, results = layer(kind), []
        x = torch.randn(STEPS, BATCH, IN)
        for transposed in (False, True):
            h, c = (torch.randn(1, HIDDEN, BATCH, generator=torch.Generator().manual_seed(n)).transpose(1, 2) for n in (1, 2))
            h, c = (each if transposed else each.contiguous() for each in (h, c))
            ours = coded(module, bits=8)
            ours(x, (h, c) if kind == "LSTM" else h)[0].sum().backward()
            results.append([each.grad for each in ours.parameters()])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("missing", [0, 1])
    def test_one_bias_alone(self, missing):
        cell, x = nn.LSTMCell(IN, HIDDEN), torch.randn(BATCH, IN, requires_grad=True)
        w_ih, w_hh, *biases = cell.parameters()
        biases[missing] = None
        zeros = torch.zeros(BATCH, HIDDEN)
        results = []
        for function in (torch.lstm_cell, fewbit.functional.lstm_cell):
            h, _ = function(x, (zeros, zeros), w_ih, w_hh, *biases)
            results.append((h, torch.autograd.grad(h.sum(), w_hh)[0]))
        assert all(map(torch.equal, *results))

    def test_what_cannot_be_coded(self):
        with pytest.raises(InputError, match=r"lstm takes a float16, bfloat16, float32 or float64 tensor, got torch.complex64"):
            fewbit.functional.lstm(torch.zeros(2, 3, 4, dtype=torch.complex64), None, [], True, 1, 0.0, True, False, False)

    def test_transforms_are_torchs(self):
        module, x = coded(layer("GRU")), torch.randn(STEPS, BATCH, IN)

        def loss(x):
            return module(x)[0].square().sum()

        exact = fewbit.revert(copy.deepcopy(module))
        expected = torch.func.grad(lambda x: exact(x)[0].square().sum())(x)
        torch.testing.assert_close(torch.func.grad(loss)(x), expected)
