"""The causal U of `models/genesplice` on new tokens only, with the past in a `GeneSpliceCache`.

A coarse token exists when its bin is full, and then shows in the tokens after that bin, so a chunk of any length goes
down level by level, each level in parallel over the tokens that the chunk finished there, and up again:

    x_l = encoder_l(x_l);  x_{l+1} = down_l(means of the bins that became full), if any
    y_l = decoder_l(x_l + what the last full bin before each token carries; zero before the first)

Shapes: B batch, L new tokens, M new bins, E hidden size of the level, p pool size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.hierarchical import first_tokens, take_tokens
from genesplice_hf.layers.hierarchical_cache import GeneSpliceCache, LevelCache, last_tokens
from genesplice_hf.layers.padding import zero_padding
from genesplice_hf.layers.window_transformer import run_blocks


def new_columns(mask: torch.Tensor, num_new: int, cache: GeneSpliceCache | None) -> torch.Tensor:
    """The part of a (B, past + L) or (B, L) mask that belongs to the L new tokens.

    Raises:
        SequenceError: the mask has another width.
    """
    past = 0 if cache is None else cache.get_seq_length()
    if mask.shape[1] not in (num_new, past + num_new):
        raise SequenceError(
            f"`attention_mask` must cover the {num_new} new tokens, or the {past} cached ones too, got "
            f"{mask.shape[1]} columns."
        )
    return mask[:, -num_new:]


def level_caches(
    cache: GeneSpliceCache | None, x_BLE: torch.Tensor, mask_BL: torch.Tensor | None, pool_sizes: Sequence[int]
) -> list[LevelCache] | list[None]:
    """One view of the cache per level for this call, bases first; without a cache all None.

    In the flat form (no pools) rows move on together and padding counts as a token, which the mask hides.
    """
    return [None] * (len(pool_sizes) + 1) if cache is None else _arrive(cache, x_BLE, mask_BL, pool_sizes)


def _arrive(
    cache: GeneSpliceCache, x_BLE: torch.Tensor, mask_BL: torch.Tensor | None, pool_sizes: Sequence[int]
) -> list[LevelCache]:
    batch, length = x_BLE.shape[:2]
    new_B = torch.full((batch,), length)
    if mask_BL is not None and pool_sizes:
        new_B = mask_BL.sum(1).cpu()
    return cache.arrive(new_B, length, pool_sizes)


def remember(fine: LevelCache, x_BLE: torch.Tensor, added_BME: torch.Tensor, pool_size: int) -> torch.Tensor:
    """Stores what the tokens after this call will need of a level.

    Args:
        x_BLE: encoder output of the level. added_BME: what its new bins add to the tokens after them.

    Returns:
        (B, 1 + M, E): what the last bin before this call adds, then the new ones.
    """
    _hold_unpooled(fine, x_BLE, pool_size)
    before = fine.cache.carried.get(fine.level)
    before = torch.zeros_like(x_BLE[:, 0]) if before is None else before
    joined = torch.cat([before[:, None], added_BME], dim=1)
    fine.cache.carried[fine.level] = last_tokens(joined, 1 + fine.coarser(pool_size).new_B, 1)[:, 0]
    return joined


def _working(x: torch.Tensor) -> torch.dtype:
    # Sums that grow over many calls are kept in float32 at least, as one call's sum is.
    return torch.promote_types(x.dtype, torch.float32)


def _hold_unpooled(fine: LevelCache, x_BLE: torch.Tensor, pool_size: int) -> None:
    """Adds the tokens after the last full bin to the running sum, which starts anew where a bin became full."""
    end_B = fine.past_B % pool_size + fine.new_B
    tail_B = torch.minimum(end_B % pool_size, fine.new_B)
    keep = min(pool_size - 1, int(fine.new_B.max()))
    tokens = last_tokens(x_BLE, fine.new_B, keep).to(_working(x_BLE))
    is_tail = torch.arange(keep) >= keep - tail_B[:, None]
    total = zero_padding(tokens, is_tail.to(x_BLE.device)).sum(1)
    before = fine.cache.pooled_sums.get(fine.level)
    if before is not None:
        goes_on = (end_B < pool_size).to(x_BLE.device)
        total = total + before * goes_on[:, None]
    fine.cache.pooled_sums[fine.level] = total


def finished_means(fine: LevelCache, num_bins: int, x_BLE: torch.Tensor, pool_size: int) -> torch.Tensor:
    """(B, M, E) means of the bins that the new tokens fill; a row's results after its last full bin are void."""
    start_B = fine.past_B % pool_size
    index = torch.arange(num_bins * pool_size) - start_B[:, None]
    tokens = take_tokens(x_BLE, index.clamp(0, x_BLE.shape[1] - 1).to(x_BLE.device))
    tokens = zero_padding(tokens.to(_working(x_BLE)), (index >= 0).to(x_BLE.device))
    sums = tokens.unflatten(1, (num_bins, pool_size)).sum(2)
    sums[:, 0] += fine.cache.pooled_sums[fine.level]
    return (sums / pool_size).to(x_BLE.dtype)


def last_bin_before(fine: LevelCache, joined_BME: torch.Tensor, num_tokens: int, pool_size: int) -> torch.Tensor:
    """(B, L, E): for each new token the entry of `remember`'s result that the last full bin before it has."""
    slot = ((fine.past_B % pool_size)[:, None] + torch.arange(num_tokens)) // pool_size
    return take_tokens(joined_BME, slot.clamp(max=joined_BME.shape[1] - 1).to(joined_BME.device))


@dataclass(frozen=True)
class Continuation:
    """One call on new tokens.

    Attributes:
        model: a causal `GeneSpliceModel` with pools and a decoder.
        levels: the cache's view per level, bases first.
        output_attentions: keep the weights of the tower's blocks.
        router_logits: collects those of tower blocks with experts.
    """

    model: nn.Module
    levels: list[LevelCache]
    output_attentions: bool
    router_logits: list[torch.Tensor] | None

    def run(self, level: int, x_BLE: torch.Tensor) -> list[torch.Tensor]:
        """New tokens of a level -> what leaves that level on the way up, (B, L, E), and every coarser one."""
        if level == len(self.model.config.pool_sizes):
            collected = (self.output_attentions, self.router_logits)
            return [self.model.tower_norm(self._blocks(self.model.tower, level, x_BLE, *collected))]
        pool_size = self.model.config.pool_sizes[level]
        x = self._blocks(self.model.encoder[level], level, x_BLE)
        coarse = self._new_bins(level, x, pool_size)
        joined = remember(self.levels[level], x, self.model.up[level](coarse[0]), pool_size)
        carried = last_bin_before(self.levels[level], joined, x.shape[1], pool_size)
        return [self._blocks(self.model.decoder[level], level, x + carried), *coarse]

    def _new_bins(self, level: int, x: torch.Tensor, pool_size: int) -> list[torch.Tensor]:
        num_bins = int(self.levels[level + 1].new_B.max())
        if num_bins == 0:
            return [x.new_zeros(len(x), 0, size) for size in self.model.config.hidden_sizes[level + 1 :]]
        means = finished_means(self.levels[level], num_bins, x, pool_size)
        return self.run(level + 1, self.model.down[level](means))

    def _blocks(self, blocks: nn.ModuleList, level: int, x: torch.Tensor, *collected: Any) -> torch.Tensor:
        windows = [block.self_attn.shape.window for block in blocks]
        mask = self.levels[level].key_mask(x.shape[1], windows, x.device)
        return run_blocks(self.model.config, blocks, x, mask, self.levels[level], *collected)


def continue_sequences(
    model: nn.Module,
    x_BLE: torch.Tensor,
    mask_BL: torch.Tensor | None,
    cache: GeneSpliceCache,
    output_attentions: bool = False,
    router_logits: list[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Runs a causal hierarchical model on new tokens after those that the cache holds.

    Args:
        model: a causal `GeneSpliceModel` with pools and a decoder.
        x_BLE: embeddings of the new tokens; each row's real ones first.
        mask_BL: bool, True = real; None = all real.
        output_attentions: keep the weights of the tower's blocks.
        router_logits: collects the logits (B, M, n) of tower blocks with experts.

    Returns:
        States of the new tokens (B, L, E), zero at padding; states of the bins that became full (B, M, E); (B, M)
        bool, True where a row has that bin; and, finer first, what leaves the levels between.
    """
    levels = _arrive(cache, x_BLE, mask_BL, model.config.pool_sizes)
    longest = int(levels[0].new_B.max())
    x = x_BLE[:, :longest]
    if longest == 0:
        states = [x.new_zeros(len(x), 0, size) for size in model.config.hidden_sizes]
    else:
        x = x if model.stem is None else model.stem(x, None, levels[0])
        states = Continuation(model, levels, output_attentions, router_logits).run(0, x)
    masks = [first_tokens(level.new_B, y.shape[1]).to(y.device) for level, y in zip(levels, states, strict=True)]
    base, *between, bins = (zero_padding(y, mask) for y, mask in zip(states, masks, strict=True))
    base = zero_padding(model.final_norm(base), masks[0])
    return nn.functional.pad(base, (0, 0, 0, x_BLE.shape[1] - longest)), bins, masks[-1], *between
