"""The stem against a loop over bases: what it sees, what it must not see, and in pieces."""

import pytest
import torch

from genesplice_hf.layers.hierarchical_cache import GeneSpliceCache
from genesplice_hf.layers.stem import ConvStem

KERNEL = 5


def by_hand(stem: ConvStem, x_LE: torch.Tensor, first_seen: int) -> torch.Tensor:
    """x_i + gelu(bias + sum over k of W_k x_{i + first_seen + k}), with zeros outside the sequence."""
    out = []
    for i in range(len(x_LE)):
        total = stem.bias.clone()
        for k in range(KERNEL):
            j = i + first_seen + k
            if 0 <= j < len(x_LE):
                total = total + stem.weight[:, :, k] @ x_LE[j]
        out.append(x_LE[i] + torch.nn.functional.gelu(total))
    return torch.stack(out)


@pytest.mark.parametrize(("is_causal", "first_seen"), [(False, -2), (True, -4)])
@pytest.mark.parametrize("length", [1, 3, 12])
def test_it_is_the_sum_over_neighbours(is_causal, first_seen, length) -> None:
    stem = ConvStem(3, KERNEL, is_causal).double()
    x = torch.randn(2, length, 3, dtype=torch.float64)
    expected = torch.stack([by_hand(stem, row, first_seen) for row in x])
    torch.testing.assert_close(stem(x, None), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_is_like_the_end_of_the_sequence(is_causal) -> None:
    stem = ConvStem(3, KERNEL, is_causal)
    x = torch.zeros(1, 12, 3)
    x[:, 4:9] = torch.randn(1, 5, 3)
    mask = torch.tensor([[4 <= i < 9 for i in range(12)]])
    out = stem(x, mask)
    torch.testing.assert_close(out[:, 4:9], stem(x[:, 4:9], None))
    assert torch.equal(out[~mask], torch.zeros(7, 3))


def test_pieces_with_a_cache_equal_one_pass() -> None:
    stem, x, cache = ConvStem(3, KERNEL, True), torch.randn(2, 12, 3), GeneSpliceCache()
    pieces = []
    for piece in x.split([1, 1, 7, 3], dim=1):
        num_new = piece.shape[1]
        (level,) = cache.arrive(torch.full((2,), num_new), num_new, pool_sizes=())
        pieces.append(stem(piece, None, level))
    torch.testing.assert_close(torch.cat(pieces, 1), stem(x, None))
