"""What models return beyond transformers' own outputs.

Shapes: B batch, L bases, M bins, E hidden size of the level.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput


@dataclass
class HierarchicalModelOutput(ModelOutput):
    """States of one forward pass of an encoder with levels.

    Attributes:
        last_hidden_state: (B, L, E0), zero at padding; (B, M, En) with `use_decoder=False`.
        bin_hidden_state: (B, M, En) after the tower, left-justified: bin 0 starts at the first real base.
        bin_mask: (B, M) bool, True for bins with a real base.
        past_key_values: cache of a causal flat model when `use_cache`.
        hidden_states: input of the first block, output of every block but the last in the order in which they run,
            then `last_hidden_state`; sizes differ by level.
        attentions: weights of every block, eager only.
    """

    last_hidden_state: torch.Tensor | None = None
    bin_hidden_state: torch.Tensor | None = None
    bin_mask: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
