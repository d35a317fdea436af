"""One vector per sequence from one vector per token, over real positions only.

Shapes: B batch, L tokens, E hidden size.
"""

from collections.abc import Sequence

import torch
from torch import nn


def masked_mean(x_BLE: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """Mean over the real tokens, (B, E); a row without one gives zeros."""
    weight = mask_BL.to(x_BLE.dtype)[..., None]
    return (x_BLE * weight).sum(1) / weight.sum(1).clamp(min=1)


def masked_max(x_BLE: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """Maximum over the real tokens, (B, E); a row without one gives zeros."""
    lowest = torch.finfo(x_BLE.dtype).min
    peak = x_BLE.masked_fill(~mask_BL[..., None], lowest).amax(1)
    return peak * mask_BL.any(1, keepdim=True).to(peak.dtype)


def first_real(x_BLE: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """The state of the first real token, (B, E); of column 0 in a row without one."""
    return x_BLE[torch.arange(len(x_BLE), device=x_BLE.device), mask_BL.int().argmax(1)]


def last_real(x_BLE: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """The state of the last real token, (B, E); of the last column in a row without one."""
    return first_real(x_BLE.flip(1), mask_BL.flip(1))


def without_special(
    mask_BL: torch.Tensor, input_ids: torch.Tensor | None, special_token_ids: Sequence[int]
) -> torch.Tensor:
    """The mask less the positions of special tokens; as it is where there are no ids to tell them by."""
    if input_ids is None or not special_token_ids:
        return mask_BL
    return mask_BL & ~torch.isin(input_ids, input_ids.new_tensor(list(special_token_ids)))


class AttentionPooling(nn.Module):
    """Softmax-weighted mean with one learned query (Yang et al. 2016, hierarchical attention, eq. 5-7)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, x_BLE: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        scores = self.query(x_BLE).squeeze(-1)
        # Half precision is too coarse for a softmax over many tokens.
        scores = scores if scores.dtype == torch.float64 else scores.float()
        weights = scores.masked_fill(~mask_BL, torch.finfo(scores.dtype).min).softmax(-1) * mask_BL
        return (weights[..., None].to(x_BLE.dtype) * x_BLE).sum(1)
