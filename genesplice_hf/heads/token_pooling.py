"""One vector per sequence for models with special tokens: mean, maximum, first or last real token.

Shapes: B batch, L tokens, E hidden size.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from genesplice_hf.heads.pooling import masked_max, masked_mean

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
        index_B = mask_BL.int().argmax(1)
        if pooling == "last":
            index_B = mask_BL.shape[1] - 1 - mask_BL.flip(1).int().argmax(1)
        picked = x_BLE.gather(1, index_B[:, None, None].expand(-1, 1, x_BLE.shape[-1])).squeeze(1)
        return picked * mask_BL.any(1, keepdim=True).to(picked.dtype)
    if input_ids is not None and len(special_token_ids):
        special = torch.tensor(list(special_token_ids), device=input_ids.device)
        mask_BL = mask_BL & ~torch.isin(input_ids, special)
    return masked_max(x_BLE, mask_BL) if pooling == "max" else masked_mean(x_BLE, mask_BL)
