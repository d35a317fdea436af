"""RoFormer: post-norm transformer layers with rotary positions of neighbouring pairs.

Rotation of the pairs (x_2i, x_2i+1) by p / 10000^(2i / D) (Su et al., RoFormer, arXiv 2104.09864, eq. 15); the layer
is BERT's. transformers has the same layers with a stored table of angles and one attention implementation.

Shapes: B batch, L tokens, H heads, D head size, E hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.attention import eager_attention, full_attention_mask

BASE = 10000.0


@dataclass(frozen=True)
class RoFormerContext:
    """What the layers share: the mask in the form that the implementation takes, sine and cosine of every pair.

    `sines` and `cosines` are (B or 1, 1, L, D), each angle twice.
    """

    mask: Any
    sines: torch.Tensor
    cosines: torch.Tensor


def roformer_context(config: PreTrainedConfig, x_BLE: torch.Tensor, mask_BL: torch.Tensor | None) -> RoFormerContext:
    """The context of one batch; positions count from the first real token of each row.

    Raises:
        SequenceError: more real tokens in a row than `config.max_position_embeddings`.
    """
    length = x_BLE.shape[1] if mask_BL is None else int(mask_BL.sum(1).max())
    if length > config.max_position_embeddings:
        raise SequenceError(
            f"a sequence has {length} bases, the limit of this model is {config.max_position_embeddings} "
            "(`max_position_embeddings`); cut it into windows of at most so many."
        )
    positions = torch.arange(x_BLE.shape[1], device=x_BLE.device)[None]
    if mask_BL is not None:
        positions = (positions - mask_BL.int().argmax(1, keepdim=True)).clamp(min=0)
    sines, cosines = (
        table.repeat_interleave(2, dim=-1)[:, None].to(x_BLE.dtype)
        for table in angle_tables(positions, config.hidden_size // config.num_attention_heads)
    )
    return RoFormerContext(full_attention_mask(config, x_BLE, mask_BL, 0), sines, cosines)


def angle_tables(positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sine and cosine (..., D / 2) of position / 10000^(2i / D), rounded to float32 as in a stored table."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.to(torch.float64)[..., None] / BASE**exponents
    return angles.sin().float(), angles.cos().float()


def position_table(config: PreTrainedConfig) -> torch.Tensor:
    """(`max_position_embeddings`, D): sines in the first half, cosines in the second, as transformers stores them."""
    positions = torch.arange(config.max_position_embeddings)
    return torch.cat(angle_tables(positions, config.hidden_size // config.num_attention_heads), dim=-1)


def rotate_pairs(x_BHLD: torch.Tensor, context: RoFormerContext) -> torch.Tensor:
    """Rotates every pair (x_2i, x_2i+1) by its position's angle."""
    turned = torch.stack([-x_BHLD[..., 1::2], x_BHLD[..., ::2]], dim=-1).flatten(-2)
    return x_BHLD * context.cosines + turned * context.sines


class RoFormerAttention(nn.Module):
    """Multi-head self-attention with biases; values are rotated too with `config.rotary_value`."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config  # names the attention implementation
        size = config.hidden_size
        self.head_dim = size // config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        self.out_proj = nn.Linear(size, size)

    def forward(self, x_BLE: torch.Tensor, context: RoFormerContext) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output (B, L, E), and weights (B, H, L, L) from eager attention."""
        heads = (*x_BLE.shape[:2], -1, self.head_dim)
        query, key, value = (
            project(x_BLE).view(heads).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        query, key = rotate_pairs(query, context), rotate_pairs(key, context)
        if self.config.rotary_value:
            value = rotate_pairs(value, context)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        out_BLHD, weights = attend(self, query, key, value, context.mask, scaling=self.head_dim**-0.5, dropout=dropout)
        return self.out_proj(out_BLHD.flatten(2)), weights


class RoFormerLayer(GradientCheckpointingLayer):
    """norm(x + attention(x)), then norm(x + down(act(up(x))))."""

    def __init__(self, config: PreTrainedConfig, layer_norm_eps: float) -> None:
        super().__init__()
        self.attention = RoFormerAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, layer_norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = nn.LayerNorm(config.hidden_size, layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x_BLE: torch.Tensor, context: RoFormerContext) -> torch.Tensor:
        attended, _ = self.attention(x_BLE, context)
        x_BLE = self.attention_norm(x_BLE + self.dropout(attended))
        fed = self.down_proj(self.activation(self.up_proj(x_BLE)))
        return self.output_norm(x_BLE + self.dropout(fed))
