"""Functions that many tests use: they count kept bytes, take gradients and compile; and small models."""

import inspect

import torch
from torch import nn

import fewbit
from fewbit.measuring import saved_storages


def bytes_kept(function, *inputs, leave_out=()):
    """Bytes of the distinct storages that function(*inputs) keeps for backward. The output lives until they are counted.

    Inputs and the tensors in `leave_out` do not count. If the function is a module, its parameters and buffers do not count.
    """
    owned = (*function.parameters(), *function.buffers()) if isinstance(function, nn.Module) else ()
    given = [each for each in (*inputs, *leave_out, *owned) if isinstance(each, torch.Tensor)]
    seen = {}
    with saved_storages(seen, leave_out={each.untyped_storage().data_ptr() for each in given}):
        y = function(*inputs)
    total = sum(seen.values())
    del y
    return total


def types(model):
    """The class of each module."""
    return [type(module) for module in model.modules()]


def squares(model, x):
    """A loss: the sum of the squares of what the model returns."""
    return model(x).square().sum()


def gradients(model, batch, loss=squares):
    """Name -> gradient of loss(model, batch), for all parameters that get one."""
    model.zero_grad()
    loss(model, batch).backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def all_gradients(module, x, grad=None):
    """The output, the gradient of the input, and those of the parameters, in order.

    grad  the incoming gradient; without it, the gradient of the sum of squares
    """
    leaf = x.clone().requires_grad_()
    module.zero_grad()
    y = module(leaf)
    y.backward(2 * y.detach() if grad is None else grad.to(y.dtype))
    return y.detach(), leaf.grad, *(each.grad.clone() for each in module.parameters())


def flat(gradients):
    """All of them as one vector."""
    return torch.cat([each.flatten() for each in gradients.values()])


def gradient_at(function, x):
    """The gradient of the sum of function(x) at x."""
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def compiled(function, backend="aot_eager", **keywords):
    """The compiled function, without graph breaks; by the backend that runs the graph as it is, unless another is named."""
    return torch.compile(function, fullgraph=True, backend=backend, **keywords)


def signature(function):
    """The signature of a function as text, without annotations."""
    whole = inspect.signature(function)
    parameters = [each.replace(annotation=each.empty) for each in whole.parameters.values()]
    return str(whole.replace(parameters=parameters, return_annotation=whole.empty))


class SwiGLU(nn.Module):
    """silu(gate(x)) * up(x), and a linear layer that reads it."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


def coded_mlp(*, bits=2, dropout=0.0):
    """A net of all common kinds, from 8 numbers to 4, converted."""
    model = nn.Sequential(
        *(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
    )
    return fewbit.convert(model, bits=bits)
