import itertools

import pytest

from fewbit import packing

SIZES = [0, 1, 7, 8, 9, 1023, 1024, 1025, 4096, 100_003, 3_000_000]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", SIZES)
def test_size_is_what_is_promised(n, bits):
    needed = -(-n * bits // 8)
    assert needed <= packing.packed_bytes(n, bits) <= needed + 512
    assert packing.packed_bytes(n, bits) == bits * packing.words(n, bits)
    assert packing.words(n, bits) % 64 == 0


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", SIZES)
def test_lanes_cover_every_element_once(n, bits):
    word_count = packing.words(n, bits)
    spans = [packing.lane_span(n, lane, word_count) for lane in range(packing.LANES)]
    assert spans[0][0] == 0
    assert spans[-1][1] == n
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    assert all(0 <= stop - start <= word_count for start, stop in spans)


@pytest.mark.parametrize("bits", range(1, 9))
def test_fields_are_the_bytes_of_the_word(bits):
    """By the definition: bits 8p to 8p + 7 of the sum of code << (lane · bits), with one lane of all ones at a time."""
    for lane in range(packing.LANES):
        word = (2**bits - 1) << (lane * bits)
        fields = {field.plane: field.shift for field in packing.fields(bits, lane)}
        for plane in range(bits):
            expected = word >> (8 * plane) & 255
            shift = fields.get(plane)
            code = 2**bits - 1
            found = 0 if shift is None else (code << shift if shift >= 0 else code >> -shift) & 255
            assert found == expected
            assert (shift is not None) == (expected != 0)
