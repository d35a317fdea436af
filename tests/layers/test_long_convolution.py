"""Convolution through the Fourier domain against the sum that defines it.

Shapes: B batch, E channels, L tokens, K taps.
"""

import pytest
import torch

from genesplice_hf.layers.long_convolution import (
    causal_convolution,
    filter_spectrum,
    shared_length,
    smooth_length,
    transform_length,
    without_autocast,
    working_dtype,
)


def direct(u_BEL: torch.Tensor, filter_EK: torch.Tensor) -> torch.Tensor:
    """y[t] = sum over s <= t of k[t - s] u[s], term by term."""
    rows = []
    for t in range(u_BEL.shape[-1]):
        terms = [filter_EK[:, t - s] * u_BEL[..., s] for s in range(t + 1)]
        rows.append(torch.stack(terms).sum(0))
    return torch.stack(rows, dim=-1)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 23])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_values_and_gradients_are_those_of_the_sum(length: int, dtype: torch.dtype, tolerance: float) -> None:
    u = torch.randn(2, 3, length, dtype=dtype, requires_grad=True)
    taps = torch.randn(3, length, dtype=dtype, requires_grad=True)
    found, expected = causal_convolution(u, filter_spectrum(taps)), direct(u, taps)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    weight = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, (u, taps), weight), torch.autograd.grad(expected, (u, taps), weight), strict=True
    ):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("length", [1, 5, 13, 20])
def test_further_taps_of_a_shared_transform_change_nothing(length: int) -> None:
    u, taps = torch.randn(2, 3, length).double(), torch.randn(3, shared_length(length)).double()
    expected = direct(u, taps[:, :length])
    for count in range(length, shared_length(length) + 1):
        found = causal_convolution(u, filter_spectrum(taps[:, :count]))
        torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-13)


def test_lengths_are_the_smallest_smooth_ones() -> None:
    def is_smooth(number: int) -> bool:
        for prime in (2, 3, 5):
            while number % prime == 0:
                number //= prime
        return number == 1

    for minimum in range(1, 2000):
        assert smooth_length(minimum) == next(n for n in range(minimum, 2 * minimum + 1) if is_smooth(n))
    assert [smooth_length(n) for n in (65_540, 2_000_004)] == [65_610, 2_000_000 + 25_000]


def test_lengths_that_share_a_transform() -> None:
    for length in range(1, 500):
        longest = shared_length(length)
        assert longest >= length and transform_length(longest) == transform_length(length) >= 2 * longest
        assert transform_length(longest + 1) > transform_length(length)


def test_half_precision_is_computed_in_single() -> None:
    wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float64: torch.float64}
    assert {dtype: working_dtype(torch.zeros(1, dtype=dtype)) for dtype in wide} == wide
    x = torch.randn(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(x):
            assert (x @ x).dtype == torch.float32
