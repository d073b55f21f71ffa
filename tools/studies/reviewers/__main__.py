"""Studies that the reviewers of "Backprop with approximate activations" asked for: `python -m tools.studies.reviewers STUDY`.

architectures  ten networks trained exactly and with 8 to 2 bits: final losses, held-out accuracy, bytes, gradient errors
verdicts       the verdict of `fewbit.fidelity` before training, compared with the final loss
optimizers     SGD, Adam, AdamW and RMSProp on three of the networks
clock          the loss against seconds
noise          the error of the gradient compared with its noise, by layer and by size of the batch
ablation       codes only in backward, only in forward, and in both
rival          training with 8-bit values and range batch norm
batches        the largest batch that fits a number of bytes
sensitivity    only activations are coded: final losses with different tables, and their distance from the derivative

A study that trains writes each run to tools/results/ as soon as it is finished, and does not run it again. So it may be stopped
at any time, and two processes may share its work. All studies run on one thread. `STUDY --help` lists options.
"""

from __future__ import annotations

import argparse
import importlib
import sys

import torch

STUDIES = ("architectures", "verdicts", "optimizers", "clock", "noise", "ablation", "rival", "batches", "sensitivity")


def main(arguments: list[str]) -> None:
    """Run the study that the first argument names. It gets the other arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.studies.reviewers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    study = parser.parse_args(arguments[:1]).study
    torch.set_num_threads(1)
    importlib.import_module(f"tools.studies.reviewers.{study}").main(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
