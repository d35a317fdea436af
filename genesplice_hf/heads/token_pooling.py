"""One vector per sequence for models with special tokens: mean, maximum, first or last real token.

Shapes: B batch, L tokens, E hidden size.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from genesplice_hf.heads.pooling import first_real, last_real, masked_max, masked_mean, without_special

TokenPooling = Literal["mean", "cls", "max", "last"]


def pool_tokens(
    x_BLE: torch.Tensor,
    mask_BL: torch.Tensor,
    pooling: TokenPooling,
    input_ids: torch.Tensor | None = None,
    special_token_ids: Sequence[int] = (),
) -> torch.Tensor:
    """(B, E): "mean" and "max" over the real tokens that stand for bases, "cls" the first real token, "last" the last.

    Args:
        mask_BL: bool, True = real.
        special_token_ids: ids that stay out of the mean and the maximum, where `input_ids` are known.
    """
    if pooling in ("cls", "last"):
        picked_BE = first_real(x_BLE, mask_BL) if pooling == "cls" else last_real(x_BLE, mask_BL)
        return picked_BE * mask_BL.any(1, keepdim=True).to(picked_BE.dtype)
    mask_BL = without_special(mask_BL, input_ids, special_token_ids)
    return masked_max(x_BLE, mask_BL) if pooling == "max" else masked_mean(x_BLE, mask_BL)
