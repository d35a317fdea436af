"""Input checks and padding, the same for every model that reads token ids.

Shapes: B batch, L tokens, E hidden size.
"""

import torch
from torch import nn

from genesplice_hf.errors import SequenceError


def demand_one_input(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
    """Raises unless exactly one of the two is given and holds at least one token per row."""
    if (input_ids is None) == (inputs_embeds is None):
        raise SequenceError("pass exactly one of `input_ids` and `inputs_embeds`.")
    given = inputs_embeds if input_ids is None else input_ids
    if given is not None and given.shape[1] < 1:
        raise SequenceError("`input_ids` must hold at least one base, got an empty sequence; drop it or pad it.")


def real_positions(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask as bool, None when everything is real; a mask with holes raises."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise SequenceError(
            f"`attention_mask` must be (batch, length) with 1 = real, got shape {tuple(attention_mask.shape)}."
        )
    mask = attention_mask.bool()
    if torch.compiler.is_compiling():
        # A graph cannot branch on what a mask holds.
        return mask
    if bool(mask.all()):
        return None
    rises = nn.functional.pad(mask, (1, 0)).to(torch.int8).diff(dim=1).eq(1).sum(1)
    if bool((rises > 1).any()):
        row = int((rises > 1).nonzero()[0])
        raise SequenceError(
            f"`attention_mask` has a hole in row {row}; real positions must be contiguous. "
            "Use the N token for unknown bases inside a sequence."
        )
    return mask


def as_mask(mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask


def zero_padding(x_BLE: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zeroes the padding; with a cache the mask covers the past too and its end belongs to x."""
    return x_BLE if mask is None else x_BLE * mask[:, -x_BLE.shape[1] :, None].to(x_BLE.dtype)
