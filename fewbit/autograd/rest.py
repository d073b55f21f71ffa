"""Codes of what torch's own operations save for backward: products, and operations that no function of fewbit replaces.

Hooks see the tensors that an operation saves. The graph of its result tells which node saved each tensor, and under which name.
A tensor is coded if the node's backward is a polynomial in it, as in products, matrix products and powers: the error of the
gradient is then about that of the codes. Probabilities and their logarithms are coded by the roots of probabilities. Booleans
are kept as bits, and integers in as few bytes as hold them.

All else stays exact: tensors that backward divides by, takes logarithms or exponentials of, or compares; parameters and the
model's inputs; statistics, indices and random states; tensors that Functions written in Python save; and small tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from fewbit import constants
from fewbit.autograd import sharing
from fewbit.autograd.parameters import cast_of_parameter, made_of_frozen
from fewbit.autograd.products import LEAST, note_product, shape_of
from fewbit.autograd.quantize import Quantizer, coded_by_shape, recipe_of
from fewbit.autograd.sharing import Recipe, as_it_is
from fewbit.kernels import DeviceTable
from fewbit.torch_internals import (
    base_of,
    hooks_on_saved,
    is_distributed,
    is_fake,
    is_torchs_own,
    leaves,
    raw_saved_by_name,
    sequence_number,
    sequence_number_of,
    storage_key,
    versions_of,
)

Tensor = torch.Tensor
# the table of a kind for a dtype and a device; None if that kind stays exact
Tables = Callable[[str, torch.dtype, torch.device], DeviceTable | None]
OfTensor = Callable[[Tensor], Recipe | None]

# nodes of products element by element, including powers
_PRODUCTS = ("MulBackward0", "DivBackward0", "AddcmulBackward0", "LerpBackward1", "PowBackward0")
# nodes of matrix products; these count as linear layers if the other factor is a weight
_MATRIX_PRODUCTS = (
    *("MmBackward0", "BmmBackward0", "MvBackward0", "AddmmBackward0", "AddbmmBackward0", "BaddbmmBackward0", "AddmvBackward0"),
    "GroupedMmBackward0",
)
# node -> names of saved tensors in which its backward is a polynomial
_POLYNOMIAL = {
    "MulBackward0": ("self", "other"),
    "DivBackward0": ("self",),
    "AddcmulBackward0": ("tensor1", "tensor2"),
    "LerpBackward1": ("weight", "self", "end"),
    "PowBackward0": ("self",),  # only for exponents of at least 2
    "MmBackward0": ("self", "mat2"),
    "BmmBackward0": ("self", "mat2"),
    "MvBackward0": ("self", "vec"),
    "DotBackward0": ("self", "tensor"),
    "AddmmBackward0": ("mat1", "mat2"),
    "AddbmmBackward0": ("batch1", "batch2"),
    "BaddbmmBackward0": ("batch1", "batch2"),
    "AddmvBackward0": ("mat", "vec"),
    "AddrBackward0": ("vec1", "vec2"),
    "GroupedMmBackward0": ("self", "mat2"),
    "TrilinearBackward0": ("i1", "i2", "i3"),
    "ConvolutionBackward0": ("input",),
    "SigmoidBackward0": ("result",),
    "TanhBackward0": ("result",),
    "ExpBackward0": ("result",),
    "VarBackward0": ("self",),
    "VarMeanBackward0": ("self",),
    "GridSampler2DBackward0": ("input",),
    "GridSampler3DBackward0": ("input",),
}
_DTYPES = frozenset(getattr(torch, name) for name in constants.DTYPES)
# node -> names of saved tensors of which its backward needs only the shape
_SHAPES = {
    "NllLossBackward0": ("self",),
    "NllLoss2DBackward0": ("self",),
    "AvgPool2DBackward0": ("self",),
    "AvgPool3DBackward0": ("self",),
    "AdaptiveAvgPool2DBackward0": ("self",),
    "AdaptiveAvgPool3DBackward0": ("self",),
    "MaxPool2DWithIndicesBackward0": ("self",),
    "MaxPool3DWithIndicesBackward0": ("self",),
    "AdaptiveMaxPool2DBackward0": ("self",),
    "AdaptiveMaxPool3DBackward0": ("self",),
    "FractionalMaxPool2DBackward0": ("self",),
    "FractionalMaxPool3DBackward0": ("self",),
    "MaxUnpool2DBackward0": ("self",),
    "ReflectionPad1DBackward0": ("self",),
    "ReflectionPad2DBackward0": ("self",),
    "ReflectionPad3DBackward0": ("self",),
    "ReplicationPad1DBackward0": ("self",),
    "ReplicationPad2DBackward0": ("self",),
    "ReplicationPad3DBackward0": ("self",),
}
_NARROW = (torch.uint8, torch.int16, torch.int32)


class Held:
    """The object that stands for a saved tensor in the graph.

    packed  what is kept for the tensor: tensors, or what outer hooks made of them
    """

    __slots__ = ("_dtype", "_rebuild", "_unpack", "_versions", "packed", "tensor")

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor

    def keep(self, recipe: Recipe | None, outer: tuple[Any, Any] | None) -> None:
        """Keep what the recipe keeps or, without a recipe, the tensor itself.

        outer  the pack and unpack functions of outer hooks
        """
        tensor, self.tensor = self.tensor, None
        assert tensor is not None, "it is decided once"
        kept, self._rebuild = ((tensor,), None) if recipe is None or recipe.is_exact else (recipe.kept, recipe.rebuild)
        self._dtype, self._unpack = tensor.dtype, outer and outer[1]
        # detached, or an output would hold its node, and the node would hold the output
        self.packed = [outer[0](each) if outer else each.detach() for each in kept]
        self._versions = () if outer else versions_of(*kept)

    def unpacked(self) -> Tensor:
        """The tensor, kept or rebuilt. Raises RuntimeError, as torch does, if what is kept was changed in place."""
        kept = [self._unpack(each) for each in self.packed] if self._unpack else self.packed
        if self._versions and self._versions != versions_of(*kept):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of "
                f"shape {tuple(kept[0].shape)} and dtype {kept[0].dtype}"
            )
        return kept[0] if self._rebuild is None else self._rebuild(kept, self._dtype)


class Saving:
    """Runs operations of torch with codes of what they save.

    tables  gives the table for each kind of what is saved
    given   the model's inputs; those without a graph are kept as they are
    """

    def __init__(self, tables: Tables, given: Any):
        self._tables = tables
        tensors = [each for each in leaves(given) if isinstance(each, Tensor) and is_torchs_own(type(each))]
        given = [each for each in tensors if each.layout == torch.strided and each.grad_fn is None]
        self._given = {storage_key(each.untyped_storage()) for each in given}

    def run(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a function of torch. Hooks that are already active get what is kept."""
        outer, first = hooks_on_saved(), sequence_number()
        waiting: list[Held] = []

        def pack(tensor: Tensor) -> Held:
            waiting.append(Held(tensor))
            return waiting[-1]

        result = None
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, Held.unpacked):
                result = function(*args, **kwargs)
        finally:
            if waiting:
                saved = [held.tensor for held in waiting if held.tensor is not None]
                of_frozen = partial(made_of_frozen, saved=saved, function=function, operands=leaves((args, kwargs)))
                self._decide(waiting, result, first, outer, of_frozen)
        if isinstance(result, Tensor) and result.grad_fn is not None and args and result is not args[0]:
            _note(result, args, kwargs)
        return sharing.note_made(result, (*args, *kwargs.values()))

    def _decide(self, waiting: list[Held], result: Any, first: int, outer: tuple[Any, Any] | None, of_frozen: OfTensor) -> None:
        roles = {id(held): (node, name) for node in _nodes(result, first) for name, held in raw_saved_by_name(node)}
        by_node: dict[int, dict[str, Tensor]] = {}
        for held in waiting:
            node, name = roles.get(id(held), (None, ""))
            assert held.tensor is not None, "it is decided below"
            by_node.setdefault(id(node), {})[name] = held.tensor
        for held in waiting:
            node, name = roles.get(id(held), (None, ""))
            held.keep(self._recipe(node, name, held.tensor, by_node[id(node)], of_frozen), outer)

    def _difference(self, tensor: Tensor, target: Tensor) -> Recipe | None:
        """What to keep of a tensor if backward takes its difference from a target, which is kept too."""
        table = self._tables("rest", tensor.dtype, tensor.device)
        if table is None or tensor.dtype != target.dtype:
            return None
        return _by_way_of(tensor.detach() - target.detach(), target, operator.add, table)

    def _quotient(self, tensor: Tensor, other: Tensor) -> Recipe | None:
        """What to keep of a tensor that is divided by another, which is kept too. Codes of the quotient are kept, because rows
        of the tensor may be as small as their divisor."""
        table = self._tables("product", tensor.dtype, tensor.device)
        if table is None or tensor.dtype != other.dtype or tensor.shape != torch.broadcast_shapes(tensor.shape, other.shape):
            return None
        known = sharing.find(tensor)
        if known is not None:
            return known
        recipe = _by_way_of(tensor.detach() / other.detach(), other, operator.mul, table)
        if recipe is not None:
            sharing.attach(tensor, recipe)
        return recipe

    def _recipe(self, node: Any, name: str, tensor: Any, saved: dict[str, Tensor], of_frozen: OfTensor) -> Recipe | None:
        """What to keep of a tensor that the node saved under this name; None for the tensor itself.

        saved      all tensors that the node saved, by name
        of_frozen  gives the recipe of a tensor without a graph, if it was made from a frozen weight
        """
        if tensor.layout != torch.strided or tensor.nbytes < LEAST or storage_key(tensor.untyped_storage()) in self._given:
            return None
        if not tensor.is_floating_point():
            return narrowed_integers(tensor, _range(node, name, saved))
        if node is None or tensor.dtype not in _DTYPES or not is_torchs_own(type(tensor)):
            return None
        if not sharing.is_made(tensor) and (tensor.grad_fn is None or _is_of_leaf(tensor)):
            return of_frozen(tensor)
        cast = cast_of_parameter(tensor)
        if cast is not None:
            return cast
        label = type(node).__name__
        if label == "MseLossBackward0" and name == "self" and "target" in saved:
            return self._difference(tensor, saved["target"])
        if label == "DivBackward0" and name == "self" and "other" in saved:
            return self._quotient(tensor, saved["other"])
        if name in _SHAPES.get(label, ()):
            return shape_of(tensor)
        if name == "result" and label in ("SoftmaxBackward0", "LogSoftmaxBackward0"):
            if not tensor.dim() or self._tables("rest", tensor.dtype, tensor.device) is None:
                return None
            recipe = _probabilities(tensor, _signed(node._saved_dim), label.startswith("Log"))
            if recipe is None:
                return None
            if label == "SoftmaxBackward0":  # logarithms of tiny probabilities are rebuilt only for their own backward
                sharing.attach(tensor, recipe)
            return recipe
        if name not in _POLYNOMIAL.get(label, ()) or (label == "PowBackward0" and not node._saved_exponent >= 2):
            return None
        table = self._tables(_kind(label, name, saved), tensor.dtype, tensor.device)
        if table is None:
            return None
        return recipe_of(tensor, Quantizer(table), coded_by_shape, is_own=name == "result")


def _by_way_of(way: Tensor, other: Tensor, back: Callable[[Tensor, Tensor], Tensor], table: DeviceTable) -> Recipe | None:
    """The recipe of back(way, other), which keeps codes of `way` and `other` itself."""
    found = coded_by_shape(way, Quantizer(table))
    if found is None or found.is_exact:
        return None
    rebuild = found.rebuild
    return Recipe((*found.kept, other.detach()), lambda kept, dtype: back(rebuild(kept[:-1], dtype), kept[-1].to(dtype)))


def _nodes(result: Any, first: int) -> Iterator[Any]:
    """The nodes of a result's graph with sequence numbers of at least `first`."""
    pending, seen = [each.grad_fn for each in leaves(result) if isinstance(each, Tensor)], set()
    while pending:
        node = pending.pop()
        if node is not None and id(node) not in seen and first <= sequence_number_of(node):
            seen.add(id(node))
            yield node
            pending += [other for other, _ in node.next_functions]


def _kind(label: str, name: str, saved: dict[str, Tensor]) -> str:
    """The kind of what a node saved under this name. saved: all that it saved."""
    if label in _PRODUCTS:
        return "product"
    others = [other for each, other in saved.items() if each != name and each in _POLYNOMIAL[label]]
    return "linear" if label in _MATRIX_PRODUCTS and others and all(map(_is_weight, others)) else "rest"


def _is_weight(tensor: Tensor) -> bool:
    """Whether the tensor is a parameter, or a view or a cast of one."""
    node: Any = tensor.grad_fn
    while node is not None and type(node).__name__ in (*sharing.VIEW_NODES, "ToCopyBackward0"):
        node = node.next_functions[0][0]
    if node is None:
        return isinstance(tensor, torch.nn.Parameter)
    return type(node).__name__ == "AccumulateGrad" and isinstance(node.variable, torch.nn.Parameter)


def _is_of_leaf(tensor: Tensor) -> bool:
    """Whether the tensor is a view of a leaf, usually of a parameter."""
    base = base_of(tensor)
    return base is not None and base.grad_fn is None


def _note(result: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Let readers of a result find a recipe if it is a cast, an embedding, or a product or quotient whose operands have recipes
    or are kept anyway."""
    label = type(result.grad_fn).__name__
    if label == "EmbeddingBackward0" and len(args) == 2 and kwargs.get("max_norm") is None:  # torch passes these arguments so
        _note_embedding(result, *args)
    if label == "ToCopyBackward0" and isinstance(args[0], Tensor) and result.device == args[0].device:
        sharing.note_cast(result, args[0])
    if label == "MulBackward0" and len(args) == 2:
        note_product(result, *args)
    if label == "DivBackward0" and len(args) == 2:
        divisor = as_it_is(args[1].detach()) if isinstance(args[1], Tensor) else args[1]  # torch keeps the divisor anyway
        note_product(result, args[0], divisor, by=operator.truediv)


def _note_embedding(result: Tensor, indices: Tensor, weight: Tensor) -> None:
    """Let readers of an embedding look its rows up again, exactly. Indices and weight are in memory anyway.

    This is not done in distributed training, which may free the memory of a sharded weight, nor with a max_norm, because the
    next call then changes the weight.
    """
    if is_distributed() or not isinstance(weight, torch.nn.Parameter):
        return
    known = sharing.find(indices) or as_it_is(indices)  # the embedding keeps the same for its own backward
    of_indices = known.rebuild

    def rebuild(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        *places, rows = kept
        return torch.nn.functional.embedding(of_indices(places, torch.int64).long(), rows).to(dtype)

    sharing.attach(result, Recipe((*known.kept, weight.detach()), rebuild))


def _signed(number: int) -> int:
    """A signed 64-bit number, from the unsigned one that torch gives."""
    return number - (1 << 64) if number >> 63 else number


def _range(node: Any, name: str, saved: dict[str, Tensor]) -> tuple[int, int] | None:
    """The least and the largest possible index, if the node tells them; else None."""
    if hasattr(node, "_saved_weight_sym_argsize_0"):  # an embedding
        return 0, node._saved_weight_sym_argsize_0 - 1
    if hasattr(node, "_saved_ignore_index") and name == "target" and "self" in saved and saved["self"].dim():
        ignored, classes = _signed(node._saved_ignore_index), saved["self"].shape[min(1, saved["self"].dim() - 1)]
        return min(0, ignored), max(classes - 1, ignored)
    if hasattr(node, "_saved_dim") and name in ("index", "indices"):  # places along a dimension
        shape = saved["self"].shape if "self" in saved else getattr(node, "_saved_self_sym_sizes", ())
        return (0, shape[_signed(node._saved_dim)] - 1) if len(shape) else None
    return None


_STEPS, _LARGEST = 254, 255  # codes of roots are 0 to 254; 255 marks the largest probability of a row
_AT_ONCE = 1 << 20  # elements that are coded at once


def _probabilities(x: Tensor, dim: int, are_logarithms: bool) -> Recipe | None:
    """The recipe of probabilities, or of their logarithms, that add up to one along a dimension; None if it would keep more.

    The largest probability of a row is kept exactly. Each other one is divided by the second largest, and its root is kept in a
    byte. Backward multiplies by the probabilities p. Steps Δ of the root give p an error of 2√p·Δ, and the squares of these
    errors add up to 4Δ² for any number of probabilities. If the largest is close to one, the others determine the gradient.
    """
    rows = x.detach().movedim(dim, -1)
    shape, rows = rows.shape, rows.reshape(-1, rows.shape[-1])
    if rows.shape[1] + 2 * rows.element_size() >= rows.shape[1] * rows.element_size():
        return None
    packed = torch.empty(rows.shape, dtype=torch.uint8, device=x.device)
    extremes = torch.empty(2, rows.shape[0], 1, dtype=x.dtype, device=x.device)
    step = max(1, _AT_ONCE // rows.shape[1])
    for first in range(0, rows.shape[0], step):
        part = slice(first, first + step)
        extremes[0, part], place = rows[part].max(1, keepdim=True)
        others = rows[part].scatter(1, place, -torch.inf if are_logarithms else 0)
        extremes[1, part] = others.amax(1, keepdim=True)
        wide, second = others.float(), extremes[1, part].float()
        roots = wide.sub_(second).div_(2).exp_() if are_logarithms else wide.div_(second).sqrt_()
        packed[part] = roots.mul_(_STEPS).round_().nan_to_num_().scatter_(1, place, _LARGEST)

    def rebuild(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        packed, (largest, second) = kept
        roots = packed.to(largest.dtype if largest.dtype == torch.float64 else torch.float32).div_(_STEPS)
        found = roots.log_().mul_(2).add_(second) if are_logarithms else roots.square_().mul_(second)
        return torch.where(packed == _LARGEST, largest.to(found.dtype), found).to(dtype).view(shape).movedim(-1, dim)

    return Recipe((packed, extremes), rebuild, bits=8)


def narrowed_integers(x: Tensor, extremes: tuple[int, int] | None = None) -> Recipe | None:
    """The recipe of booleans as bits, or of integers in a narrower dtype; None if there is none, or the range is not known.

    extremes  the least and the largest possible number, if known
    """
    if base_of(x) is not None or not x.is_contiguous():
        return None
    known = sharing.find(x)
    if known is not None:
        return known
    recipe = as_bits(x) if x.dtype == torch.bool else _narrower(x, extremes)
    if recipe is not None:
        sharing.attach(x, recipe)
    return recipe


def as_bits(x: Tensor) -> Recipe:
    """The recipe of booleans as bits, eight per byte."""
    shape, count = x.shape, x.numel()
    padded = torch.nn.functional.pad(x.reshape(-1), (0, -count % 8)).view(-1, 8)
    packed = (padded.to(torch.uint8) << _places(x)).sum(1, dtype=torch.uint8)

    def rebuild(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return ((kept[0].unsqueeze(1) >> _places(kept[0])) & 1).bool().view(-1)[:count].view(shape)

    return Recipe((packed,), rebuild)


def _places(x: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=x.device)


def _narrower(x: Tensor, extremes: tuple[int, int] | None) -> Recipe | None:
    """The recipe of integers in the first narrower dtype that holds all possible numbers. If their range is not known, it is
    taken from the numbers themselves, but only on the CPU, where no device has to be waited for."""
    if x.dtype not in (torch.int64, torch.int32) or (extremes is None and (x.device.type != "cpu" or is_fake(x))):
        return None
    least, most = extremes or (int(each) for each in x.aminmax())
    for dtype in _NARROW:
        of = torch.iinfo(dtype)
        if dtype.itemsize < x.dtype.itemsize and of.min <= least and most <= of.max:
            return Recipe((x.to(dtype),), lambda kept, dtype: kept[0].to(dtype))
    return None
