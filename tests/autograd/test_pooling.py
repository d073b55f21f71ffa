"""Pooling and padding without keeping the input: torch's gradients, bit for bit; places in windows, by brute force; bytes."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import bytes_kept
from torch.nn import functional

import fewbit
from fewbit.autograd import pooling
from fewbit.autograd.pooling import Windows
from fewbit.packing import packed_bytes

CODED, aten = fewbit.functional, torch.ops.aten


@st.composite
def windows_of_planes(draw):
    """A plane of two or three dimensions, and kernel, stride, padding, dilation and ceil_mode."""
    dims = draw(st.integers(2, 3))
    numbers = [
        tuple(draw(st.integers(low, high)) for _ in range(dims)) for low, high in ((1, 7), (1, 4), (1, 4), (0, 2), (1, 3))
    ]
    plane, kernel, stride, padding, dilation = numbers
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    ceil_mode = draw(st.booleans())
    reach = [size + 2 * p - d * (k - 1) for size, k, p, d in zip(plane, kernel, padding, dilation, strict=True)]
    assume(all(each >= 1 for each in reach))
    return plane, (kernel, stride, padding, dilation), ceil_mode


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(windows_of_planes(), st.integers(0, 1000), st.sampled_from([1, 40]))
def test_all_indices_come_back(window, seed, images):
    """Also for ties, NaN and windows of infinities, and for windows that miss the plane."""
    plane, sizes, ceil_mode = window
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 2, (images, 2, *plane), generator=generator).float()
    x[x == -2] = -torch.inf
    x[torch.rand(x.shape, generator=generator) < 0.1] = torch.nan
    _, indices = getattr(aten, f"max_pool{len(plane)}d_with_indices")(x, *sizes, ceil_mode)
    kept, restore = pooling._coded(indices.clone(), plane, Windows.strided(*sizes))
    assert torch.equal(restore(kept), indices)
    assert restore(kept).dtype == torch.int64
    assert kept.nbytes <= indices.nbytes // 2


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=3), st.sampled_from([1, 60]))
def test_all_indices_of_adaptive_windows_come_back(sizes, images):
    plane, output = zip(*sizes, strict=True)
    x = torch.randn(images, 1, *plane)
    _, indices = getattr(aten, f"adaptive_max_pool{len(plane)}d")(x, output)
    kept, restore = pooling._coded(indices.clone(), plane, None)
    assert torch.equal(restore(kept), indices)


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(windows_of_planes())
def test_distances_by_brute_force(window):
    plane, (kernel, stride, padding, dilation), _ = window
    windows = Windows.strided(kernel, stride, padding, dilation)
    places = itertools.product(*(range(0, k * d, d) for k, d in zip(kernel, dilation, strict=True)))
    expected = set()
    for place in places:
        index = 0
        for size, each in zip(plane, place, strict=True):
            index = index * size + each
        expected.add(index)
    assert list(windows.distances(plane)) == sorted(expected)
    assert windows.most(plane) == max(expected)


@pytest.mark.parametrize(
    ("kernel", "plane", "bits"),
    [
        *[((1, 1), (32, 32), 1), ((1, 2), (32, 32), 1), ((2, 2), (32, 32), 2), ((3, 3), (33, 33), 4), ((4, 4), (32, 32), 4)],
        *[((5, 5), (35, 35), 5), ((8, 8), (64, 64), 6), ((16, 16), (64, 64), 8), ((2, 2, 2), (8, 8, 8), 3)],
    ],
)
def test_bytes_of_maxima(kernel, plane, bits):
    """As few bits as needed to number the places of a window."""
    x = torch.randn(32, 16, *plane, requires_grad=True)
    function = getattr(CODED, f"max_pool{len(plane)}d")
    n = function(x, kernel).numel()
    assert bytes_kept(lambda: function(x * 1, kernel)) == packed_bytes(n, bits)


def test_bytes_where_no_window_tells_the_place_in_8_bits():
    x = torch.randn(4, 8, 64, 64, requires_grad=True)
    assert bytes_kept(lambda: CODED.max_pool2d(x * 1, 17, 1)) == 2 * CODED.max_pool2d(x, 17, 1).numel()
    assert bytes_kept(lambda: CODED.adaptive_max_pool2d(x * 1, 1)) == 2 * 4 * 8
    x = torch.randn(1, 1, 256, 256, requires_grad=True)
    assert bytes_kept(lambda: CODED.max_pool2d(x * 1, 17, 17)) == 4 * 15 * 15


@pytest.mark.parametrize(("width", "packs"), [(2**22 - 8, True), (2**23 + 8, False)])
def test_windows_as_far_apart_as_float32_tells(width, packs):
    windows = Windows.strided((2, 3), (2, 3), (0, 0), (1, 1))
    indices = torch.randint(0, 2, (1, 1, 1, 4000)) * width + torch.randint(0, 3, (1, 1, 1, 4000)) + 3 * torch.arange(4000)
    kept, restore = pooling._coded(indices.clone(), (2, width), windows)
    assert torch.equal(restore(kept), indices)
    assert (kept.dtype == torch.uint8) == packs


def test_the_smallest_keep_no_more_than_torch():
    for size in range(2, 12):
        x = torch.randn(1, 1, size, size, requires_grad=True)
        ours, torchs = (bytes_kept(lambda x, f=f: f(x * 1, 2), x) for f in (CODED.max_pool2d, functional.max_pool2d))
        assert ours * 8 <= torchs


def test_returned_indices_are_kept_alone():
    """The indices are kept once, together with a layer that unpools by them."""
    x = torch.randn(4, 8, 16, 16, requires_grad=True)

    def block():
        y, indices = CODED.max_pool2d(x * 1, 2, return_indices=True)
        return functional.max_unpool2d(y, indices, 2)

    assert bytes_kept(block) == 8 * 4 * 8 * 8 * 8


NOTHING = {
    "avg_pool1d": ((4, 8, 64), (2,)),
    "avg_pool2d": ((4, 8, 16, 16), (2,)),
    "avg_pool3d": ((4, 8, 8, 8, 8), (2,)),
    "adaptive_avg_pool1d": ((4, 8, 64), (5,)),
    "adaptive_avg_pool2d": ((4, 8, 16, 16), (5,)),
    "adaptive_avg_pool3d": ((4, 8, 8, 8, 8), (3,)),
    "pad": ((4, 8, 16, 16), ((1, 1, 1, 1), "reflect")),
    "interpolate": ((4, 8, 16, 16), (5, None, "area")),
}


@pytest.mark.parametrize("name", NOTHING)
def test_bytes_of_what_is_linear(name):
    shape, arguments = NOTHING[name]
    x = torch.randn(shape, requires_grad=True)
    assert bytes_kept(lambda: getattr(CODED, name)(x * 1, *arguments)) == 0
    assert bytes_kept(lambda: getattr(functional, name)(x * 1, *arguments)) == x.nbytes


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "name", ["avg_pool2d", "adaptive_avg_pool2d", "pad", "interpolate", "max_pool2d", "adaptive_max_pool2d"]
)
def test_nothing_of_the_stand_in_is_read(name, memory_format, monkeypatch):
    _, arguments = NOTHING.get(name, (None, (3,)))
    x = torch.randn(4, 8, 16, 16).to(memory_format=memory_format).requires_grad_()
    y = getattr(CODED, name)(x, *arguments)
    grad, made = torch.randn_like(y), []
    (expected,) = torch.autograd.grad(y, x, grad, retain_graph=True)

    def full_of_nan(*arguments):
        made.append(stand_in(*arguments))
        made[0].new_empty(0).set_(made[0].untyped_storage()).fill_(torch.nan)
        return made[0]

    stand_in = pooling._stand_in
    monkeypatch.setattr(pooling, "_stand_in", full_of_nan)
    (found,) = torch.autograd.grad(y, x, grad)
    assert made[0].isnan().all()
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride() == x.stride()


def test_a_stand_in_takes_no_memory():
    grad = torch.randn(3)
    found = pooling._stand_in(grad, torch.Size((1000, 1000, 7)), torch.contiguous_format)
    assert found.shape == (1000, 1000, 7)
    assert found.untyped_storage().nbytes() == 4
