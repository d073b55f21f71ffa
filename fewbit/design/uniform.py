"""The uniform coding: equally wide bins over a weight, with one edge at zero. It needs no search.

Chakrabarti & Moseley, "Backprop with approximate activations for memory-efficient network training" (NeurIPS 2019), code
batch-normalised pre-activations with it. Let B = 2**bits be the number of bins, b the weight's centre in units of its scale,
and x be in these units too. Their code is

    clip(floor(x·B/6) + shift, 0, B - 1),    shift = max(1, B//2 - floor(b·B/6))

and the value of a code is (code + 0.5 - shift)·6/B. The bins thus cover b ± 3, moved by less than a bin to have an edge at
zero. The sign of x survives, which is all that the derivative of ReLU needs. One thing differs here: floor() counts an x on an
edge to the right bin, tables count it to the left bin, so x = 0 goes with negative x as in torch's ReLU.
"""

from __future__ import annotations

import numpy as np

from fewbit.weights import Weight

Array = np.ndarray


def uniform_bins(weight: Weight, bits: int) -> tuple[Array, Array]:
    """Edges between the bins (2**bits - 1,), one of them 0, and the bins' middles (2**bits,).

    >>> from fewbit.weights import Normal
    >>> uniform_bins(Normal(mean=2), bits=2)
    (array([0. , 1.5, 3. ]), array([-0.75,  0.75,  2.25,  3.75]))
    """
    bins = 2**bits
    center, scale = weight.feature
    shift = bins // 2 - np.floor(center / scale * bins / 6)
    # The published lower bound keeps a bin for negative x however far to the right the centre lies. An upper bound is needed
    # as well: with a shift beyond the last code, positive x would be clipped to the code of negative x.
    shift = np.clip(shift, 1, bins - 1)
    width = 6 * scale / bins
    return (np.arange(1, bins) - shift) * width, (np.arange(bins) + 0.5 - shift) * width
