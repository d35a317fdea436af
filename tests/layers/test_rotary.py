"""Rotary positions against complex numbers: a pair (x_i, x_{i + D/2}) turns by position * theta^(-2i/D)."""

import numpy as np
import pytest
import torch

from genesplice_hf.layers.rotary import rotary_table, rotate

CPU = torch.device("cpu")


def turned_by_complex_numbers(x_BHLD: np.ndarray, theta: float, start: int) -> np.ndarray:
    half = x_BHLD.shape[-1] // 2
    frequencies = theta ** (-2 * np.arange(half) / x_BHLD.shape[-1])
    angles = (start + np.arange(x_BHLD.shape[2]))[:, None] * frequencies
    numbers = (x_BHLD[..., :half] + 1j * x_BHLD[..., half:]) * np.exp(1j * angles)
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("start", [0, 7, 2**20])
@pytest.mark.parametrize("head_dim", [2, 8, 32])
def test_rotation_equals_complex_multiplication(theta: float, start: int, head_dim: int) -> None:
    x = torch.randn(2, 3, 9, head_dim, dtype=torch.float64)
    table = rotary_table(9, head_dim, theta, start, CPU, torch.float64)
    expected = turned_by_complex_numbers(x.numpy(), theta, start)
    np.testing.assert_allclose(rotate(x, table).numpy(), expected, atol=1e-9 if start else 1e-12)


def test_rotation_keeps_lengths() -> None:
    x = torch.randn(1, 2, 50, 16, dtype=torch.float64)
    turned = rotate(x, rotary_table(50, 16, 1e4, 0, CPU, torch.float64))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=0, atol=1e-12)


def test_scores_depend_on_distance_alone() -> None:
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        turned = [
            rotate(x, rotary_table(1, 16, 1e4, at, CPU, torch.float64)) for x, at in ((query, query_at), (key, key_at))
        ]
        return (turned[0] * turned[1]).sum()

    for shift in (1, 1000, 2**20):
        torch.testing.assert_close(score(12 + shift, 5 + shift), score(12, 5), rtol=0, atol=1e-9)


def test_angles_stay_exact_a_million_tokens_away() -> None:
    """float32 angles would be off by 0.06 rad there; the table in float32 is off by rounding alone."""
    start = 1_000_000
    cos, sin = rotary_table(64, 32, 1e4, start, CPU, torch.float32)
    frequencies = np.longdouble(1e4) ** (-np.arange(0, 32, 2, dtype=np.longdouble) / 32)
    angles = (start + np.arange(64, dtype=np.longdouble))[:, None] * frequencies
    angles = np.concatenate([angles, angles], axis=1)
    assert np.abs(cos.numpy() - np.cos(angles)).max() < 6.1e-8
    assert np.abs(sin.numpy() - np.sin(angles)).max() < 6.1e-8


def test_a_table_that_starts_later_is_the_end_of_a_longer_one() -> None:
    whole = rotary_table(20, 8, 1e4, 0, CPU, torch.float32)
    later = rotary_table(5, 8, 1e4, 15, CPU, torch.float32)
    for all_positions, last_positions in zip(whole, later, strict=True):
        assert torch.equal(all_positions[15:], last_positions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x = torch.randn(1, 1, 3, 4, dtype=dtype)
    assert rotate(x, rotary_table(3, 4, 1e4, 0, CPU, torch.float32)).dtype == dtype
