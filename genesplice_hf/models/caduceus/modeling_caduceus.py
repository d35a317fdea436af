"""Heads of Caduceus: masked language model, sequence and token classification.

With `rcps` each head reads both strands: what it says of the reverse complement is what it says of the sequence, read
backwards and with complementary letters exchanged.

Shapes: B batch, L tokens, P wanted positions, E width of one strand, V vocabulary, C labels.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import can_return_tuple

from genesplice_hf.heads.losses import weighted_cross_entropy
from genesplice_hf.heads.pooling import without_special
from genesplice_hf.heads.sequence import SequenceClassificationHead, infer_problem_type, sequence_loss
from genesplice_hf.heads.token import TokenClassificationHead
from genesplice_hf.layers.hierarchical import take_tokens
from genesplice_hf.layers.padding import as_mask
from genesplice_hf.layers.reverse_complement import strand_mean
from genesplice_hf.models.caduceus.configuration_caduceus import CaduceusConfig
from genesplice_hf.models.caduceus.modeling_caduceus_base import CaduceusModel, CaduceusPreTrainedModel


class _CaduceusWithHead(CaduceusPreTrainedModel):
    """A base model and what every head needs to read its strands."""

    def __init__(self, config: CaduceusConfig) -> None:
        config.validate()
        super().__init__(config)
        self.caduceus = CaduceusModel(config)

    def strands(self, state: torch.Tensor) -> list[torch.Tensor]:
        """What each strand says of every position, (B, L, E) each: the given one and, with `rcps`, the other."""
        if not self.config.rcps:
            return [state]
        given, other = state.chunk(2, dim=-1)
        return [given, other.flip(-1)]


class CaduceusForMaskedLM(_CaduceusWithHead):
    """Predicts masked bases; the head's matrix is the embedding."""

    _tied_weights_keys = {"lm_head.weight": "caduceus.embeddings.weight"}

    def __init__(self, config: CaduceusConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weight: torch.Tensor | None = None,
        logits_positions: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """As `CaduceusModel.forward`, and:

        Args:
            labels: (B, L) true ids, -100 where nothing is asked (the published code's ignored label is the pad id).
            loss_weight: (B, L) weight of each label.
            logits_positions: (B, P) positions whose logits and loss are wanted; None = all.

        Returns:
            `logits` (B, L, V), or (B, P, V) with `logits_positions`.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.caduceus(input_ids, attention_mask, inputs_embeds, **kwargs)
        state = outputs.last_hidden_state
        if logits_positions is not None:
            state = take_tokens(state, logits_positions)
            labels = None if labels is None else take_tokens(labels, logits_positions)
            loss_weight = None if loss_weight is None else take_tokens(loss_weight, logits_positions)
        logits = self._logits(state)
        loss = None if labels is None else weighted_cross_entropy(logits, labels, loss_weight, num_items)
        return MaskedLMOutput(loss, logits, outputs.hidden_states)

    def _logits(self, state: torch.Tensor) -> torch.Tensor:
        """The other strand speaks of complements; the published head adds the two."""
        given, *other = (self.lm_head(strand) for strand in self.strands(state))
        return given + other[0][..., self.complement(given.device)] if other else given


class CaduceusForSequenceClassification(_CaduceusWithHead):
    """One class, value or label set per sequence, from pooled states (`config.classifier_pooling`)."""

    def __init__(self, config: CaduceusConfig) -> None:
        super().__init__(config)
        self.classifier = SequenceClassificationHead(
            config.d_model, config.num_labels, config.classifier_pooling, config.classifier_dropout
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """As `CaduceusModel.forward`; `labels` as `heads.sequence.sequence_loss` takes them, `logits` (B, C).

        With `rcps` the mean over both strands, each pooled in its own reading direction.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.caduceus(input_ids, attention_mask, inputs_embeds, **kwargs)
        state = outputs.last_hidden_state
        mask = as_mask(None if attention_mask is None else attention_mask.bool(), state)
        if self.config.classifier_pooling != "cls":
            mask = without_special(mask, input_ids, self.config.special_token_ids)
        given, *other = self.strands(state)
        readings = [(given, mask), *((strand.flip(1), mask.flip(1)) for strand in other)]
        logits = strand_mean([self.classifier(*reading) for reading in readings])
        loss = None
        if labels is not None:
            problem = infer_problem_type(self.config.problem_type, self.config.num_labels, labels)
            loss = sequence_loss(logits, labels, problem, num_items)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states)


class CaduceusForTokenClassification(_CaduceusWithHead):
    """One label per token."""

    def __init__(self, config: CaduceusConfig) -> None:
        super().__init__(config)
        self.classifier = TokenClassificationHead(config.d_model, config.num_labels, config.classifier_dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """As `CaduceusModel.forward`; `labels` (B, L) class ids, -100 = ignored; `logits` (B, L, C).

        With `rcps` the mean over both strands, the labels of the other one exchanged by `config.token_strand_pairs`.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.caduceus(input_ids, attention_mask, inputs_embeds, **kwargs)
        logits = [self.classifier(strand) for strand in self.strands(outputs.last_hidden_state)]
        logits = strand_mean(logits, self.config.token_strand_pairs)
        loss = None if labels is None else weighted_cross_entropy(logits, labels, None, num_items)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states)
