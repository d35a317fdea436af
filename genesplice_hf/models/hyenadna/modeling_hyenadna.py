"""Heads of HyenaDNA: causal language model, sequence and token classification.

Shapes: B batch, L tokens, E hidden size, V vocabulary, K labels.
"""

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import can_return_tuple

from genesplice_hf.heads.losses import IGNORED, shift_left, weighted_cross_entropy
from genesplice_hf.heads.pooling import without_special
from genesplice_hf.heads.sequence import SequenceClassificationHead, infer_problem_type, sequence_loss
from genesplice_hf.heads.token import TokenClassificationHead
from genesplice_hf.layers.padding import as_mask
from genesplice_hf.models.hyenadna.configuration_hyenadna import HyenaDNAConfig
from genesplice_hf.models.hyenadna.modeling_hyenadna_base import HyenaDNAModel, HyenaDNAPreTrainedModel


class HyenaDNAForCausalLM(HyenaDNAPreTrainedModel, GenerationMixin):
    """Predicts the next base; `generate()` reads the whole sequence again for every base."""

    _tied_weights_keys = {"lm_head.weight": "hyenadna.word_embeddings.weight"}

    def __init__(self, config: HyenaDNAConfig) -> None:
        config.validate()
        super().__init__(config)
        self.hyenadna = HyenaDNAModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def _supports_default_dynamic_cache() -> bool:
        # `generate` must not make a cache of keys and values, for there are none.
        return False

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weight: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """As `HyenaDNAModel.forward`, and:

        Args:
            labels: (B, L) the ids themselves (shifted inside), -100 where nothing is asked.
            loss_weight: (B, L) weight of each label.
            logits_to_keep: compute only the last so many logits, or those at the positions (P,); 0 = all. The loss is
                that of the labels which the computed logits predict.

        Returns:
            `logits` (B, L, V).
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.hyenadna(input_ids, attention_mask, inputs_embeds, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            weight = None if loss_weight is None else shift_left(loss_weight, 0.0)[:, kept]
            loss = weighted_cross_entropy(logits, shift_left(labels, IGNORED)[:, kept], weight, num_items)
        return CausalLMOutput(loss, logits, outputs.hidden_states)

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, but each step reads the whole sequence."""
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length=None, **kwargs)


class HyenaDNAForSequenceClassification(HyenaDNAPreTrainedModel):
    """One class, value or label set per sequence, from pooled states (`config.classifier_pooling`)."""

    def __init__(self, config: HyenaDNAConfig) -> None:
        config.validate()
        super().__init__(config)
        self.hyenadna = HyenaDNAModel(config)
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
        """As `HyenaDNAModel.forward`; `labels` as `heads.sequence.sequence_loss` takes them, `logits` (B, K)."""
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.hyenadna(input_ids, attention_mask, inputs_embeds, **kwargs)
        state = outputs.last_hidden_state
        mask = as_mask(None if attention_mask is None else attention_mask.bool(), state)
        if self.config.classifier_pooling in ("mean", "max"):
            mask = without_special(mask, input_ids, self.config.special_token_ids)
        logits = self.classifier(state, mask)
        loss = None
        if labels is not None:
            problem = infer_problem_type(self.config.problem_type, self.config.num_labels, labels)
            loss = sequence_loss(logits, labels, problem, num_items)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states)


class HyenaDNAForTokenClassification(HyenaDNAPreTrainedModel):
    """One label per base, from the bases up to it."""

    def __init__(self, config: HyenaDNAConfig) -> None:
        config.validate()
        super().__init__(config)
        self.hyenadna = HyenaDNAModel(config)
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
        """As `HyenaDNAModel.forward`; `labels` (B, L) class ids, -100 = ignored; `logits` (B, L, K)."""
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.hyenadna(input_ids, attention_mask, inputs_embeds, **kwargs)
        logits = self.classifier(outputs.last_hidden_state)
        loss = None if labels is None else weighted_cross_entropy(logits, labels, None, num_items)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states)
