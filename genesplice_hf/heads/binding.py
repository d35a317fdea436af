"""Binding of a factor: heads and losses of tracks and of yes-or-no labels, and the read value beside them.

Shapes: B pairs of window and factor, T bins, S tracks, H latent heads, C labels, F Fourier numbers.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from genesplice_hf.errors import SequenceError
from genesplice_hf.heads.losses import IGNORED
from genesplice_hf.heads.pooling import masked_mean
from genesplice_hf.heads.sequence import sequence_loss
from genesplice_hf.heads.tracks import poisson_loss, poisson_multinomial_loss

POISSON_EPS = 1e-20
CORRELATION_EPS = 1e-8
# Slowest period of the Fourier features over 2 pi, and what peak counts are divided by.
FOURIER_BASE, FOURIER_UNIT, PEAKS_UNIT = 20_000.0, 50.0, 8_000.0


@dataclass
class TFBindModelOutput(ModelOutput):
    """States of window, factor and context, and how they match.

    Attributes:
        last_hidden_state: (B, T, H) interactions after the context's projection, zero at padding.
        interactions: (B, T, H) before it.
        residue_scores: (B, H, T, R) similarity of every residue, 0 at padding; on request.
        dna_states, protein_states: what the interaction compared; context_embed: the context's vector; on request.
        bin_mask: (B, T) bool, True = real; None = all real.
        hidden_states: bins after the encoder's norm and after every block; attentions: (B, heads, T, R) of every
            joint block, eager only; on request.
    """

    last_hidden_state: torch.Tensor | None = None
    interactions: torch.Tensor | None = None
    residue_scores: torch.Tensor | None = None
    dna_states: torch.Tensor | None = None
    protein_states: torch.Tensor | None = None
    context_embed: torch.Tensor | None = None
    bin_mask: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class BindingOutput(ModelOutput):
    """What a TFBind head says.

    Attributes:
        loss: `main_loss`, with `aux_loss` where there is one.
        logits: (B, T) or (B, T, S) non-negative tracks; (B, C) logits of labels. With labels for every pair of
            windows and factors the batch is two dimensions, windows x factors.
        main_loss: of tracks or labels. aux_loss: of the read value.
        num_scored: what `main_loss` is a mean over: values, rows x tracks for "correlation", labels.
        read_value: (B, 1) predicted, where the model has such a head.
        interactions, residue_scores, hidden_states, attentions: as `TFBindModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    main_loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    num_scored: torch.Tensor | None = None
    read_value: torch.Tensor | None = None
    interactions: torch.Tensor | None = None
    residue_scores: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class Scored(NamedTuple):
    """A mean loss and how many things it is a mean over; 0 with a gradient of 0 where there is nothing."""

    loss: torch.Tensor
    count: torch.Tensor


def binding_track_loss(
    predictions_BTS: torch.Tensor, targets_BTS: torch.Tensor, mask_BT: torch.Tensor | None, kind: str
) -> Scored:
    """Loss over real bins whose target is not NaN, in float32 at least.

    Args:
        predictions_BTS: non-negative. targets_BTS: NaN = unknown. mask_BT: bool, True = real; None = all.
        kind: "poisson" = mean(p - y log max(p, 1e-20)), "mse", "poisson_multinomial" (`heads/tracks.py`), or
            "correlation" = 1 - mean over rows and tracks of Pearson's r along the bins.

    Raises:
        SequenceError: targets of another shape, or negative ones in a loss of counts.
    """
    if targets_BTS.shape != predictions_BTS.shape:
        raise SequenceError(
            f"`labels` must be (batch, bins[, tracks]) = {tuple(predictions_BTS.shape)}, were "
            f"{tuple(targets_BTS.shape)}; bin and crop them as the model does (`target_length`)."
        )
    predictions, targets = _wide(predictions_BTS), _wide(targets_BTS.to(predictions_BTS.device))
    valid = ~targets.isnan()
    if mask_BT is not None:
        valid = valid & mask_BT[..., None]
    targets = targets.masked_fill(~valid, 0.0)
    if kind.startswith("poisson") and bool((targets < 0).any()):
        raise SequenceError(f"`labels` must not be negative with loss_type={kind!r}; use NaN for unknown values.")
    if kind == "correlation":
        return correlation_loss(predictions, targets, valid)
    if kind == "poisson_multinomial":
        return Scored(poisson_multinomial_loss(predictions, targets, valid), valid.sum())
    if kind == "poisson":
        return Scored(poisson_loss(predictions, targets, valid, POISSON_EPS), valid.sum())
    return _mean_where((predictions - targets).square(), valid)


def correlation_loss(predictions_BTS: torch.Tensor, targets_BTS: torch.Tensor, valid_BTS: torch.Tensor) -> Scored:
    """1 - mean of Pearson's r along the bins; rows whose target is constant over valid bins are left out."""
    weight = valid_BTS.to(predictions_BTS.dtype)
    count = weight.sum(1, keepdim=True).clamp(min=1)
    centred = [(x - (x * weight).sum(1, keepdim=True) / count) * weight for x in (predictions_BTS, targets_BTS)]
    products = (centred[0] * centred[1]).sum(1)
    # Not `norm`, whose gradient at 0 is not defined.
    norms = [(x.square().sum(1) + torch.finfo(x.dtype).tiny).sqrt() for x in centred]
    pearson = products / (norms[0] * norms[1]).clamp(min=CORRELATION_EPS)
    infinite = torch.finfo(targets_BTS.dtype).max
    highest = targets_BTS.masked_fill(~valid_BTS, -infinite).amax(1)
    varies = highest > targets_BTS.masked_fill(~valid_BTS, infinite).amin(1)
    return _mean_where(1 - pearson, varies)


class BindingHead(nn.Module):
    """Mean over real bins, LayerNorm, projection: (B, T, H) -> (B, C); and the read value's head where asked for.

    Args:
        size, num_labels: H and C.
        fourier_dims: F of the read value; None = no such head.
        features: of `ReadValueHead`.
    """

    def __init__(self, size: int, num_labels: int, fourier_dims: int | None = None, features: str = "log1p") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.out_proj = nn.Linear(size, num_labels)
        self.read_value = None if fourier_dims is None else ReadValueHead(size, fourier_dims, features)

    def forward(self, x_BTH: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
        return self.out_proj(self.norm(mean_bins(x_BTH, mask_BT)))


class ReadValueHead(nn.Module):
    """The read value of a peak from its bins and from how many peaks its experiment has: (B, T, H) -> (B, 1).

    Args:
        size, fourier_dims: H and F.
        features: "log1p" = [log1p(n) / 10, n / 8000, sin and cos of n / 50], a learned vector for unknown n;
            "reference" = [n / 8000, log(n + 1e-20), sin, cos], as in converted models, whose 0 is a feature of -46.
    """

    def __init__(self, size: int, fourier_dims: int, features: str = "log1p") -> None:
        super().__init__()
        self.features, self.fourier_dims = features, fourier_dims
        self.norm = nn.LayerNorm(size)
        self.fc1 = nn.Linear(size + fourier_dims + 2, 2 * size)
        self.fc2 = nn.Linear(2 * size, 1)
        self.unknown = nn.Parameter(torch.empty(fourier_dims + 2)) if features == "log1p" else None

    def initialize(self) -> None:
        """Unknown counts look like none of the known ones, and like nothing special."""
        if self.unknown is not None:
            init.zeros_(self.unknown)

    def forward(
        self, x_BTH: torch.Tensor, mask_BT: torch.Tensor | None, peaks_nr: torch.Tensor | None
    ) -> torch.Tensor:
        """`peaks_nr` (B,) or (B, 1), NaN = unknown; None = all unknown.

        Raises:
            SequenceError: counts of another number than rows, or missing ones with "reference" features.
        """
        pooled = self.norm(mean_bins(x_BTH, mask_BT))
        hidden = torch.cat([pooled, self._of_peaks(peaks_nr, pooled)], dim=-1)
        return self.fc2(nn.functional.gelu(self.fc1(hidden)))

    def _of_peaks(self, peaks_nr: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        if peaks_nr is None:
            peaks = torch.full((len(like), 1), torch.nan, device=like.device)
        else:
            peaks = _wide(peaks_nr.to(like.device)).reshape(-1, 1)
            if len(peaks) == 1:
                peaks = peaks.expand(len(like), 1)
        if len(peaks) != len(like):
            raise SequenceError(f"`peaks_nr` must hold one count per row ({len(like)}), got {len(peaks)}.")
        known = ~peaks.isnan()
        if self.unknown is None and not bool(known.all()):
            raise SequenceError("`peaks_nr` must be known for every row with read_value_features='reference'.")
        counts = peaks.masked_fill(~known, 0.0)
        waves = fourier_features(counts / FOURIER_UNIT, self.fourier_dims)
        if self.unknown is None:
            return torch.cat([counts / PEAKS_UNIT, (counts + 1e-20).log(), waves], dim=-1).to(like.dtype)
        found = torch.cat([counts.log1p() / 10, counts / PEAKS_UNIT, waves], dim=-1).to(like.dtype)
        return torch.where(known, found, self.unknown)


def fourier_features(x_B1: torch.Tensor, size: int) -> torch.Tensor:
    """(B, F): sines, then cosines, of x times exp(-k ln(20000) / (F / 2)), k = 0 .. F / 2 - 1."""
    half = size // 2
    rates = torch.exp(torch.arange(half, device=x_B1.device, dtype=x_B1.dtype) * (-math.log(FOURIER_BASE) / half))
    angles = x_B1 * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def binding_label_loss(
    logits_BC: torch.Tensor,
    labels: torch.Tensor,
    kind: str,
    problem_type: str | None = None,
    pos_weight: float | None = None,
    on_logits: bool = False,
) -> Scored:
    """Mean loss over labels that are neither NaN nor -100, in float32 at least.

    Args:
        labels: (B,) or (B, C) from 0 to 1; (B,) class ids, where there are several classes.
        kind: "bce" or "mse", the latter of probabilities.
        problem_type: transformers' word for another loss; None = by `kind`, or by class ids.
        pos_weight: of labels of 1 in "bce".
        on_logits: "mse" compares logits with labels, as the reference does.

    Raises:
        SequenceError: another number of labels than logits.
    """
    labels = labels.to(logits_BC.device)
    are_classes = logits_BC.shape[-1] > 1 and labels.dim() == 1 and not labels.is_floating_point()
    if problem_type == "single_label_classification" or (problem_type is None and are_classes):
        count = (labels != IGNORED).sum()
        return Scored(sequence_loss(logits_BC, labels, "single_label_classification"), count)
    if labels.numel() != logits_BC.numel():
        raise SequenceError(
            f"`labels` must be one per logit, {tuple(logits_BC.shape)}, were {tuple(labels.shape)}; see `num_labels`."
        )
    logits, targets = _wide(logits_BC), _wide(labels.reshape(logits_BC.shape))
    valid = ~targets.isnan() & (targets != IGNORED)
    targets = targets.masked_fill(~valid, 0.0)
    if problem_type == "regression":
        losses = (logits - targets).square()
    elif kind == "mse" and problem_type is None:
        losses = ((logits if on_logits else logits.sigmoid()) - targets).square()
    else:
        weight = None if pos_weight is None else logits.new_tensor(pos_weight)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=weight)
    return _mean_where(losses, valid)


def read_value_loss(found_B1: torch.Tensor, read_value: torch.Tensor) -> Scored:
    """Smooth L1 (threshold 1) over rows whose read value is not NaN.

    Raises:
        SequenceError: another number of values than rows.
    """
    if read_value.numel() != found_B1.numel():
        raise SequenceError(
            f"`read_value` must hold one value per row ({found_B1.numel()}), got {read_value.numel()}."
        )
    targets = _wide(read_value.to(found_B1.device)).reshape(found_B1.shape)
    valid = ~targets.isnan()
    losses = nn.functional.smooth_l1_loss(_wide(found_B1), targets.masked_fill(~valid, 0.0), reduction="none")
    return _mean_where(losses, valid)


def mean_bins(x_BTH: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """(B, H) over real bins, summed in float32 at least."""
    wide = _wide(x_BTH)
    return (wide.mean(1) if mask_BT is None else masked_mean(wide, mask_BT)).to(x_BTH.dtype)


def _mean_where(losses: torch.Tensor, valid: torch.Tensor) -> Scored:
    count = valid.sum()
    return Scored(torch.where(valid, losses, 0.0).sum() / count.clamp(min=1), count)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
