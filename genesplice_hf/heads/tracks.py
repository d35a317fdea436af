"""Tracks along the genome: a non-negative value per bin and track, and the losses of counts.

Poisson loss as in Enformer (Avsec et al. 2021); Poisson-multinomial as in Borzoi (Linder et al. 2023): the total
of a track is Poisson, and its shape over the bins multinomial.

Shapes: B batch, M bins, T tracks, E hidden size.
"""

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
    predictions_BMT: torch.Tensor, targets_BMT: torch.Tensor, mask_BM: torch.Tensor, kind: str
) -> torch.Tensor:
    """Mean loss over the real bins whose target is not NaN; 0 (with a gradient of 0) when there is none.

    Args:
        predictions_BMT: non-negative. targets_BMT: counts or coverage, NaN = unknown.
        mask_BM: bool, True = real.
        kind: "poisson" or "poisson_multinomial".

    Raises:
        SequenceError: targets of another shape, or negative ones.
    """
    if targets_BMT.shape != predictions_BMT.shape:
        raise SequenceError(
            f"`labels` must be (batch, bins, tracks) = {tuple(predictions_BMT.shape)}, were "
            f"{tuple(targets_BMT.shape)}; bin and crop the targets as `track_bin_size` and `track_target_length` say."
        )
    targets = targets_BMT.to(predictions_BMT)
    valid = ~targets.isnan() & mask_BM[..., None]
    targets = targets.masked_fill(~valid, 0.0)
    if bool((targets < 0).any()):
        raise SequenceError("`labels` must not be negative; use NaN for bins without a value.")
    function = poisson_multinomial_loss if kind == "poisson_multinomial" else poisson_loss
    return function(_wide(predictions_BMT), _wide(targets), valid)


def poisson_loss(predictions_BMT: torch.Tensor, targets_BMT: torch.Tensor, valid_BMT: torch.Tensor) -> torch.Tensor:
    """mean(p - y log p) over valid entries, log p from 1e-7 on (Poisson likelihood without the term of y alone)."""
    losses = predictions_BMT - targets_BMT * predictions_BMT.clamp(min=EPSILON).log()
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
