"""Causal convolution with filters as long as the sequence, through the Fourier domain in O(L log L).

    y[t] = sum over s <= t of k[t - s] u[s]

(Poli et al., Hyena Hierarchy, arXiv 2302.10866, section 3.)

Shapes: B batch, E channels, L tokens, N length of the transform (at least 2 L, so that nothing wraps around).
"""

from contextlib import AbstractContextManager, nullcontext

import torch


def smooth_length(minimum: int) -> int:
    """The smallest 2^a 3^b 5^c >= `minimum`; transforms of such lengths are the fast ones."""
    best = 1 << max(minimum - 1, 0).bit_length()
    five = 1
    while five < best:
        odd = five
        while odd < best:
            quotient = -(-minimum // odd)
            best = min(best, odd << (quotient - 1).bit_length())
            odd *= 3
        five *= 5
    return best


def transform_length(length: int) -> int:
    """N for sequences of `length` tokens."""
    return smooth_length(2 * length)


def shared_length(length: int) -> int:
    """The longest sequence whose transform is as long as that of `length` tokens.

    Filters of so many taps serve `length` tokens as well: what the further taps add lies behind the last token.
    """
    return transform_length(length) // 2


def filter_spectrum(filter_EL: torch.Tensor) -> torch.Tensor:
    """The transform (..., E, N / 2 + 1) of filters (..., E, L) that `causal_convolution` multiplies with."""
    return torch.fft.rfft(filter_EL, n=transform_length(filter_EL.shape[-1]))


def causal_convolution(u_BEL: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
    """Every channel of `u_BEL` with its filter.

    Args:
        u_BEL: (B, E, L), float32 or float64.
        spectrum: `filter_spectrum` of filters (E, K) with L <= K <= `shared_length(L)`.
    """
    length = u_BEL.shape[-1]
    size = transform_length(length)
    return torch.fft.irfft(torch.fft.rfft(u_BEL, n=size) * spectrum, n=size)[..., :length]


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 stays; everything else is computed in float32, for no transform exists in half precision."""
    return x.dtype if x.dtype == torch.float64 else torch.float32


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """Filters and transforms keep their precision inside autocast."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
