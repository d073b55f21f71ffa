"""What the reviewers of backprop with approximate activations asked for: `python -m tools.studies.reviewers STUDY [--help]`.

architectures  ten networks trained exactly and with 8 to 2 bits: final losses, held-out accuracy, bytes, gradient errors
verdicts       what `fewbit.fidelity` says of them beforehand, beside what came of it
optimizers     SGD, Adam, AdamW and RMSProp on three of them
clock          the loss against seconds
noise          the error of the gradient beside its own noise, by layer and by size of the batch
ablation       codes in backward alone, in forward alone, and in both
rival          training with 8-bit values and range batch norm
batches        the largest batch that a number of bytes holds
sensitivity    tables of activations alone: what is learned, and how far they are from the derivative

A study that trains writes each run to tools/results/ as soon as it is finished, and runs that stand there are not run again: it
may be stopped at any time, and two processes may share its work. All run on one thread.
"""

from __future__ import annotations

import argparse
import importlib
import sys

import torch

STUDIES = ("architectures", "verdicts", "optimizers", "clock", "noise", "ablation", "rival", "batches", "sensitivity")


def main(arguments: list[str]) -> None:
    """Run the study that the first argument names; the others are its own."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.studies.reviewers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    study = parser.parse_args(arguments[:1]).study
    torch.set_num_threads(1)
    importlib.import_module(f"tools.studies.reviewers.{study}").main(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
