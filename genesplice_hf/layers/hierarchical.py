"""Pooling to coarse levels and back for U-shaped encoders, with masks and without leaking the future.

Shapes: B batch, L fine tokens, E hidden size, p pool size, M = L / p coarse tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from genesplice_hf.errors import SequenceError


@dataclass(frozen=True)
class LevelReach:
    """How far one token of a level looks there, in tokens of the level and to each side (causal: to the left).

    Attributes:
        encoder: through all blocks before pooling; of the tower for the coarsest level. None = over everything.
        decoder: through all blocks after unpooling; 0 for the tower.
    """

    encoder: int | None
    decoder: int = 0


class LengthPlan(NamedTuple):
    """What the model makes of a sequence.

    Attributes:
        num_bp: real bases. padded_bp: bases after padding to whole bins, inside the model.
        tokens_per_level: tokens of each level, bases first.
        num_bins: tokens of the coarsest level.
        receptive_field_bp: bases that one output can depend on, itself included.
        estimated_activation_bytes: what a backward pass over one sequence keeps without gradient checkpointing.
    """

    num_bp: int
    padded_bp: int
    tokens_per_level: tuple[int, ...]
    num_bins: int
    receptive_field_bp: int | None = None
    estimated_activation_bytes: int | None = None


def plan_length(num_bp: int, pool_sizes: Sequence[int]) -> LengthPlan:
    """Pads `num_bp` up to whole bins and counts the tokens of every level.

    Raises:
        SequenceError: fewer than one base.
    """
    if num_bp < 1:
        raise SequenceError(
            f"`num_bp` must be at least 1, got {num_bp}; every length from 1 on is legal, none below it."
        )
    bin_size = math.prod(pool_sizes)
    tokens = [-(-num_bp // bin_size) * bin_size]
    for size in pool_sizes:
        tokens.append(tokens[-1] // size)
    return LengthPlan(num_bp, tokens[0], tuple(tokens), tokens[-1])


def receptive_field(
    reaches: Sequence[LevelReach], pool_sizes: Sequence[int], stem: int, is_causal: bool, to_bases: bool
) -> int | None:
    """Bases that one output can depend on at most; None = any number, for a layer sees everything.

    The tokens that an output depends on are followed backwards, as an interval, through the decoder, the tower and
    the encoders; the widest one over all places inside a bin counts.

    Args:
        reaches: one per level, bases first.
        pool_sizes: tokens of level l per token of level l + 1.
        stem: bases that the stem looks to each side (causal: to the left).
        is_causal: nothing to the right is seen, and coarse tokens are seen one bin later.
        to_bases: outputs are bases; False = they are bins (no decoder).
    """
    if any(reach.encoder is None for reach in reaches):
        return None
    places = range(math.prod(pool_sizes)) if to_bases else range(1)
    widths = []
    for place in places:
        level = 0 if to_bases else len(pool_sizes)
        seen = _seen_from((place, place), level, reaches, pool_sizes, is_causal, to_bases)
        left, right = _widened(seen, stem, is_causal)
        widths.append(right - left + 1)
    return max(widths)


def _seen_from(
    seen: tuple[int, int],
    level: int,
    reaches: Sequence[LevelReach],
    pool_sizes: Sequence[int],
    is_causal: bool,
    decodes: bool,
) -> tuple[int, int]:
    """Outputs of the stem that an interval of tokens after the decoder (or the tower) of `level` depends on."""
    if decodes and level < len(pool_sizes):
        seen = _widened(seen, reaches[level].decoder, is_causal)
        pool_size, shift = pool_sizes[level], 1 if is_causal else 0
        coarse = (seen[0] // pool_size - shift, seen[1] // pool_size - shift)
        below = _seen_from(coarse, level + 1, reaches, pool_sizes, is_causal, True)
        skip = _seen_through_encoders(seen, level, reaches, pool_sizes, is_causal)
        return min(below[0], skip[0]), max(below[1], skip[1])
    return _seen_through_encoders(seen, level, reaches, pool_sizes, is_causal)


def _seen_through_encoders(
    seen: tuple[int, int], level: int, reaches: Sequence[LevelReach], pool_sizes: Sequence[int], is_causal: bool
) -> tuple[int, int]:
    for lower in reversed(range(level)):
        left, right = _widened(seen, reaches[lower + 1].encoder or 0, is_causal)
        seen = left * pool_sizes[lower], (right + 1) * pool_sizes[lower] - 1
    return _widened(seen, reaches[0].encoder or 0, is_causal)


def _widened(seen: tuple[int, int], reach: int, is_causal: bool) -> tuple[int, int]:
    return seen[0] - reach, seen[1] + (0 if is_causal else reach)


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


def first_tokens(counts_B: torch.Tensor, length: int) -> torch.Tensor:
    """(B, length) bool mask of rows whose first `counts_B` tokens are real."""
    return torch.arange(length, device=counts_B.device) < counts_B[:, None]


def take_tokens(x: torch.Tensor, index_BL: torch.Tensor) -> torch.Tensor:
    """Gathers tokens: x (B, L, ...) by (B, L) positions."""
    shape = index_BL.shape + (1,) * (x.dim() - 2)
    return x.gather(1, index_BL.view(shape).expand(-1, -1, *x.shape[2:]))


def put_back(x_BLE: torch.Tensor, index_BL: torch.Tensor) -> torch.Tensor:
    """The inverse of `take_tokens` with the same index."""
    return take_tokens(x_BLE, torch.argsort(index_BL, dim=1))


def average_tokens(x_BLE: torch.Tensor, mask_BL: torch.Tensor, pool_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over `pool_size` neighbouring real tokens and their mask; the first bin starts at the first real token.

    Args:
        x_BLE: (B, L, E), any L >= 1. mask_BL: (B, L) bool, contiguous in each row.

    Returns:
        (B, M, E) and (B, M) bool with M = ceil(L / pool_size), left-justified; both as given when `pool_size` is 1.
    """
    if pool_size == 1:
        return x_BLE, mask_BL
    if not bool(mask_BL[:, 0].all()):
        index = left_justify_index(mask_BL)
        x_BLE, mask_BL = take_tokens(x_BLE, index), take_tokens(mask_BL, index)
    missing = -x_BLE.shape[1] % pool_size
    x_BLE, mask_BL = nn.functional.pad(x_BLE, (0, 0, 0, missing)), nn.functional.pad(mask_BL, (0, missing))
    return masked_mean_pool(x_BLE, mask_BL, pool_size), pool_mask(mask_BL, pool_size)
