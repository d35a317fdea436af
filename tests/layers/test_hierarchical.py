"""Pooling and its way back against loops over bins and bases."""

import pytest
import torch

from genesplice_hf.layers.hierarchical import (
    left_justify_index,
    masked_mean_pool,
    pool_mask,
    put_back,
    take_tokens,
    unpool,
)

POOL = 4
# Real positions of each row: all, a right end, both ends in padding, one base, none.
SPANS = [(0, 12), (0, 5), (3, 11), (6, 7), (0, 0)]


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.tensor([[start <= i < stop for i in range(12)] for start, stop in SPANS])


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(len(SPANS), 12, 3, dtype=torch.float64, requires_grad=True)


def test_a_bin_is_real_when_a_base_of_it_is(mask: torch.Tensor) -> None:
    expected = [[any(row[b * POOL : (b + 1) * POOL]) for b in range(3)] for row in mask.tolist()]
    assert pool_mask(mask, POOL).tolist() == expected


def test_the_mean_of_each_bin_is_over_its_real_bases(x: torch.Tensor, mask: torch.Tensor) -> None:
    pooled = masked_mean_pool(x, mask, POOL)
    for row in range(len(SPANS)):
        for b in range(3):
            real = [x[row, i] for i in range(b * POOL, (b + 1) * POOL) if mask[row, i]]
            expected = torch.stack(real).mean(0) if real else torch.zeros(3, dtype=torch.float64)
            torch.testing.assert_close(pooled[row, b], expected, rtol=0, atol=1e-15)


def test_padding_gets_no_gradient_from_the_mean(x: torch.Tensor, mask: torch.Tensor) -> None:
    masked_mean_pool(x, mask, POOL).sin().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.equal(x.grad[~mask], torch.zeros_like(x.grad[~mask]))
    assert (x.grad[mask] != 0).all()


def test_what_stands_in_padding_does_not_matter_to_the_mean(x: torch.Tensor, mask: torch.Tensor) -> None:
    other = torch.where(mask[..., None], x, torch.full_like(x, 1e6))
    assert torch.equal(masked_mean_pool(other, mask, POOL), masked_mean_pool(x, mask, POOL))


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_base_gets_the_bin_it_may_see(is_causal: bool) -> None:
    bins = torch.randn(2, 3, 5)
    out = unpool(bins, POOL, is_causal)
    for i in range(12):
        coarse = i // POOL - (1 if is_causal else 0)
        expected = bins[:, coarse] if coarse >= 0 else torch.zeros(2, 5)
        assert torch.equal(out[:, i], expected)


def test_down_and_up_leave_constant_bins_as_they_are() -> None:
    constant = torch.randn(2, 3, 5).repeat_interleave(POOL, dim=1)
    everything = torch.ones(2, 12, dtype=torch.bool)
    torch.testing.assert_close(unpool(masked_mean_pool(constant, everything, POOL), POOL, False), constant)


def test_left_justifying_moves_the_real_bases_first_and_keeps_their_order(mask: torch.Tensor) -> None:
    index = left_justify_index(mask)
    positions = torch.arange(12).expand(len(SPANS), -1)
    moved = take_tokens(positions, index)
    for row, (start, stop) in enumerate(SPANS):
        assert moved[row, : stop - start].tolist() == list(range(start, stop))
        assert take_tokens(mask, index)[row].tolist() == [i < stop - start for i in range(12)]


def test_putting_back_undoes_left_justifying(x: torch.Tensor, mask: torch.Tensor) -> None:
    index = left_justify_index(mask)
    assert torch.equal(put_back(take_tokens(x, index), index), x)
