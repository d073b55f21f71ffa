"""The domain of a design, cut into cells. It gives the integrals that the dynamic programs and the polish need."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fewbit.errors import DesignError
from fewbit.record import Activation
from fewbit.weights import Weight

Array = np.ndarray
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(4)


class Grid:
    """Cells of a domain under a weight w, and the channel functions g (derivative, value, …) on them.

    w is normalised to mass 1 on the domain. Jumps and kinks of f' are edges, so every cell is smooth inside and 4-point
    Gauss-Legendre quadrature is exact to rounding.

    edges  (cells+1,) ascending     jumps  (j,) the points of `edges` at which f' jumps
    mass   (cells,) ∫ w             mean   (channels, cells) the mean of g over each cell
    scale  (channels,) square roots of the factors of the squared errors; g itself is not scaled
    """

    def __init__(self, activation: Activation, channels: tuple[str, ...], scale: Array, weight: Weight, domain, cells: int):
        low, high = domain
        shape = activation.derivative_shape
        breaks = [x for x in (*shape.jumps, *shape.kinks) if low < x < high]
        self.edges = np.union1d(weight.edges(domain, cells), breaks)
        self.jumps = np.array([x for x in shape.jumps if low < x < high])
        self.scale = scale
        self._activation, self._channels, self._weight = activation, channels, weight
        self._total = 1.0
        total = float(self.integrate(self.edges[:-1], self.edges[1:])[0].sum())
        if not (total > 0 and np.isfinite(total)):
            raise DesignError(f"weight {weight} has no finite mass on the domain {domain}: got {total}; choose another domain")
        middles = 0.5 * (self.edges[1:] + self.edges[:-1])
        halved = np.union1d(self.edges, middles)
        if not np.isclose(self.integrate(halved[:-1], halved[1:])[0].sum(), total, rtol=1e-2):
            raise DesignError(f"weight {weight} is too narrow for the cells of {domain}; choose a smaller domain or more cells")
        self._total = total
        self.mass = self.integrate(self.edges[:-1], self.edges[1:])[0]
        self.mean = self.mean_between(self.edges[:-1], self.edges[1:])

    def g(self, x: Array) -> Array:
        """The channel functions at x: (channels, *x.shape)."""
        by_name: dict[str, Callable[[Array], Array]] = {"derivative": self._activation.df, "value": self._activation.f}
        values = np.stack([np.broadcast_to(by_name[channel](x), np.shape(x)) for channel in self._channels])
        if not np.all(np.isfinite(values)):
            raise DesignError(
                f"{self._activation} must have finite values and derivatives on the domain; choose other "
                "parameters or a smaller domain"
            )
        return values

    def w(self, x: Array) -> Array:
        """The normalised density at x; same shape as x."""
        density = self._weight.density(x) / self._total
        if np.any(density < 0) or not np.all(np.isfinite(density)):
            raise DesignError(f"weight {self._weight} must be finite and nowhere negative on the domain")
        return density

    def _sample(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Nodes (k, 4) and weights w dx (k, 4) of the quadrature over k intervals [a, b], none of which may cross an edge."""
        half = 0.5 * (b - a)[:, None]
        nodes = 0.5 * (a + b)[:, None] + half * _NODES
        return nodes, half * _NODE_WEIGHTS * self.w(nodes)

    def integrate(self, a: Array, b: Array) -> tuple[Array, Array, Array]:
        """∫ w (k,), ∫ w g (channels, k) and ∫ w g² (channels, k) over k intervals [a, b] that cross no edge."""
        nodes, dx = self._sample(a, b)
        g = self.g(nodes)
        return dx.sum(-1), (g * dx).sum(-1), (g * g * dx).sum(-1)

    def mean_between(self, a: Array, b: Array) -> Array:
        """Mean of g (channels, k) over intervals that cross no edge. It is exact for a constant g. If w is 0, it is g at the
        first node."""
        nodes, dx = self._sample(a, b)
        g = self.g(nodes)
        mass = dx.sum(-1)
        first = g[..., :1]
        return first[..., 0] + ((g - first) * dx).sum(-1) / np.where(mass > 0, mass, 1.0)

    def pieces(self, thresholds: Array) -> tuple[Array, Array]:
        """Cut the cells at the thresholds too: edges (k+1,) of the pieces, and for each piece (k,) its interval of the table.

        Thresholds outside the domain cut nothing.
        """
        inside = (thresholds > self.edges[0]) & (thresholds < self.edges[-1])
        edges = np.union1d(self.edges, thresholds[inside])
        return edges, np.searchsorted(thresholds, edges[1:], side="left")

    def integrate_by(self, thresholds: Array, codes: Array, count: int) -> tuple[Array, Array]:
        """∫ w (count,) and ∫ w g (channels, count) over each code.

        Each is a direct sum. In differences of running sums, rounding would swamp the small mass of a code far out.
        """
        edges, interval = self.pieces(thresholds)
        mass, first, _ = self.integrate(edges[:-1], edges[1:])
        code = codes[interval].astype(np.int64)
        return np.bincount(code, mass, count), np.stack([np.bincount(code, row, count) for row in first])

    def mean_by(self, thresholds: Array, codes: Array, count: int) -> Array:
        """Mean of g over each code: (channels, count). It is exact if g is constant over a code, and NaN for an unused code."""
        edges, interval = self.pieces(thresholds)
        mean = self.mean_between(edges[:-1], edges[1:])
        mass = self.integrate(edges[:-1], edges[1:])[0]
        code = codes[interval].astype(np.int64)
        levels = np.full((mean.shape[0], count), np.nan)
        levels[:, code[::-1]] = mean[:, ::-1]  # the first piece of each code
        total = np.bincount(code, mass, count)
        for c in range(mean.shape[0]):
            excess = np.bincount(code, mass * (mean[c] - levels[c, code]), count)
            levels[c] += excess / np.where(total > 0, total, 1.0)
        return levels

    def error(self, thresholds: Array, codes: Array, levels: Array) -> Array:
        """∫ w (g - q)² for each channel (channels,). q is the level of x's code. An exact fit gives exactly 0."""
        edges, interval = self.pieces(thresholds)
        nodes, dx = self._sample(edges[:-1], edges[1:])
        q = levels[:, codes[interval]][:, :, None]
        return (((self.g(nodes) - q) ** 2) * dx).sum((1, 2))

    def power(self) -> Array:
        """∫ w g² for each channel (channels,)."""
        return self.integrate(self.edges[:-1], self.edges[1:])[2].sum(-1)
