"""Enformer with task heads: tracks of any set of species, classes per sequence, classes per bin.

Shapes: B batch, L bases, T bins, E embedding size, C labels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import can_return_tuple

from genesplice_hf.errors import GeneSpliceError, SequenceError
from genesplice_hf.heads.encoder_outputs import token_output
from genesplice_hf.heads.outputs import TrackPredictionOutput
from genesplice_hf.heads.sequence import SequenceClassificationHead, infer_problem_type, sequence_loss
from genesplice_hf.heads.token import TokenClassificationHead
from genesplice_hf.heads.tracks import SpeciesTrackHeads, track_loss
from genesplice_hf.layers.padding import real_positions
from genesplice_hf.models.enformer.configuration_enformer import EnformerConfig
from genesplice_hf.models.enformer.modeling_enformer_base import EnformerModel, EnformerPreTrainedModel, crop_centre

Labels: TypeAlias = torch.Tensor | Mapping[str, torch.Tensor] | None


class EnformerForTrackPrediction(EnformerPreTrainedModel):
    """A non-negative value per bin and track of a species."""

    # The loss is a mean over bins with a target, of which the Trainer's count of labels knows nothing.
    accepts_loss_kwargs = False

    def __init__(self, config: EnformerConfig) -> None:
        config.validate()
        if not config.output_heads:
            raise ValueError(f"`output_heads` must name at least one species for {type(self).__name__}.")
        if config.post_transformer:
            raise ValueError("`post_transformer` is for EnformerForHeadAdaptation; these heads read embeddings.")
        super().__init__(config)
        self.enformer = EnformerModel(config)
        self.classifier = SpeciesTrackHeads(
            config.hidden_size, {name: config.output_heads[name] for name in config.species}
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: Labels = None,
        species: str | Sequence[str] | None = None,
        target_length: int | None = None,
        track_indices: torch.Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> TrackPredictionOutput:
        """As `EnformerModel.forward`, and:

        Args:
            labels: (B, T, tracks) counts or coverage, NaN where unknown; a dict {species: tensor of its rows} where
                `species` is a list or "all".
            species: a key of `config.output_heads`, one for each row, "all" heads on every row, or None =
                `config.default_species`.
            track_indices: tracks that alone are computed, and that `labels` hold then; for one species.

        Returns:
            `logits` (B, T, tracks), non-negative float32; `predictions` in their place with a list of species or
            "all". The loss over several species is the mean of theirs, weighted by rows.

        Raises:
            SequenceError: an unknown species, as many species as there are no rows, labels of another shape.
        """
        outputs = self.enformer(input_ids, inputs_embeds, attention_mask, target_length, **kwargs)
        x_BTE = outputs.last_hidden_state
        if species is None or (isinstance(species, str) and species != "all"):
            logits = self.classifier(x_BTE, species or self._default_species(), track_indices)
            loss = None if labels is None else self._loss(logits, _single(labels, species))
            return self._output(outputs, loss, logits=logits)
        if track_indices is not None:
            raise SequenceError("`track_indices` belong to one species; name it in `species`.")
        rows = self._rows_of(species, x_BTE)
        predictions = {name: self.classifier(x_BTE[index], name) for name, index in rows.items()}
        loss = None if labels is None else self._loss_over_species(predictions, labels)
        return self._output(outputs, loss, predictions=predictions)

    def add_heads(self, heads: Mapping[str, int]) -> None:
        """Adds a new head per entry (species -> tracks), initialised as at first; the config knows of them.

        Raises:
            GeneSpliceError: a species that has a head.
        """
        taken = sorted(set(heads) & set(self.classifier.species))
        if taken:
            raise GeneSpliceError(f"`heads` names {', '.join(taken)}, which have heads; use `resize_head`.")
        self._set_heads(self.config.output_heads | dict(heads))
        for species, tracks in heads.items():
            self.classifier.add_module(species, self._new_head(tracks))

    def resize_head(self, species: str, num_tracks: int, keep: Sequence[int] | None = None) -> None:
        """Gives a head another number of tracks.

        Args:
            keep: the tracks whose weights are kept, which become the first ones in this order; None = the first ones
                that fit. The others are drawn anew.

        Raises:
            GeneSpliceError: an unknown species, tracks to keep that do not exist or are too many.
        """
        old = self._head(species)
        keep = list(range(min(num_tracks, old.out_features))) if keep is None else list(keep)
        if len(keep) > num_tracks or not all(0 <= index < old.out_features for index in keep):
            raise GeneSpliceError(
                f"`keep` must hold at most {num_tracks} of the tracks 0 to {old.out_features - 1}, got {keep[:10]}."
            )
        self._set_heads(self.config.output_heads | {species: num_tracks})
        new = self._new_head(num_tracks)
        with torch.no_grad():
            new.weight[: len(keep)], new.bias[: len(keep)] = old.weight[keep], old.bias[keep]
        # By assignment, for a new child would go to the end of the order.
        setattr(self.classifier, species, new)

    def remove_head(self, species: str) -> None:
        """Takes a head away; the config's default goes with it.

        Raises:
            GeneSpliceError: an unknown species, or the only one.
        """
        self._head(species)
        rest = {name: tracks for name, tracks in self.config.output_heads.items() if name != species}
        if not rest:
            raise GeneSpliceError(f"`species` {species!r} is the only head; add another one first.")
        if self.config.default_species == species:
            self.config.default_species = None
        self._set_heads(rest)
        delattr(self.classifier, species)

    def _head(self, species: str) -> nn.Linear:
        if species not in self.classifier.species:
            raise GeneSpliceError(f"`species` must be one of {', '.join(self.classifier.species)}, got {species!r}.")
        head = self.classifier.get_submodule(species)
        assert isinstance(head, nn.Linear)
        return head

    def _new_head(self, num_tracks: int) -> nn.Linear:
        head = nn.Linear(self.config.hidden_size, num_tracks)
        self._init_weights(head)
        any_head = next(iter(self.classifier.parameters()))
        return head.to(any_head)

    def _set_heads(self, heads: dict[str, int]) -> None:
        before = self.config.output_heads
        self.config.output_heads = heads
        try:
            self.config.validate_heads()
        except ValueError:
            self.config.output_heads = before
            raise
        self.config.head_order = list(heads)

    def _default_species(self) -> str:
        return self.config.default_species or self.config.species[0]

    def _rows_of(self, species: str | Sequence[str], x_BTE: torch.Tensor) -> dict[str, torch.Tensor]:
        """Species -> its rows, in the order of the config's heads."""
        if species == "all":
            return {name: torch.arange(len(x_BTE), device=x_BTE.device) for name in self.config.species}
        unknown = sorted(set(species) - set(self.config.output_heads))
        if unknown or len(species) != len(x_BTE):
            raise SequenceError(
                f'`species` must be a name, "all", or one of {", ".join(self.config.species)} for each of the '
                f"{len(x_BTE)} rows, got {len(species)}{f' with {unknown}' if unknown else ''}."
            )
        rows = {name: [row for row, one in enumerate(species) if one == name] for name in self.config.species}
        return {name: torch.tensor(index, device=x_BTE.device) for name, index in rows.items() if index}

    def _loss(self, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return track_loss(predictions, labels, None, self.config.loss_type, self.config.log_eps)

    def _loss_over_species(self, predictions: dict[str, torch.Tensor], labels: Labels) -> torch.Tensor:
        if not isinstance(labels, Mapping) or set(labels) != set(predictions):
            raise SequenceError(
                f"`labels` must be a dict with a tensor for each of {', '.join(predictions)}, as `species` says."
            )
        losses = [self._loss(values, labels[name]) * len(values) for name, values in predictions.items()]
        return torch.stack(losses).sum() / sum(map(len, predictions.values()))

    def _output(self, outputs: BaseModelOutput, loss: torch.Tensor | None, **given: Any) -> TrackPredictionOutput:
        return TrackPredictionOutput(
            loss=loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            last_hidden_state=outputs.last_hidden_state,
            **given,
        )


class EnformerForSequenceClassification(EnformerPreTrainedModel):
    """One class, value or label set per sequence, from the mean of its bins."""

    def __init__(self, config: EnformerConfig) -> None:
        config.validate()
        super().__init__(config)
        self.enformer = EnformerModel(config)
        self.classifier = SequenceClassificationHead(
            config.hidden_size, config.num_labels, "mean", config.classifier_dropout
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        target_length: int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """As `EnformerModel.forward`; `labels` as `heads.sequence.sequence_loss` takes them, `logits` (B, C).

        With a mask the mean is over the bins that hold a real base.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.enformer(input_ids, inputs_embeds, attention_mask, target_length, **kwargs)
        length = self.config.target_length if target_length is None else target_length
        real_BT = self._real_bins(real_positions(attention_mask), outputs.last_hidden_state, length)
        logits = self.classifier(outputs.last_hidden_state, real_BT)
        loss = None
        if labels is not None:
            problem = infer_problem_type(self.config.problem_type, self.config.num_labels, labels)
            loss = sequence_loss(logits, labels, problem, num_items)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)

    def _real_bins(self, mask_BL: torch.Tensor | None, x_BTE: torch.Tensor, length: int) -> torch.Tensor:
        if mask_BL is None:
            return x_BTE.new_ones(x_BTE.shape[:2], dtype=torch.bool)
        size = self.config.bin_size
        whole_BL = nn.functional.pad(mask_BL, (0, -mask_BL.shape[1] % size))
        bins_Bn = whole_BL.unflatten(1, (-1, size)).any(2)
        return crop_centre(bins_Bn[..., None], length).squeeze(-1)


class EnformerForTokenClassification(EnformerPreTrainedModel):
    """One label per bin."""

    def __init__(self, config: EnformerConfig) -> None:
        config.validate()
        super().__init__(config)
        self.enformer = EnformerModel(config)
        self.classifier = TokenClassificationHead(config.hidden_size, config.num_labels, config.classifier_dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        target_length: int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """As `EnformerModel.forward`; `labels` (B, T) class ids, -100 = ignored; `logits` (B, T, C)."""
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.enformer(input_ids, inputs_embeds, attention_mask, target_length, **kwargs)
        return token_output(self.classifier, outputs, labels, num_items)


def _single(labels: Labels, species: str | None) -> torch.Tensor:
    if isinstance(labels, torch.Tensor):
        return labels
    raise SequenceError(
        f'`labels` must be a tensor for one species (`species` {species!r}); pass a list of species or "all" for a '
        "dict of labels."
    )
