"""Attention that every model looks up by name, and banded window attention in O(L w) memory.

Models look the attention function up in transformers' `ALL_ATTENTION_FUNCTIONS` (eager, sdpa, flash_attention_2,
flex_attention) with `eager_attention` as the definition, and hand it to `window_attention` for layers with a
window. transformers' own window masks are dense, (L, L); here the window is cut into blocks, so that no mask
larger than (w, 3w) exists. The bias of ALiBi is a constant (H, w, 3w) table there.

The window is a radius w: bidirectional attention sees |i - j| <= w, causal attention sees 0 <= i - j <= w.

Shapes: B batch, H heads, K key/value heads, L tokens, D head size, w window radius, n blocks of w tokens.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from genesplice_hf.layers.alibi import alibi_bias, biased_mask

logger = logging.getLogger(__name__)

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

# Blocks are processed in groups of at most this many queries, which bounds the copies of keys and values.
MAX_GROUP_TOKENS = 65_536
# Up to so many windows, one call with an (L, L) mask costs less than cutting blocks; memory stays O(L w).
MAX_DENSE_WINDOWS = 8


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain softmax(q k^T * scaling) v; the definition that the other implementations must equal.

    Args:
        query: (B, H, Lq, D). key, value: (B, K, Lk, D), K divides H.
        attention_mask: None (causal when `module.is_causal` and Lq > 1), bool (True = visible) or additive,
            broadcastable to (B, H, Lq, Lk).

    Returns:
        Output (B, Lq, H, D) and weights (B, H, Lq, Lk).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is None and module.is_causal and query.shape[2] > 1:
        attention_mask = causal_mask(query.shape[2], key.shape[2], query.device)
    if attention_mask is not None:
        scores = _masked(scores, attention_mask)
    working = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = scores.softmax(dim=-1, dtype=working).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def _masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def best_attn_implementation(device: torch.device | str, dtype: torch.dtype) -> str:
    """Names the fastest implementation that can run here, for callers who ask; the choice is logged.

    Nothing in the package calls this by itself: an explicit `attn_implementation` either works or raises.
    """
    half_on_cuda = torch.device(device).type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    choice = "flash_attention_2" if half_on_cuda and is_flash_attn_2_available() else "sdpa"
    logger.info("attention implementation for %s, %s: %s", device, dtype, choice)
    return choice


def causal_mask(num_queries: int, num_keys: int, device: torch.device, window: int | None = None) -> torch.Tensor:
    """(Lq, Lk) bool: query i is the (Lk - Lq + i)-th key's token and sees itself and what came before."""
    distance = _distance(num_queries, num_keys, device)
    visible = distance >= 0
    return visible if window is None else visible & (distance <= window)


def band_mask(num_queries: int, num_keys: int, device: torch.device, window: int) -> torch.Tensor:
    """(Lq, Lk) bool: |i - j| <= window, the last query standing at the last key."""
    return _distance(num_queries, num_keys, device).abs() <= window


def _distance(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)
    return queries[:, None] - torch.arange(num_keys, device=device)[None, :]


def open_empty_rows(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Opens the rows that see no key, so that softmax stays finite; also says which rows had one.

    Args:
        mask: bool (..., Lq, Lk).

    Returns:
        The mask with empty rows all True, and (..., Lq, 1) bool: False where the output must be zeroed.
    """
    has_key = mask.any(-1, keepdim=True)
    return mask | ~has_key, has_key


class Band(NamedTuple):
    """What the queries of one call see: `visible` (Lq, Lk) bool, and `bias` (H, Lq, Lk) of their scores or None."""

    visible: torch.Tensor
    bias: torch.Tensor | None


def window_attention(
    function: AttentionFunction,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    window: int,
    scaling: float,
    dropout: float = 0.0,
    output_attentions: bool = False,
    slopes_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention inside a window of radius w through a looked-up attention function.

    Args:
        function: what `ALL_ATTENTION_FUNCTIONS.get_interface` gives for the module's implementation.
        module: carries `config`, `is_causal`, `num_key_value_groups`, `training`.
        query: (B, H, Lq, D); key, value: (B, K, Lk, D). Lq < Lk only in causal decoding with a cache.
        key_mask: (B, Lk) bool, True = real; None = all real.
        window: radius w >= 1 in tokens.
        output_attentions: eager only; returns dense weights, so it needs O(L^2) memory.
        slopes_H: (H,) slopes of ALiBi (`layers.alibi`), not with flash; None = no bias.

    Returns:
        Output (B, Lq, H, D), zero where a query sees no key, and weights (B, H, Lq, Lk) or None.

    Memory is O(L w): the (L, L) matrix never exists unless `output_attentions` asks for it.
    """
    name = module.config._attn_implementation
    if name is not None and "flash" in name:
        # transformers hands the kernel (sliding_window - 1) on each side, so the radius is passed plus one.
        mask = None if key_mask is None else key_mask.long()
        return function(module, query, key, value, mask, scaling=scaling, dropout=dropout, sliding_window=window + 1)
    if name == "flex_attention":
        # flex on a CPU has no backward and compiles for seconds; the banded path needs no block mask at all.
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    attend = partial(_attend, function, module, scaling, dropout)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if output_attentions or num_queries <= window or num_keys <= MAX_DENSE_WINDOWS * window:
        build = causal_mask if module.is_causal else band_mask
        visible = build(num_queries, num_keys, query.device, window=window)
        distance = _distance(num_queries, num_keys, query.device)
        return attend(query, key, value, Band(visible, _bias(slopes_H, distance, query)), key_mask)
    band = _block_band(window, module.is_causal, slopes_H, query)
    # Queries that a cache has answered already take empty places, so that blocks of queries and keys stay aligned.
    query = nn.functional.pad(query, (0, 0, num_keys - num_queries, 0))
    return _banded(attend, query, key, value, key_mask, band)[:, -num_queries:], None


def _attend(
    function: AttentionFunction,
    module: nn.Module,
    scaling: float,
    dropout: float,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    band: Band,
    key_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One call with the band and the (B, Lk) `key_mask`; queries that see no key give zeros."""
    if key_mask is None:
        mask = biased_mask(band.visible[None, None], band.bias)
        return function(module, query, key, value, mask, scaling=scaling, dropout=dropout)
    visible, has_key = open_empty_rows(band.visible & key_mask[:, None, None, :])
    mask = biased_mask(visible, band.bias)
    out, weights = function(module, query, key, value, mask, scaling=scaling, dropout=dropout)
    return out * has_key.transpose(1, 2).to(out.dtype), weights


def _banded(
    attend: AttentionFunction,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    band: Band,
) -> torch.Tensor:
    """Query block c against key blocks c-1, c, c+1 (causal: c-1, c), each block w tokens long; (B, L, H, D)."""
    batch, _, length, _ = query.shape
    window, width = band.visible.shape
    num_blocks = -(-length // window)
    tail = num_blocks * window - length
    after = width - 2 * window
    real = key_mask if key_mask is not None else query.new_ones(batch, length, dtype=torch.bool)
    real = nn.functional.pad(real, (window, tail + after))
    query = nn.functional.pad(query, (0, 0, 0, tail))
    key, value = (nn.functional.pad(x, (0, 0, window, tail + after)) for x in (key, value))
    outputs = []
    for start in range(0, num_blocks * window, _group_tokens(window)):
        stop = min(start + _group_tokens(window), num_blocks * window)
        keys = slice(start, stop + window + after)
        group = (query[:, :, start:stop], key[:, :, keys], value[:, :, keys], real[:, keys])
        outputs.append(_attend_blocks(attend, *group, band))
    return torch.cat(outputs, dim=1)[:, :length]


def _group_tokens(window: int) -> int:
    return max(1, MAX_GROUP_TOKENS // window) * window


def _block_band(window: int, is_causal: bool, slopes_H: torch.Tensor | None, query: torch.Tensor) -> Band:
    """(w, 3w) or causal (w, 2w): what query a of a block sees of key b of its neighbourhood."""
    queries = torch.arange(window, 2 * window, device=query.device)
    distance = queries[:, None] - torch.arange((2 if is_causal else 3) * window, device=query.device)[None, :]
    visible = (distance >= 0) & (distance <= window) if is_causal else distance.abs() <= window
    return Band(visible, _bias(slopes_H, distance, query))


def _bias(slopes_H: torch.Tensor | None, distance: torch.Tensor, query: torch.Tensor) -> torch.Tensor | None:
    return None if slopes_H is None else alibi_bias(slopes_H, distance, query.dtype)


def _attend_blocks(
    attend: AttentionFunction,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    real: torch.Tensor,
    band: Band,
) -> torch.Tensor:
    """Folds the n blocks of one group into the batch and attends once; (B, n w, H, D)."""
    batch, heads, length, head_dim = query.shape
    window, width = band.visible.shape
    num_blocks = length // window
    q = query.view(batch, heads, num_blocks, window, head_dim).transpose(1, 2).flatten(0, 1)
    k, v = (
        x.unfold(2, width, window).permute(0, 2, 1, 4, 3).reshape(batch * num_blocks, -1, width, head_dim)
        for x in (key, value)
    )
    visible = real.unfold(1, width, window).reshape(batch * num_blocks, width)
    out, _ = attend(q, k, v, band, visible)
    return out.reshape(batch, length, heads, head_dim)


def full_attention_mask(
    config: PreTrainedConfig,
    x_BLE: torch.Tensor,
    key_mask: torch.Tensor | None,
    past: int,
    slopes_H: torch.Tensor | None = None,
) -> Any:
    """The mask of full layers in the form that the config's implementation takes.

    Args:
        key_mask: (B, past + L) bool or None. past: tokens that a cache already holds.
        slopes_H: (H,) slopes of ALiBi, for eager and sdpa; None = no bias.

    Returns:
        None where the implementation needs none; flash: (B, Lk); flex: a BlockMask, or with a past (where sdpa takes
        its place) as sdpa; eager and sdpa: bool, (B, 1, 1, Lk) for bidirectional attention, (B or 1, 1, L, Lk) for
        causal attention with padding or a past; with ALiBi additive, (B or 1, H, L, Lk).
    """
    if slopes_H is not None:
        return _full_alibi_mask(config, x_BLE, key_mask, past, slopes_H)
    name, is_causal = config._attn_implementation or "eager", config.is_decoder
    if "flash" in name:
        return None if key_mask is None else key_mask.long()
    if name == "flex_attention" and past == 0:
        build = create_causal_mask if is_causal else create_bidirectional_mask
        return build(config=config, inputs_embeds=x_BLE, attention_mask=key_mask, past_key_values=None)
    length = x_BLE.shape[1]
    if not is_causal:
        return None if key_mask is None else open_empty_rows(key_mask[:, None, None, :])[0]
    if key_mask is None and (past == 0 or length == 1):
        return None
    visible = causal_mask(length, past + length, x_BLE.device)[None, None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    return open_empty_rows(visible)[0]


def _full_alibi_mask(
    config: PreTrainedConfig, x_BLE: torch.Tensor, key_mask: torch.Tensor | None, past: int, slopes_H: torch.Tensor
) -> torch.Tensor:
    """Dense, for full layers have few tokens: 4 H L^2 bytes in float32 (0.1 GiB for 6 heads and 2,048 tokens)."""
    length, device = x_BLE.shape[1], x_BLE.device
    distance = _distance(length, past + length, device)
    visible = causal_mask(length, past + length, device) if config.is_decoder else torch.ones_like(distance).bool()
    visible = visible[None, None]
    if key_mask is not None:
        visible = open_empty_rows(visible & key_mask[:, None, None, :])[0]
    return biased_mask(visible, alibi_bias(slopes_H, distance, x_BLE.dtype))
