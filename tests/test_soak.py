"""Ten thousand random calls, many at the same time: gradients are never wrong, and memory does not grow."""

import ctypes
import gc
import json
import mmap
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch

import fewbit
from fewbit import activations
from fewbit.errors import FewbitError, InputError

CALLS, ROUNDS = 10_000, 20
NAMES = ["gelu", "silu", "tanh", "relu", "hardswish", "softplus"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = {
    "contiguous": lambda x: x * 1,
    "transposed": lambda x: (x * 1).movedim(0, -1) if x.dim() else x * 1,
    "reversed": lambda x: (x * 1).permute(list(reversed(range(x.dim())))),
    "every other": lambda x: torch.cat([x, x], -1)[..., ::2] if x.dim() else x * 1,
    "offset": lambda x: torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[-x.numel() :].view(x.shape) if x.numel() else x * 1,
    "expanded": lambda x: x.unsqueeze(-1).expand(*x.shape, 3),
}


def random_leaf(rng):
    size = int(2 ** rng.uniform(0, 12)) if rng.random() < 0.98 else 200_000  # the latter in torch's threads
    shape = [[size], [], [0], [3, 0, 2], [size // 7 + 1, 7], [2, size // 8 + 1, 2, 2]][
        rng.choice(6, p=[0.3, 0.05, 0.05, 0.05, 0.3, 0.25])
    ]
    dtype = DTYPES[rng.integers(4)]
    return torch.from_numpy(np.asarray(rng.normal(0, 3, shape))).to(dtype).requires_grad_()


def one_call(seed):
    """A random coded activation. Its gradient is compared with the oracle's. Sometimes there is an error on the way."""
    rng = np.random.default_rng(seed)
    name, bits = rng.choice(NAMES), int(rng.integers(1, 5) if rng.random() < 0.9 else rng.integers(5, 9))
    leaf = random_leaf(rng)
    layout = rng.choice(list(LAYOUTS))
    x = LAYOUTS[layout](leaf)
    inplace = bool(rng.random() < 0.3) and layout not in ("expanded", "every other")
    before = LAYOUTS[layout](leaf).detach()  # with x's own strides: torch's last bit depends on them
    y = getattr(fewbit.functional, name)(x, bits=bits, inplace=inplace)
    assert torch.equal(y, activations.get(name).forward(before)), (seed, name, "forward")
    scale = 1
    match rng.integers(8):
        case 0:
            return  # a graph that is dropped
        case 1:
            with pytest.raises(FewbitError):
                getattr(fewbit.functional, name)(x, bits=9)
        case 2 if x.numel():
            (grad_x,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
            with pytest.raises(InputError, match="can be taken once"):
                torch.autograd.grad(grad_x.sum(), leaf)
            return
        case 3:
            y.register_hook(lambda grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                y.sum().backward()
            return
        case 4:
            y, scale = y.mul_(2) if layout != "expanded" else y * 2, 2  # an output changed after the fact
    grad = torch.from_numpy(np.asarray(rng.normal(size=tuple(y.shape)))).to(y.dtype)
    target = leaf if inplace else x
    (found,) = torch.autograd.grad(y, target, grad)
    if inplace:
        reference = LAYOUTS[layout](leaf)
        expected_x = oracles.expected_gradient(fewbit.load_ladder(name, bits), reference, grad * scale)
        (expected,) = torch.autograd.grad(reference, leaf, expected_x)
    else:
        expected = oracles.expected_gradient(fewbit.load_ladder(name, bits), before, grad * scale)
    assert torch.equal(found, expected), (seed, name, bits, layout, inplace, tuple(x.shape), x.dtype)


def resident_bytes():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free already goes back first
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def soak():
    """Resident bytes and Python objects after each round."""
    for name in NAMES:  # tables, device_tables and kernels are made once and kept
        for bits in range(1, 9):
            for dtype in DTYPES:
                getattr(fewbit.functional, name)(torch.ones(3, dtype=dtype, requires_grad=True), bits=bits).sum().backward()
    resident, objects, per_round = [], [], CALLS // ROUNDS
    with ThreadPoolExecutor(4) as pool:
        for round in range(ROUNDS):
            torch.set_num_threads(1 + round % 2)
            list(pool.map(one_call, range(round * per_round, (round + 1) * per_round)))
            resident.append(resident_bytes())
            objects.append(len(gc.get_objects()))
    return resident, objects


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to tell how much memory is resident")
def test_ten_thousand_random_calls():
    """In a process of its own, so that other tests do not influence its memory."""
    code = "import json, test_soak; print(json.dumps(test_soak.soak()))"
    environment = {
        **os.environ,
        "MALLOC_ARENA_MAX": "1",  # several arenas hide a leak in the memory that they hold back: 6 MiB, by chance
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",  # otherwise torch's gelu keeps 28 KiB for each of 1024 sizes
    }
    folder = Path(__file__).parent
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    resident, objects = json.loads(result.stdout)
    early, late = slice(2, ROUNDS // 2), slice(ROUNDS // 2, ROUNDS)
    assert max(objects[late]) - max(objects[early]) < 100, objects
    assert np.median(resident[late]) - np.median(resident[early]) < 2 << 20, resident
