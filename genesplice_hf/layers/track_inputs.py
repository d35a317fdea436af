"""Real values per base beside the sequence (conservation, methylation, ...), projected and added to the embedding.

Shapes: B batch, L bases, C channels, E hidden size.
"""

import torch
from torch import nn

from genesplice_hf.errors import SequenceError


def check_track_values(
    values_BLC: torch.Tensor | None, num_channels: int, given: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """The values with zeros at padding; None where the model takes none.

    Args:
        num_channels: what the model takes; 0 = none.
        given: (B, L, ...) ids or embeddings that the values belong to.
        mask: bool (B, L) or, with a cache, (B, past + L); None = all real.

    Raises:
        SequenceError: values are missing, not wanted, of another shape, or not finite at real positions.
    """
    if values_BLC is None and num_channels:
        raise SequenceError(
            f"`track_values` are missing: the config says `track_inputs={num_channels}`; pass as many values per base."
        )
    if values_BLC is not None and not num_channels:
        raise SequenceError("`track_values` have no effect with `track_inputs=0`; leave them out, or set it.")
    if values_BLC is None:
        return None
    wanted = (*given.shape[:2], num_channels)
    if tuple(values_BLC.shape) != wanted:
        raise SequenceError(
            f"`track_values` must be (batch, length, `track_inputs`) = {wanted}, got {tuple(values_BLC.shape)}."
        )
    if mask is not None:
        values_BLC = values_BLC.masked_fill(~mask[:, -given.shape[1] :, None], 0.0)
    if not bool(values_BLC.isfinite().all()):
        raise SequenceError("`track_values` must be finite; fill missing ones with 0 or the mean of their channel.")
    return values_BLC


def add_track_values(
    x_BLE: torch.Tensor, projection: nn.Linear | None, values_BLC: torch.Tensor | None
) -> torch.Tensor:
    """x + projection(values), or x where there are none."""
    if projection is None or values_BLC is None:
        return x_BLE
    return x_BLE + projection(values_BLC.to(x_BLE.dtype))
