"""Memory against time, planned and measured: `python -m tools.studies.frontier [names]`, all by default.

The models are GPT-2, and a Llama with LoRA adapters on all of its linear layers, both from `tools.studies.working_sizes`.
`report.plan(4, budget=…)` makes plans for budgets between the lowest peak and the exact one. Each plan is converted and run:
the peak is what torch's allocator takes beyond the model, and the time is the median ratio of steps paired with exact ones.
"7B" plans a Llama of 7 billion parameters with LoRA, in bfloat16 on the meta device, 2,048 tokens, for 24 GiB; it does not run.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from importlib import import_module
from typing import Any

import torch
from rich.console import Console
from torch import nn

import fewbit
from fewbit import terminal
from fewbit.bench.models import Subject
from fewbit.bench.step import Step
from fewbit.terminal import bytes_label
from tools.studies import common, working_sizes

CPU = torch.device("cpu")
BITS, ROUNDS = 4, 5
SHARES = (0.75, 0.5, 0.25, 0.1)  # positions of budgets between the lowest peak (0) and the exact one (1)
LARGE = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
BUDGET = "24 GiB"


def with_adapters(model: nn.Module, rank: int = 16) -> Any:
    """The model with LoRA on all of its linear layers."""
    peft: Any = import_module("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear"))


def llama_with_adapters() -> Subject:
    """The Llama of `working_sizes`."""
    found = working_sizes.llama()
    return found._replace(model=with_adapters(found.model))


MODELS = {"GPT-2": working_sizes.gpt2, "Llama with LoRA": llama_with_adapters}


def compare(subject: Subject, console: Console, name: str) -> list[dict[str, Any]]:
    """For each budget: the planned and the measured figures."""
    report = fewbit.memory(subject.model, subject.batch, loss_fn=subject.loss_fn)
    least = report.plan(BITS, budget=1)
    lowest, exact = min(each.peak for each in least.frontier), report.peak.bytes
    plans = [report.plan(BITS, budget=int(lowest + share * (exact - lowest))) for share in SHARES]
    console.print(name, plans[1].view(), "", sep="\n")
    models = [copy.deepcopy(subject.model) for _ in (None, *plans)]
    for plan, model in zip(plans, models[1:], strict=True):
        plan.choice.convert(model, plan.setting, None)
    steps = [Step(subject._replace(model=model)) for model in models]
    seconds = [[_seconds(step) for step in steps] for _ in range(ROUNDS + 1)][1:]
    peaks = [step.peak_bytes(CPU) or 0 for step in steps]
    found = []
    for i, plan in enumerate(plans, 1):
        ratio = statistics.median(each[i] / each[0] for each in seconds)
        ways = [str(way) for way in plan.choice.blocks.values()]
        found.append(
            {
                "budget": plan.budget,
                "choice": {way: ways.count(way) for way in dict.fromkeys(ways)}
                | {"rest": "code" if plan.choice.rest else "keep"},
                "bits": min(bits for _, bits in plan.setting.by_kind),
                "planned peak": plan.peak.bytes,
                "measured peak": peaks[i] + plan.peak.bytes - plan.peak.beyond_model,
                "planned time": plan.time,
                "measured time": ratio,
            }
        )
    return found


def _seconds(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def seven_billion(console: Console) -> dict[str, Any]:
    """The plan, and how long it takes to make it."""
    transformers: Any = import_module("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LARGE)).to(torch.bfloat16)
        model = with_adapters(model).train()
        tokens = torch.empty(1, 2048, dtype=torch.int64)
    begin = time.perf_counter()
    report = fewbit.memory(model, {"input_ids": tokens, "labels": tokens}, fake=True, optimizer="adamw")
    plan = report.plan(BITS, budget=BUDGET)
    taken = time.perf_counter() - begin
    console.print(plan.view(), f"planned in {taken:.0f} s", "", sep="\n")
    return {**plan.totals(), "seconds": taken, "verdict": plan.verdict}


def main() -> None:
    """Compare the models asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *MODELS, "7B"], help="all by default")
    names = parser.parse_args().names or [*MODELS, "7B"]
    console, results = terminal.console(at_least=120), dict[str, Any]()
    view = terminal.table(("model", "blocks"), ("budget", "planned", "measured", "time: planned", "measured"))
    for name in names:
        if name == "7B":
            results[name] = seven_billion(console)
            continue
        results[name] = compare(MODELS[name](), console, name)
        for each in results[name]:
            sizes = map(bytes_label, (each["budget"], each["planned peak"], each["measured peak"]))
            what = ", ".join(f"{number} {way}" if way != "rest" else f"rest {number}" for way, number in each["choice"].items())
            view.add_row(name, what, *sizes, f"{each['planned time']:.2f}", f"{each['measured time']:.2f}")
    console.print(view)
    common.write("frontier", results)


if __name__ == "__main__":
    main()
