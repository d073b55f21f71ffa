"""DDP and FSDP2 on two processes: the gradients equal those of one process that runs their shares of the batch in turn."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layer_oracles import Block
from torch.nn import functional

import fewbit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"),
]
PROCESSES, SECONDS = 2, 240
CALLS = [f"{way}, calls, {mode}" for way in ("ddp", "fsdp") for mode in ("eager", "compiled")]
LAYERS = ["ddp, layers, eager", "ddp, layers, compiled", "fsdp, layers, eager", "fsdp, layers, compiled", "fsdp, layers apart"]
CASES = [*[f"{way}, {mode}" for way in ("ddp", "fsdp") for mode in ("eager", "compiled")], *LAYERS, *CALLS]


class Calls(torch.nn.Module):
    """Attention, dropout, pooling and products, all called as torch's functions, on (batch, tokens, 32)."""

    def __init__(self, p):
        super().__init__()
        self.gain, self.p = torch.nn.Parameter(torch.rand(32) + 0.5), p
        self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        self.gate, self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x):
        x = x + functional.dropout(self.out(self.attended(self.normed(x))), self.p)
        x = x + functional.max_pool1d(x, 3, 1, 1)
        return x + self.down(functional.silu(self.gate(x)) * self.up(x))

    def normed(self, x):
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def attended(self, x):
        q, k, v = (each.unflatten(-1, (2, 16)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def make_model(case):
    torch.manual_seed(0)
    if case in CALLS:
        p = 0.0 if case.endswith("compiled") else 0.1  # compiled code draws other random numbers
        return torch.nn.Sequential(*[fewbit.convert(Calls(p), bits=4) for _ in range(2)])
    if case in LAYERS:
        return torch.nn.Sequential(*[fewbit.convert(Block(), bits=4) for _ in range(2)])
    return torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Linear(8, 64), fewbit.GELU(bits=3), torch.nn.Linear(64, 16)),
        torch.nn.Sequential(fewbit.SiLU(bits=2), torch.nn.Linear(16, 1)),
    )


def make_batch(case):
    return torch.randn((32, 4, 32) if case in (*LAYERS, *CALLS) else (32, 8), generator=torch.Generator().manual_seed(1))


def gradients(model, x):
    """Gradients of the mean square of the model's output."""
    model.zero_grad()
    torch.manual_seed(3)
    model(x).pow(2).mean().backward()
    whole = (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters())
    return [grad.detach().clone() for grad in whole]


def distribute(case):
    """The model, made ready for this process."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = make_model(case)
    if case.endswith("compiled"):
        for block in model:
            block.compile(backend="aot_eager", fullgraph=True)
    if case.startswith("ddp"):
        return DistributedDataParallel(model)
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    for block in model:
        if case.endswith("apart"):  # the weights of a norm are freed before backward of the readers of its codes
            for layer in (block.norm1, block.qkv, block.norm2, block.up, block.down):
                fully_shard(layer, mesh=mesh)
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def work(rank, folder):
    """The code of each process: its share of the batch in every case. Gradients go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    shares = {case: make_batch(case).chunk(PROCESSES)[rank] for case in CASES}
    torch.save({case: gradients(distribute(case), shares[case]) for case in CASES}, folder / f"gradients-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def found(folder):
    """For each process, the gradients of each case."""
    interface = "lo0" if sys.platform == "darwin" else "lo"  # in case the machine's name does not resolve
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(PROCESSES)
    ]
    try:
        errors = [process.communicate(timeout=SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * PROCESSES, "\n".join(errors)
    return [torch.load(folder / f"gradients-{rank}.pt") for rank in range(PROCESSES)]


def test_gradients_are_those_of_one_process(tmp_path):
    """All cases in one test, so that the processes are started only once."""
    by_process = found(tmp_path)
    for case in CASES:
        # by shares, since codes are standardized over the batch that a process has
        shares = [gradients(make_model(case), share) for share in make_batch(case).chunk(PROCESSES)]
        rtol, atol = (1e-4, 1e-6) if case in (*LAYERS, *CALLS) else (1e-5, 1e-7)
        for grads in by_process:
            for grad, *parts in zip(grads[case], *shares, strict=True):
                whole = torch.stack(parts).mean(0)
                assert whole.abs().max() > 0, case
                torch.testing.assert_close(grad, whole, rtol=rtol, atol=atol, msg=lambda text, case=case: f"{case}: {text}")


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
