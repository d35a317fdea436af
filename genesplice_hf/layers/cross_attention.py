"""Attention between two sets: in both directions from one score matrix, to a context, and through a few latents.

The joint block shares queries and keys: S = (Wqk x)(Wqk' p)^T scales both directions, x attends with a softmax over p
and p with one over x (bidirectional cross attention). Two calls with swapped roles give the same result as the two
softmaxes of one matrix and keep no matrix. The latents follow the Set Transformer (Lee et al., arXiv 1810.00825,
section 3.1: MAB, ISAB). The configs name `attn_heads`, `attn_dim_head`, `ff_mult`, `dropout`, `norm_type` and
`_attn_implementation`.

Shapes: B batch, L tokens of a set, T tokens of x, R tokens of p, M latents, N context tokens, H heads, D head size,
E width of x, P width of p, C width of the context.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genesplice_hf.layers.attention import eager_attention
from genesplice_hf.layers.conditioning import AdaptiveLayerNorm


class BothSides(NamedTuple):
    """Two sets after a block, and the weights (B, H, T, R) with which the first attended, eager only."""

    x_BTE: torch.Tensor
    p_BRP: torch.Tensor
    weights: torch.Tensor | None


class FeedForward(nn.Module):
    """fc2(dropout(gelu(fc1(x)))), GELU by the error function; (..., E) -> (..., E)."""

    def __init__(self, size: int, mult: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, size * mult)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(size * mult, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(nn.functional.gelu(self.fc1(x))))


class Attention(nn.Module):
    """Attention of queries of width E over keys of width C, through a looked-up implementation.

    Args:
        config: see the head of this file.
        size, key_size: E and C.
        null_key: a learned key and value that is always visible.
    """

    is_causal = False

    def __init__(self, config: PreTrainedConfig, size: int, key_size: int, null_key: bool = False) -> None:
        super().__init__()
        self.config = config
        self.heads, self.scaling = config.attn_heads, config.attn_dim_head**-0.5
        inner = config.attn_heads * config.attn_dim_head
        self.to_q = nn.Linear(size, inner, bias=False)
        self.to_k = nn.Linear(key_size, inner, bias=False)
        self.to_v = nn.Linear(key_size, inner, bias=False)
        self.to_out = nn.Linear(inner, size)
        self.null_key: nn.Parameter | None = None
        self.null_value: Any = None
        if null_key:
            self.null_key, self.null_value = (nn.Parameter(torch.empty(inner)) for _ in range(2))

    def initialize(self) -> None:
        """What differs from the model's usual initialisation."""
        if self.null_key is not None:
            init.normal_(self.null_key)
            init.zeros_(self.null_value)

    def forward(self, x_BLE: torch.Tensor, keys_BNC: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
        """(B, L, E) of what `keys_BNC` hold; `key_mask` (B, N) bool, True = visible, None = all."""
        key, value = self.to_k(keys_BNC), self.to_v(keys_BNC)
        if self.null_key is not None:
            pairs = ((self.null_key, key), (self.null_value, value))
            key, value = (torch.cat([null.expand(len(x), 1, -1), x], dim=1) for null, x in pairs)
            key_mask = None if key_mask is None else nn.functional.pad(key_mask, (1, 0), value=True)
        query, key, value = (split_heads(x, self.heads) for x in (self.to_q(x_BLE), key, value))
        out, _ = attend(self, query, key, value, key_mask, self.scaling, self.config.dropout)
        return self.to_out(out.flatten(2))


class SelfAttentionBlock(GradientCheckpointingLayer):
    """x + attention(LN x), then x + feed-forward(LN x)."""

    def __init__(self, config: PreTrainedConfig, size: int) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(size)
        self.attn = Attention(config, size, size)
        self.ff_norm = nn.LayerNorm(size)
        self.ff = FeedForward(size, config.ff_mult, config.dropout)

    def forward(self, x_BLE: torch.Tensor, mask_BL: torch.Tensor | None = None) -> torch.Tensor:
        """(B, L, E); `mask_BL` bool, True = real, None = all."""
        normed = self.attn_norm(x_BLE)
        x_BLE = x_BLE + self.attn(normed, normed, mask_BL)
        return x_BLE + self.ff(self.ff_norm(x_BLE))


class ContextAttentionBlock(GradientCheckpointingLayer):
    """x + attention of LN x over the context's tokens and a null key; adds nothing at initialisation."""

    def __init__(self, config: PreTrainedConfig, size: int, context_size: int) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(size)
        self.attn = Attention(config, size, context_size, null_key=True)

    def initialize(self) -> None:
        """Starts as the identity."""
        init.zeros_(self.attn.to_out.weight)
        init.zeros_(self.attn.to_out.bias)

    def forward(self, x_BLE: torch.Tensor, tokens_BNC: torch.Tensor, mask_BN: torch.Tensor | None) -> torch.Tensor:
        """(B, L, E); one of `x_BLE` and `tokens_BNC` may have a batch of 1."""
        x_BLE, tokens_BNC, mask_BN = same_batch(x_BLE, tokens_BNC, mask_BN)
        return x_BLE + self.attn(self.attn_norm(x_BLE), tokens_BNC, mask_BN)


class JointAttentionBlock(GradientCheckpointingLayer):
    """Two sets attend to each other by one score matrix; each then goes through its own feed-forward network.

    Args:
        config: see the head of this file.
        size, context_size: E and P.
        condition_size: C, of a vector that modulates a normalised copy of each set before the block (AdaLN).
        sides: which sets it modulates, of "dna" (x) and "protein" (p).
    """

    is_causal = False

    def __init__(
        self,
        config: PreTrainedConfig,
        size: int,
        context_size: int,
        condition_size: int | None = None,
        sides: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.config = config
        self.heads, self.scaling = config.attn_heads, config.attn_dim_head**-0.5
        inner = config.attn_heads * config.attn_dim_head
        norm = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
        self.norm, self.context_norm = norm(size), norm(context_size)
        self.to_qk = nn.Linear(size, inner, bias=False)
        self.context_to_qk = nn.Linear(context_size, inner, bias=False)
        self.to_v = nn.Linear(size, inner, bias=False)
        self.context_to_v = nn.Linear(context_size, inner, bias=False)
        self.to_out = nn.Linear(inner, size)
        self.context_to_out = nn.Linear(inner, context_size)
        self.ff_norm, self.context_ff_norm = nn.LayerNorm(size), nn.LayerNorm(context_size)
        self.ff = FeedForward(size, config.ff_mult, config.dropout)
        self.context_ff = FeedForward(context_size, config.ff_mult, config.dropout)
        widths = {"dna": size, "protein": context_size}
        self.adaln = None
        if condition_size is not None:
            self.adaln = nn.ModuleDict({side: AdaptiveLayerNorm(widths[side], condition_size) for side in sides})

    def forward(
        self,
        x_BTE: torch.Tensor,
        p_BRP: torch.Tensor,
        mask_BT: torch.Tensor | None,
        mask_BR: torch.Tensor | None,
        condition_BC: torch.Tensor | None = None,
    ) -> BothSides:
        """Both sets, of one batch size, after the block; rows of p where `mask_BR` is False are zero.

        Args:
            mask_BT, mask_BR: bool, True = real; None = all real.
            condition_BC: the vector for `adaln`.
        """
        if self.adaln is not None:
            x_BTE = self.adaln["dna"](x_BTE, condition_BC) if "dna" in self.adaln else x_BTE
            p_BRP = self.adaln["protein"](p_BRP, condition_BC) if "protein" in self.adaln else p_BRP
        x, p = self.norm(x_BTE), self.context_norm(p_BRP)
        parts = (self.to_qk(x), self.context_to_qk(p), self.to_v(x), self.context_to_v(p))
        qk_x, qk_p, v_x, v_p = (split_heads(part, self.heads) for part in parts)
        to_x, to_p, weights = self._attend(qk_x, qk_p, v_x, v_p, mask_BT, mask_BR)
        x_BTE = x_BTE + self.to_out(to_x.flatten(2))
        p_BRP = p_BRP + self.context_to_out(to_p.flatten(2))
        x_BTE = x_BTE + self.ff(self.ff_norm(x_BTE))
        p_BRP = p_BRP + self.context_ff(self.context_ff_norm(p_BRP))
        return BothSides(x_BTE, p_BRP if mask_BR is None else p_BRP * mask_BR[..., None].to(p_BRP.dtype), weights)

    def _attend(
        self,
        qk_x: torch.Tensor,
        qk_p: torch.Tensor,
        v_x: torch.Tensor,
        v_p: torch.Tensor,
        mask_BT: torch.Tensor | None,
        mask_BR: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(B, T, H, D), (B, R, H, D) and the weights of the first direction."""
        dropout = self.config.dropout
        if (self.config._attn_implementation or "eager") != "eager":
            to_x, _ = attend(self, qk_x, qk_p, v_p, mask_BR, self.scaling, dropout)
            to_p, _ = attend(self, qk_p, qk_x, v_x, mask_BT, self.scaling, dropout)
            return to_x, to_p, None
        scores = qk_x @ qk_p.transpose(-1, -2) * self.scaling
        over_p = _probabilities(scores, mask_BR)
        over_x = _probabilities(scores.transpose(-1, -2), mask_BT)
        to_x = nn.functional.dropout(over_p, dropout, self.training) @ v_p
        to_p = nn.functional.dropout(over_x, dropout, self.training) @ v_x
        return to_x.transpose(1, 2), to_p.transpose(1, 2), over_p


class InducedJointBlock(GradientCheckpointingLayer):
    """Two sets exchange through M learned latents: cost O((T + R) M) instead of O(T R).

    The latents, shifted by the context, attend to the union of both sets, and each set attends to the latents:
    MAB(a, b) = a' + FF(LN a') with a' = a + attention(LN a, LN b).
    """

    def __init__(
        self, config: PreTrainedConfig, size: int, context_size: int, latents: int, condition_size: int | None
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(latents, size))
        self.type_embeddings = nn.Parameter(torch.empty(2, size))
        self.condition = None if condition_size is None else nn.Linear(condition_size, size)
        self.from_context = nn.Linear(context_size, size) if context_size != size else None
        self.gather = InducedAttention(config, size, size)
        self.scatter = InducedAttention(config, size, size)
        self.context_scatter = InducedAttention(config, context_size, size)

    def initialize(self) -> None:
        """Unit latents; at first the context changes nothing."""
        init.normal_(self.latents)
        init.zeros_(self.type_embeddings)
        if self.condition is not None:
            init.zeros_(self.condition.weight)
            init.zeros_(self.condition.bias)

    def forward(
        self,
        x_BTE: torch.Tensor,
        p_BRP: torch.Tensor,
        mask_BT: torch.Tensor | None,
        mask_BR: torch.Tensor | None,
        condition_BC: torch.Tensor | None = None,
    ) -> BothSides:
        """As `JointAttentionBlock.forward`, without weights."""
        p_BRE = p_BRP if self.from_context is None else self.from_context(p_BRP)
        union = torch.cat([x_BTE + self.type_embeddings[0], p_BRE + self.type_embeddings[1]], dim=1)
        mask = None
        if mask_BT is not None or mask_BR is not None:
            masks = zip((mask_BT, mask_BR), (x_BTE, p_BRP), strict=True)
            parts = [x.new_ones(x.shape[:2], dtype=torch.bool) if m is None else m for m, x in masks]
            mask = torch.cat(parts, dim=1)
        latents = self.latents.expand(len(x_BTE), -1, -1)
        if self.condition is not None:
            latents = latents + self.condition(condition_BC)[:, None]
        latents = self.gather(latents, union, mask)
        x_BTE, p_BRP = self.scatter(x_BTE, latents, None), self.context_scatter(p_BRP, latents, None)
        return BothSides(x_BTE, p_BRP if mask_BR is None else p_BRP * mask_BR[..., None].to(p_BRP.dtype), None)


class InducedAttention(nn.Module):
    """MAB(a, b) of the Set Transformer, with norms before each branch."""

    def __init__(self, config: PreTrainedConfig, size: int, key_size: int) -> None:
        super().__init__()
        self.attn_norm, self.context_norm = nn.LayerNorm(size), nn.LayerNorm(key_size)
        self.attn = Attention(config, size, key_size)
        self.ff_norm = nn.LayerNorm(size)
        self.ff = FeedForward(size, config.ff_mult, config.dropout)

    def forward(self, a_BLE: torch.Tensor, b_BNC: torch.Tensor, mask_BN: torch.Tensor | None) -> torch.Tensor:
        a_BLE = a_BLE + self.attn(self.attn_norm(a_BLE), self.context_norm(b_BNC), mask_BN)
        return a_BLE + self.ff(self.ff_norm(a_BLE))


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention through the implementation of `module.config`; output (B, Lq, H, D), weights with eager only.

    flash attention takes no mask for keys of another number than the queries; sdpa is called in its place there.

    Args:
        query: (B, H, Lq, D). key, value: (B, H, Lk, D). key_mask: (B, Lk) bool, True = visible; None = all.
    """
    name = module.config._attn_implementation or "eager"
    is_flash = "flash" in name
    if is_flash and key_mask is not None and query.shape[2] != key.shape[2]:
        name, is_flash = "sdpa", False
    mask = None
    if key_mask is not None:
        mask = key_mask.long() if is_flash else key_mask[:, None, None, :]
    if mask is not None and name == "flex_attention":
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
        mask = mask.expand(-1, 1, query.shape[2], -1)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
    rate = dropout if module.training else 0.0
    return function(module, query, key, value, mask, scaling=scaling, dropout=rate)


def split_heads(x_BLI: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, L, H D) -> (B, H, L, D)."""
    return x_BLI.unflatten(-1, (heads, -1)).transpose(1, 2)


def same_batch(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The tensors with batches of 1 repeated (as views) to the largest batch among them; None stays."""
    batch = max(len(tensor) for tensor in (x, *others) if tensor is not None)
    return tuple(None if tensor is None else grown(tensor, batch) for tensor in (x, *others))


def grown(x: torch.Tensor, batch: int) -> torch.Tensor:
    """x with a batch of 1 repeated (as a view) to `batch`."""
    return x if len(x) == batch else x.expand(batch, *x.shape[1:])


def _probabilities(scores: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], torch.finfo(scores.dtype).min)
    working = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return scores.softmax(-1, dtype=working).to(scores.dtype)
