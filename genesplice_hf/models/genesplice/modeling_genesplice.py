"""Heads of GeneSplice: masked and causal language models, sequence and token classification, tracks.

With `rc_equivariant` a head reads both strands and averages what it says of them, complementary channels exchanged.

Shapes: B batch, L bases, M bins, E hidden size of the level, V vocabulary, C labels, T tracks.
"""

import math
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

from genesplice_hf.errors import SequenceError
from genesplice_hf.heads.losses import IGNORED, shift_left, weighted_cross_entropy
from genesplice_hf.heads.outputs import HierarchicalModelOutput, TrackPredictionOutput
from genesplice_hf.heads.sequence import SequenceClassificationHead, infer_problem_type, sequence_loss
from genesplice_hf.heads.token import TokenClassificationHead
from genesplice_hf.heads.tracks import TrackHead, centred_crop, track_loss
from genesplice_hf.layers.hierarchical import average_tokens, first_tokens, take_tokens
from genesplice_hf.layers.hierarchical_cache import GeneSpliceCache
from genesplice_hf.layers.padding import as_mask, real_positions, zero_padding
from genesplice_hf.layers.reverse_complement import demand_whole_bins, strand_mean
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
        track_values: torch.Tensor | None = None,
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
        outputs = self.genesplice(input_ids, attention_mask, inputs_embeds, track_values, **kwargs)
        states = [strand.last_hidden_state for strand in outputs.strands()]
        if self.training and labels is not None:
            labelled = labels != IGNORED
            states, labels = [state[labelled] for state in states], labels[labelled]
            loss_weight = None if loss_weight is None else loss_weight[labelled]
        elif logits_positions is not None:
            states = [take_tokens(state, logits_positions) for state in states]
            labels = None if labels is None else take_tokens(labels, logits_positions)
            loss_weight = None if loss_weight is None else take_tokens(loss_weight, logits_positions)
        logits = strand_mean([self.lm_head(state) for state in states], self.config.complement_map)
        loss = None if labels is None else weighted_cross_entropy(logits, labels, loss_weight, num_items)
        loss = self.with_router_losses(loss, outputs, labels, num_items)
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
        track_values: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weight: torch.Tensor | None = None,
        past_key_values: GeneSpliceCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `GeneSpliceModel.forward`, and:

        Args:
            labels: (B, L) the ids themselves (shifted inside), -100 where nothing is asked.
            loss_weight: (B, L) weight of each label.
            logits_to_keep: compute only the last so many logits, or those at the positions (P,); 0 = all. The loss is
                that of the labels which the computed logits predict.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.genesplice(
            input_ids, attention_mask, inputs_embeds, track_values, past_key_values, use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            weight = None if loss_weight is None else shift_left(loss_weight, 0.0)
            weight = None if weight is None else weight[:, kept]
            labels = shift_left(labels, IGNORED)[:, kept]
            loss = weighted_cross_entropy(logits, labels, weight, num_items)
            loss = self.with_router_losses(loss, outputs, labels, num_items)
        recorded = (outputs.past_key_values, outputs.hidden_states, outputs.attentions)
        return CausalLMOutputWithPast(loss, logits, *recorded)

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, but without a cache (not wanted, or in training) each step reads the whole sequence."""
        if kwargs.get("past_key_values") is None:
            next_sequence_length = None
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length=next_sequence_length, **kwargs)


class GeneSpliceForSequenceClassification(GeneSplicePreTrainedModel):
    """One class, value or label set per sequence, from pooled states (`config.classifier_pooling`)."""

    def __init__(self, config: GeneSpliceConfig) -> None:
        config.validate()
        super().__init__(config)
        self.genesplice = GeneSpliceModel(config)
        self.genesplice.matches_bins = False
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
        track_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """As `GeneSpliceModel.forward`; `labels` as `heads.sequence.sequence_loss` takes them, `logits` (B, C)."""
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.genesplice(input_ids, attention_mask, inputs_embeds, track_values, **kwargs)
        if self.reads_bins:
            states, mask = [strand.bin_hidden_state for strand in outputs.strands()], outputs.bin_mask
        else:
            states = [strand.last_hidden_state for strand in outputs.strands()]
            mask = as_mask(None if attention_mask is None else attention_mask.bool(), states[0])
        logits = strand_mean([self.classifier(state, mask) for state in states])
        loss = None
        if labels is not None:
            problem = infer_problem_type(self.config.problem_type, self.config.num_labels, labels)
            loss = sequence_loss(logits, labels, problem, num_items)
            loss = self.with_router_losses(loss, outputs, labels, num_items)
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
        track_values: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """As `GeneSpliceModel.forward`; `labels` (B, L) class ids, -100 = ignored; `logits` (B, L, C)."""
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.genesplice(input_ids, attention_mask, inputs_embeds, track_values, **kwargs)
        logits = [self.classifier(strand.last_hidden_state) for strand in outputs.strands()]
        logits = strand_mean(logits, self.config.token_strand_pairs)
        loss = None if labels is None else weighted_cross_entropy(logits, labels, None, num_items)
        loss = self.with_router_losses(loss, outputs, labels, num_items)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class GeneSpliceForTrackPrediction(GeneSplicePreTrainedModel):
    """A non-negative value per bin of `config.track_bin_size` bases and track.

    Bins start at the first real base of a row; the last may be short. They are made from the coarsest level whose
    tokens they are whole multiples of, as means over its real tokens; bins of one base need no mean.
    """

    # The loss is a mean over bins with a target, of which the Trainer's count of labels knows nothing.
    accepts_loss_kwargs = False

    def __init__(self, config: GeneSpliceConfig) -> None:
        config.validate()
        if config.num_tracks < 1:
            raise ValueError(f"`num_tracks` must be at least 1 for {type(self).__name__}, got {config.num_tracks}.")
        super().__init__(config)
        self.genesplice = GeneSpliceModel(config)
        self.level, self.tokens_per_bin = _track_level(config)
        width = config.hidden_sizes[self.level]
        self.classifier = TrackHead(width, config.num_tracks, config.classifier_dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        track_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> TrackPredictionOutput:
        """As `GeneSpliceModel.forward`; bins of one base stand where their bases do, others are left-justified.

        Args:
            labels: (B, M, T) counts or coverage >= 0, NaN where unknown; M = `track_target_length` when that is set,
                otherwise ceil(L / `track_bin_size`).

        Raises:
            SequenceError: fewer bins than `track_target_length`, labels of another shape or below 0; with
                `rc_equivariant` a length that is no multiple of the bin size.
        """
        outputs = self.genesplice(input_ids, attention_mask, inputs_embeds, track_values, **kwargs)
        given = input_ids if inputs_embeds is None else inputs_embeds
        mask = as_mask(real_positions(attention_mask), given)
        if self.config.rc_equivariant and self.config.track_bin_size > 1:
            demand_whole_bins(mask, mask.shape[1], self.config.track_bin_size)
        features, bin_mask = zip(*(self._features(strand, mask) for strand in outputs.strands()), strict=True)
        predictions = strand_mean([self.classifier(x) for x in features], self.config.track_strand_pairs)
        predictions, bin_mask = self._centre(zero_padding(predictions, bin_mask[0]), bin_mask[0])
        loss = None
        if labels is not None:
            loss = track_loss(predictions, labels, bin_mask, self.config.track_loss)
            loss = self.with_router_losses(loss, outputs)
        return TrackPredictionOutput(loss, predictions, outputs.hidden_states, outputs.attentions)

    def _features(self, strand: HierarchicalModelOutput, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, M, E) of the bins, and which are real."""
        if self.level == 0:
            return average_tokens(strand.last_hidden_state, mask, self.tokens_per_bin)
        assert strand.level_hidden_states is not None  # the base model always fills it
        state = strand.level_hidden_states[self.level - len(self.config.hidden_sizes)]
        bases = self.config.track_bin_size // self.tokens_per_bin
        real = first_tokens(-(-mask.sum(1) // bases), state.shape[1])
        return average_tokens(state, real, self.tokens_per_bin)

    def _centre(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.config.track_target_length
        if length is None:
            return x, mask
        surplus = mask.sum(1) - length
        if self.config.rc_equivariant and bool((surplus % 2).any()):
            row = int((surplus % 2).argmax())
            raise SequenceError(
                f"`track_target_length` ({length}) is not centred for both strands in the {int(mask[row].sum())} bins "
                f"of row {row}; set it to {length + 1}, or change the input by one bin."
            )
        return centred_crop(x, mask, length)


def _track_level(config: GeneSpliceConfig) -> tuple[int, int]:
    """The coarsest level whose tokens tile a bin, and how many of its tokens a bin holds."""
    first = 0 if config.use_decoder or not config.num_levels else config.num_levels
    bases = [math.prod(config.pool_sizes[:level]) for level in range(config.num_levels + 1)]
    for level in range(config.num_levels, first - 1, -1):
        if config.track_bin_size % bases[level] == 0:
            return level, config.track_bin_size // bases[level]
    raise ValueError(
        f"`track_bin_size` must be a multiple of {bases[first]} bases without a decoder, got {config.track_bin_size}; "
        "change it, or set `use_decoder=True`."
    )
