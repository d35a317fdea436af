"""Pre-norm transformer block with grouped-query attention over a window or over all tokens.

Shapes: B batch, L tokens, H heads, K key/value heads, D head size, E hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genesplice_hf.layers.alibi import alibi_implementation, alibi_slopes
from genesplice_hf.layers.attention import eager_attention, full_attention_mask, window_attention
from genesplice_hf.layers.feed_forward import SwiGLU
from genesplice_hf.layers.hierarchical_cache import LevelCache
from genesplice_hf.layers.mixture_of_experts import MixtureOfExperts
from genesplice_hf.layers.norm import RMSNorm
from genesplice_hf.layers.rotary import rotary_table, rotate


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
        num_experts, experts_per_token: of a mixture of experts in place of the SwiGLU; 0 experts = the SwiGLU.
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
    num_experts: int = 0
    experts_per_token: int = 0

    @classmethod
    def of_level(
        cls, config: PreTrainedConfig, level: int, window: int | None, has_experts: bool = False
    ) -> "BlockShape":
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
            num_experts=config.moe_num_experts if has_experts else 0,
            experts_per_token=config.moe_top_k if has_experts else 0,
        )

    def kept_numbers(self, num_tokens: int) -> int:
        """Numbers that one block keeps for a backward pass over one sequence of so many tokens, with sdpa.

        Per token: 6 E of the norms, 4 I of the SwiGLU (of each chosen expert), queries and output 2 H D, keys and
        values 2 K D. A window layer keeps c copies of keys and values and c w of the mask; c = 3 blocks, causal 2.
        """
        copies = 1 if self.window is None else 2 if self.is_causal else 3
        wide = 4 * self.intermediate_size * max(1, self.experts_per_token)
        heads = 2 * self.head_dim * (self.num_heads + copies * self.num_key_value_heads)
        return num_tokens * (6 * self.hidden_size + wide + heads + copies * (self.window or 0))


@dataclass
class LevelContext:
    """What the blocks of one level share: masks, rotary tables, slopes and the cache.

    Attributes:
        key_mask: (B, Lk) bool, or None when every position is real.
        full_mask: mask of the full layers in the form that the attention implementation takes.
        local_table, global_table: rotary tables of window and of full layers; None without RoPE.
        cache: what earlier calls left; takes this call's keys and values.
        slopes_H: (H,) slopes of ALiBi; None without it. The full mask holds their bias already.
    """

    key_mask: torch.Tensor | None
    full_mask: Any
    local_table: tuple[torch.Tensor, torch.Tensor] | None
    global_table: tuple[torch.Tensor, torch.Tensor] | None
    cache: LevelCache | None = None
    slopes_H: torch.Tensor | None = None


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
            key, value = context.cache.update(key, value, self.layer_idx, self.shape.window)
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
        name = self.config._attn_implementation
        name = name if context.slopes_H is None else alibi_implementation(name)
        if name == "flex_attention" and key.shape[2] > query.shape[2]:
            # flex would compile a kernel for every number of keys.
            name = "sdpa"
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        dropout = self.shape.attention_dropout if self.training else 0.0
        scaling, window = self.shape.head_dim**-0.5, self.shape.window
        if window is None:
            return function(self, query, key, value, context.full_mask, scaling=scaling, dropout=dropout)
        # Keys before the window of the first query can never be seen: decoding reads at most w + 1 of them.
        needed = min(key.shape[2], query.shape[2] + window)
        key, value = key[:, :, -needed:], value[:, :, -needed:]
        mask = None if context.key_mask is None else context.key_mask[:, -needed:]
        inputs = (query, key, value, mask, window)
        return window_attention(function, self, *inputs, scaling, dropout, output_attentions, context.slopes_H)


class RecordedState(nn.Identity):
    """Marks a state that `output_hidden_states` returns: transformers records what this module gives."""


class WindowedBlock(GradientCheckpointingLayer):
    """Pre-norm block: x + attention(norm(x)), then x + SwiGLU(norm(x)), or experts in place of the SwiGLU.

    A block with experts returns the router's logits (B, L, n) beside its states; they are an output, for what a
    checkpointed block leaves elsewhere has no gradient when checkpointing is reentrant.
    """

    def __init__(self, config: PreTrainedConfig, shape: BlockShape, layer_idx: int) -> None:
        super().__init__()
        self.input_state = RecordedState()
        self.attn_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = WindowedAttention(config, shape, layer_idx)
        self.mlp_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.has_experts = shape.num_experts > 0
        self.mlp = _feed_forward(shape)
        self.dropout = nn.Dropout(shape.hidden_dropout)

    def forward(
        self, x_BLE: torch.Tensor, context: LevelContext, output_attentions: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x_BLE = self.input_state(x_BLE)
        attended, _ = self.self_attn(self.attn_norm(x_BLE), context, output_attentions)
        x_BLE = x_BLE + self.dropout(attended)
        if not self.has_experts:
            return x_BLE + self.dropout(self.mlp(self.mlp_norm(x_BLE)))
        real = None if context.key_mask is None else context.key_mask[:, -x_BLE.shape[1] :]
        mixed, router_logits = self.mlp(self.mlp_norm(x_BLE), real)
        return x_BLE + self.dropout(mixed), router_logits


def _feed_forward(shape: BlockShape) -> nn.Module:
    if shape.num_experts:
        return MixtureOfExperts(shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.experts_per_token)
    return SwiGLU(shape.hidden_size, shape.intermediate_size)


def run_blocks(
    config: PreTrainedConfig,
    blocks: nn.ModuleList,
    x_BLE: torch.Tensor,
    mask: torch.Tensor | None,
    cache: LevelCache | None = None,
    output_attentions: bool = False,
    router_logits: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Runs the blocks of one level, which share masks and rotary tables.

    Args:
        config: names the attention implementation, `is_decoder`, `position_embedding`, `local_rope_theta` (window
            layers) and `global_rope_theta` (full layers).
        mask: (B, L) bool or, with a cache, (B, past + L); None = all real.
        router_logits: collects the logits (B, L, n) of every block with experts.
    """
    if len(blocks) == 0:
        return x_BLE
    context = _level_context(config, blocks, x_BLE, mask, cache)
    for block in blocks:
        out = block(x_BLE, context, output_attentions)
        x_BLE, logits = out if block.has_experts else (out, None)
        if logits is not None and router_logits is not None:
            router_logits.append(logits)
    return x_BLE


def _level_context(
    config: PreTrainedConfig,
    blocks: nn.ModuleList,
    x_BLE: torch.Tensor,
    mask: torch.Tensor | None,
    cache: LevelCache | None,
) -> LevelContext:
    past = cache.get_seq_length() if cache is not None else 0
    windows = [block.self_attn.shape.window for block in blocks]
    shape = blocks[0].self_attn.shape
    slopes_H = None
    if config.position_embedding == "alibi":
        working = torch.float64 if x_BLE.dtype == torch.float64 else torch.float32
        slopes_H = alibi_slopes(shape.num_heads, x_BLE.device, working)

    def table(theta: float, is_used: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not is_used or config.position_embedding != "rope":
            return None
        if cache is not None:
            return cache.rotary_table(x_BLE.shape[1], shape.head_dim, theta, x_BLE.device, x_BLE.dtype)
        return rotary_table(x_BLE.shape[1], shape.head_dim, theta, 0, x_BLE.device, x_BLE.dtype)

    return LevelContext(
        key_mask=mask,
        full_mask=full_attention_mask(config, x_BLE, mask, past, slopes_H) if None in windows else None,
        local_table=table(config.local_rope_theta, any(window is not None for window in windows)),
        global_table=table(config.global_rope_theta, None in windows),
        cache=cache,
        slopes_H=slopes_H,
    )
