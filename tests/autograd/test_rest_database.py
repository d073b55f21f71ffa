"""All of torch's differentiable operations, on samples of torch's own database, with everything coded that can be coded."""

from itertools import islice

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import fewbit
from fewbit.autograd import quantize, rest

BITS = {"rest": 8, "product": 8}


def _samples():
    from torch.testing._internal.common_methods_invocations import op_db

    for entry in op_db:
        if entry.supports_autograd and torch.float32 in entry.dtypes and entry.name != "linalg.lstsq":  # its outputs vary
            try:
                samples = [*islice(entry.sample_inputs("cpu", torch.float32, requires_grad=True), 12)]
            except Exception:
                continue
            yield entry, samples


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_of_torchs_operations(monkeypatch):
    """Every differentiable operation in torch's database on torch's samples, with everything coded that can be coded."""
    pytest.importorskip("expecttest", reason="torch's database of operations needs it")
    monkeypatch.setattr(rest, "LEAST", 1)  # samples are small
    monkeypatch.setattr(quantize, "is_small", lambda *_: False)
    coded, tried, failures = set(), 0, []
    keep = rest.Held.keep

    def counting(self, recipe, outer):
        if recipe is not None and not recipe.is_exact:
            coded.add(name)
        keep(self, recipe, outer)

    monkeypatch.setattr(rest.Held, "keep", counting)
    for entry, samples in _samples():
        name = entry.name
        for number, sample in enumerate(samples):
            try:
                exact, again = (_gradients_of(entry.op, sample, None) for _ in range(2))
            except Exception:
                continue
            if exact is None or not all(map(_same, exact[0], again[0])):  # some are random themselves
                continue
            tried += 1
            try:
                fault = _fault(exact, _gradients_of(entry.op, sample, BITS))
            except Exception as error:
                fault = repr(error)
            if fault:
                failures.append(f"{name}, sample {number}: {fault}")
    assert not failures, "\n".join(failures)
    assert tried > 3000
    assert len(coded) > 100


def _gradients_of(operation, sample, bits):
    """Outputs that depend on the inputs, and the inputs' gradients. The operation reads tensors that are not leaves."""
    leaves = []

    def needed(tensor):
        if not (tensor.is_floating_point() and tensor.requires_grad):
            return tensor
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1] * 1 if tensor.layout == torch.strided else leaves[-1]

    given, args, kwargs = tree_map_only(torch.Tensor, needed, (sample.input, sample.args, sample.kwargs))
    torch.manual_seed(0)
    if bits is None:
        found = operation(given, *args, **kwargs)
    else:
        with fewbit.patch(bits=bits):
            found = operation(given, *args, **kwargs)
    outputs = [each for each in tree_leaves(found) if isinstance(each, torch.Tensor) and each.requires_grad]
    if not outputs or not leaves:
        return None
    torch.manual_seed(1)
    loss = sum((each * torch.randn(each.shape)).sum() if each.is_floating_point() else each.abs().sum() for each in outputs)
    return outputs, torch.autograd.grad(loss, leaves, allow_unused=True)


def _dense(tensor):
    return (tensor if tensor.layout == torch.strided else tensor.to_dense()).detach()


def _same(one, other):
    return torch.allclose(_dense(one), _dense(other), rtol=0, atol=0, equal_nan=True)


def _fault(exact, found):
    """Words for what is wrong with the results; None if nothing is."""
    if not all(map(_same, exact[0], found[0])):
        return "another output"
    error = size = 0.0
    for true, ours in zip(exact[1], found[1], strict=True):
        if (true is None) != (ours is None):
            return "no gradient"
        if true is not None:
            true, ours = _dense(true), _dense(ours)
            finite = true.isfinite()
            if not torch.equal(finite, ours.isfinite()):
                return "not finite elsewhere"
            error += (true - ours)[finite].norm().item() ** 2
            size += true[finite].norm().item() ** 2
    return f"errs by {(error / size) ** 0.5:.3f}" if error > 0.06**2 * size and size > 1e-6 else None
