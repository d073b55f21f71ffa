"""The largest batch that fits: compared with trying every batch, and how it is shown."""

import pytest
import torch
from support import SwiGLU
from torch import nn

import fewbit
from fewbit.bench.models import gpt
from fewbit.errors import InputError
from fewbit.models.memory.largest import resized, size_of
from fewbit.models.memory.peak import peak_of
from fewbit.terminal import parse_bytes


def mlps(number=3):
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(number)))


@pytest.mark.parametrize("budget", [2**17, 300_000, 2**20, 3 * 2**20])
def test_one_more_does_not_fit(budget):
    report = fewbit.memory(mlps(), torch.randn(8, 16, 32))
    found = report.largest_batch(budget, bits=4)
    assert list(found.ways) == ["exact", "coded", "checkpointed", "coded and checkpointed"]
    exact = found.ways["exact"]

    def peak(samples):
        return peak_of(report.forward, None, lambda batch: resized(batch, 0, 8, samples)).bytes

    assert exact.bytes == peak(exact.samples or 1)
    assert peak(exact.samples + 1) > budget
    if exact.samples:
        assert exact.bytes <= budget
        assert found.ways["coded"].samples >= exact.samples


def test_where_nothing_fits():
    report = fewbit.memory(SwiGLU(32, 64), torch.randn(4, 128, 32))
    found = report.largest_batch(1000)
    assert {each.samples for each in found.ways.values()} == {0}
    assert "none" in str(found)
    assert "checkpointed" not in found.ways  # it has no blocks


@pytest.mark.slow
def test_the_table_and_what_is_exported():
    subject = gpt(2, 64, 2, 16)
    report = fewbit.memory(subject.model, subject.batch, optimizer="adamw")
    found = report.largest_batch("4 MiB", bits=3)
    text = str(found)
    assert "4.00 MiB" in text
    assert "bits=3" in text
    assert [row["way"] for row in found.rows()] == list(found.ways)
    assert found.to_dict()["budget"] == 4 * 2**20
    assert len(found.plot().axes[0].patches) == 4
    assert found.ways["coded"].samples > found.ways["exact"].samples
    assert not any(each.requires_grad and each.grad is not None for each in subject.model.parameters())


def test_every_tensor_of_a_batch_grows_along():
    batch = {"input_ids": torch.zeros(4, 7, dtype=torch.int64), "position": torch.arange(7), "scale": torch.tensor(1.0)}

    def shapes(dimension, size):
        return {name: tuple(each.shape) for name, each in resized(batch, dimension, size, 9).items()}

    assert [size_of(batch, dimension) for dimension in (0, 1)] == [4, 7]
    assert shapes(0, 4) == {"input_ids": (9, 7), "position": (7,), "scale": ()}
    assert shapes(1, 7) == {"input_ids": (4, 9), "position": (9,), "scale": ()}
    for empty in (3, torch.zeros(0, 4)):
        with pytest.raises(InputError, match="no tensor"):
            size_of(empty, 0)
    with pytest.raises(InputError, match="two dimensions"):
        size_of(torch.ones(3), 1)


@pytest.mark.slow
def test_the_longest_sequence():
    """What attention keeps grows with the length; written-out attention weights grow with its square."""
    subject = gpt(2, 64, 2, 16)
    report = fewbit.memory(subject.model, subject.batch)
    found = report.longest_sequence("4 MiB", bits=4)
    assert found.grows == "sequence"
    assert "longest sequence" in str(found)
    exact, coded = found.ways["exact"], found.ways["coded"]
    assert 1 < exact.samples < coded.samples
    peaks = [
        peak_of(report.forward, None, lambda batch, length=length: resized(batch, 1, 16, length)).bytes
        for length in (exact.samples, exact.samples + 1)
    ]
    assert peaks[0] == exact.bytes <= found.budget < peaks[1]


@pytest.mark.parametrize(
    ("given", "number"),
    [(7, 7), ("24 GiB", 24 * 2**30), ("8GB", 8 * 10**9), ("1.5kib", 1536), ("512 MB", 512 * 10**6), ("100", 100), ("3 B", 3)],
)
def test_bytes(given, number):
    assert parse_bytes(given) == number


@pytest.mark.parametrize("given", ["", "many", "-3", "4 XB", 0, -1, True, None, 2.5, "1e3"])
def test_no_bytes(given):
    with pytest.raises(InputError, match="24 GiB"):
        parse_bytes(given)
