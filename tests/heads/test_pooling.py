"""Pooling against loops over the real tokens of each row."""

import pytest
import torch

from genesplice_hf.heads.pooling import AttentionPooling, masked_max, masked_mean

SPANS = [(0, 6), (0, 2), (3, 5), (5, 6)]
MASK = torch.tensor([[start <= i < stop for i in range(6)] for start, stop in SPANS])
EMPTY = torch.zeros(4, 6, dtype=torch.bool)


@pytest.fixture
def x() -> torch.Tensor:
    # Below zero throughout, so that a zero of the padding would win a maximum and pull a mean.
    return (-torch.rand(4, 6, 3, dtype=torch.float64) - 1).requires_grad_()


@pytest.fixture
def attention() -> AttentionPooling:
    return AttentionPooling(3).double()


def rows_of(x: torch.Tensor) -> list[torch.Tensor]:
    return [row[start:stop] for row, (start, stop) in zip(x, SPANS, strict=True)]


def test_mean(x) -> None:
    expected = torch.stack([sum(tokens) / len(tokens) for tokens in rows_of(x)])
    torch.testing.assert_close(masked_mean(x, MASK), expected, rtol=0, atol=1e-15)


def test_max(x) -> None:
    peaks = [[max(t[e].item() for t in tokens) for e in range(3)] for tokens in rows_of(x)]
    assert masked_max(x, MASK).tolist() == peaks


def test_attention(x, attention) -> None:
    expected = []
    for tokens in rows_of(x):
        scores = [(token * attention.query.weight[0]).sum().exp() for token in tokens]
        expected.append(sum(score * token for score, token in zip(scores, tokens, strict=True)) / sum(scores))
    torch.testing.assert_close(attention(x, MASK), torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["mean", "max", "attention"])
def test_padding_neither_matters_nor_learns(kind, x, attention) -> None:
    pool = {"mean": masked_mean, "max": masked_max, "attention": attention}[kind]
    other = torch.where(MASK[..., None], x, torch.full_like(x, 99.0))
    assert torch.equal(pool(other, MASK), pool(x, MASK))
    pool(x, MASK).square().sum().backward()
    assert torch.equal(x.grad[~MASK], torch.zeros_like(x.grad[~MASK]))
    assert torch.isfinite(x.grad).all() and (x.grad[MASK] != 0).any(-1).any()


@pytest.mark.parametrize("kind", ["mean", "max", "attention"])
def test_a_row_without_a_real_token_gives_zeros(kind, x, attention) -> None:
    pool = {"mean": masked_mean, "max": masked_max, "attention": attention}[kind]
    out = pool(x, EMPTY)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(4, 3, dtype=torch.float64))
    assert torch.isfinite(x.grad).all()


def test_the_learned_query_chooses(attention) -> None:
    """A query far along one direction pools the token that points there."""
    attention.query.weight.data = torch.tensor([[100.0, 0.0, 0.0]], dtype=torch.float64)
    x = torch.eye(3, dtype=torch.float64)[None]
    torch.testing.assert_close(attention(x, torch.ones(1, 3, dtype=torch.bool)), x[:, 0])
