"""Bidirectional attention with ALiBi for every token, without a dense bias for long sequences.

Up to 2,048 tokens the bias is one additive mask, made once and shared by all layers. Beyond, queries are worked
through in chunks of 512, each with the bias of its own rows, which is made again in the backward pass; flex attention
computes the bias inside its kernel.

Shapes: B batch, H heads, L tokens, D head size, C queries of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.masking_utils import create_bidirectional_mask

from genesplice_hf.layers.alibi import alibi_bias, alibi_slopes, biased_mask
from genesplice_hf.layers.attention import AttentionFunction, open_empty_rows

# Longer sequences never have an (H, L, L) tensor.
MAX_DENSE_TOKENS = 2048
QUERY_CHUNK = 512


@dataclass(frozen=True)
class AlibiContext:
    """What all layers share in one forward pass.

    Attributes:
        name: of the attention implementation.
        slopes_H: (H,) float32.
        key_mask: (B, L) bool, True = real; None = all real.
        dense: (1 or B, H, L, L) bias with -inf at padding; None where there is none.
        block_mask: of flex attention; None elsewhere, or where all is real.
    """

    name: str
    slopes_H: torch.Tensor
    key_mask: torch.Tensor | None
    dense: torch.Tensor | None = None
    block_mask: Any = None

    @classmethod
    def of(
        cls, config: PreTrainedConfig, x_BLE: torch.Tensor, key_mask: torch.Tensor | None, output_attentions: bool
    ) -> "AlibiContext":
        """For the config's implementation and number of heads, and states in the dtype of `x_BLE`.

        Raises:
            ValueError: flash attention, whose path in transformers takes no slopes.
        """
        name = config._attn_implementation or "eager"
        if "flash" in name:
            raise ValueError(
                f'`attn_implementation="{name}"` cannot add the bias of ALiBi; use "sdpa" or "flex_attention".'
            )
        slopes_H, length = alibi_slopes(config.num_attention_heads, x_BLE.device), x_BLE.shape[1]
        if name == "flex_attention":
            mask = create_bidirectional_mask(config=config, inputs_embeds=x_BLE, attention_mask=key_mask)
            return cls(name, slopes_H, key_mask, block_mask=mask)
        if length > MAX_DENSE_TOKENS and not output_attentions:
            return cls(name, slopes_H, key_mask)
        return cls(name, slopes_H, key_mask, dense=_rows(slopes_H, key_mask, 0, length, length, x_BLE.dtype))


def alibi_attention(
    function: AttentionFunction,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: AlibiContext,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(q k^T scaling - m_h |i - j|) v over the real keys.

    Args:
        function: what `ALL_ATTENTION_FUNCTIONS.get_interface` gives for the module's implementation; flex attention is
            called with a bias of its own instead.
        module: carries `config`, `is_causal`, `num_key_value_groups`, `training`.
        query, key, value: (B, H, L, D).
        dropout: of the weights; not with flex attention.

    Returns:
        Output (B, L, H, D), arbitrary but finite for queries of padding, and weights (B, H, L, L) or None (eager with
        a dense bias gives them).
    """
    if context.name == "flex_attention":
        return _flex(module, query, key, value, context, scaling, dropout), None
    if context.dense is not None:
        return function(module, query, key, value, context.dense, scaling=scaling, dropout=dropout)
    length, chunks = query.shape[2], []
    for start in range(0, length, QUERY_CHUNK):
        inputs = (function, module, query[:, :, start : start + QUERY_CHUNK], key, value, context, start)
        if torch.is_grad_enabled():
            # A kept bias for each chunk would be a dense one for each layer.
            chunks.append(checkpoint(_chunk, *inputs, scaling, dropout, use_reentrant=False))
        else:
            chunks.append(_chunk(*inputs, scaling, dropout))
    return torch.cat(chunks, dim=1), None


def _chunk(
    function: AttentionFunction,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: AlibiContext,
    start: int,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """(B, C, H, D) of the queries from `start` on."""
    rows = (start, start + query.shape[2], key.shape[2], query.dtype)
    mask = _rows(context.slopes_H, context.key_mask, *rows)
    return function(module, query, key, value, mask, scaling=scaling, dropout=dropout)[0]


def _rows(
    slopes_H: torch.Tensor, key_mask: torch.Tensor | None, start: int, stop: int, length: int, dtype: torch.dtype
) -> torch.Tensor:
    """(1 or B, H, stop - start, L) additive mask of the queries start .. stop - 1."""
    keys = torch.arange(length, device=slopes_H.device)
    bias = alibi_bias(slopes_H, keys[start:stop, None] - keys, dtype)[None]
    if key_mask is None:
        return bias
    return biased_mask(open_empty_rows(key_mask[:, None, None, :])[0], bias)


def _flex(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: AlibiContext,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    if dropout:
        raise ValueError('`flex_attention` has no dropout of attention weights; set it to 0, or use "sdpa".')
    slopes_H = context.slopes_H

    def with_bias(
        score: torch.Tensor, row: torch.Tensor, head: torch.Tensor, i: torch.Tensor, j: torch.Tensor
    ) -> torch.Tensor:
        return score - slopes_H[head] * (i - j).abs()

    out_BHLD = compile_friendly_flex_attention(
        query, key, value, training=module.training, score_mod=with_bias, block_mask=context.block_mask, scale=scaling
    )
    return out_BHLD.transpose(1, 2)
