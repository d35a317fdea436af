"""Maps of pairs: the separated first convolution against the dense one, distances, and the upper triangle."""

import pytest
import torch
from torch.nn.functional import conv2d, relu

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.batch_norm import Affine
from genesplice_hf.layers.pair_maps import (
    PairConv2d,
    convolve_distances,
    convolve_pair_means,
    distances,
    pair_features,
    symmetrised,
    upper_triangle,
)

OPERATIONS = ["mean", "max", "multiply", "multiply1", "concat"]


def by_definition(x: torch.Tensor, operation: str) -> torch.Tensor:
    """Pixel by pixel."""
    rules = {
        "mean": lambda a, b: (a + b) / 2,
        "max": torch.maximum,
        "multiply": lambda a, b: a * b,
        "multiply1": lambda a, b: a * b + a + b,
        "concat": lambda a, b: torch.cat([b, a], dim=1),
    }
    size = range(x.shape[-1])
    rows = [torch.stack([rules[operation](x[..., i], x[..., j]) for j in size], dim=-1) for i in size]
    return torch.stack(rows, dim=-2)


def dense(conv: PairConv2d, x: torch.Tensor, affine: Affine | None = None) -> torch.Tensor:
    """The slow twin: the whole map with its distance channel under one convolution."""
    pairs = by_definition(x, conv.operation)
    if conv.has_distance:
        steps = distances(x.shape[-1], x.device, x.dtype).expand(x.shape[0], -1, -1, -1)
        pairs = torch.cat([pairs, steps], dim=1)
    out = conv2d(relu(pairs), conv.weight, padding=conv.padding)
    return out if affine is None else out * affine.scale[:, None, None] + affine.shift[:, None, None]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_pair_features_by_definition(operation: str) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(pair_features(x, operation), by_definition(x, operation), atol=1e-14, rtol=0)


def test_distances_are_whole_bins() -> None:
    assert distances(4, torch.device("cpu"))[0, 0].tolist() == [[0, 1, 2, 3], [1, 0, 1, 2], [2, 1, 0, 1], [3, 2, 1, 0]]


@pytest.mark.parametrize("num_bins", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_separated_is_dense_with_its_borders(num_bins: int, kernel_size: int) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, num_bins, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(4, 3, kernel_size, kernel_size, dtype=torch.float64, requires_grad=True)
    found = convolve_pair_means(x, kernel)
    expected = conv2d(pair_features(x, "mean"), kernel, padding=kernel_size // 2)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weight = torch.randn_like(expected)
    one, other = (torch.autograd.grad((out * weight).sum(), [x, kernel]) for out in (found, expected))
    for gradient, twin in zip(one, other, strict=True):
        torch.testing.assert_close(gradient, twin, atol=1e-11, rtol=0)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("has_distance", [True, False])
@pytest.mark.parametrize("is_folded", [True, False])
def test_the_convolution_is_dense_in_every_form(operation: str, has_distance: bool, is_folded: bool) -> None:
    torch.manual_seed(0)
    conv = PairConv2d(3, 4, 3, operation, has_distance).double()
    x = torch.rand(2, 3, 8, dtype=torch.float64)
    affine = Affine(torch.tensor([1.0, -2, 0, 0.5]).double(), torch.randn(4).double()) if is_folded else None
    expected = dense(conv, x, affine)
    torch.testing.assert_close(conv(x, relu, affine), expected, atol=1e-12, rtol=0)
    if operation == "mean":
        torch.testing.assert_close(conv(x, None, affine), expected, atol=1e-12, rtol=0)


def test_distances_are_convolved_in_float32_by_a_bfloat16_kernel() -> None:
    """Far distances stay apart: in bfloat16 257 is 256."""
    kernel = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = convolve_distances(kernel, 300)
    assert found.dtype == torch.float32
    assert torch.equal(found, convolve_distances(kernel.float(), 300))
    rounded = conv2d(distances(300, kernel.device).bfloat16().float(), kernel.float(), padding=1)
    assert (found - rounded).abs().max() > 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(convolve_distances(kernel, 300), found)


def test_symmetrised() -> None:
    x = torch.randn(2, 3, 5, 5)
    found = symmetrised(x)
    assert torch.equal(found, found.transpose(-1, -2))
    torch.testing.assert_close(found, (x + x.transpose(-1, -2)) / 2)


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_the_upper_triangle_reads_the_mirrored_element(offset: int) -> None:
    x = torch.arange(2 * 49.0).view(1, 2, 7, 7)
    found = upper_triangle(x, 1, offset)
    pairs = [(i, j) for i in range(5) for j in range(i + offset, 5)]
    assert found.shape == (1, len(pairs), 2)
    for place, (i, j) in enumerate(pairs):
        assert torch.equal(found[0, place], x[0, :, j + 1, i + 1])


def test_a_map_without_pairs_is_refused() -> None:
    with pytest.raises(SequenceError, match="at least 7 bins"):
        upper_triangle(torch.zeros(1, 2, 6, 6), 2, 2)
