"""The blocks of Akita: activation first, then convolution, batch norm, dropout and max pool.

Shapes: B batch, C channels, L positions, N bins.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from genesplice_hf.layers.batch_norm import BatchNorm1d, BatchNorm2d, convolve_and_norm, convolve_norm_pool
from genesplice_hf.layers.dilated_convolution import DilatedConv1d, DilatedConv2d
from genesplice_hf.layers.pair_maps import symmetrised
from genesplice_hf.models.akita.configuration_akita import AkitaConfig

# Positions of a convolution that inference works on at a time.
TILE_SIZE = 1 << 15


class AkitaTrunkBlock(GradientCheckpointingLayer):
    """A block of the trunk, (B, C, L) -> (B, C', L')."""


class AkitaConvBlock(AkitaTrunkBlock):
    """pool(norm(conv(act(x)))); the pool follows the norm, and the next block's activation works on what it leaves."""

    def __init__(self, config: AkitaConfig, in_size: int, out_size: int, kernel_size: int, pool_size: int = 1) -> None:
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.conv = DilatedConv1d.same(in_size, out_size, kernel_size)
        self.norm = BatchNorm1d(out_size, config.batch_norm_eps, config.batch_norm_momentum)
        self.pool_size = pool_size

    def forward(self, x_BCL: torch.Tensor) -> torch.Tensor:
        return convolve_norm_pool(self.conv, self.norm, self.activation, x_BCL, self.pool_size, TILE_SIZE)


class AkitaDilatedBlock(AkitaTrunkBlock):
    """x + dropout(norm2(conv2(act(norm1(conv1(act(x))))))); the identity at first, for norm2 starts at 0."""

    def __init__(self, config: AkitaConfig, size: int, dilation: int) -> None:
        super().__init__()
        inner, eps, momentum = config.dilated_filters, config.batch_norm_eps, config.batch_norm_momentum
        self.activation = ACT2FN[config.hidden_act]
        self.conv1 = DilatedConv1d.same(size, inner, config.dilated_kernel_size, dilation)
        self.norm1 = BatchNorm1d(inner, eps, momentum)
        self.conv2 = DilatedConv1d.same(inner, size, 1)
        self.norm2 = BatchNorm1d(size, eps, momentum)
        self.norm2.starts_at_zero = True
        self.dropout = nn.Dropout(config.dilated_dropout)

    def forward(self, x_BCL: torch.Tensor) -> torch.Tensor:
        return x_BCL + _branch(self, self.activation, x_BCL)


class AkitaDilatedBlock2d(GradientCheckpointingLayer):
    """The same over a map, (B, C, N, N) -> (B, C, N, N), which is made symmetric at the end."""

    def __init__(self, config: AkitaConfig, dilation: int) -> None:
        super().__init__()
        size, inner = config.head2d_filters, config.dilated2d_filters
        eps, momentum = config.batch_norm_eps, config.batch_norm_momentum
        self.activation = ACT2FN[config.hidden_act]
        self.conv1 = DilatedConv2d.same(size, inner, config.dilated2d_kernel_size, dilation)
        self.norm1 = BatchNorm2d(inner, eps, momentum)
        self.conv2 = DilatedConv2d.same(inner, size, 1)
        self.norm2 = BatchNorm2d(size, eps, momentum)
        self.norm2.starts_at_zero = True
        self.dropout = nn.Dropout(config.dilated2d_dropout)
        self.is_symmetric = config.dilated2d_symmetric

    def forward(self, x_BCNN: torch.Tensor) -> torch.Tensor:
        x_BCNN = _branch(self, self.activation, x_BCNN).add_(x_BCNN)
        return symmetrised(x_BCNN) if self.is_symmetric else x_BCNN


def _branch(block: Any, activation: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    inner = convolve_and_norm(block.conv1, block.norm1, activation(x))
    return block.dropout(convolve_and_norm(block.conv2, block.norm2, activation(inner)))
