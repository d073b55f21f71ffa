"""`fewbit env`: the facts that a bug report needs."""

from __future__ import annotations

import importlib.metadata
import platform

_OTHERS = ("transformers", "peft", "accelerate", "lightning")


def env() -> None:
    """Print the facts that a bug report needs: versions, processor, GPU, kernels in use, and the folder of cached tables."""
    import torch

    from fewbit import kernels, store, terminal
    from fewbit.bench.environment import device_name, versions
    from fewbit.kernels import cuda

    found = dict(versions()) | {name: _version(name) for name in _OTHERS if _version(name)}
    found["system"] = f"{platform.system()} {platform.release()}, {platform.machine()}"
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        kernel = kernels.backend(torch.empty(0, device=device)).__name__.rpartition(".")[2]
        found[str(device)] = f"{device_name(device)}; kernels: {kernel}"
    found["threads"] = str(torch.get_num_threads())
    found["GPUs"] = "Triton's kernels" if cuda.available() else "torch's operations: Triton is missing, or older than 3.6"
    found["cache"] = str(store.cache_directory())
    console = terminal.console()
    width = max(map(len, found))
    for name, value in found.items():
        console.print(f"{name:{width}}  {value}", soft_wrap=True)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
