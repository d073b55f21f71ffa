"""tools/results: each file names its versions and date, and README.md and docs/ print its figures."""

import json
import re
from datetime import date
from functools import cache
from pathlib import Path
from statistics import fmean, median

import pytest
from documents import PAGES, README, words

from tools.studies import final_loss
from tools.studies.reviewers import architectures, batches, comparison, verdicts

ROOT = Path(__file__).parents[2]
# pictures of studies are in the same folder
FILES = sorted((ROOT / "tools" / "results").glob("*.json"))
TEXT = " ".join(map(words, (README, *PAGES)))
BITS = range(1, 5)


@cache
def read(name):
    return json.loads((ROOT / "tools" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def at(results, path):
    """The value at a path such as "128/float32, exact/total", or what a function computes from the results."""
    if callable(path):
        return path(results)
    for key in path.split("/"):
        results = results[key]
    return results


def behind(label):
    """The largest percentage by which models' last losses are behind those of exact ones, without ResNet."""
    return lambda results: max(lag(each, label) for name, each in results["models"].items() if name != "ResNet")


def lag(model, label):
    return 100 * (last_loss(model, label) / last_loss(model, "exact") - 1)


def last_loss(model, label):
    return fmean(model["losses"][label][-5:])


def gains(kind, ways, bits):
    """Percent by which calibrated tables lower the error of shipped ones."""
    return lambda results: [
        100 * (1 - results["tables"][kind][way][b] / results["tables"][kind]["shipped"][b]) for way in ways for b in bits
    ]


def least(numbers):
    return lambda results: min(numbers(results))


def most(numbers):
    return lambda results: max(numbers(results))


def allocated(bits):
    """Percent by which allocated bits lower the error of the same bits everywhere."""

    def gain(results):
        found = results["allocation"]["all layers"][bits]
        return 100 * (1 - found["allocated"]["held_out"] / found["uniform"]["held_out"])

    return gain


def percent(path):
    return lambda results: 100 * at(results, path)


def ratio(above, below):
    return lambda results: at(results, above) / (at(results, below) if isinstance(below, str) else below)


def final_loss_above_exact(label):
    """Percent, averaged over the orders of batches."""

    def above(results):
        found = final_loss.distance(results["runs"], label)
        assert found is not None, "it was run"
        return 100 * found[0]

    return above


def worst_held_out(results):
    """The largest difference in percent between the held-out losses of coded and exact training."""
    exact = results["exact"]["held_out"]
    return max(100 * abs(each["held_out"] / exact - 1) for each in results.values())


def of_architectures(count):
    """For each number of bits, `count` of the (distance, spread) of all networks."""

    def found(bits):
        def of(results):
            lines = [line["coded"] for line in architectures.lines(results["runs"]).values()]
            return count([(line.distances[bits], line.spread) for line in lines])

        return of

    return [found(bits) for bits in (8, 5, 4, 3, 2)]


def count_of_noise(found):
    """How many of (distance, spread) are not farther above exact than exact runs differ."""
    return sum(comparison.is_noise(*each) for each in found)


def kept_shares(results):
    return [each["kept_bytes"]["coded"] / each["kept_bytes"]["exact"] for each in results["models"].values()]


def of_level(level):
    """How many verdicts of that level there are, and how many of these networks end within the spread of exact runs."""

    def cases(results):
        return [each for each in verdicts.cases(results["runs"], 1000) if each.level == level]

    return lambda results: len(cases(results)), lambda results: sum(each.is_noise for each in cases(results))


def verdict_of(task, key, times=1):
    """The verdict of `fidelity` on a network at 4 bits."""

    def found(results):
        (run,) = (each for each in results["runs"] if each["task"] == task)
        return times * run["verdicts"]["4"][key]

    return found


def of_lora(count):
    """`count` of the figures of all models, bases, adapters and orders of attaching."""

    def found(results):
        return count([each for bases in results.values() for ways in bases.values() for each in ways.values()])

    return found


JOINT = gains("GELU and linear", ["calibrated"], "1234")
ALONE = gains("GELU", ["calibrated", "by gradient"], "234")

RECURRENT = "LSTM", "GRU", "RNN, tanh"


def of_batches(results, label):
    """The largest batches in one way, relative to those of exact steps."""
    return [each[label] / each["exact"] for each in batches.by_case(results["runs"]).values()]


def of_others(results):
    """The ratios of times, without LSTMs."""
    return [each["ratio"] for kind, sizes in results["time"].items() if kind != "LSTM" for each in sizes.values()]


# texts of README.md and docs/, with a place and its rounding for each figure; the file; and the figures' paths in it
QUOTED = [
    *(
        (
            f"{name} {{:.2f}} {{:.3f}} {{:.3f}} {{:.3f}} {{:.3f}} {{:.3f}}",
            "huggingface",
            ratio(f"models/{name}/kept_bytes/coded", f"models/{name}/kept_bytes/exact"),
            *(f"models/{name}/gradient_errors/{label}" for label in ("coded", "calibrated")),
            *(
                lambda results, name=name, label=label: last_loss(results["models"][name], label)
                for label in ("exact", "coded", "calibrated")
            ),
        )
        for name in read("huggingface")["results"]["models"]
    ),
    (
        "the coded models are up to {:.0f} % behind exact, the calibrated ones up to {:.0f} %",
        "huggingface",
        behind("coded"),
        behind("calibrated"),
    ),
    *(
        (
            f"{model} {adapter} {{:.2f}} {{:.2f}} {{:.2f}} {{:.3f}} {{:.3f}}",
            "lora",
            *(f"{model}/{adapter}/after/kept/{precision}" for precision in ("float32", "bfloat16", "autocast")),
            *(f"{model}/{adapter}/after/fidelity/{bits}/error" for bits in (4, 5)),
        )
        for model, adapter in (
            ("Llama", "LoRA"),
            *(
                (model, "LoRA, dropout")
                for model in ("Llama", "GPT-2", "BERT", "Llama, bitsandbytes nf4", "Llama, torchao int8")
            ),
            ("Llama", "DoRA, dropout"),
        )
    ),
    ("The study has {} cases:", "lora", of_lora(len)),
    ("4 bits keep at most {:.2f} of exact", "lora", of_lora(lambda cases: max(max(each["kept"].values()) for each in cases))),
    (
        "calls all of them safe, at 4 bits {}.",
        "lora",
        of_lora(lambda cases: sum(each["fidelity"]["4"]["verdict"] == "safe" for each in cases)),
    ),
    (
        "errs by {:.3f}, {:.1f} % of the SGD noise {:.2f}: safe, but look at blocks.*.up ({:.1f} % of its noise)",
        "fidelity",
        "errors/blocks, 4 bits/error",
        percent("errors/blocks, 4 bits/share"),
        "errors/blocks, 4 bits/noise",
        lambda results: 100 * max(row["share"] for row in results["errors"]["blocks, 4 bits"]["rows"] if "up" in row["group"]),
    ),
    ("after 300 steps, noise {:.3f} (", "fidelity", "errors/all layers, 4 bits/noise"),
    *(
        (f"{row} {{:.3f}} {{:.3f}} {{:.3f}} {{:.3f}}", "fidelity", *(f"errors/{label}, {bits} bits/error" for bits in BITS))
        for row, label in (("activations alone", "activations"), ("its blocks", "blocks"), ("all layers", "all layers"))
    ),
    (
        "With 8, 5, 4, 3 and 2 bits, {}, {}, {}, {} and {} of them end no farther",
        "reviewers_architectures",
        *of_architectures(count_of_noise),
    ),
    (
        "The median network ends {:+.1f}, {:+.1f}, {:+.1f}, {:+.1f} and {:+.1f} % from exact",
        "reviewers_architectures",
        *of_architectures(lambda found: 100 * median(each.mean for each, _ in found)),
    ),
    (
        "Of {} settings that it called safe, {} end there. Of {} that it called doubtful, {} do.",
        "reviewers_verdicts",
        *of_level("safe"),
        *of_level("doubtful"),
    ),
    (
        "fit {:.1f} to {:.1f} times the exact batch with 4 bits, and {:.1f} to {:.1f} times with checkpointing",
        "reviewers_batches",
        *(
            lambda results, label=label, which=which: which(of_batches(results, label))
            for label in (batches.CODES, batches.CHECKPOINTED)
            for which in (min, max)
        ),
    ),
    (
        "% of what torch's keep, 64 steps {:.1f} {:.1f} {:.1f}",
        "recurrent",
        *(percent(f"kept/{kind}/shares/4") for kind in RECURRENT),
    ),
    *(
        (template, "recurrent", *(f"errors/{kind}/{steps}/errors/4" for kind in RECURRENT))
        for steps, template in (
            (64, "gradient error, 64 steps {:.3f} {:.3f} {:.3f}"),
            (1024, "gradient error, 1,024 steps {:.3f} {:.3f} {:.3f}"),
        )
    ),
    (
        "Coded LSTMs take {:.1f} times its time, and {:.1f} with a batch of 8. GRUs and other networks take {:.1f} to {:.1f}.",
        "recurrent",
        *(f"time/LSTM/64 x {batch} x 128/ratio" for batch in (32, 8)),
        lambda results: min(of_others(results)),
        lambda results: max(of_others(results)),
    ),
    ("lower the gradient's error by {:.0f} to {:.0f} % at equal bits", "calibration", least(JOINT), most(JOINT)),
    ("Tables of the derivative alone lower it by {:.0f} to {:.0f} % from 2 bits up", "calibration", least(ALONE), most(ALONE)),
    ("all layers coded by {:.0f} % (2 bits) and {:.0f} % (3 bits) at equal", "calibration", allocated("2"), allocated("3")),
    *(
        (
            f"{dtype}, width 128 {{:.2f}} {{:.2f}} {{:.2f}}",
            "gpt-memory",
            *(f"128/{dtype}, {label}/total" for label in ("exact", "4 bits", "5 bits")),
        )
        for dtype in ("bfloat16", "float32")
    ),
    ("Exact attention alone takes {:.0f} units", "gpt-memory", "128/float32, exact/attention"),
    ("gradient error – {:.3f} {:.3f}", "gpt-errors", *(f"errors/blocks alone, {bits} bits/all" for bits in (4, 5))),
    ("beside {:.2f} of noise from batch to batch", "gpt-errors", "noise/all"),
    (
        "the errors are {:.3f} and {:.3f}; uniform bins over ±3σ give {:.3f} at 4 bits",
        "gpt-errors",
        *(f"errors/{label}/all" for label in ("joint codes, 4 bits", "joint codes, 5 bits", "uniform codes, 4 bits")),
    ),
    (
        "smaller error ({:.3f} against {:.3f} with all layers",
        "gpt-errors",
        *(f"errors/{label}, 4 bits/all" for label in ("joint codes", "stochastic rounding")),
    ),
    ("held-out loss within {:.1f} %", "gpt-training", worst_held_out),
    (
        "end {:.1f} % above exact at 5 bits, {:.1f} % at 4 and {:.1f} % at 3",
        "final_loss",
        *(final_loss_above_exact(label) for label in ("5", "4", "3")),
    ),
    (
        "The zoo has {} small models, with dropout and with whatever stays exact: of transformers, timm, torchvision, "
        "diffusers and torch.nn, and written out by hand (`python -m tools.studies.zoo`). `convert` at 4 bits leaves {:.2f} "
        "of the bytes at the median and {:.2f} at the 90th percentile, with a gradient error of {:.3f} at the median",
        "zoo",
        "summary/models",
        "summary/kept/median",
        "summary/kept/90th percentile",
        "summary/gradient error/4",
    ),
    (
        "A SwiGLU keeps {:.1f} bits for each hidden number instead of {:.0f}",
        "swiglu",
        *(f"bfloat16, {label}/bits/all but the input" for label in ("4 bits", "exact")),
    ),
    (
        "digits keeps 1/{:.0f} of what it kept",
        "resnet",
        ratio("exact/kept_bytes/all", "joint codes, 4 bits/kept_bytes/all"),
    ),
    *(
        (
            f"{name} {' '.join(['{:.2f}'] * 8)}",
            "working_sizes",
            *(f"{name}/coded/{column}" for column in ("calls", "moved", "kept", "peak", "time")),
            *(f"{name}/checkpoint/{column}" for column in ("kept", "peak", "time")),
        )
        for name in read("working_sizes")["results"]
    ),
    *(
        (
            f"{name} {' '.join(['{:.2f}'] * 8)}",
            "working_sizes-cuda",
            *(f"models/{name}/coded/{column}" for column in ("calls", "moved", "kept", "peak", "time")),
            *(f"models/{name}/checkpoint/{column}" for column in ("kept", "peak", "time")),
        )
        for name in read("working_sizes-cuda")["results"]["models"]
    ),
    # the table of README
    *(
        (
            f"{name} {{:.0f}} MiB {{:.2f}} s {{:.2f}} {{:.2f}} {{:.2f}} {{:.2f}} ",
            "working_sizes",
            ratio(f"{name}/exact peak bytes", 1 << 20),
            f"{name}/exact seconds/median",
            *(f"{name}/{way}/{column}" for way in ("coded", "checkpoint") for column in ("peak", "time")),
        )
        for name in read("working_sizes")["results"]
    ),
    *(
        (
            f"{name}, H200 {{:.1f}} GiB {{:.2f}} s {{:.2f}} {{:.2f}} {{:.2f}} {{:.2f}} ",
            "working_sizes-cuda",
            ratio(f"models/{name}/exact peak bytes", 1 << 30),
            f"models/{name}/exact seconds/median",
            *(f"models/{name}/{way}/{column}" for way in ("coded", "checkpoint") for column in ("peak", "time")),
        )
        for name in read("working_sizes-cuda")["results"]["models"]
    ),
    *(
        (
            f"{read('working_sizes')['results'][name]['checkpoint']['time']:.2f} {{}} ({{:.1f}} %)",
            "reviewers_verdicts",
            verdict_of(task, "level"),
            verdict_of(task, "share", 100),
        )
        for name, task in (("GPT-2", "gpt"), ("BERT", "bert"), ("ViT", "vit"), ("ResNet-18", "resnet"))
    ),
    (
        "and {:.2f} on two CPU cores, at {:.2f} of the time",
        "working_sizes",
        "GPT-2/coded/peak",
        "GPT-2/coded/time",
    ),
    (
        "a step of GPT-2 takes {:.2f} of its exact peak on an H200 GPU, at {:.2f} of the time",
        "working_sizes-cuda",
        "models/GPT-2/coded/peak",
        "models/GPT-2/coded/time",
    ),
    (
        "of GPT-2 takes {:.2f} of its exact peak memory on two CPU cores, at {:.2f} of the time",
        "working_sizes",
        "GPT-2/coded/peak",
        "GPT-2/coded/time",
    ),
    (
        "it takes {:.2f} of the peak of {:.0f} GiB, at {:.2f} of the time",
        "working_sizes-cuda",
        "models/GPT-2/coded/peak",
        ratio("models/GPT-2/exact peak bytes", 1 << 30),
        "models/GPT-2/coded/time",
    ),
    ("the ResNet for digits takes {:.2f} of the exact time", "working_sizes", "ResNet, digits/coded/time"),
    # the list of all studies
    ("two CPU cores GPT-2: {:.2f} of the peak, {:.2f} of the time", "working_sizes", "GPT-2/coded/peak", "GPT-2/coded/time"),
    (
        "NVIDIA H200 GPT-2: {:.2f} of the peak, {:.2f} of the time",
        "working_sizes-cuda",
        "models/GPT-2/coded/peak",
        "models/GPT-2/coded/time",
    ),
    (
        "ten families of Hugging Face {:.2f} to {:.2f} of the kept bytes",
        "huggingface",
        lambda results: min(kept_shares(results)),
        lambda results: max(kept_shares(results)),
    ),
    ("{} small models of many packages {:.2f} of the kept bytes", "zoo", "summary/models", "summary/kept/median"),
    (
        "{:.2f} → {:.2f} units in float32 at 4 bits",
        "gpt-memory",
        "128/float32, exact/total",
        "128/float32, 4 bits/total",
    ),
    (
        "gradient error of a trained GPT {:.3f} at 4 bits, {:.3f} at 5",
        "gpt-errors",
        *(f"errors/joint codes, {bits} bits/all" for bits in (4, 5)),
    ),
    ("200 steps, exact and coded the same held-out loss within {:.1f} %", "gpt-training", worst_held_out),
    ("to the end of a schedule {:.1f} % above exact at 5 bits", "final_loss", final_loss_above_exact("5")),
    ("beside noise {:.3f} at 4 bits, noise {:.2f}", "fidelity", "errors/blocks, 4 bits/error", "errors/blocks, 4 bits/noise"),
    ("error {:.0f} to {:.0f} % lower", "calibration", least(JOINT), most(JOINT)),
    (
        "what a SwiGLU keeps {:.1f} bits instead of {:.0f}",
        "swiglu",
        *(f"bfloat16, {label}/bits/all but the input" for label in ("4 bits", "exact")),
    ),
    ("1/{:.0f} of the kept bytes", "resnet", ratio("exact/kept_bytes/all", "joint codes, 4 bits/kept_bytes/all")),
    ("{:.1f} % of the kept bytes (LSTM)", "recurrent", percent("kept/LSTM/shares/4")),
    ("{} of 10 within the spread of seeds at 4 bits", "reviewers_architectures", of_architectures(count_of_noise)[2]),
    (
        "{1} of {0} safe settings",
        "reviewers_verdicts",
        *of_level("safe"),
    ),
    (
        "{:.1f} to {:.1f} times the exact one",
        "reviewers_batches",
        *(lambda results, which=which: which(of_batches(results, batches.CODES)) for which in (min, max)),
    ),
]


@pytest.mark.parametrize(("template", "name", "paths"), [(first, name, paths) for first, name, *paths in QUOTED])
def test_documents_print_what_was_measured(template, name, paths):
    results = read(name)["results"]
    assert template.format(*(at(results, path) for path in paths)) in TEXT


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_file_says_what_it_was_measured_with(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    assert list(found) == ["version", "torch", "date", "threads", "results"]
    assert all(re.match(r"\d+\.\d+\.\d+", found[key]) for key in ("version", "torch"))
    assert date.fromisoformat(found["date"]).isoformat() == found["date"]
    assert found["threads"] >= 1
    assert found["results"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_documents_name_the_study_of_each_file(path):
    study, _, part = path.stem.replace("reviewers_", "reviewers-").partition("-")
    assert f"`python -m tools.studies.{study}" in TEXT
    assert not part or re.search(rf"`python -m tools.studies.{study} (--device )?{part}`", TEXT)


def test_results_hold_what_documents_say_in_words():
    assert all(each["bits equal"] and each["keys equal"] for each in read("huggingface")["results"]["models"].values())
    kept = [each["kept_bytes"] for each in read("huggingface")["results"]["models"].values()]
    assert all(each["predicted"] == each["coded"] for each in kept)
    accuracies = {label: fmean(each["accuracy_percent"]) for label, each in read("resnet")["results"].items()}
    assert accuracies["joint codes, 4 bits"] >= accuracies["exact"]  # "at the same accuracy"
    adapted = of_lora(list)(read("lora")["results"])
    assert all(each["outputs equal"] and each["codes"] == 1 for each in adapted)
    assert all(each["fidelity"]["5"]["verdict"] == "safe" for each in adapted)
    assert all(ways["before"] == ways["after"] for bases in read("lora")["results"].values() for ways in bases.values())
    for units in (each["units"] for by_name in read("planner")["results"].values() for each in by_name.values()):
        assert units["predicted"] == pytest.approx(units["measured"], rel=0.01)
        assert units["pays, predicted"] == pytest.approx(units["pays, measured"], rel=0.01)
