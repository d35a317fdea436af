"""Several objectives in one batch: tokens to predict, two views to recognise, and segments that follow each other.

Shapes: B examples, L tokens of the window, W tokens of the second view, S tokens of the pair of segments.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.objectives.contrastive import ContrastiveCollator, check_views
from genesplice_hf.objectives.next_segment import NextSegmentCollator


class TokenCollator(Protocol):
    """A collator whose batch holds `input_ids` and `labels`."""

    def __call__(self, features: Sequence[Mapping[str, Any]], /) -> dict[str, torch.Tensor]: ...

    def set_epoch(self, epoch: int) -> None: ...


class MultiObjectiveCollator:
    """Puts the batches of other collators together, for a model that sums their losses.

    The batch of `tokens` (masked, or whole for a causal model) is at the same time the first view of the
    contrast, which saves a third of the computation; only `contrastive.second` is then used of the views.
    Without `tokens` both views are those of `contrastive`.

    Args:
        tokens: `DnaMLMCollator`, `KmerSpanCollator` or `CLMCollator`.
        contrastive: `ContrastiveCollator`.
        next_segment: `NextSegmentCollator`; features must then be window rows.

    At least one of `tokens` and `contrastive` is needed; a `NextSegmentCollator` alone needs no mixing. Each
    collator has its own seed; all of them may have the same.

    Raises:
        GeneSpliceError: nothing to mix, or a second view that never differs from the tokens.
    """

    def __init__(
        self,
        tokens: TokenCollator | None = None,
        contrastive: ContrastiveCollator | None = None,
        next_segment: NextSegmentCollator | None = None,
    ):
        if tokens is None and contrastive is None:
            raise GeneSpliceError(
                "`tokens` and `contrastive` are both None; give one of them, or use `NextSegmentCollator` by itself"
            )
        if tokens is not None and contrastive is not None:
            first = ("mask",) if hasattr(tokens, "mlm_probability") else ("identity",)
            check_views(first, tuple(contrastive.views[1]), contrastive.rc_equivariant)
        self.tokens = tokens
        self.contrastive = contrastive
        self.next_segment = next_segment

    @property
    def collators(self) -> list[TokenCollator | ContrastiveCollator | NextSegmentCollator]:
        """The collators that take part."""
        return [part for part in (self.tokens, self.contrastive, self.next_segment) if part is not None]

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of every collator; call it before each pass over the data."""
        for collator in self.collators:
            collator.set_epoch(epoch)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns in one dict, as far as there is a collator for it:

        - `input_ids`, `attention_mask` (B,L), `labels` (B,L), `loss_weight` (B,L) of `tokens`;
        - `view_input_ids`, `view_attention_mask` (B,W) of the second view;
        - `segment_input_ids`, `segment_attention_mask`, `segment_ids` (B,S) and `follows` (B,).

        `token_type_ids` of single sequences, which are 0 throughout, are left out.
        """
        batch: dict[str, torch.Tensor] = {}
        if self.tokens is not None:
            batch |= self.tokens(features)
            batch.pop("token_type_ids", None)
        if self.contrastive is not None:
            batch |= self.contrastive(features) if self.tokens is None else self.contrastive.second_view(features)
        if self.next_segment is not None:
            pair = self.next_segment(features)
            for name in ("input_ids", "attention_mask"):
                batch[f"segment_{name}"] = pair.pop(name)
            batch |= pair
        return batch
