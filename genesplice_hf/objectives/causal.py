"""Next-token objective: every token is its own label; the model shifts them inside its loss.

Shapes: B examples, L tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from genesplice_hf.objectives.collation import IGNORED, DnaCollator


class CLMCollator(DnaCollator):
    """Makes batches for causal language modelling.

    A feature holds `input_ids` (with optional `attention_mask`, `token_type_ids` and, for `soft_mask_weight`
    below 1, `soft_mask`: the lower-case share of each token), or a raw `sequence`, which is tokenized here.
    `example_id` (a number or a string) names it; without one its content does. Further columns, old
    `labels` among them, are left aside.

    Args:
        tokenizer: any tokenizer with a pad token.
        pad_to_multiple_of: pads L up to a multiple of this many tokens.
        soft_mask_weight: loss weight of lower-case bases, in [0, 1]; below 1 the batch holds `loss_weight`.
        rc_probability: probability that a raw `sequence` is read from the opposite strand.
        seed: of the strand draws, which depend on (seed, epoch, example) alone; None draws and logs one.

    Raises:
        GeneSpliceError: arguments out of range, an empty batch, or features without the needed columns.
        SequenceError: an example without tokens, or a letter that the tokenizer refuses.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pad_to_multiple_of: int | None = None,
        soft_mask_weight: float = 1.0,
        rc_probability: float = 0.0,
        seed: int | None = None,
    ):
        super().__init__(tokenizer, pad_to_multiple_of, soft_mask_weight, rc_probability, seed)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `attention_mask`, `labels` (B,L) and, when asked for, `loss_weight` (B,L).

        Labels equal the ids where `attention_mask` is 1 and are -100 elsewhere, so that a pad token that
        doubles as an end token is still learned where it is real.
        """
        batch = self.read(features)
        labels = np.where(batch.attention_mask != 0, batch.input_ids, IGNORED)
        return self.emit(batch, batch.input_ids, labels)
