"""Which packages with models of the zoo are installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging

import torch

PACKAGES = ("transformers", "timm", "torchvision", "diffusers")


def missing(package: str) -> str:
    """The reason why the models of a package are left out; empty if they are not."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        _with_operators_of_torchvision()
        importlib.import_module(package)
    except Exception as error:
        return f"{package} cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    logging.getLogger(package).setLevel(logging.ERROR)
    return ""


def versions() -> dict[str, str]:
    """Versions of the installed packages."""
    return {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}


def _with_operators_of_torchvision() -> None:
    """Let torchvision be imported. Its wheels hold operators built for CUDA, which a torch for CPUs cannot load. It looks some
    of them up on import, and fails. Here they are only declared by name; no model of the zoo calls them."""
    if importlib.util.find_spec("torchvision") is None or torch.version.cuda is not None:
        return
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
