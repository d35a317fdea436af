"""Pre-norm transformer block with grouped-query attention over a window or over all tokens, and its cache.

Shapes: B batch, L tokens, H heads, K key/value heads, D head size, E hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genesplice_hf.layers.attention import eager_attention, full_attention_mask, window_attention
from genesplice_hf.layers.feed_forward import SwiGLU
from genesplice_hf.layers.norm import RMSNorm
from genesplice_hf.layers.rotary import rotary_table, rotate


class StemCache(DynamicCache):
    """Keys and values of every layer, and the last embeddings that the stem's convolution still needs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem_inputs: torch.Tensor | None = None

    def extend_stem(self, x_BLE: torch.Tensor, keep: int) -> torch.Tensor:
        """Puts the previous `keep` embeddings (zeros at first) before x and remembers the last ones."""
        past = self.stem_inputs
        if past is None:
            past = x_BLE.new_zeros(x_BLE.shape[0], keep, x_BLE.shape[2])
        joined = torch.cat([past, x_BLE], dim=1)
        self.stem_inputs = joined[:, joined.shape[1] - keep :]
        return joined

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.stem_inputs is not None:
            self.stem_inputs = self.stem_inputs.index_select(0, beam_idx.to(self.stem_inputs.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.stem_inputs is not None:
            self.stem_inputs = self.stem_inputs.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.stem_inputs is not None:
            self.stem_inputs = self.stem_inputs[indices]

    def crop(self, max_length: int, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "this cache cannot be cropped, for the stem keeps only its last inputs; run the prefix again."
        )


@dataclass(frozen=True)
class BlockShape:
    """Sizes and behaviour of one block.

    Attributes:
        hidden_size, intermediate_size: width of the states and of the SwiGLU.
        num_heads, num_key_value_heads, head_dim: heads of queries, of keys and values, and their size.
        window: radius in tokens; None = full attention.
        is_causal: a token sees itself and what came before.
        qk_norm: RMSNorm of queries and keys before rotation.
        norm_eps, attention_dropout, hidden_dropout: as their names say.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    window: int | None
    is_causal: bool
    qk_norm: bool = False
    norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0

    @classmethod
    def of_level(cls, config: PreTrainedConfig, level: int, window: int | None) -> "BlockShape":
        """The shape of the blocks of one level of a config whose sizes are lists with an entry per level."""
        return cls(
            hidden_size=config.hidden_sizes[level],
            intermediate_size=config.intermediate_sizes[level],
            num_heads=config.num_attention_heads[level],
            num_key_value_heads=config.num_key_value_heads[level],
            head_dim=config.head_dims[level],
            window=window,
            is_causal=config.is_decoder,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            attention_dropout=config.attention_dropout,
            hidden_dropout=config.hidden_dropout,
        )


@dataclass
class LevelContext:
    """What the blocks of one level share: masks, rotary tables and the cache.

    Attributes:
        key_mask: (B, Lk) bool, or None when every position is real.
        full_mask: mask of the full layers in the form that the attention implementation takes.
        local_table, global_table: rotary tables of window and of full layers; None without RoPE.
        cache: grows by this call's keys and values.
    """

    key_mask: torch.Tensor | None
    full_mask: Any
    local_table: tuple[torch.Tensor, torch.Tensor] | None
    global_table: tuple[torch.Tensor, torch.Tensor] | None
    cache: StemCache | None = None


class WindowedAttention(nn.Module):
    """Grouped-query self-attention over a window of `shape.window` tokens each side, or over all."""

    def __init__(self, config: PreTrainedConfig, shape: BlockShape, layer_idx: int) -> None:
        super().__init__()
        self.config = config  # names the attention implementation
        self.shape = shape
        self.layer_idx = layer_idx
        self.is_causal = shape.is_causal
        self.num_key_value_groups = shape.num_heads // shape.num_key_value_heads
        query_width = shape.num_heads * shape.head_dim
        key_width = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, shape.hidden_size, bias=False)
        self.o_proj.feeds_residual = True  # initialised smaller
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()

    def forward(
        self, x_BLE: torch.Tensor, context: LevelContext, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*x_BLE.shape[:2], -1, self.shape.head_dim)
        query = self.q_norm(self.q_proj(x_BLE).view(heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(x_BLE).view(heads)).transpose(1, 2)
        value = self.v_proj(x_BLE).view(heads).transpose(1, 2)
        table = context.global_table if self.shape.window is None else context.local_table
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
        if context.cache is not None:
            key, value = context.cache.update(key, value, self.layer_idx)
        out_BLHD, weights = self._attend(query, key, value, context, output_attentions)
        return self.o_proj(out_BLHD.reshape(*x_BLE.shape[:2], -1)), weights

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: LevelContext,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.shape.attention_dropout if self.training else 0.0
        scaling, window = self.shape.head_dim**-0.5, self.shape.window
        if window is None:
            return function(self, query, key, value, context.full_mask, scaling=scaling, dropout=dropout)
        # Keys before the window of the first query can never be seen: decoding reads at most w + 1 of them.
        needed = min(key.shape[2], query.shape[2] + window)
        key, value = key[:, :, -needed:], value[:, :, -needed:]
        mask = None if context.key_mask is None else context.key_mask[:, -needed:]
        inputs = (query, key, value, mask, window)
        return window_attention(function, self, *inputs, scaling, dropout, output_attentions)


class WindowedBlock(GradientCheckpointingLayer):
    """Pre-norm block: x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, config: PreTrainedConfig, shape: BlockShape, layer_idx: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = WindowedAttention(config, shape, layer_idx)
        self.mlp_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = SwiGLU(shape.hidden_size, shape.intermediate_size)
        self.dropout = nn.Dropout(shape.hidden_dropout)

    def forward(self, x_BLE: torch.Tensor, context: LevelContext, output_attentions: bool = False) -> torch.Tensor:
        attended, _ = self.self_attn(self.attn_norm(x_BLE), context, output_attentions)
        x_BLE = x_BLE + self.dropout(attended)
        return x_BLE + self.dropout(self.mlp(self.mlp_norm(x_BLE)))


def run_blocks(
    config: PreTrainedConfig,
    blocks: nn.ModuleList,
    x_BLE: torch.Tensor,
    mask: torch.Tensor | None,
    cache: StemCache | None = None,
    output_attentions: bool = False,
) -> torch.Tensor:
    """Runs the blocks of one level, which share masks and rotary tables.

    Args:
        config: names the attention implementation, `is_decoder`, `position_embedding`, `local_rope_theta` (window
            layers) and `global_rope_theta` (full layers).
        mask: (B, L) bool or, with a cache, (B, past + L); None = all real.
    """
    if len(blocks) == 0:
        return x_BLE
    context = _level_context(config, blocks, x_BLE, mask, cache)
    for block in blocks:
        x_BLE = block(x_BLE, context, output_attentions)
    return x_BLE


def _level_context(
    config: PreTrainedConfig,
    blocks: nn.ModuleList,
    x_BLE: torch.Tensor,
    mask: torch.Tensor | None,
    cache: StemCache | None,
) -> LevelContext:
    past = cache.get_seq_length() if cache is not None else 0
    windows = [block.self_attn.shape.window for block in blocks]
    head_dim = blocks[0].self_attn.shape.head_dim

    def table(theta: float, is_used: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not is_used or config.position_embedding != "rope":
            return None
        return rotary_table(x_BLE.shape[1], head_dim, theta, past, x_BLE.device, x_BLE.dtype)

    return LevelContext(
        key_mask=mask,
        full_mask=full_attention_mask(config, x_BLE, mask, past) if None in windows else None,
        local_table=table(config.local_rope_theta, any(window is not None for window in windows)),
        global_table=table(config.global_rope_theta, None in windows),
        cache=cache,
    )
