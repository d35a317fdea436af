"""Pooling of pairs against the softmax that defines it. Shapes: B batch, L positions, C channels."""

import pytest
import torch

from genesplice_hf.layers.attention_pooling import AttentionPool2


def by_softmax(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Logits of every position, softmax over each pair (or a single last position), weighted sum."""
    logits = x @ weight.t()
    pairs = [slice(start, start + 2) for start in range(0, x.shape[1], 2)]
    return torch.stack([(logits[:, pair].softmax(1) * x[:, pair]).sum(1) for pair in pairs], 1)


@pytest.mark.parametrize("length", [1, 2, 7, 12])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients(length: int, dtype: torch.dtype, atol: float, with_bias: bool) -> None:
    torch.manual_seed(0)
    pool = AttentionPool2(5).to(dtype)
    torch.nn.init.normal_(pool.weight)
    x = torch.randn(2, length, 5, dtype=dtype, requires_grad=True)
    bias = torch.randn(5, dtype=dtype, requires_grad=True) if with_bias else None
    inputs = [x, pool.weight, *([bias] if with_bias else [])]
    expected = by_softmax(x if bias is None else x + bias, pool.weight)
    found = pool(x, bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    mix = torch.randn_like(expected)
    # A single position has a weight of 1 whatever the logits are.
    gradients = [torch.autograd.grad((out * mix).sum(), inputs, allow_unused=True) for out in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=0, atol=4 * atol)
    with torch.no_grad():
        kept = x.clone()
        torch.testing.assert_close(pool(x, bias), expected, rtol=0, atol=atol)
        assert torch.equal(x, kept)


def test_it_starts_as_twice_the_identity() -> None:
    assert torch.equal(AttentionPool2(3).weight, 2 * torch.eye(3))
