"""Heads of the SLiM Performer: masked and causal language models, sequence and token classification.

In training on labels, a sequence longer than `slim_chunk_size` takes the sub-linear way: `loss` alone is returned
(per-token heads), and its gradient is that of ordinary backpropagation.

Shapes: B batch, L tokens, C tokens of a chunk, E hidden size, V vocabulary, K labels.
"""

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.heads.losses import IGNORED, shift_left, weighted_cross_entropy
from genesplice_hf.heads.sequence import SequenceClassificationHead, infer_problem_type, sequence_loss
from genesplice_hf.heads.token import TokenClassificationHead
from genesplice_hf.layers.linear_attention import LinearCache
from genesplice_hf.layers.padding import as_mask
from genesplice_hf.models.performer.configuration_performer import PerformerConfig
from genesplice_hf.models.performer.modeling_performer_base import TokenStream
from genesplice_hf.models.performer.modeling_performer_head import PerformerWithHead, Targets


class _PerformerLanguageModel(PerformerWithHead):
    """Base model and logits; untied unless `tie_word_embeddings`."""

    _tied_weights_keys = {"output_logit_map.weight": "performer.input_map.weight"}

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(config)
        self.output_logit_map = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.output_logit_map

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.output_logit_map = new_embeddings


class PerformerForMaskedLM(_PerformerLanguageModel):
    """Predicts masked bases from both sides."""

    def __init__(self, config: PerformerConfig) -> None:
        if config.is_decoder:
            raise ValueError("a causal config (`is_decoder=True`) has no masked LM; use PerformerForCausalLM.")
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weight: torch.Tensor | None = None,
        slim_chunk_size: int | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """As `PerformerModel.forward`, and:

        Args:
            labels: (B, L) true ids, -100 where nothing is asked.
            loss_weight: (B, L) weight of each label.

        Returns:
            `logits` (B, L, V), None in sub-linear training.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        if self.trains_in_chunks(inputs, labels, slim_chunk_size, kwargs):
            targets = Targets(labels, loss_weight, num_items)
            return MaskedLMOutput(
                loss=self.chunked_token_loss(inputs, self.output_logit_map, targets, slim_chunk_size)
            )
        outputs = self.performer(**inputs, slim_chunk_size=slim_chunk_size, **kwargs)
        logits = self.output_logit_map(outputs.last_hidden_state)
        loss = None if labels is None else weighted_cross_entropy(logits, labels, loss_weight, num_items)
        return MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class PerformerForCausalLM(_PerformerLanguageModel, GenerationMixin):
    """Predicts the next base; `generate()` takes the same time for every base, however long the past."""

    def __init__(self, config: PerformerConfig) -> None:
        if not config.is_decoder:
            raise ValueError("PerformerForCausalLM needs a causal config; set `is_decoder=True` in it.")
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weight: torch.Tensor | None = None,
        past_key_values: LinearCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        slim_chunk_size: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `PerformerModel.forward`, and:

        Args:
            labels: (B, L) the ids themselves (shifted inside), -100 where nothing is asked.
            loss_weight: (B, L) weight of each label.
            logits_to_keep: compute only the last so many logits; 0 = all. Labels need all.

        Returns:
            `logits` (B, L, V), None in sub-linear training. Without gradients and extra outputs, states are kept for
            one chunk at a time only.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        kwargs |= {"past_key_values": past_key_values, "use_cache": use_cache}
        if self.trains_in_chunks(inputs, labels, slim_chunk_size, kwargs):
            targets = Targets(labels, loss_weight, num_items, shift=1)
            return CausalLMOutputWithPast(
                loss=self.chunked_token_loss(inputs, self.output_logit_map, targets, slim_chunk_size)
            )
        recording = self.performer.is_recording(kwargs, "output_hidden_states", "output_attentions")
        if torch.is_grad_enabled() or recording:
            outputs = self.performer(**inputs, slim_chunk_size=slim_chunk_size, **kwargs)
            logits = self.output_logit_map(outputs.last_hidden_state[:, -logits_to_keep:])
        else:
            outputs, logits = self._streamed(inputs, slim_chunk_size, logits_to_keep, past_key_values, use_cache)
        loss = None
        if labels is not None:
            weight = None if loss_weight is None else shift_left(loss_weight, 0.0)
            loss = weighted_cross_entropy(logits, shift_left(labels, IGNORED), weight, num_items)
        recorded = (outputs.past_key_values, outputs.hidden_states, outputs.attentions)
        return CausalLMOutputWithPast(loss, logits, *recorded)

    def _streamed(
        self,
        inputs: dict[str, Any],
        slim_chunk_size: int | None,
        logits_to_keep: int,
        past: LinearCache | None,
        use_cache: bool | None,
    ) -> tuple[BaseModelOutputWithPast, torch.Tensor]:
        """Logits chunk after chunk, states forgotten on the way."""
        stream = self.performer.open(**inputs, cache=past)
        cache = self.performer.start_cache(past, use_cache)
        skipped = stream.length - logits_to_keep if logits_to_keep else 0
        logits, start = [], 0
        for x_BCE in self.performer.final_states(stream, self.performer.chunk_size(slim_chunk_size), cache):
            stop = start + x_BCE.shape[1]
            if stop > skipped:
                logits.append(self.output_logit_map(x_BCE[:, max(skipped - start, 0) :]))
            start = stop
        return BaseModelOutputWithPast(past_key_values=cache), torch.cat(logits, dim=1)

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, but without a cache each step reads the whole sequence."""
        if kwargs.get("past_key_values") is None:
            next_sequence_length = None
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length=next_sequence_length, **kwargs)


class PerformerForSequenceClassification(PerformerWithHead):
    """One class, value or label set per sequence, from pooled states (`config.classifier_pooling`)."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(config)
        self.classifier = SequenceClassificationHead(
            config.hidden_size, config.num_labels, config.classifier_pooling, config.classifier_dropout
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        slim_chunk_size: int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """As `PerformerModel.forward`; `labels` as `heads.sequence.sequence_loss` takes them, `logits` (B, K)."""
        num_items = kwargs.pop("num_items_in_batch", None)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        if torch.is_grad_enabled() and self.trains_in_chunks(inputs, labels, slim_chunk_size, kwargs):
            return self._trained_in_chunks(inputs, labels, slim_chunk_size, num_items)
        outputs = self.performer(**inputs, slim_chunk_size=slim_chunk_size, **kwargs)
        state = outputs.last_hidden_state
        logits = self.classifier(state, as_mask(None if attention_mask is None else attention_mask.bool(), state))
        loss = None if labels is None else self._loss(logits, labels, num_items)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
        problem = infer_problem_type(self.config.problem_type, self.config.num_labels, labels)
        return sequence_loss(logits, labels, problem, num_items)

    def _trained_in_chunks(
        self,
        inputs: dict[str, Any],
        labels: torch.Tensor,
        slim_chunk_size: int | None,
        num_items: torch.Tensor | int | None,
    ) -> SequenceClassifierOutput:
        """The mean is pooled in a pass of its own; the loss's gradient for it is then dealt out to the tokens.

        d loss / d parameters = sum over tokens of <d loss / d pooled, d state / d parameters> / number of tokens,
        which is the gradient of a sum over chunks. The classifier's own gradient comes from the pooled vector.
        """
        if self.config.classifier_pooling != "mean":
            raise GeneSpliceError(
                f"`classifier_pooling`={self.config.classifier_pooling!r} has no sub-linear gradient; use 'mean', or "
                "`slim_chunk_size=-1` (more memory)."
            )
        self.performer.count_training_pass()
        stream = self.performer.open(**inputs)
        pooled_BE = self._pooled(stream, slim_chunk_size).requires_grad_()
        one_token = torch.ones(pooled_BE.shape[0], 1, dtype=torch.bool, device=pooled_BE.device)
        logits = self.classifier(pooled_BE[:, None], one_token)
        loss = self._loss(logits, labels, num_items)
        if any(parameter.requires_grad for parameter in self.performer.parameters()):
            (slope_BE,) = torch.autograd.grad(loss, pooled_BE, retain_graph=True)
            share_BE = slope_BE / _num_real(stream)

            def dealt_out(x_BCE: torch.Tensor, start: int, stop: int) -> torch.Tensor:
                return (x_BCE.to(share_BE.dtype) * share_BE[:, None]).sum()

            dealt = self.chunked_loss(stream, dealt_out, slim_chunk_size, self.performer)
            loss = loss + (dealt - dealt.detach()).to(loss.dtype)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def _pooled(self, stream: TokenStream, slim_chunk_size: int | None) -> torch.Tensor:
        """(B, E) mean over the real tokens; finished states are zero at padding."""
        chunks = self.performer.final_states(stream, self.performer.chunk_size(slim_chunk_size))
        total: Any = sum(x_BCE.sum(1, dtype=torch.promote_types(x_BCE.dtype, torch.float32)) for x_BCE in chunks)
        return (total / _num_real(stream)).to(self.dtype)


def _num_real(stream: TokenStream) -> torch.Tensor:
    """Real tokens of each row, at least 1, as (B, 1)."""
    return stream.seen.clamp(min=1)[:, None]


class PerformerForTokenClassification(PerformerWithHead):
    """One label per base."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(config)
        self.classifier = TokenClassificationHead(config.hidden_size, config.num_labels, config.classifier_dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        slim_chunk_size: int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """As `PerformerModel.forward`; `labels` (B, L) class ids, -100 = ignored; `logits` (B, L, K) or None."""
        num_items = kwargs.pop("num_items_in_batch", None)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        if self.trains_in_chunks(inputs, labels, slim_chunk_size, kwargs):
            targets = Targets(labels, None, num_items)
            return TokenClassifierOutput(
                loss=self.chunked_token_loss(inputs, self.classifier, targets, slim_chunk_size)
            )
        outputs = self.performer(**inputs, slim_chunk_size=slim_chunk_size, **kwargs)
        logits = self.classifier(outputs.last_hidden_state)
        loss = None if labels is None else weighted_cross_entropy(logits, labels, None, num_items)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
