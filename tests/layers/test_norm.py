"""RMSNorm against torch's own."""

import pytest
import torch

from genesplice_hf.layers.norm import RMSNorm


def norm_with_weights(size: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(size, eps=1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_values_and_gradients_equal_torch(dtype: torch.dtype, tolerance: float) -> None:
    norm = norm_with_weights(24, dtype)
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 5, 24, dtype=dtype)
    ours = norm(x)
    theirs = torch.nn.functional.rms_norm(x, (24,), norm.weight, eps=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    inputs = (x, norm.weight)
    for mine, reference in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=0, atol=20 * tolerance)


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    norm = norm_with_weights(64, torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    exact = torch.nn.functional.rms_norm(x.float(), (64,), norm.weight.float(), eps=1e-6)
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), exact.bfloat16())


def test_zeros_stay_zeros_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = RMSNorm(8)(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 8))
    assert torch.isfinite(x.grad).all()


def test_the_size_of_a_vector_does_not_matter() -> None:
    x = torch.randn(4, 16, dtype=torch.float64)
    norm = norm_with_weights(16, torch.float64)
    torch.testing.assert_close(norm(1000 * x), norm(x), rtol=0, atol=1e-5)
