import numpy as np
import pytest
import torch
from scipy import stats

from fewbit.errors import DesignError
from fewbit.weights import Custom, Histogram, Normal, Student, Uniform, as_weight

X = np.linspace(-9, 9, 301)


@pytest.mark.parametrize(
    ("weight", "density"),
    [
        (Uniform(), np.ones_like(X)),
        (Normal(), stats.norm.pdf(X)),
        (Normal(mean=-1, std=2.5), stats.norm.pdf(X, -1, 2.5)),
        (Student(), stats.t.pdf(X, 3)),
        (Student(df=1.5, mean=2, scale=0.5), stats.t.pdf(X, 1.5, 2, 0.5)),
    ],
    ids=str,
)
def test_densities_up_to_a_factor(weight, density):
    ratio = weight.density(X) / density
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)


@pytest.mark.parametrize(
    "text", ["student", "student(df=5)", "normal", "normal(mean=1, std=2)", "uniform", "student(scale=0.1)"]
)
def test_text_form_round_trips(text):
    weight = as_weight(text)
    assert str(weight) == text
    assert as_weight(str(weight)) == weight
    assert weight.reusable


def test_text_is_canonical():
    assert str(as_weight(" normal( std = 1.0 ,mean=0) ")) == "normal"
    assert as_weight("student(df=3)") == Student()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("gauss", "weight must be one of student, normal, uniform"),
        ("normal(sd=2)", "takes mean=NUMBER, std=NUMBER; got 'sd=2'"),
        ("normal(std=x)", "got 'std=x'"),
        ("uniform(low=0)", "takes no arguments"),
        ("normal(std=-1)", "std must be a positive number, got -1"),
        ("student(df=inf)", "df must be a positive number, got inf"),
        (3.0, "weight must be one of .* got float"),
        (None, "got NoneType"),
        ([], "samples must be a non-empty real array"),
        (["a"], "samples must be a non-empty real array"),
        ([1.0, np.nan, np.inf], "samples must be finite; 2 of 3 are not"),
    ],
)
def test_wrong_weights(weight, message):
    with pytest.raises(DesignError, match=message):
        as_weight(weight)


@pytest.mark.parametrize(
    ("edges", "counts", "message"),
    [
        ([0, 1], [1, 2], r"edges \(n\+1,\) and counts \(n,\)"),
        ([0, 0, 1], [1, 2], "finite and ascending"),
        ([0, 1, 2], [1, -2], "none negative"),
        ([0, 1, 2], [0, 0], "not all zero"),
    ],
)
def test_wrong_histograms(edges, counts, message):
    with pytest.raises(DesignError, match=message):
        Histogram(edges, counts)


def test_histogram_holds_all_samples_and_their_density(rng):
    samples = rng.normal(0.5, 2.0, 400_000)
    weight = as_weight(samples)
    assert isinstance(weight, Histogram)
    assert weight.counts.sum() == samples.size
    low, high = weight.domain
    assert low < samples.min()
    assert samples.max() < high
    widths = np.diff(weight.bin_edges)
    coarse = np.add.reduceat(weight.counts, np.arange(0, 4096, 128)) / samples.size
    exact = np.diff(stats.norm.cdf(weight.bin_edges[::128], 0.5, 2.0))
    np.testing.assert_allclose(coarse, exact, atol=4e-3)
    np.testing.assert_allclose((weight.density((weight.bin_edges[1:] + weight.bin_edges[:-1]) / 2) * widths), weight.counts)
    assert weight.density(np.array([low - 1, high + 1])).tolist() == [0.0, 0.0]


def test_features_are_centres_and_scales(rng):
    assert as_weight("normal(mean=-1, std=2)").feature == (-1.0, 2.0)
    assert as_weight("student(mean=3, scale=0.5)").feature == (3.0, 0.5)
    samples = rng.normal(-3.0, 0.25, 10_000)
    assert as_weight(samples).feature == pytest.approx((samples.mean(), samples.std()), rel=1e-3)


def test_an_outlier_leaves_the_resolution_around_zero(rng):
    weight = Histogram.of(np.append(rng.normal(size=10_000), 1e6))
    near_zero = np.abs(weight.bin_edges[:-1]) < 1
    assert np.diff(weight.bin_edges)[near_zero].max() < 0.01


def test_samples_of_any_shape_type_and_value():
    assert Histogram.of(np.full((3, 4), 7)).domain == pytest.approx((7, 7), abs=1e-3)
    assert as_weight(torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)) == as_weight([1.0] * 6)


def test_histograms_compare_by_content():
    assert Histogram([0, 1], [1]) == Histogram([0, 1], [1])
    assert Histogram([0, 1], [1]) != Histogram([0, 2], [1])
    assert len({Histogram([0, 1], [1]), Histogram([0, 1], [1])}) == 1


def test_functions_become_custom_weights():
    weight = as_weight(np.cosh)
    assert isinstance(weight, Custom)
    assert not weight.reusable
    assert str(weight) == "custom(cosh)"
    np.testing.assert_array_equal(as_weight(lambda x: 2.0).density(X), np.full_like(X, 2.0))
