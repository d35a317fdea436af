"""Heads of DNABERT-2: masked LM, sequence and token classification.

Shapes: B batch, L tokens, P wanted positions, V vocabulary, C labels.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import can_return_tuple

from genesplice_hf.heads.encoder_outputs import masked_lm_output, sequence_output, token_output
from genesplice_hf.heads.prediction import PredictionHead
from genesplice_hf.heads.sequence import SequenceClassificationHead
from genesplice_hf.heads.token import TokenClassificationHead
from genesplice_hf.models.dnabert2.configuration_dnabert2 import DNABERT2Config
from genesplice_hf.models.dnabert2.modeling_dnabert2_base import DNABERT2Model, DNABERT2PreTrainedModel

# The published head does not follow `layer_norm_eps`.
_HEAD_EPS = 1e-12


class _WithBase(DNABERT2PreTrainedModel):
    def __init__(self, config: DNABERT2Config) -> None:
        config.validate()
        super().__init__(config)
        self.dnabert2 = DNABERT2Model(config)

    @property
    def classifier_dropout(self) -> float:
        given = self.config.classifier_dropout
        return self.config.hidden_dropout_prob if given is None else given


class DNABERT2ForMaskedLM(_WithBase):
    """Predicts masked tokens; the decoder is the embedding unless `tie_word_embeddings=False`."""

    _tied_weights_keys = {"lm_head.decoder.weight": "dnabert2.word_embeddings.weight"}

    def __init__(self, config: DNABERT2Config) -> None:
        super().__init__(config)
        self.lm_head = PredictionHead(config.hidden_size, config.vocab_size, _HEAD_EPS)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weight: torch.Tensor | None = None,
        logits_positions: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """As `DNABERT2Model.forward`, and:

        Args:
            labels: (B, L) true ids, -100 where nothing is asked; 0 is an id like any other.
            loss_weight: (B, L) weight of each label.
            logits_positions: (B, P) positions whose logits and loss are wanted.

        Returns:
            `logits` (B, L, V), or (B, P, V) with `logits_positions`.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.dnabert2(input_ids, attention_mask, inputs_embeds, token_type_ids, **kwargs)
        return masked_lm_output(self.lm_head, outputs, labels, loss_weight, logits_positions, num_items)


class DNABERT2ForSequenceClassification(_WithBase):
    """One class, value or label set per sequence, from pooled states (`config.classifier_pooling`)."""

    def __init__(self, config: DNABERT2Config) -> None:
        super().__init__(config)
        self.classifier = SequenceClassificationHead(
            config.hidden_size, config.num_labels, config.classifier_pooling, self.classifier_dropout
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """As the base model; `labels` as `heads.sequence.sequence_loss` takes them, `logits` (B, C).

        With `inputs_embeds` special tokens cannot be told from others and are pooled as well.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.dnabert2(input_ids, attention_mask, inputs_embeds, token_type_ids, **kwargs)
        given = (input_ids, attention_mask, labels, num_items)
        return sequence_output(self.classifier, self.config, outputs, *given)


class DNABERT2ForTokenClassification(_WithBase):
    """One label per token."""

    def __init__(self, config: DNABERT2Config) -> None:
        super().__init__(config)
        self.classifier = TokenClassificationHead(config.hidden_size, config.num_labels, self.classifier_dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """As the base model; `labels` (B, L) class ids, -100 = ignored; `logits` (B, L, C)."""
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.dnabert2(input_ids, attention_mask, inputs_embeds, token_type_ids, **kwargs)
        return token_output(self.classifier, outputs, labels, num_items)
