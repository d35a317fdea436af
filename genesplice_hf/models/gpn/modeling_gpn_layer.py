"""The convolutional layers of GPN.

In a padded batch every convolution sees zeros at padding, as it does beyond the ends of a sequence: a padded sequence
has the states of the unpadded one.

Shapes: B batch, L tokens, E hidden size, I inner size.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import gelu
from transformers.modeling_layers import GradientCheckpointingLayer

from genesplice_hf.layers.dilated_convolution import DilatedConv1d
from genesplice_hf.layers.padding import zero_padding
from genesplice_hf.layers.roformer import RoFormerContext
from genesplice_hf.models.gpn.configuration_gpn import GPNConfig


@dataclass(frozen=True)
class GPNContext:
    """What the layers share: the (B, L) bool mask, None = all real, and what attention needs."""

    mask: torch.Tensor | None
    roformer: RoFormerContext | None = None


def conv_of_layer(config: GPNConfig, layer: int, size: int) -> DilatedConv1d:
    """The convolution of one layer on `size` channels; its output is as long as its input."""
    taps, dilation = config.kernel(layer), config.dilation(layer)
    groups = size if config.depthwise and layer > 0 else 1
    return DilatedConv1d(size, size, taps, padding=(taps - 1) * dilation // 2, groups=groups, bias=config.has_bias)


def convolve(conv: nn.Module, x_BLE: torch.Tensor, mask_BL: torch.Tensor | None) -> torch.Tensor:
    """The convolution along L of x, with zeros at padding; channels come last in and out.

    The result is contiguous: products over another layout round differently from one call to the next.
    """
    x_BLE = zero_padding(x_BLE, mask_BL)
    if type(conv) is DilatedConv1d and conv.groups == 1 and x_BLE.device.type == "cpu":
        return _channels_last(conv, x_BLE)
    return conv(x_BLE.transpose(1, 2)).transpose(1, 2).contiguous()


def _channels_last(conv: DilatedConv1d, x_BLE: torch.Tensor) -> torch.Tensor:
    """As an image of height 1, whose kernels on processors read and write channels last without a copy."""
    (padding,), (dilation,) = conv.padding, conv.dilation
    y_BE1L = nn.functional.conv2d(
        x_BLE.transpose(1, 2)[:, :, None], conv.weight[:, :, None], conv.bias, 1, (0, padding), (1, dilation)
    )
    return y_BE1L[:, :, 0].transpose(1, 2).contiguous()


class GPNLayer(GradientCheckpointingLayer):
    """Any convolutional layer: (B, L, E) -> (B, L, E)."""


class LegacyLayer(GPNLayer):
    """x + norm(gelu(conv(x))), then x + norm(gelu(ffn(x)))."""

    def __init__(self, config: GPNConfig, index: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.conv = conv_of_layer(config, index, size)
        self.conv_norm = nn.LayerNorm(size, eps)
        self.ffn = nn.Linear(size, size)
        self.ffn_norm = nn.LayerNorm(size, eps)

    def forward(self, x_BLE: torch.Tensor, context: GPNContext) -> torch.Tensor:
        x_BLE = x_BLE + self.conv_norm(gelu(convolve(self.conv, x_BLE, context.mask)))
        return x_BLE + self.ffn_norm(gelu(self.ffn(x_BLE)))


class ConvNetLayer(GPNLayer):
    """x + conv_proj(gelu(conv(norm(x)))), then x + ffn_out(gelu(ffn_in(norm(x))))."""

    def __init__(self, config: GPNConfig, index: int) -> None:
        super().__init__()
        size, inner, bias, eps = config.hidden_size, config.intermediate_size, config.bias, config.layer_norm_eps
        self.conv_norm = nn.LayerNorm(size, eps, bias=bias)
        self.dilated_conv = conv_of_layer(config, index, size)
        self.conv_proj = nn.Linear(size, size, bias=bias)
        self.ffn_norm = nn.LayerNorm(size, eps, bias=bias)
        self.ffn_in = nn.Linear(size, inner, bias=bias)
        self.ffn_out = nn.Linear(inner, size, bias=bias)
        self.dropout = nn.Dropout(config.hidden_dropout_prob or 0.0)

    def forward(self, x_BLE: torch.Tensor, context: GPNContext) -> torch.Tensor:
        convolved = gelu(convolve(self.dilated_conv, self.conv_norm(x_BLE), context.mask))
        x_BLE = x_BLE + self.dropout(self.conv_proj(convolved))
        return x_BLE + self.dropout(self.ffn_out(gelu(self.ffn_in(self.ffn_norm(x_BLE)))))


class ByteNetLayer(GPNLayer):
    """x + proj_out(gelu(norm(conv(gelu(norm(proj_in(gelu(norm(x)))))))), on I channels inside."""

    def __init__(self, config: GPNConfig, index: int) -> None:
        super().__init__()
        size, bias, eps = config.hidden_size, config.bias, config.layer_norm_eps
        inner = size // 2 if config.slim else size
        self.norm_in = nn.LayerNorm(size, eps, bias=bias)
        self.proj_in = nn.Linear(size, inner, bias=bias)
        self.norm_mid = nn.LayerNorm(inner, eps, bias=bias)
        self.dilated_conv = conv_of_layer(config, index, inner)
        self.norm_out = nn.LayerNorm(inner, eps, bias=bias)
        self.proj_out = nn.Linear(inner, size, bias=bias)

    def forward(self, x_BLE: torch.Tensor, context: GPNContext) -> torch.Tensor:
        inner_BLI = gelu(self.norm_mid(self.proj_in(gelu(self.norm_in(x_BLE)))))
        inner_BLI = convolve(self.dilated_conv, inner_BLI, context.mask)
        return x_BLE + self.proj_out(gelu(self.norm_out(inner_BLI)))
