"""Convolutional stem: mixes neighbouring bases before the first block.

Shapes: B batch, L tokens, E hidden size.
"""

import torch
from torch import nn

from genesplice_hf.layers.hierarchical_cache import LevelCache
from genesplice_hf.layers.padding import zero_padding


class ConvStem(nn.Conv1d):
    """x + gelu(convolution of x) over `kernel_size` (odd) tokens, centred or, when causal, looking back only."""

    def __init__(self, hidden_size: int, kernel_size: int, is_causal: bool) -> None:
        super().__init__(hidden_size, hidden_size, kernel_size)
        self.reach = kernel_size - 1
        self.left = self.reach if is_causal else self.reach // 2

    def forward(  # type: ignore[override]
        self, x_BLE: torch.Tensor, mask: torch.Tensor | None, cache: LevelCache | None = None
    ) -> torch.Tensor:
        """Args: x_BLE, zero at padding. mask: bool (B, L) or, with a cache, (B, past + L); None = all real."""
        if cache is not None:
            wide = cache.extend_stem(x_BLE, self.reach)
        else:
            wide = nn.functional.pad(x_BLE, (0, 0, self.left, self.reach - self.left))
        return zero_padding(x_BLE + self.neighbours(wide), mask)

    def neighbours(self, wide: torch.Tensor) -> torch.Tensor:
        """gelu(convolution), (B, L, E), of L tokens with `left` before and `reach - left` after them in `wide`."""
        return nn.functional.gelu(super().forward(wide.transpose(1, 2)).transpose(1, 2))
