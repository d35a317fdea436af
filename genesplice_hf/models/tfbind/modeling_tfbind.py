"""TFBind with heads: a track of binding along the window, or whether the factor binds; and the DNA encoder alone.

Shapes: B pairs of window and factor, T bins, S tracks, C labels, H latent heads, F factors, P listed pairs.
"""

import copy
from os import PathLike
from typing import Any, Literal

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from genesplice_hf.errors import SequenceError
from genesplice_hf.heads.binding import (
    BindingHead,
    BindingOutput,
    TFBindModelOutput,
    binding_label_loss,
    binding_track_loss,
    read_value_loss,
)
from genesplice_hf.heads.outputs import TrackPredictionOutput
from genesplice_hf.heads.tracks import SpeciesTrackHeads, TrackHead, track_loss
from genesplice_hf.models.tfbind.configuration_tfbind import BINARY_LOSSES, TRACK_LOSSES, TFBindConfig
from genesplice_hf.models.tfbind.modeling_tfbind_base import TFBindModel, TFBindPreTrainedModel
from genesplice_hf.models.tfbind.modeling_tfbind_encoders import build_encoder, run_encoder
from genesplice_hf.models.tfbind.modeling_tfbind_screening import ScreensFactors

# The classes whose heads could be taken for each other's.
_WITH_HEADS = ("TFBindForTrackPrediction", "TFBindForSequenceClassification")


class AdoptsBase(TFBindPreTrainedModel):
    """A task class that takes the base model of another task's checkpoint, and never its head."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """As `TFBindPreTrainedModel.from_pretrained`; from a checkpoint with another head this one's is drawn.

        The two kinds of heads share names (and shapes, where they give as many numbers), not meaning.
        """
        saved = _saved_by(pretrained_model_name_or_path, kwargs)
        if saved == cls.__name__ or saved not in _WITH_HEADS:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        base, info = TFBindModel.from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        model = cls(base.config).eval()
        model.tfbind = base
        model.classifier.to(base.device, base.dtype)
        info["missing_keys"] = {f"classifier.{key}" for key in model.classifier.state_dict()}
        return (model, info) if wants_info else model


class TFBindForTrackPrediction(ScreensFactors, AdoptsBase):
    """A non-negative value per bin of the window for each factor."""

    # The loss is a mean over bins with a target, of which the Trainer's count of labels knows nothing.
    accepts_loss_kwargs = False

    def __init__(self, config: TFBindConfig) -> None:
        config.validate()
        config = for_task(config, "track", TRACK_LOSSES, type(self).__name__)
        super().__init__(config)
        self.tfbind = TFBindModel(config)
        self.classifier = TrackHead(config.latent_heads, config.num_tracks, 0.0)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        protein_embeds: torch.Tensor | None = None,
        protein_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        dna_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        protein_input_ids: torch.LongTensor | None = None,
        protein_chain_ids: torch.LongTensor | None = None,
        context_input_ids: torch.LongTensor | None = None,
        context_mask: torch.Tensor | None = None,
        pairs: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> BindingOutput:
        """As `TFBindModel.forward`, and:

        Args:
            labels: (B, T) or (B, T, S), NaN = unknown; (windows, F, T[, S]) for every window with every factor, or,
                beside `pairs`, for the listed ones.

        Returns:
            `logits` (B, T), with several tracks (B, T, S): the predicted track itself, float32, zero at padding;
            (windows, F, T[, S]) where labels are for every window with every factor. `num_scored` is 0 where nothing
            could be scored; the loss is then 0.

        Raises:
            SequenceError: labels of another shape, or negative ones in a loss of counts.
        """
        dims = 2 if self.config.num_tracks == 1 else 3
        windows, factors = batches(input_ids, inputs_embeds, dna_embeds), batches(protein_embeds, protein_input_ids)
        pairs, labels, grid = with_grid(pairs, labels, windows, factors, dims)
        outputs = self.tfbind(
            input_ids, protein_embeds, protein_mask, context, inputs_embeds, dna_embeds, attention_mask,
            protein_input_ids, protein_chain_ids, context_input_ids, context_mask, pairs, **kwargs,
        )  # fmt: skip
        tracks = self.logits_of(outputs)
        found = BindingOutput(logits=tracks if grid is None else tracks.unflatten(0, grid), **recorded(outputs))
        if labels is not None:
            several = tracks if dims == 3 else tracks[..., None]
            targets = labels[..., None] if labels.dim() == several.dim() - 1 else labels
            scored = binding_track_loss(several, targets, outputs.bin_mask, self.config.loss_type or "poisson")
            found.loss = found.main_loss = scored.loss
            found.num_scored = scored.count
        return found

    def logits_of(self, outputs: TFBindModelOutput) -> torch.Tensor:
        """The predicted tracks."""
        tracks = self.classifier(outputs.last_hidden_state)
        if outputs.bin_mask is not None:
            tracks = tracks * outputs.bin_mask[..., None].to(tracks.dtype)
        return tracks[..., 0] if self.config.num_tracks == 1 else tracks


class TFBindForSequenceClassification(ScreensFactors, AdoptsBase):
    """Whether the factor binds in the window; by default one logit."""

    def __init__(self, config: TFBindConfig) -> None:
        config.validate()
        config = for_task(config, "binary", BINARY_LOSSES, type(self).__name__)
        super().__init__(config)
        self.tfbind = TFBindModel(config)
        fourier_dims = config.fourier_dims if config.aux_read_value else None
        self.classifier = BindingHead(config.latent_heads, config.num_labels, fourier_dims, config.read_value_features)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        protein_embeds: torch.Tensor | None = None,
        protein_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        dna_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        protein_input_ids: torch.LongTensor | None = None,
        protein_chain_ids: torch.LongTensor | None = None,
        context_input_ids: torch.LongTensor | None = None,
        context_mask: torch.Tensor | None = None,
        pairs: torch.LongTensor | None = None,
        read_value: torch.Tensor | None = None,
        peaks_nr: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BindingOutput:
        """As `TFBindModel.forward`, and:

        Args:
            labels: (B,) or (B, C) from 0 to 1, NaN or -100 = unknown; (windows, F[, C]) for every window with every
                factor, or, beside `pairs`, for the listed ones. Class ids (B,) with several labels.
            read_value: (B,) or (B, 1) for `aux_loss`, NaN = unknown. peaks_nr: (B,) or (B, 1) peaks of each
                experiment, NaN = unknown; None = all unknown. Both need `aux_read_value`.

        Returns:
            `logits` (B, C), or (windows, F, C); `read_value` (B, 1) where the model predicts it.

        Raises:
            SequenceError: labels, read values or counts of another number than rows; read values without their head.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        dims = 1 if self.config.num_labels == 1 else 2
        windows, factors = batches(input_ids, inputs_embeds, dna_embeds), batches(protein_embeds, protein_input_ids)
        pairs, labels, grid = with_grid(pairs, labels, windows, factors, dims)
        outputs = self.tfbind(
            input_ids, protein_embeds, protein_mask, context, inputs_embeds, dna_embeds, attention_mask,
            protein_input_ids, protein_chain_ids, context_input_ids, context_mask, pairs, **kwargs,
        )  # fmt: skip
        logits = self.logits_of(outputs)
        found = BindingOutput(logits=logits if grid is None else logits.unflatten(0, grid), **recorded(outputs))
        self._read(found, outputs, read_value, peaks_nr)
        if labels is not None:
            self._score(found, logits, labels, num_items)
        return found

    def logits_of(self, outputs: TFBindModelOutput) -> torch.Tensor:
        """(B, C)."""
        return self.classifier(outputs.last_hidden_state, outputs.bin_mask)

    def _read(
        self,
        found: BindingOutput,
        outputs: TFBindModelOutput,
        read_value: torch.Tensor | None,
        peaks_nr: torch.Tensor | None,
    ) -> None:
        head = self.classifier.read_value
        if head is None:
            if read_value is not None:
                raise SequenceError("`read_value` needs a model with `aux_read_value=True`; leave it out.")
            return
        found.read_value = head(outputs.last_hidden_state, outputs.bin_mask, peaks_nr)
        if read_value is not None:
            found.aux_loss = read_value_loss(found.read_value, read_value).loss

    def _score(
        self, found: BindingOutput, logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> None:
        config = self.config
        scored = binding_label_loss(
            logits, labels, config.loss_type or "bce", config.problem_type, config.pos_weight, config.mse_on_logits
        )
        # The share of this batch in the optimiser step, for the aid as for the task.
        share = 1.0 if num_items is None else scored.count / torch.as_tensor(num_items).clamp(min=1).to(logits.device)
        found.main_loss, found.num_scored = scored.loss * share, scored.count
        found.loss = found.main_loss
        if found.aux_loss is not None:
            found.aux_loss = found.aux_loss * share
            found.loss = found.main_loss + config.aux_read_value_weight * found.aux_loss


class TFBindForDNATracks(TFBindPreTrainedModel):
    """Tracks of named heads on the DNA encoder's bins, without proteins: what the encoder was or is trained on."""

    accepts_loss_kwargs = False
    # Of a whole TFBind model the encoder alone is used.
    _keys_to_ignore_on_load_unexpected = [r"^(tfbind\.)?(?!dna_encoder|tfbind\.dna_encoder|classifier).*"]

    def __init__(self, config: TFBindConfig) -> None:
        config.validate()
        if not config.track_heads:
            raise ValueError(f"`track_heads` must name at least one species for {type(self).__name__}.")
        super().__init__(config)
        self.tfbind = DnaTrunk(config)
        self.classifier = SpeciesTrackHeads(config.dna_width, config.track_heads)
        self.post_init()
        self.tfbind.freeze_encoders()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        species: str | None = None,
        track_indices: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> TrackPredictionOutput:
        """Predicts tracks from windows.

        Args:
            input_ids, attention_mask, inputs_embeds: as the DNA encoder takes them.
            labels: (B, T, S), NaN = unknown.
            species: which head; None = the first. track_indices: which of its tracks.

        Returns:
            `logits` (B, T, S), non-negative, float32; every bin that the encoder returns is used.

        Raises:
            SequenceError: an unknown species or track, labels of another shape or negative ones.
        """
        del kwargs
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        states = run_encoder(self.tfbind.dna_encoder, inputs, lambda outputs: {"states": outputs.last_hidden_state})[
            "states"
        ]
        logits = self.classifier(states, species or self.classifier.species[0], track_indices)
        mask = None
        if attention_mask is not None and attention_mask.shape == logits.shape[:2]:
            mask = attention_mask.bool()
        loss = None
        if labels is not None:
            kind = self.config.loss_type or "poisson"
            loss = track_loss(logits, labels, mask, kind, log_eps=1e-20)
        return TrackPredictionOutput(loss, logits)


class DnaTrunk(nn.Module):
    """The DNA encoder of a TFBind model, under its name there."""

    def __init__(self, config: TFBindConfig) -> None:
        super().__init__()
        self.freezes = config.freeze_dna
        self.dna_encoder = build_encoder(config.dna_config)

    def freeze_encoders(self) -> None:
        if self.freezes:
            self.dna_encoder.requires_grad_(False).eval()

    def load_absent_encoders(self) -> None:
        """Encoders come with the checkpoint here."""

    def train(self, mode: bool = True) -> "DnaTrunk":
        super().train(mode)
        if self.freezes:
            self.dna_encoder.eval()
        return self


def for_task(
    config: TFBindConfig, task: Literal["track", "binary"], losses: tuple[str, ...], name: str
) -> TFBindConfig:
    """A copy of the config that says which task it is for.

    Raises:
        ValueError: its loss is one of the other task.
    """
    if config.loss_type is not None and config.loss_type not in losses:
        raise ValueError(f"`loss_type` must be one of {', '.join(losses)} for {name}, got {config.loss_type!r}.")
    config = copy.copy(config)
    config.task = task
    return config


def batches(*tensors: torch.Tensor | None) -> int:
    """The batch of the first tensor that is given; 0 = none is."""
    return next((len(tensor) for tensor in tensors if tensor is not None), 0)


def with_grid(
    pairs: torch.Tensor | None, labels: torch.Tensor | None, windows: int, factors: int, dims: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, tuple[int, int] | None]:
    """The pairs that labels ask for, the labels pair by pair, and (windows, factors) where all pairs are meant.

    Args:
        dims: of labels pair by pair.
    """
    is_grid = labels is not None and labels.dim() > dims and tuple(labels.shape[:2]) == (windows, factors)
    if labels is None or not is_grid or (factors == 1 and pairs is None):
        return pairs, labels, None
    if pairs is not None:
        return pairs, labels[pairs[:, 0], pairs[:, 1]], None
    every = torch.cartesian_prod(torch.arange(windows), torch.arange(factors)).to(labels.device)
    return every, labels.flatten(0, 1), (windows, factors)


def _saved_by(path: str | PathLike | None, kwargs: dict[str, Any]) -> str | None:
    """The class that saved a checkpoint; None where that cannot be seen, as of an adapter."""
    names = ("revision", "cache_dir", "token", "subfolder", "local_files_only")
    if path is None:
        return None
    try:
        content = TFBindConfig.get_config_dict(path, **{name: kwargs[name] for name in names if name in kwargs})[0]
    except OSError:
        return None
    return next(iter(content.get("architectures") or []), None)


def recorded(outputs: TFBindModelOutput) -> dict[str, Any]:
    """What heads pass on of the base model's output."""
    names = ("interactions", "residue_scores", "hidden_states", "attentions")
    return {name: getattr(outputs, name) for name in names}
