"""The sequence classifiers of GPN.

What the published heads call their parameters stands in `conversion_gpn.py`. None is called as one of the token
classifier (`out_proj`), so that a checkpoint of one kind lends its base, and nothing of its head, to the other.

Shapes: B batch, L tokens, E hidden size, C labels.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu
from transformers.activations import ACT2FN

from genesplice_hf.heads.token_pooling import pool_tokens
from genesplice_hf.layers.padding import zero_padding
from genesplice_hf.models.gpn.configuration_gpn import GPNConfig

INNER_SIZE = 64
KERNEL_SIZE = 3


class PoolingHead(nn.Module):
    """Pools what `positions` makes of every position and projects it with `project`: (B, L, E) -> (B, C)."""

    def __init__(self, config: GPNConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, x_BLE: torch.Tensor, mask_BL: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        x_BLE = self.positions(x_BLE, mask_BL)
        ids = self.config.special_token_ids
        return self.project(pool_tokens(x_BLE, mask_BL, self.config.classifier_pooling, input_ids, ids))

    def positions(self, x_BLE: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        return x_BLE

    def project(self, pooled_BE: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class StandardHead(PoolingHead):
    """Pooled state, norm (v2), dropout, dense, activation, dropout, projection."""

    def __init__(self, config: GPNConfig) -> None:
        super().__init__(config)
        size, bias = config.hidden_size, config.has_bias
        self.norm = None
        if config.layout == "v2":
            self.norm = nn.LayerNorm(size, config.layer_norm_eps, bias=bias)
        self.dense = nn.Linear(size, size, bias=bias)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob or 0.0)
        self.final = nn.Linear(size, config.num_labels, bias=bias)

    def project(self, pooled_BE: torch.Tensor) -> torch.Tensor:
        pooled_BE = pooled_BE if self.norm is None else self.norm(pooled_BE)
        pooled_BE = self.activation(self.dense(self.dropout(pooled_BE)))
        return self.final(self.dropout(pooled_BE))


class ResidualMLP(nn.Module):
    """shortcut(x) + down(gelu(up(norm(x)))), no biases; the shortcut is a map where the width changes."""

    def __init__(self, in_size: int, out_size: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_size, eps, bias=False)
        self.up = nn.Linear(in_size, INNER_SIZE, bias=False)
        self.down = nn.Linear(INNER_SIZE, out_size, bias=False)
        self.shortcut = None if in_size == out_size else nn.Linear(in_size, out_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skipped = x if self.shortcut is None else self.shortcut(x)
        return skipped + self.down(gelu(self.up(self.norm(x))))


class ResidualCNN(nn.Module):
    """shortcut(x) + down(gelu(conv(norm(x)))), no biases; zeros at padding and beyond the ends."""

    def __init__(self, in_size: int, out_size: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_size, eps, bias=False)
        self.taps = nn.Conv1d(in_size, INNER_SIZE, KERNEL_SIZE, padding=KERNEL_SIZE // 2, bias=False)
        self.down = nn.Linear(INNER_SIZE, out_size, bias=False)
        self.shortcut = None if in_size == out_size else nn.Linear(in_size, out_size, bias=False)

    def forward(self, x_BLE: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        skipped = x_BLE if self.shortcut is None else self.shortcut(x_BLE)
        normed_BEL = zero_padding(self.norm(x_BLE), mask_BL).transpose(1, 2)
        return skipped + self.down(gelu(self.taps(normed_BEL)).transpose(1, 2))


class LightweightMLPHead(PoolingHead):
    """One small MLP before pooling and one after it, 64 wide."""

    def __init__(self, config: GPNConfig) -> None:
        super().__init__(config)
        eps = config.layer_norm_eps
        self.mlp1 = ResidualMLP(config.hidden_size, INNER_SIZE, eps)
        self.mlp2 = ResidualMLP(INNER_SIZE, INNER_SIZE, eps)
        self.norm = nn.LayerNorm(INNER_SIZE, eps, bias=False)
        self.final = nn.Linear(INNER_SIZE, config.num_labels, bias=False)

    def positions(self, x_BLE: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        return self.mlp1(x_BLE)

    def project(self, pooled_BE: torch.Tensor) -> torch.Tensor:
        return self.final(self.norm(self.mlp2(pooled_BE)))


class LightweightCNNHead(PoolingHead):
    """Two small convolutions before pooling and an MLP after it, 64 wide."""

    def __init__(self, config: GPNConfig) -> None:
        super().__init__(config)
        eps = config.layer_norm_eps
        self.conv1 = ResidualCNN(config.hidden_size, INNER_SIZE, eps)
        self.conv2 = ResidualCNN(INNER_SIZE, INNER_SIZE, eps)
        self.mlp = ResidualMLP(INNER_SIZE, INNER_SIZE, eps)
        self.norm = nn.LayerNorm(INNER_SIZE, eps, bias=False)
        self.final = nn.Linear(INNER_SIZE, config.num_labels, bias=False)

    def positions(self, x_BLE: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.conv1(x_BLE, mask_BL), mask_BL)

    def project(self, pooled_BE: torch.Tensor) -> torch.Tensor:
        return self.final(self.norm(self.mlp(pooled_BE)))


HEADS: dict[str, Any] = {
    "standard": StandardHead,
    "lightweight_mlp": LightweightMLPHead,
    "lightweight_cnn": LightweightCNNHead,
}
