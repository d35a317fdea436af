"""Batch norm folded into convolutions, tiles of a pooled convolution, and statistics under checkpointing.

The slow twin is the plain chain norm(conv(activation(x))), max pool.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import max_pool1d, relu
from torch.utils.checkpoint import checkpoint

from genesplice_hf.layers.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    affine_of,
    convolve_and_norm,
    convolve_norm_pool,
    foldable,
    max_pool,
)
from genesplice_hf.layers.dilated_convolution import DilatedConv1d, DilatedConv2d


def stage(dimensions: int = 1, kernel_size: int = 5, dilation: int = 1, seed: int = 0) -> tuple[Any, Any]:
    """A convolution 3 -> 4 and a norm with statistics and weights of its own, some of them negative."""
    torch.manual_seed(seed)
    conv_class, norm_class = {1: (DilatedConv1d, BatchNorm1d), 2: (DilatedConv2d, BatchNorm2d)}[dimensions]
    conv, norm = conv_class.same(3, 4, kernel_size, dilation), norm_class(4, 1e-3, 0.1)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.5, -0.5, 0.0, 2.0]))
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return conv.double(), norm.double().eval()


def plain(conv: Any, norm: Any, x: torch.Tensor, pool: int) -> torch.Tensor:
    return max_pool1d(norm(conv(relu(x))), pool, pool, ceil_mode=True)


@pytest.mark.parametrize(("dimensions", "kernel_size", "dilation"), [(1, 5, 1), (1, 3, 4), (1, 1, 1), (2, 3, 2)])
def test_folded_is_plain_in_values_and_gradients(dimensions: int, kernel_size: int, dilation: int) -> None:
    conv, norm = stage(dimensions, kernel_size, dilation)
    x = torch.randn(2, 3, *[17] * dimensions, dtype=torch.float64, requires_grad=True)
    assert foldable(conv, norm) is not None
    inputs = [x, conv.weight, norm.weight, norm.bias]
    found = convolve_and_norm(conv, norm, x)
    expected = norm(conv(x))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weight = torch.randn_like(expected)
    one, other = (torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected))
    for gradient, twin in zip(one, other, strict=True):
        torch.testing.assert_close(gradient, twin, atol=1e-11, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 31, 40])
@pytest.mark.parametrize(("pool", "tile"), [(1, 8), (2, 8), (2, 3), (3, 7), (4, 1)])
def test_tiles_are_the_whole(length: int, pool: int, tile: int) -> None:
    conv, norm = stage(kernel_size=5)
    x = torch.randn(2, 3, length, dtype=torch.float64)
    kept = x.clone()
    with torch.no_grad():
        found = convolve_norm_pool(conv, norm, relu, x, pool, tile)
        torch.testing.assert_close(found, plain(conv, norm, x, pool), atol=1e-12, rtol=0)
    assert torch.equal(x, kept)


def test_tiles_of_a_dilated_convolution() -> None:
    conv, norm = stage(kernel_size=3, dilation=4)
    x = torch.randn(1, 3, 29, dtype=torch.float64)
    with torch.no_grad():
        found = convolve_norm_pool(conv, norm, relu, x, 2, 6)
        torch.testing.assert_close(found, plain(conv, norm, x, 2), atol=1e-12, rtol=0)


def test_pooling_and_relu_commute() -> None:
    x = torch.randn(2, 3, 11)
    assert torch.equal(relu(max_pool(x, 2)), max_pool(relu(x), 2))
    assert max_pool(x, 2).shape[-1] == 6
    assert torch.equal(max_pool(x, 2)[..., -1], x[..., -1])


def test_what_stands_between_is_not_bypassed() -> None:
    """Batch statistics, hooks, replaced forwards and foreign modules go the plain way."""
    conv, norm = stage()
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    assert affine_of(norm.train()) is None
    assert affine_of(nn.Identity()) is None
    norm.eval()
    assert foldable(nn.Conv1d(3, 4, 5, padding=2), norm) is None
    handle = conv.register_forward_hook(lambda module, args, out: out + 1)
    assert foldable(conv, norm) is None
    torch.testing.assert_close(convolve_and_norm(conv, norm, x), norm(conv(x)))
    handle.remove()
    conv.forward = lambda value: torch.zeros(2, 4, 9, dtype=torch.float64)
    assert foldable(conv, norm) is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_a_batch_once(use_reentrant: bool) -> None:
    conv, norm = stage()
    found = []
    for checkpointed in (False, True):
        fresh = BatchNorm1d(4, 1e-3, 0.1).double().train()
        fresh.load_state_dict(norm.state_dict())
        torch.manual_seed(1)
        x = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)

        def run(value: torch.Tensor, layer: nn.Module = fresh) -> torch.Tensor:
            return layer(conv(value)).tanh()

        out = checkpoint(run, x, use_reentrant=use_reentrant) if checkpointed else run(x)
        gradient = torch.autograd.grad(out.sum(), x)[0] if not use_reentrant else None
        if use_reentrant:
            out.sum().backward()
            gradient = x.grad
        found.append((out.detach(), gradient, fresh.running_mean, fresh.running_var, fresh.num_batches_tracked))
    assert int(found[0][-1]) == 1
    for plain_value, value in zip(*found, strict=True):
        assert torch.equal(plain_value, value)
