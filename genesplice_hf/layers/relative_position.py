"""Relative positions of Enformer: the basis functions of the distance, and the shift from distances to pairs.

The basis is that of the original TensorFlow code (Avsec et al. 2021, "relative positional basis functions") at every
number of bins: exponential, central mask and gamma functions of |distance|, and the same times its sign.

Shapes: B batch, H heads, n bins, R = 2n - 1 distances from -(n - 1) to n - 1, F functions of one family.
"""

import math
from collections import OrderedDict
from typing import Literal

import torch

GammaNormalization = Literal["position", "feature"]

# Recent tables, for a table is the same for every layer and every call of one length.
_MAX_CACHED = 8
_cache: OrderedDict[tuple, torch.Tensor] = OrderedDict()


def relative_basis(
    num_bins: int,
    feature_size: int,
    gamma_normalization: GammaNormalization = "position",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """(R, feature_size) table; row r belongs to the distance r - (n - 1) in bins. Do not change it in place.

    Computed in float32 (float64 for float64) and cast last: in half precision distances above 256 are no integers.

    Args:
        num_bins: n >= 1.
        feature_size: 6 F.
        gamma_normalization: "position" divides each gamma function by its maximum over all distances, as TensorFlow's
            Enformer was trained; "feature" divides by the maximum over the functions, as enformer-pytorch does.

    Raises:
        ValueError: `feature_size` is no multiple of 6.
    """
    if feature_size < 6 or feature_size % 6:
        raise ValueError(f"`feature_size` must be a positive multiple of 6, got {feature_size}.")
    build = (num_bins, feature_size // 6, gamma_normalization, dtype, torch.device(device))
    if torch.compiler.is_compiling() or torch.device(device).type == "meta":
        return _table(*build)
    if build not in _cache:
        # A table made under inference mode could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            _cache[build] = _table(*build)
        while len(_cache) > _MAX_CACHED:
            _cache.popitem(last=False)
    _cache.move_to_end(build)
    return _cache[build]


def relative_shift(by_distance: torch.Tensor) -> torch.Tensor:
    """(..., n, 2n - 1) values per bin and distance -> (..., n, n) per pair: out[i, j] = in[i, n - 1 - i + j].

    A view without a copy where the input is contiguous: going down one row and back one column is a stride of
    2n - 2, so that row i of the result starts where row i of the input meets its distance -i.
    """
    num_bins, num_distances = by_distance.shape[-2:]
    if num_distances != 2 * num_bins - 1:
        raise ValueError(f"the last two sizes must be n and 2n - 1, got {num_bins} and {num_distances}.")
    if num_bins == 1:
        return by_distance
    flat = by_distance.flatten(-2)[..., num_bins - 1 : num_bins - 1 + num_bins * (num_distances - 1)]
    return flat.unflatten(-1, (num_bins, num_distances - 1))[..., :num_bins]


def _table(
    num_bins: int, num_functions: int, normalization: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    working = torch.float64 if dtype == torch.float64 else torch.float32
    distance = torch.arange(-(num_bins - 1), num_bins, device=device, dtype=working)
    size = distance.abs()[:, None]
    families = [
        _exponential(size, num_bins, num_functions),
        _central_mask(size, num_functions),
        _gamma(size, num_bins, num_functions, normalization),
    ]
    even = torch.cat(families, dim=1)
    return torch.cat([even, distance.sign()[:, None] * even], dim=1).to(dtype)


def _exponential(size: torch.Tensor, num_bins: int, num_functions: int) -> torch.Tensor:
    """2^(-|d| / h), half lives h from 8 bins to n."""
    half_life = 2.0 ** torch.linspace(3.0, math.log2(num_bins), num_functions, device=size.device, dtype=size.dtype)
    return torch.exp(-math.log(2.0) / half_life * size)


def _central_mask(size: torch.Tensor, num_functions: int) -> torch.Tensor:
    """1 where |d| < 2^k - 1, k = 1 .. F."""
    width = 2.0 ** torch.arange(1, num_functions + 1, device=size.device, dtype=size.dtype)
    return (width - 1 > size).to(size.dtype)


def _gamma(size: torch.Tensor, num_bins: int, num_functions: int, normalization: str) -> torch.Tensor:
    """Densities of gamma distributions with means n/F .. n and standard deviation n/(2F), scaled to a maximum of 1."""
    deviation = num_bins / (2 * num_functions)
    start = num_bins / num_functions
    mean = torch.linspace(start, num_bins, num_functions, device=size.device, dtype=size.dtype)
    concentration, rate = (mean / deviation) ** 2, mean / deviation**2
    log_density = torch.xlogy(concentration - 1, size) - rate * size
    log_normalizer = torch.lgamma(concentration) - concentration * rate.log()
    density = (log_density - log_normalizer).exp() + 1e-8
    return density / density.amax(dim=0 if normalization == "position" else 1, keepdim=True)
