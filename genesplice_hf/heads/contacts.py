"""Contact maps: one value per pair of bins, as a vector of the upper triangle or as a symmetric map.

Fudenberg, Kelley and Pollard 2020 (Akita): log(observed / expected) contacts, mean squared error.

Shapes: B batch, N bins, P = (N - k)(N - k + 1) / 2 pairs i + k <= j with the diagonal offset k, T targets.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import ModelOutput

from genesplice_hf.errors import SequenceError


@dataclass
class ContactPredictionOutput(ModelOutput):
    """Predicted contacts.

    Attributes:
        loss: scalar, with labels.
        logits: (B, P, T) predictions, pairs in the order of `torch.triu_indices(N, N, k)`.
        contact_maps: (B, N, N, T), symmetric, 0 on the diagonals nearer than k; with `return_maps=True`.
        last_hidden_state: (B, bins, width) of the trunk; with `return_maps=True`.
        hidden_states: of the trunk.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    contact_maps: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


def num_pairs(num_bins: int, diagonal_offset: int) -> int:
    """P of N bins."""
    rows = max(num_bins - diagonal_offset, 0)
    return rows * (rows + 1) // 2


def vector_to_map(vector_BPT: torch.Tensor, num_bins: int, diagonal_offset: int, fill: float = 0.0) -> torch.Tensor:
    """(..., P, T) -> (..., N, N, T): the symmetric map, `fill` on the diagonals nearer than the offset.

    Raises:
        SequenceError: the vector has another number of pairs.
    """
    if vector_BPT.dim() < 2 or vector_BPT.shape[-2] != num_pairs(num_bins, diagonal_offset):
        raise SequenceError(
            f"`vector` must be (..., {num_pairs(num_bins, diagonal_offset)} pairs, targets) for {num_bins} bins and "
            f"`diagonal_offset` {diagonal_offset}, got shape {tuple(vector_BPT.shape)}."
        )
    rows, columns = torch.triu_indices(num_bins, num_bins, diagonal_offset, device=vector_BPT.device)
    shape = (*vector_BPT.shape[:-2], num_bins, num_bins, vector_BPT.shape[-1])
    contact_map = vector_BPT.new_full(shape, fill)
    contact_map[..., rows, columns, :] = vector_BPT
    contact_map[..., columns, rows, :] = vector_BPT
    return contact_map


def contact_loss(predictions_BPT: torch.Tensor, targets_BPT: torch.Tensor) -> torch.Tensor:
    """Mean squared error in at least float32 over targets that are not NaN; 0 (with a gradient of 0) without any.

    Raises:
        SequenceError: targets of another shape.
    """
    if targets_BPT.shape != predictions_BPT.shape:
        raise SequenceError(
            f"`labels` must be (batch, pairs, targets) = {tuple(predictions_BPT.shape)}, were "
            f"{tuple(targets_BPT.shape)}; bin, crop and cut them as `target_crop` and `diagonal_offset` say."
        )
    working = torch.promote_types(predictions_BPT.dtype, torch.float32)
    targets = targets_BPT.to(predictions_BPT.device, working)
    valid = ~targets.isnan()
    errors = (predictions_BPT.to(working) - targets.nan_to_num()).square()
    return torch.where(valid, errors, 0.0).sum() / valid.sum().clamp(min=1)
