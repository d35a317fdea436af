"""Tracks along the genome: a non-negative value per bin and track, and the losses of counts.

Poisson loss as in Enformer (Avsec et al. 2021); Poisson-multinomial as in Borzoi (Linder et al. 2023): the total
of a track is Poisson, and its shape over the bins multinomial.

Shapes: B batch, M bins, T tracks, E hidden size.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from genesplice_hf.errors import SequenceError

EPSILON = 1e-7


class TrackHead(nn.Module):
    """Drops out, projects and makes positive: (B, M, E) -> (B, M, T) by softplus in at least float32."""

    def __init__(self, hidden_size: int, num_tracks: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden_size, num_tracks)

    def forward(self, x_BME: torch.Tensor) -> torch.Tensor:
        return nn.functional.softplus(_wide(self.out_proj(self.dropout(x_BME))))


class SpeciesTrackHeads(nn.Module):
    """One projection per species on the same bins: (B, M, E) -> (B, M, T of the species) by softplus in float32.

    A child module per species, under its name, holds the weights.
    """

    def __init__(self, hidden_size: int, num_tracks: Mapping[str, int]) -> None:
        super().__init__()
        for species, tracks in num_tracks.items():
            self.add_module(species, nn.Linear(hidden_size, tracks))

    @property
    def species(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.named_children())

    def forward(
        self, x_BME: torch.Tensor, species: str, track_indices: torch.Tensor | Sequence[int] | None = None
    ) -> torch.Tensor:
        """Predictions of one species.

        Args:
            track_indices: (T',) tracks that alone are computed, in this order; None = all.

        Raises:
            SequenceError: a species without a head, an index beyond its tracks.
        """
        if species not in self.species:
            raise SequenceError(f"`species` must be one of {', '.join(self.species)}, got {species!r}.")
        head = self.get_submodule(species)
        if track_indices is None:
            return nn.functional.softplus(_wide(head(x_BME)))
        index = _demand_tracks(track_indices, head.out_features, species).to(x_BME.device)
        chosen = nn.functional.linear(x_BME, head.weight[index], head.bias[index])
        return nn.functional.softplus(_wide(chosen))


def _demand_tracks(indices: torch.Tensor | Sequence[int], num_tracks: int, species: str) -> torch.Tensor:
    index = torch.as_tensor(indices)
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool or not index.numel():
        raise SequenceError("`track_indices` must be a list or a 1-D tensor of at least one track number.")
    if bool((index < 0).any() | (index >= num_tracks).any()):
        raise SequenceError(
            f"`track_indices` must be 0 to {num_tracks - 1}, the tracks of {species!r}, got {index.tolist()[:10]}."
        )
    return index


def centred_crop(x_BMT: torch.Tensor, mask_BM: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `length` bins in the middle of each row's real ones, (B, length, T), and which of them are real.

    Of an odd number of bins too many, one more is cut from the end. A row of padding alone gives its first bins,
    masked.

    Raises:
        SequenceError: a row has fewer real bins than `length`.
    """
    real = mask_BM.sum(1)
    short = (real < length) & (real > 0)
    if bool(short.any()) or length > x_BMT.shape[1]:
        row = int(short.int().argmax())
        raise SequenceError(
            f"`track_target_length` ({length}) is larger than the {int(real[row])} bins of row {row}; pass at least "
            f"{length} bins of bases, or set it to at most {int(real[row])} (None = all bins)."
        )
    start = mask_BM.int().argmax(1) + (real - length).clamp(min=0).div(2, rounding_mode="floor")
    index = start[:, None] + torch.arange(length, device=x_BMT.device)
    return x_BMT.gather(1, index[..., None].expand(-1, -1, x_BMT.shape[-1])), mask_BM.gather(1, index)


def track_loss(
    predictions_BMT: torch.Tensor,
    targets_BMT: torch.Tensor,
    mask_BM: torch.Tensor | None,
    kind: str,
    log_eps: float = EPSILON,
) -> torch.Tensor:
    """Mean loss over the real bins whose target is not NaN; 0 (with a gradient of 0) when there is none.

    Args:
        predictions_BMT: non-negative. targets_BMT: counts or coverage, NaN = unknown.
        mask_BM: bool, True = real; None = all real.
        kind: "poisson", "poisson_multinomial" or "mse" (which takes any targets).
        log_eps: smaller predictions count as it in the logarithm of "poisson".

    Raises:
        SequenceError: targets of another shape, or negative counts.
    """
    if targets_BMT.shape != predictions_BMT.shape:
        raise SequenceError(
            f"`labels` must be (batch, bins, tracks) = {tuple(predictions_BMT.shape)}, were "
            f"{tuple(targets_BMT.shape)}; bin and crop the targets as `track_bin_size` and `track_target_length` say."
        )
    targets = targets_BMT.to(predictions_BMT)
    valid = ~targets.isnan() if mask_BM is None else ~targets.isnan() & mask_BM[..., None]
    targets = targets.masked_fill(~valid, 0.0)
    if kind == "mse":
        return _mean_where((_wide(predictions_BMT) - _wide(targets)).square(), valid)
    if bool((targets < 0).any()):
        raise SequenceError("`labels` must not be negative; use NaN for bins without a value.")
    if kind == "poisson_multinomial":
        return poisson_multinomial_loss(_wide(predictions_BMT), _wide(targets), valid)
    return poisson_loss(_wide(predictions_BMT), _wide(targets), valid, log_eps)


def poisson_loss(
    predictions_BMT: torch.Tensor, targets_BMT: torch.Tensor, valid_BMT: torch.Tensor, log_eps: float = EPSILON
) -> torch.Tensor:
    """mean(p - y log max(p, log_eps)) over valid entries (Poisson likelihood without the term of y alone)."""
    losses = predictions_BMT - targets_BMT * predictions_BMT.clamp(min=log_eps).log()
    return _mean_where(losses, valid_BMT)


def poisson_multinomial_loss(
    predictions_BMT: torch.Tensor,
    targets_BMT: torch.Tensor,
    valid_BMT: torch.Tensor,
    total_weight: float = 1.0,
) -> torch.Tensor:
    """mean over rows and tracks of multinomial + total_weight * poisson, with L valid bins of the track in the row.

    s_y = sum y, s_p = sum p
    poisson     = (s_p - s_y log(s_p + eps)) / L
    multinomial = -sum((y + eps) log((p + eps) / s_p)) / L
    """
    weight = valid_BMT.to(predictions_BMT.dtype)
    num_bins = weight.sum(1)
    total_y, total_p = (targets_BMT * weight).sum(1), (predictions_BMT * weight).sum(1)
    poisson = total_p - total_y * (total_p + EPSILON).log()
    share = (predictions_BMT + EPSILON) / total_p.clamp(min=EPSILON)[:, None]
    multinomial = -((targets_BMT + EPSILON) * share.log() * weight).sum(1)
    return _mean_where((multinomial + total_weight * poisson) / num_bins.clamp(min=1), num_bins > 0)


def _mean_where(losses: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return torch.where(valid, losses, 0.0).sum() / valid.sum().clamp(min=1)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
