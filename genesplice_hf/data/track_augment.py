"""Shift and reverse complement of sequence *and* targets, and how to undo them on predictions.

Shapes: ... any batch axes, L bases, M bins, T tracks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from genesplice_hf.data.target_table import check_strand_pair
from genesplice_hf.data.track_windows import UNKNOWN_ID
from genesplice_hf.errors import DataError


class Augmented(NamedTuple):
    """What `augment` returns: the pair, and what was done to it.

    Attributes:
        input_ids: (..., L).
        labels: (..., M, T), or None where none were given.
        rc: whether both were reverse-complemented; pass it to `undo_augment`.
        shift: bases by which the window was moved. Targets do not move, so there is nothing to undo.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor | None
    rc: bool
    shift: int


def reverse_complement_ids(input_ids: torch.Tensor) -> torch.Tensor:
    """The opposite strand of ids (..., L): 0 <-> 3, 1 <-> 2; all others (N = 4, padding = 5 or -1) stay."""
    is_base = (input_ids >= 0) & (input_ids < 4)
    return torch.where(is_base, 3 - input_ids, input_ids).flip(-1)


def shift_ids(input_ids: torch.Tensor, shift: int) -> torch.Tensor:
    """Ids (..., L) of a window that lies `shift` bases further right; what is not known there becomes N.

    Raises:
        DataError: the shift leaves nothing of the window.
    """
    if abs(shift) >= max(1, input_ids.shape[-1]):
        raise DataError(f"`shift` ({shift}) must be smaller than the {input_ids.shape[-1]} bases of the window.")
    if not shift:
        return input_ids
    unknown = torch.full_like(input_ids[..., : abs(shift)], UNKNOWN_ID)
    parts = [input_ids[..., shift:], unknown] if shift > 0 else [unknown, input_ids[..., :shift]]
    return torch.cat(parts, dim=-1)


def augment(
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    rc: bool = False,
    shift: int = 0,
    strand_pair: Sequence[int] | None = None,
) -> Augmented:
    """Moves the window by `shift` bases, then takes the opposite strand of it and of its targets.

    Args:
        input_ids: (..., L), ids of the Enformer vocabulary of any integer type.
        labels: (..., M, T); the reverse complement flips the bins and swaps paired tracks, the shift changes nothing.
        rc: take the reverse complement.
        shift: bases to the right, negative = left.
        strand_pair: the partner of each track on the other strand, its own inverse; None = all unstranded.

    Raises:
        DataError: a shift as long as the window, or pairs that do not fit the tracks.
    """
    ids = shift_ids(input_ids, shift)
    if rc:
        ids = reverse_complement_ids(ids)
        labels = None if labels is None else undo_augment(labels, True, strand_pair)
    return Augmented(ids, labels, rc, shift)


def undo_augment(predictions: torch.Tensor, rc: bool, strand_pair: Sequence[int] | None = None) -> torch.Tensor:
    """Predictions (..., M, T) of an augmented window as those of the window itself; twice is the identity.

    Raises:
        DataError: pairs that do not fit the tracks.
    """
    if not rc:
        return predictions
    flipped = predictions.flip(-2)
    if strand_pair is None:
        return flipped
    pairs = check_strand_pair(strand_pair, predictions.shape[-1])
    return flipped[..., torch.from_numpy(pairs).to(predictions.device)]
