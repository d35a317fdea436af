"""The other strand and the mean over both, against loops over bases; test-time averaging of any function.

Shapes: B batch, L tokens, C channels.
"""

import pytest
import torch

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.reverse_complement import (
    average_over_strands,
    both_strands,
    demand_whole_bins,
    reverse_complement,
    reverse_tokens,
    split_strands,
    strand_mean,
)

# 0 pads; A5 C6 G7 T8 N9.
COMPLEMENT = [0, 1, 2, 3, 4, 8, 7, 6, 5, 9]
LETTERS = {5: "A", 6: "C", 7: "G", 8: "T", 9: "N", 0: "."}
# Real spans of rows of 7: all, right padding, left padding, both, one base, none.
SPANS = [(0, 7), (0, 4), (3, 7), (2, 6), (5, 6), (0, 0)]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.tensor([[start <= i < stop for i in range(7)] for start, stop in SPANS])
    return torch.randint(5, 10, mask.shape).masked_fill(~mask, 0), mask


def other_strand(row: list[int], start: int, stop: int) -> list[int]:
    """By hand, in letters."""
    pairs = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}
    ids = {letter: token for token, letter in LETTERS.items()}
    inside = [ids[pairs[LETTERS[token]]] for token in row[start:stop]]
    return row[:start] + inside[::-1] + row[stop:]


def test_the_other_strand_is_read_from_its_own_start() -> None:
    ids, mask = batch()
    expected = [other_strand(row, *span) for row, span in zip(ids.tolist(), SPANS, strict=True)]
    assert reverse_complement(ids, COMPLEMENT, mask).tolist() == expected
    assert reverse_complement(ids[:1], COMPLEMENT).tolist() == expected[:1]


def test_twice_is_nothing() -> None:
    ids, mask = batch()
    assert torch.equal(reverse_complement(reverse_complement(ids, COMPLEMENT, mask), COMPLEMENT, mask), ids)
    x = torch.randn(*ids.shape, 3)
    assert torch.equal(reverse_tokens(reverse_tokens(x, mask), mask), x)


def test_padding_stays_where_it_is_whatever_it_holds() -> None:
    ids, mask = batch()
    ids = ids.masked_fill(~mask, 5)
    assert (reverse_complement(ids, COMPLEMENT, mask)[~mask] == 5).all()


def test_both_strands_are_put_together_and_taken_apart() -> None:
    ids, mask = batch()
    together, masks = both_strands(ids, COMPLEMENT, mask)
    assert torch.equal(masks, torch.cat([mask, mask]))
    forward, reverse = split_strands(together, mask)
    assert torch.equal(forward, ids)
    # Read backwards again, the other strand shows the complement of every base in its place.
    assert torch.equal(reverse, torch.where(mask, torch.tensor(COMPLEMENT)[ids], ids))
    assert both_strands(ids, COMPLEMENT)[1] is None


def test_the_mean_exchanges_channels() -> None:
    forward, reverse = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    mean = strand_mean([forward, reverse], [2, 1, 0])
    for channel, partner in enumerate([2, 1, 0]):
        torch.testing.assert_close(mean[..., channel], (forward[..., channel] + reverse[..., partner]) / 2)
    torch.testing.assert_close(strand_mean([forward, reverse]), (forward + reverse) / 2)
    assert strand_mean([forward]) is forward


def test_averaging_makes_any_function_of_bases_equivariant() -> None:
    """A lopsided function of the neighbour to the left: its average treats both strands alike."""
    table = torch.randn(10, 4, dtype=torch.float64)

    def predict(ids, mask):
        return table[ids] * torch.nn.functional.pad(table[ids], (0, 0, 1, -1)).cos()

    ids, mask = batch()
    partner = [3, 2, 1, 0]
    for given, real in ((ids[:1], None), (ids, mask)):
        out = average_over_strands(predict, given, COMPLEMENT, real, partner)
        other = average_over_strands(predict, reverse_complement(given, COMPLEMENT, real), COMPLEMENT, real, partner)
        places = slice(None) if real is None else real
        torch.testing.assert_close(other[places], reverse_tokens(out, real)[..., partner][places], rtol=0, atol=1e-12)
        assert not torch.allclose(out[places], predict(given, real)[places])


def test_averaging_per_sequence_and_per_bin() -> None:
    ids = torch.randint(5, 9, (3, 12))
    table = torch.randn(10, 2)

    def per_bin(ids, mask):
        return (table[ids] * torch.arange(12)[:, None]).unflatten(1, (3, 4)).sum(2)

    def per_sequence(ids, mask):
        return per_bin(ids, mask).sum(1)

    other = reverse_complement(ids, COMPLEMENT)
    bins = average_over_strands(per_bin, ids, COMPLEMENT)
    torch.testing.assert_close(bins, (per_bin(ids, None) + per_bin(other, None).flip(1)) / 2)
    whole = average_over_strands(per_sequence, ids, COMPLEMENT, torch.ones_like(ids))
    torch.testing.assert_close(whole, (per_sequence(ids, None) + per_sequence(other, None)) / 2)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    with pytest.raises(SequenceError, match=r"gave 3 bins for 12 tokens.*equal length"):
        average_over_strands(per_bin, ids, COMPLEMENT, mask)


def test_lengths_that_are_no_whole_bins_are_refused_with_the_nearest() -> None:
    demand_whole_bins(None, 256, 128)
    demand_whole_bins(torch.tensor([[True] * 4 + [False] * 2, [False, True, True, False, False, False]]), 6, 2)
    with pytest.raises(SequenceError, match=r"130 real bases in row 0.*multiples of 128.*128 or 256"):
        demand_whole_bins(None, 130, 128)
    with pytest.raises(SequenceError, match=r"3 real bases in row 1.*extend it to 4\."):
        demand_whole_bins(torch.tensor([[True] * 4, [False, True, True, True]]), 4, 4)
