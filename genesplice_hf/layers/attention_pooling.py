"""Attention pooling over pairs of positions (Avsec et al., Enformer, Nature Methods 2021, "attention pooling").

Each channel of two neighbours is averaged with softmax weights whose logits are a linear map of all channels. As the
logits are linear, with d = x0 - x1 the softmax over two is a sigmoid of one matrix product of half the size:

    softmax(W x0, W x1) . (x0, x1) = x1 + d * sigmoid(W d)

Shapes: B batch, L positions, C channels.
"""

import torch
from torch import nn


class AttentionPool2(nn.Module):
    """(B, L, C) -> (B, ceil(L / 2), C); a last position without a neighbour stays as it is.

    Attributes:
        weight: (C, C) of the logits, no bias; `INITIAL_GAIN` times the identity at first.
    """

    INITIAL_GAIN = 2.0

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(self.INITIAL_GAIN * torch.eye(num_channels))

    def forward(self, x_BLC: torch.Tensor, bias_C: torch.Tensor | None = None) -> torch.Tensor:
        """Pools x, or x + bias: a constant per channel passes through an average, and costs half as much after it."""
        pairs = x_BLC.shape[1] // 2
        first, second = x_BLC[:, : 2 * pairs].unflatten(1, (pairs, 2)).unbind(2)
        difference = first - second
        logits = nn.functional.linear(difference, self.weight)
        if torch.is_grad_enabled():
            pooled = torch.addcmul(second, difference, logits.sigmoid().to(difference.dtype))
        else:
            pooled = difference.mul_(logits.sigmoid_()).add_(second)
        if x_BLC.shape[1] % 2:
            pooled = torch.cat([pooled, x_BLC[:, -1:]], dim=1)
        if bias_C is None:
            return pooled
        return pooled + bias_C.to(pooled.dtype) if torch.is_grad_enabled() else pooled.add_(bias_C)

    def extra_repr(self) -> str:
        return str(self.weight.shape[0])
