"""Streaming histograms compared with numpy's, and how they are smoothed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewbit
from fewbit import activations
from fewbit.models.calibration.histogram import BINS, EDGES, StreamingHistogram, bins_of


class TestHistogram:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_streamed_counts_are_those_of_numpy(self, dtype):
        generator = torch.Generator().manual_seed(0)
        parts = [(torch.randn(n, 3, generator=generator) * 10.0**k).to(dtype) for n, k in ((5, -3), (100, 0), (33, 5))]
        histogram = StreamingHistogram()
        for part in parts:
            histogram.add(part)
        together = torch.cat(parts).double().numpy().ravel()
        moved = np.abs(histogram.counts - np.histogram(together, EDGES)[0]).sum()
        assert moved <= (0 if dtype == torch.float64 else 4)  # arcsinh in float32 may fall on the other side of an edge
        assert histogram.elements == together.size
        assert histogram.mean == pytest.approx(together.mean(), rel=1e-6)
        assert histogram.std == pytest.approx(together.std(), rel=1e-6)

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), min_size=1, max_size=5))
    def test_order_and_parts_do_not_matter(self, parts):
        one, other = StreamingHistogram(), StreamingHistogram()
        for part in parts:
            one.add(torch.tensor(part, dtype=torch.float64))
        other.add(torch.tensor([x for part in parts for x in part][::-1], dtype=torch.float64))
        np.testing.assert_array_equal(one.counts, other.counts)
        assert one.mean == pytest.approx(other.mean, rel=1e-9, abs=1e-6)
        assert one.std == pytest.approx(other.std, rel=1e-6, abs=1e-3)

    def test_what_is_not_finite_counts_apart(self):
        histogram = StreamingHistogram()
        histogram.add(torch.tensor([0.5, torch.nan, -torch.inf, torch.inf]))
        histogram.add(torch.tensor([torch.nan]))
        histogram.add(torch.empty(0))
        assert (histogram.elements, histogram.not_finite, histogram.counts.sum()) == (1, 4, 1)
        assert histogram.mean == 0.5

    def test_numbers_of_any_size_have_a_bin(self):
        for dtype in (torch.float16, torch.float32, torch.float64):
            info = torch.finfo(dtype)
            bins = bins_of(torch.tensor([info.min, -1.0, 0.0, info.tiny, 1.0, info.max, torch.nan], dtype=dtype)).tolist()
            assert bins == sorted(bins)
            assert bins[0] >= 0
            assert bins[-2] <= BINS - 1 < bins[-1]

    def test_gradients_are_counted_where_their_elements_lie(self):
        x, gradient = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 4)
        x[0, 0] = torch.nan
        histogram = StreamingHistogram()
        histogram.add_gradient(bins_of(x), gradient)
        expected = np.histogram(x.numpy(), EDGES, weights=gradient.double().numpy() ** 2)[0]
        np.testing.assert_allclose(histogram.squares, expected)

    def test_many_bins_are_merged(self):
        histogram = StreamingHistogram()
        histogram.add(torch.cat([torch.randn(1000), torch.tensor([-1e8, 3e7])]).double())
        weight = histogram.seen()
        assert weight.counts.size <= 4096
        assert weight.counts.sum() == 1002
        assert weight.domain[0] <= -1e8 < 3e7 <= weight.domain[1]

    @pytest.mark.parametrize("x", [[0.0], [5.0, 5.0], [1e-7, -1e-7], [1e8], [-3e9, 3e9]])
    def test_few_and_odd_samples_give_a_table(self, x):
        histogram = StreamingHistogram()
        histogram.add(torch.tensor(x))
        for channels in (("derivative",), ("derivative", "value")):
            table = fewbit.design("gelu", 3, weight=histogram.smoothed(), channels=channels)
            assert np.isfinite(table.levels).all()


class TestSmoothing:
    """From 100 samples alone, the outer levels would be single samples."""

    def error(self, weight, x):
        table = fewbit.design("gelu", 4, weight=weight)
        return np.sqrt(np.mean((table(x) - activations.get("gelu").df(x)) ** 2))

    def test_helps_where_samples_are_few_or_their_scale_changes(self):
        rng, histogram = np.random.default_rng(0), StreamingHistogram()
        histogram.add(torch.from_numpy(rng.standard_normal(100)))
        for scale in (1, 3):
            x = scale * rng.standard_normal(100_000)
            assert self.error(histogram.smoothed(), x) < self.error(histogram.seen(), x)

    def test_costs_little_where_samples_are_many(self):
        x, histogram = np.random.default_rng(0).standard_normal(200_000), StreamingHistogram()
        histogram.add(torch.from_numpy(x))
        assert self.error(histogram.smoothed(), x) < 1.02 * self.error(histogram.seen(), x)
