"""Heads of GPN: masked language model, sequence and token classification.

Shapes: B batch, L tokens, P asked positions, E hidden size, V vocabulary, C labels.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import can_return_tuple

from genesplice_hf.heads.losses import IGNORED, weighted_cross_entropy
from genesplice_hf.heads.prediction import PredictionHead, at_positions, masked_lm_loss
from genesplice_hf.heads.sequence import infer_problem_type, sequence_loss
from genesplice_hf.heads.token import TokenClassificationHead
from genesplice_hf.layers.padding import as_mask
from genesplice_hf.models.gpn.configuration_gpn import GPNConfig
from genesplice_hf.models.gpn.modeling_gpn_base import GPNModel, GPNPreTrainedModel
from genesplice_hf.models.gpn.modeling_gpn_head import HEADS


class GPNForMaskedLM(GPNPreTrainedModel):
    """Predicts masked bases; the difference of two logits is a variant's score."""

    _tied_weights_keys = {"lm_head.decoder.weight": "gpn.embeddings.weight"}

    def __init__(self, config: GPNConfig) -> None:
        config.validate()
        super().__init__(config)
        self.gpn = GPNModel(config)
        self.lm_head = PredictionHead(
            config.hidden_size,
            config.vocab_size,
            config.layer_norm_eps,
            bias=config.has_bias,
            has_transform=config.layout == "legacy" or config.mlm_head_transform,
        )
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
        labels: torch.LongTensor | None = None,
        loss_weight: torch.Tensor | None = None,
        input_probs: torch.Tensor | None = None,
        output_probs: torch.Tensor | None = None,
        aux_features: torch.Tensor | None = None,
        logits_positions: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """As `GPNModel.forward`, and:

        Args:
            labels: (B, L) true ids, -100 where nothing is asked.
            loss_weight: (B, L) weight of each position in the loss; it is not changed.
            output_probs: (B, L, V) probabilities as targets instead of `labels`; all 0 = nothing is asked.
            logits_positions: (B, P) positions whose logits (and loss) alone are wanted.

        Returns:
            `logits` (B, L, V), or (B, P, V) with `logits_positions`; `loss` sum(w ce) / sum(w).
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.gpn(input_ids, attention_mask, inputs_embeds, input_probs, aux_features, **kwargs)
        logits = self.lm_head(at_positions(outputs.last_hidden_state, logits_positions))
        labels, output_probs, loss_weight = (
            None if target is None else at_positions(target, logits_positions)
            for target in (labels, output_probs, loss_weight)
        )
        loss = masked_lm_loss(logits, labels, output_probs, loss_weight, num_items)
        return MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class GPNForSequenceClassification(GPNPreTrainedModel):
    """One class, value or label set per sequence, by `config.classification_head` on pooled states."""

    def __init__(self, config: GPNConfig) -> None:
        config.validate()
        super().__init__(config)
        self.gpn = GPNModel(config)
        self.classifier = HEADS[config.classification_head](config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        input_probs: torch.Tensor | None = None,
        aux_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """As `GPNModel.forward`; `labels` as `heads.sequence.sequence_loss` takes them, `logits` (B, C)."""
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.gpn(input_ids, attention_mask, inputs_embeds, input_probs, aux_features, **kwargs)
        state = outputs.last_hidden_state
        mask = as_mask(None if attention_mask is None else attention_mask.bool(), state)
        logits = self.classifier(state, mask, input_ids)
        if self.config.regression_softplus:
            logits = nn.functional.softplus(logits)
        loss = None
        if labels is not None:
            problem = infer_problem_type(self.config.problem_type, self.config.num_labels, labels)
            loss = sequence_loss(logits, labels, problem, num_items)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class GPNForTokenClassification(GPNPreTrainedModel):
    """One label per base."""

    def __init__(self, config: GPNConfig) -> None:
        config.validate()
        super().__init__(config)
        self.gpn = GPNModel(config)
        self.classifier = TokenClassificationHead(
            config.hidden_size, config.num_labels, config.hidden_dropout_prob or 0.0
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        input_probs: torch.Tensor | None = None,
        aux_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """As `GPNModel.forward`; `labels` (B, L) class ids, -100 = ignored; `logits` (B, L, C).

        With `pos_weight` the labels 1 count so many times, and the sum is divided by the number of labels.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.gpn(input_ids, attention_mask, inputs_embeds, input_probs, aux_features, **kwargs)
        logits = self.classifier(outputs.last_hidden_state)
        loss = None
        if labels is not None and self.config.pos_weight is not None:
            weight = torch.where(labels == 1, float(self.config.pos_weight), 1.0)
            num_items = (labels != IGNORED).sum() if num_items is None else num_items
            loss = weighted_cross_entropy(logits, labels, weight, num_items)
        elif labels is not None:
            loss = weighted_cross_entropy(logits, labels, None, num_items)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
