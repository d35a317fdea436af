"""The selective scan against its recurrence written out step by step: values, gradients, extremes, memory.

Shapes: B batch, L tokens, D channels, N states per channel.
"""

import pytest
import torch
from tensor_sizes import LargestTensor

from genesplice_hf.layers.selective_scan import call_kernel, scan_in_chunks, selective_scan

CHUNK = 8
LENGTHS = pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK + 3])
BOTH_WAYS = pytest.mark.parametrize("parallel", [False, True], ids=["steps", "parallel"])


def twin(x, delta, A, B, C) -> torch.Tensor:
    """The recurrence itself."""
    state = x.new_zeros(x.shape[0], *A.shape)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        state = decay * state + (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1)


def inputs(length: int, batch: int = 2, channels: int = 5, states: int = 3, dtype=torch.float64, step: float = 1.0):
    """x, delta, A, B, C; decays between almost 1 and almost 0."""
    x, delta = torch.randn(2, batch, length, channels, dtype=dtype)
    B, C = torch.randn(2, batch, length, states, dtype=dtype)
    A = -16 * torch.rand(channels, states, dtype=dtype)
    return x, step * torch.nn.functional.softplus(2 * delta), A, B, C


@LENGTHS
@BOTH_WAYS
@pytest.mark.parametrize("step", [1e-3, 1.0, 100.0])
def test_values_and_gradients(length: int, parallel: bool, step: float) -> None:
    given = [tensor.requires_grad_() for tensor in inputs(length, step=step)]
    found, expected = scan_in_chunks(*given, CHUNK, parallel), twin(*given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    slopes = torch.autograd.grad((found * weight).sum(), given)
    for slope, other in zip(slopes, torch.autograd.grad((expected * weight).sum(), given), strict=True):
        torch.testing.assert_close(slope, other, rtol=1e-12, atol=1e-12 * other.abs().max().item())


@BOTH_WAYS
@pytest.mark.parametrize("chunk", [1, 2, 3, 64])
def test_the_chunk_changes_nothing(parallel: bool, chunk: int) -> None:
    given = inputs(37)
    torch.testing.assert_close(scan_in_chunks(*given, chunk, parallel), twin(*given), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(selective_scan(*given, chunk_size=chunk), twin(*given), rtol=1e-12, atol=1e-12)


@BOTH_WAYS
def test_float32_is_near_float64(parallel: bool) -> None:
    given = inputs(600, step=0.05)
    expected = twin(*given)
    found = scan_in_chunks(*(tensor.float() for tensor in given), 256, parallel)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@BOTH_WAYS
def test_half_precision_keeps_its_states_in_float32(parallel: bool) -> None:
    """The rounded inputs' own answer, rounded once: 600 steps in bfloat16 would be off by far more."""
    given = [tensor.bfloat16() for tensor in inputs(600, step=0.01)]
    expected = twin(*(tensor.double() for tensor in given))
    found = scan_in_chunks(*given, CHUNK, parallel)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)


@BOTH_WAYS
@pytest.mark.parametrize("step", [0.0, 1e4, 1e30])
def test_extreme_steps_stay_finite(parallel: bool, step: float) -> None:
    """No decay at all, and decays that are 0 in float32: a sum of logarithms would overflow here."""
    x, delta, A, B, C = inputs(40, dtype=torch.float32)
    delta = torch.full_like(delta, step)
    given = [tensor.requires_grad_() for tensor in (x / max(step, 1.0), delta, A, B, C)]
    found = scan_in_chunks(*given, 32, parallel)
    torch.testing.assert_close(found, twin(*given))
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(found.sum(), given))


@BOTH_WAYS
def test_a_reset_forgets_exactly(parallel: bool) -> None:
    """One huge step between small ones: what came before it leaves no trace."""
    x, delta, A, B, C = inputs(40, dtype=torch.float32, step=1e-3)
    delta[:, 20], A = 1e6, A - 1.0
    other = x.clone()
    other[:, :20] += 100.0
    found, changed = (scan_in_chunks(one, delta, A, B, C, 32, parallel) for one in (x, other))
    assert torch.equal(found[:, 20:], changed[:, 20:])
    assert not torch.equal(found[:, 19], changed[:, 19])


def test_zeros_before_and_after_change_nothing() -> None:
    """Padding whose x is 0 writes nothing, on either side."""
    x, delta, A, B, C = inputs(30)
    x[:, :7], x[:, 25:] = 0.0, 0.0
    inner = selective_scan(x[:, 7:25], delta[:, 7:25], A, B[:, 7:25], C[:, 7:25], CHUNK)
    torch.testing.assert_close(selective_scan(x, delta, A, B, C, CHUNK)[:, 7:25], inner, rtol=1e-12, atol=1e-12)


def test_it_is_causal_and_rows_are_apart() -> None:
    x, *others = inputs(30)
    expected = selective_scan(x, *others, CHUNK)
    x[0, 11] += 1.0
    found = selective_scan(x, *others, CHUNK)
    assert torch.equal(found[1], expected[1]) and torch.equal(found[0, :11], expected[0, :11])
    assert not torch.equal(found[0, 11], expected[0, 11])


def test_any_layout_of_the_inputs() -> None:
    given = inputs(21)
    strided = [tensor.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for tensor in given]
    assert not any(tensor.is_contiguous() for tensor in strided)
    found = selective_scan(*strided, CHUNK)
    torch.testing.assert_close(found, twin(*given), rtol=1e-12, atol=1e-12)
    # The gradient of a sum is an expanded scalar.
    for slope, tensor in zip(torch.autograd.grad(found.sum(), strided), given, strict=True):
        assert slope.shape == tensor.shape


@pytest.mark.parametrize("is_training", [False, True])
def test_no_tensor_holds_all_states(is_training: bool) -> None:
    """L D N numbers never exist at once, in either direction."""
    length, channels, states, chunk = 512, 8, 16, 16
    given = [tensor.requires_grad_(is_training) for tensor in inputs(length, 1, channels, states)]
    with LargestTensor() as largest:
        found = scan_in_chunks(*given, chunk, parallel=False)
        if is_training:
            found.sum().backward()
    assert largest.elements <= length * max(channels, states)


def test_a_kernel_gets_what_it_asks_for() -> None:
    """Time last, one dtype for all but A; here the kernel is the twin."""
    given = [tensor.bfloat16() for tensor in inputs(12, batch=2, channels=4)]
    given[1] = given[1].float()

    def kernel(x, delta, A, B, C):
        assert {tensor.dtype for tensor in (x, delta, B, C)} == {torch.bfloat16} and A.dtype == torch.float32
        assert x.shape == delta.shape == (2, 4, 12) and B.shape == C.shape == (2, 3, 12) and x.is_contiguous()
        wide = [tensor.float().transpose(1, 2) for tensor in (x, delta, B, C)]
        return twin(wide[0], wide[1], A, wide[2], wide[3]).transpose(1, 2).to(x.dtype)

    found = call_kernel(kernel, *given)
    torch.testing.assert_close(found, selective_scan(*given), rtol=2**-7, atol=1e-2)


def test_bad_options_are_advice() -> None:
    given = inputs(4)
    with pytest.raises(ValueError, match=r"`chunk_size` must be at least 1, got 0"):
        selective_scan(*given, chunk_size=0)
    with pytest.raises(ValueError, match=r"`backend` must be auto, torch or mamba_ssm, got 'triton'"):
        selective_scan(*given, backend="triton")
    with pytest.raises(ValueError, match=r"needs that package and CUDA tensors.*use 'auto'"):
        selective_scan(*given, backend="mamba_ssm")
