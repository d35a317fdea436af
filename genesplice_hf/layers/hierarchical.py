"""Pooling to coarse levels and back for U-shaped encoders, with masks and without leaking the future.

Shapes: B batch, L fine tokens, E hidden size, p pool size, M = L / p coarse tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from genesplice_hf.errors import SequenceError


class LengthPlan(NamedTuple):
    """What a sequence of `num_bp` bases becomes: bases after padding, tokens of each level, and bins."""

    num_bp: int
    padded_bp: int
    tokens_per_level: tuple[int, ...]
    num_bins: int


def plan_length(num_bp: int, pool_sizes: Sequence[int]) -> LengthPlan:
    """Pads `num_bp` up to whole bins and counts the tokens of every level.

    Raises:
        SequenceError: fewer than one base.
    """
    if num_bp < 1:
        raise SequenceError(f"`num_bp` must be at least 1, got {num_bp}.")
    bin_size = 1
    for size in pool_sizes:
        bin_size *= size
    tokens = [-(-num_bp // bin_size) * bin_size]
    for size in pool_sizes:
        tokens.append(tokens[-1] // size)
    return LengthPlan(num_bp, tokens[0], tuple(tokens), tokens[-1])


def pool_mask(mask_BL: torch.Tensor, pool_size: int) -> torch.Tensor:
    """(B, M) bool: a bin is real when any of its p tokens is."""
    return mask_BL.unflatten(1, (-1, pool_size)).any(-1)


def masked_mean_pool(x_BLE: torch.Tensor, mask_BL: torch.Tensor, pool_size: int) -> torch.Tensor:
    """Mean of the real tokens of each bin, (B, M, E); a bin without one gives zeros."""
    weight = mask_BL.to(x_BLE.dtype).unflatten(1, (-1, pool_size))
    total = (x_BLE.unflatten(1, (-1, pool_size)) * weight[..., None]).sum(2)
    return total / weight.sum(-1).clamp(min=1)[..., None]


def unpool(y_BME: torch.Tensor, pool_size: int, is_causal: bool) -> torch.Tensor:
    """Repeats each bin p times, (B, M p, E).

    Causal: bins are first shifted right by one, so that coarse token j is seen from fine token (j + 1) p on
    and no fine token sees a bin that holds a later one.
    """
    if is_causal:
        y_BME = nn.functional.pad(y_BME, (0, 0, 1, 0))[:, :-1]
    return y_BME.repeat_interleave(pool_size, dim=1)


def left_justify_index(mask_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) index that moves the real tokens of each row to its start, keeping their order."""
    return torch.argsort(~mask_BL, dim=1, stable=True)


def take_tokens(x: torch.Tensor, index_BL: torch.Tensor) -> torch.Tensor:
    """Gathers tokens: x (B, L, ...) by (B, L) positions."""
    shape = index_BL.shape + (1,) * (x.dim() - 2)
    return x.gather(1, index_BL.view(shape).expand(-1, -1, *x.shape[2:]))


def put_back(x_BLE: torch.Tensor, index_BL: torch.Tensor) -> torch.Tensor:
    """The inverse of `take_tokens` with the same index."""
    return take_tokens(x_BLE, torch.argsort(index_BL, dim=1))
