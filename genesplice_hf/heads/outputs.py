"""What models return beyond transformers' own outputs.

Shapes: B batch, L bases, M bins, T tracks, E hidden size of the level.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from genesplice_hf.layers.hierarchical import first_tokens
from genesplice_hf.layers.reverse_complement import split_strands


@dataclass
class HierarchicalModelOutput(ModelOutput):
    """States of one forward pass of an encoder with levels.

    Attributes:
        last_hidden_state: (B, L, E0), zero at padding; (B, M, En) with `use_decoder=False`.
        bin_hidden_state: (B, M, En) after the tower, left-justified: bin 0 starts at the first real base of a row,
            whatever side its padding is on. In a call with a cache, the bins of this call's bases.
        bin_mask: (B, M) bool, True for bins with a real base.
        past_key_values: cache of a causal model when `use_cache`.
        hidden_states: the input of every block (encoder levels, fine to coarse; tower; decoder levels, coarse to
            fine), then `last_hidden_state`: one more than there are blocks. Sizes differ by level, and rows are
            left-justified and padded to whole bins in all but the last.
        attentions: weights (B, H, M, M) of the tower's blocks, eager only.
        level_hidden_states: per level the state that leaves it: bases (`last_hidden_state`), the decoder's output of
            every level between, (B, ceil(L / bases per token), E) left-justified and zero at padding, and
            `bin_hidden_state`; bins alone without a decoder.
        reverse: with `rc_equivariant` the same of the other strand, read backwards: token i is what the other strand
            says of base i. Its bins are counted from the last real base; they cover the same bases as this strand's
            where the length is a multiple of the bin size. All other fields but `router_logits` are this strand's.
        router_logits: (B, M, n) for every tower block with experts, None without experts; with `rc_equivariant`
            (2B, M, n), strand after strand.
    """

    last_hidden_state: torch.Tensor | None = None
    bin_hidden_state: torch.Tensor | None = None
    bin_mask: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    level_hidden_states: tuple[torch.Tensor, ...] | None = None
    reverse: Optional["HierarchicalModelOutput"] = None
    router_logits: tuple[torch.Tensor, ...] | None = None

    def strands(self) -> list["HierarchicalModelOutput"]:
        """This strand, and the other one where it was read."""
        return [self] if self.reverse is None else [self, self.reverse]


def split_output(
    outputs: HierarchicalModelOutput, mask_BL: torch.Tensor | None, pool_sizes: Sequence[int]
) -> HierarchicalModelOutput:
    """The output for 2B rows as that of the first strand, with the other, read backwards, in `reverse`.

    Args:
        outputs: of the B given strands and then of their reverse complements.
        mask_BL: bool, True = real, of the given strands; None = all real.
        pool_sizes: of the model.
    """
    assert outputs.bin_mask is not None and outputs.level_hidden_states is not None
    bin_mask = outputs.bin_mask.chunk(2)[0]
    bins = split_strands(outputs.bin_hidden_state, bin_mask)
    has_bases = len(outputs.level_hidden_states) > 1
    state = split_strands(outputs.last_hidden_state, mask_BL if has_bases or not pool_sizes else bin_mask)
    between = []
    for level, x in enumerate(outputs.level_hidden_states[1:-1], 1):
        bases = math.prod(pool_sizes[:level])
        real = None if mask_BL is None else first_tokens(-(-mask_BL.sum(1) // bases), x.shape[1])
        between.append(split_strands(x, real))
    levels = [state, *between, bins] if has_bases else [bins]
    forward, reverse = (
        HierarchicalModelOutput(state[i], bins[i], bin_mask, level_hidden_states=tuple(pair[i] for pair in levels))
        for i in (0, 1)
    )
    forward.reverse, forward.router_logits = reverse, outputs.router_logits
    for name in ("hidden_states", "attentions"):
        recorded = getattr(outputs, name)
        if recorded is not None:
            setattr(forward, name, tuple(x if x is None else x.chunk(2)[0] for x in recorded))
    return forward


@dataclass
class TrackPredictionOutput(ModelOutput):
    """Predicted tracks.

    Attributes:
        loss: scalar, with labels.
        logits: (B, M, T) non-negative predictions per bin and track, zero in bins of padding; None where rows or
            species have tracks of their own.
        hidden_states, attentions: of the base model.
        predictions: in place of `logits` species -> (rows of the species, M, its T).
        last_hidden_state: (B, M, E) of the base model, where the model gives it.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    predictions: dict[str, torch.Tensor] | None = None
    last_hidden_state: torch.Tensor | None = None
