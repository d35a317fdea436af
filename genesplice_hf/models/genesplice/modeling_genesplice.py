"""Heads of GeneSplice: masked and causal language models, sequence and token classification.

Shapes: B batch, L bases, E hidden size of the level, V vocabulary, C labels.
"""

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from genesplice_hf.heads.losses import IGNORED, shift_left, weighted_cross_entropy
from genesplice_hf.heads.sequence import SequenceClassificationHead, infer_problem_type, sequence_loss
from genesplice_hf.heads.token import TokenClassificationHead
from genesplice_hf.layers.hierarchical import take_tokens
from genesplice_hf.layers.padding import as_mask
from genesplice_hf.layers.window_transformer import StemCache
from genesplice_hf.models.genesplice.configuration_genesplice import GeneSpliceConfig
from genesplice_hf.models.genesplice.modeling_genesplice_base import GeneSpliceModel, GeneSplicePreTrainedModel


class _GeneSpliceLanguageModel(GeneSplicePreTrainedModel):
    """Base model and a head whose matrix is the embedding."""

    _tied_weights_keys = {"lm_head.weight": "genesplice.embeddings.weight"}

    def __init__(self, config: GeneSpliceConfig) -> None:
        config.validate()
        _demand_base_states(config, type(self).__name__)
        super().__init__(config)
        self.genesplice = GeneSpliceModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class GeneSpliceForMaskedLM(_GeneSpliceLanguageModel):
    """Predicts masked bases."""

    def __init__(self, config: GeneSpliceConfig) -> None:
        if config.is_decoder:
            raise ValueError("a causal config (`is_decoder=True`) has no masked LM; use GeneSpliceForCausalLM.")
        super().__init__(config)

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
        """As `GeneSpliceModel.forward`, and:

        Args:
            labels: (B, L) true ids, -100 where nothing is asked.
            loss_weight: (B, L) weight of each label.
            logits_positions: (B, P) positions whose logits (and, in evaluation, loss) are wanted.

        Returns:
            `logits` (B, L, V), or (B, P, V) with `logits_positions`; in training with labels only the
            labelled positions are computed and `logits` is (number of labels, V), in row order.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.genesplice(input_ids, attention_mask, inputs_embeds, **kwargs)
        state = outputs.last_hidden_state
        if self.training and labels is not None:
            labelled = labels != IGNORED
            state, labels = state[labelled], labels[labelled]
            loss_weight = None if loss_weight is None else loss_weight[labelled]
        elif logits_positions is not None:
            state = take_tokens(state, logits_positions)
            labels = None if labels is None else take_tokens(labels, logits_positions)
            loss_weight = None if loss_weight is None else take_tokens(loss_weight, logits_positions)
        logits = self.lm_head(state)
        loss = None if labels is None else weighted_cross_entropy(logits, labels, loss_weight, num_items)
        return MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)


def _demand_base_states(config: GeneSpliceConfig, class_name: str) -> None:
    if config.num_levels and not config.use_decoder:
        raise ValueError(f"{class_name} needs one state per base; set `use_decoder=True`.")


class GeneSpliceForCausalLM(_GeneSpliceLanguageModel, GenerationMixin):
    """Predicts the next base; `generate()` continues a sequence."""

    def __init__(self, config: GeneSpliceConfig) -> None:
        if not config.is_decoder:
            raise ValueError("GeneSpliceForCausalLM needs a causal config; set `is_decoder=True` in it.")
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weight: torch.Tensor | None = None,
        past_key_values: StemCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `GeneSpliceModel.forward`, and:

        Args:
            labels: (B, L) the ids themselves (shifted inside), -100 where nothing is asked.
            loss_weight: (B, L) weight of each label.
            logits_to_keep: compute only the last so many logits; 0 = all.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.genesplice(
            input_ids, attention_mask, inputs_embeds, past_key_values=past_key_values, use_cache=use_cache, **kwargs
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            weight = None if loss_weight is None else shift_left(loss_weight, 0.0)
            loss = weighted_cross_entropy(logits, shift_left(labels, IGNORED), weight, num_items)
        recorded = (outputs.past_key_values, outputs.hidden_states, outputs.attentions)
        return CausalLMOutputWithPast(loss, logits, *recorded)

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, but without a cache (hierarchical, or training) each step reads the whole sequence."""
        if kwargs.get("past_key_values") is None:
            next_sequence_length = None
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length=next_sequence_length, **kwargs)


class GeneSpliceForSequenceClassification(GeneSplicePreTrainedModel):
    """One class, value or label set per sequence, from pooled states (`config.classifier_pooling`)."""

    def __init__(self, config: GeneSpliceConfig) -> None:
        config.validate()
        super().__init__(config)
        self.genesplice = GeneSpliceModel(config)
        self.reads_bins = config.classifier_pooling == "bin_mean" or not config.use_decoder
        width = config.hidden_sizes[-1] if self.reads_bins else config.hidden_sizes[0]
        self.classifier = SequenceClassificationHead(
            width, config.num_labels, config.classifier_pooling, config.classifier_dropout
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
        """As `GeneSpliceModel.forward`; `labels` as `heads.sequence.sequence_loss` takes them, `logits` (B, C)."""
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.genesplice(input_ids, attention_mask, inputs_embeds, **kwargs)
        if self.reads_bins:
            state, mask = outputs.bin_hidden_state, outputs.bin_mask
        else:
            state = outputs.last_hidden_state
            mask = as_mask(None if attention_mask is None else attention_mask.bool(), state)
        logits = self.classifier(state, mask)
        loss = None
        if labels is not None:
            problem = infer_problem_type(self.config.problem_type, self.config.num_labels, labels)
            loss = sequence_loss(logits, labels, problem, num_items)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class GeneSpliceForTokenClassification(GeneSplicePreTrainedModel):
    """One label per base."""

    def __init__(self, config: GeneSpliceConfig) -> None:
        config.validate()
        _demand_base_states(config, type(self).__name__)
        super().__init__(config)
        self.genesplice = GeneSpliceModel(config)
        self.classifier = TokenClassificationHead(config.hidden_size, config.num_labels, config.classifier_dropout)
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
        """As `GeneSpliceModel.forward`; `labels` (B, L) class ids, -100 = ignored; `logits` (B, L, C)."""
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.genesplice(input_ids, attention_mask, inputs_embeds, **kwargs)
        logits = self.classifier(outputs.last_hidden_state)
        loss = None if labels is None else weighted_cross_entropy(logits, labels, None, num_items)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
