"""Convert frozen Hugging Face models with PEFT's adapters: `python -m tools.studies.lora [NAME ...]`.

Small models from configurations get adapters on all their linear layers: LoRA, rsLoRA and DoRA, with and without dropout. Bases
are in floating point, and also quantized if bitsandbytes or torchao are installed. Adapters are attached before and after
`fewbit.convert(model, bits=4)`. The figures are: the bytes kept relative to exact ones, in float32, in bfloat16 and under
autocast; whether outputs have the same bits; the error of the adapters' gradients and its share of their noise, also with
5 bits; and how many codes the adapters of queries, keys and values keep of their input, without masks of dropout.

The table is printed, and written to tools/results/ as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import nn

import fewbit
from fewbit import terminal
from fewbit.models.memory.report import MemoryReport
from tools.studies import common, huggingface

BITS, MORE, RANK, BATCHES = 4, 5, 8, 4
WHEN = ("before", "after")  # whether adapters are attached before or after the conversion
DROPOUT = {"lora_dropout": 0.1}
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, dropout": DROPOUT,
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "DoRA, dropout": {"use_dora": True, **DROPOUT},
}
MODELS = ("Llama", "GPT-2", "BERT")
PRECISIONS = ("float32", "bfloat16", "autocast")
# the modules that read what queries, keys and values are made of, in the second block
_READERS = re.compile(r"\.1\.\S*\b(q_proj|k_proj|v_proj|query|key|value|c_attn)\.lora_(A|dropout)\b")


def _with_bitsandbytes(model: nn.Module, make: Callable[..., nn.Module]) -> nn.Module:
    """The model with its linear layers, except the last, replaced by those of bitsandbytes."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not model.get_output_embeddings():  # type: ignore[operator]
                coded = make(child.in_features, child.out_features, bias=child.bias is not None)
                coded.load_state_dict(child.state_dict())
                setattr(module, name, coded.to("cpu"))  # this quantizes
    return model


def _nf4(model: nn.Module) -> nn.Module:
    layers = importlib.import_module("bitsandbytes.nn")

    def make(*sizes: int, bias: bool) -> nn.Module:
        return layers.Linear4bit(*sizes, bias=bias, quant_type="nf4", compute_dtype=torch.float32)

    return _with_bitsandbytes(model, make)


def _int8(model: nn.Module) -> nn.Module:
    layers = importlib.import_module("bitsandbytes.nn")

    def make(*sizes: int, bias: bool) -> nn.Module:
        return layers.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, threshold=6.0)

    return _with_bitsandbytes(model, make)


def _with_torchao(model: nn.Module, name: str, **options: Any) -> nn.Module:
    """The model with the weights of its linear layers, except the last, quantized by torchao's configuration of that name."""
    quantization = importlib.import_module("torchao.quantization")

    def is_chosen(module: nn.Module, name: str) -> bool:
        return type(module) is nn.Linear and module is not model.get_output_embeddings()  # type: ignore[operator]

    model.requires_grad_(False)  # integers have no gradient
    quantization.quantize_(model, getattr(quantization, name)(**options), filter_fn=is_chosen)
    return model


def _torchao_int8(model: nn.Module) -> nn.Module:
    return _with_torchao(model, "Int8WeightOnlyConfig")


def _torchao_int4(model: nn.Module) -> nn.Module:
    granularity = importlib.import_module("torchao.quantization").PerGroup(32)
    return _with_torchao(model, "IntxWeightOnlyConfig", weight_dtype=getattr(torch, "int4"), granularity=granularity)  # noqa: B009


BASES: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {  # name -> package, and what quantizes the base
    "bitsandbytes nf4": ("bitsandbytes", _nf4),
    "bitsandbytes int8": ("bitsandbytes", _int8),
    "torchao int8": ("torchao", _torchao_int8),
    "torchao int4": ("torchao", _torchao_int4),
}


def installed_bases() -> list[str]:
    """The quantized bases whose package is installed."""
    return [name for name, (package, _) in BASES.items() if importlib.util.find_spec(package) is not None]


def works(adapter: str, base: str) -> bool:
    """Whether the exact model trains. With DoRA on integers of bitsandbytes, the second step fails on the CPU (PEFT 0.21)."""
    return base != "bitsandbytes int8" or "use_dora" not in ADAPTERS[adapter]


def adapted(model: nn.Module, adapter: str) -> nn.Module:
    """The model with seeded adapters on its linear layers. The adapters do not begin at zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=RANK,
        target_modules="all-linear",
        fan_in_fan_out="GPT2" in type(model).__name__,  # GPT-2's layers hold their weights transposed
        init_lora_weights=False,
        **ADAPTERS[adapter],
    )
    return get_peft_model(model, config).train()  # type: ignore[arg-type]


def build(name: str, adapter: str, base: str = "", when: str = "") -> nn.Module:
    """A model with adapters. It is exact if `when` is empty; else `when` says whether they are attached before or after the
    conversion."""
    model = huggingface.build(huggingface.CASES[name])
    model = BASES[base][1](model) if base else model
    if when == "after":
        fewbit.convert(model, bits=BITS)
    model = adapted(model, adapter)
    return fewbit.convert(model, bits=BITS) if when == "before" else model


def kept(name: str, adapter: str, base: str, when: str, precisions: Sequence[str] = PRECISIONS) -> dict[str, MemoryReport]:
    """Precision -> what a forward pass keeps."""
    batch, found = huggingface.CASES[name].sample(torch.Generator().manual_seed(1)), {}
    for precision in precisions:
        model = build(name, adapter, base, when)
        if precision == "bfloat16":
            model.to(torch.bfloat16)
        context = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()
        with context:
            found[precision] = fewbit.memory(model, batch)
    return found


def codes_of_attention_input(report: MemoryReport) -> int:
    """How many codes the adapters of queries, keys and values keep of their input: storages with that many bits an element."""
    read = [each for each in report.storages if any(_READERS.search(saver.module) for saver in each.savers)]
    width = report.forward.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator, union-attr]
    return sum(each.bytes == huggingface.BATCH * huggingface.TOKENS * width * BITS // 8 for each in read)


def compare(name: str, adapter: str, base: str = "") -> dict[str, Any]:
    """All figures of one model, adapter and base, by when the adapters are attached."""
    case = huggingface.CASES[name]
    batches = [case.sample(torch.Generator().manual_seed(seed)) for seed in range(BATCHES)]
    exact, exact_kept = build(name, adapter, base), kept(name, adapter, base, "")
    results = {}
    for when in WHEN:
        coded, coded_kept = build(name, adapter, base, when), kept(name, adapter, base, when)
        equal = torch.equal(_logits(exact, batches[0]), _logits(coded, batches[0]))
        results[when] = {
            "kept": {key: coded_kept[key].activation_bytes / exact_kept[key].activation_bytes for key in PRECISIONS},
            "bytes": {key: coded_kept[key].activation_bytes for key in PRECISIONS},
            "outputs equal": equal,
            "codes": codes_of_attention_input(coded_kept["float32"]),
            "fidelity": {BITS: _judged(coded, batches), MORE: _judged(fewbit.convert(coded, bits=MORE), batches)},
        }
    return results


def _logits(model: nn.Module, batch: Any) -> torch.Tensor:
    torch.manual_seed(2)  # of dropouts
    return model(**batch).logits


def _judged(model: nn.Module, batches: list[Any]) -> dict[str, Any]:
    found = fewbit.fidelity(model, batches)
    return {"error": found.whole.error, "share of noise": found.whole.share, "verdict": found.level}


def compare_all(console: Console, names: list[str], bases: list[str]) -> dict[str, Any]:
    """Print and return the figures of these models, also on these quantized bases if they have linear layers."""
    kept_columns = ("kept of\nexact", "bf16", "auto-\ncast")
    judged_columns = (f"error,\n{BITS} bits", "of\nnoise", f"error,\n{MORE} bits", "of\nnoise")
    columns = (*kept_columns, *judged_columns, "codes\nof x", "same\noutput")
    view = terminal.table(("model, base", "adapter", "attached"), columns)
    results: dict[str, Any] = {}
    for name in names:
        for base in ["", *(bases if name != "GPT-2" else [])]:  # GPT-2's layers are not nn.Linear
            label = f"{name}, {base}" if base else name
            results[label] = {}
            for adapter in (each for each in ADAPTERS if works(each, base)):
                found = results[label][adapter] = compare(name, adapter, base)
                ways = WHEN if found[WHEN[0]] != found[WHEN[1]] else WHEN[1:]
                for way in ways:
                    each = found[way]
                    judged = each["fidelity"].values()
                    view.add_row(
                        *(label, adapter) if way == ways[0] else ("", ""),
                        way if len(ways) > 1 else "both",
                        *(f"{each['kept'][precision]:.3f}" for precision in PRECISIONS),
                        *(figure for one in judged for figure in (f"{one['error']:.3f}", f"{one['share of noise']:.3f}")),
                        str(each["codes"]),
                        "yes" if each["outputs equal"] else "NO",
                    )
    console.print(view)
    return results


def main() -> None:
    """Run on the models asked for, on all bases that are installed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], help="all by default")
    names: list[str] = parser.parse_args().names or [*MODELS]
    common.write("lora", compare_all(terminal.console(at_least=120), names, installed_bases()))


if __name__ == "__main__":
    main()
