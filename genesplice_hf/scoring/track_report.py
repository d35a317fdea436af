"""One pass over predicted and measured tracks, and a table of it: a line per track, and means per assay.

The assay of a track is what stands before the first colon of its description (`CAGE:`, `DNASE:`, ...), as in the
`targets.txt` of Basenji.

Shapes: B batch (windows), M bins, T tracks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from genesplice_hf.errors import DataError
from genesplice_hf.scoring.streaming import Array, StreamingMoments, StreamingPoisson, per_sequence_pearson
from genesplice_hf.scoring.streaming_ranks import StreamingSpearman

# Name -> what it is, in the order of the tables.
TRACK_METRICS = {
    "pearson": "correlation over all windows and bins",
    "spearman": "rank correlation over the same",
    "r2": "1 - residual / total sum of squares",
    "poisson": "mean of p - y log p",
    "window_pearson": "correlation along the bins of a window, mean over windows",
}


def assay_of(description: str) -> str:
    """What stands before the first colon; the whole text where there is none."""
    return description.split(":", 1)[0].strip()


class TrackReport:
    """Feeds all figures of `TRACK_METRICS` at once, and says them per track, per assay and over all.

    Args:
        tracks: a description per track, in the order of the columns.
        spearman_bins: bins that the rank correlation keeps; None = all of them (8 bytes per bin and track).
        seed: of the choice of those bins.

    Raises:
        DataError: no track.
    """

    def __init__(self, tracks: Sequence[str], spearman_bins: int | None = 1 << 17, seed: int = 0) -> None:
        if not tracks:
            raise DataError("`tracks` must hold a description per track, got none.")
        self.tracks = [str(track) for track in tracks]
        self.moments = StreamingMoments(len(tracks))
        self.spearman = StreamingSpearman(len(tracks), spearman_bins, seed)
        self.poisson = StreamingPoisson(len(tracks))
        # The mean over windows of a correlation that not every window defines, kept as moments of it.
        self.window_pearson = StreamingMoments(len(tracks))
        self.windows = 0

    def update(self, predictions: Array, targets: Array) -> "TrackReport":
        """Adds windows (B, M, T), or one (M, T); NaN targets are skipped. Errors as `StreamingPearson.update`."""
        for metric in (self.moments, self.spearman, self.poisson):
            metric.update(predictions, targets)
        along_BT = per_sequence_pearson(predictions, targets)
        self.window_pearson.update(along_BT, along_BT)
        self.windows += len(along_BT)
        return self

    def merge(self, other: "TrackReport") -> "TrackReport":
        """Adds what `other` has seen, and returns this object."""
        for mine, theirs in zip(self._metrics(), other._metrics(), strict=True):
            mine.merge(theirs)
        self.windows += other.windows
        return self

    def all_reduce(self) -> "TrackReport":
        """Adds what all processes have seen, on each of them; see `StreamingMetric.all_reduce`."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            counts: list = [0] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(counts, 0 if self.moments._is_reduced else self.windows)
            self.windows = sum(counts) or self.windows
        for metric in self._metrics():
            metric.all_reduce()
        return self

    def rows(self) -> list[dict[str, Any]]:
        """One dict per track: `track`, `description`, `assay`, the figures, and means of both sides."""
        moments, figures = self.moments._known(), self._figures()
        return [
            {"track": track, "description": description, "assay": assay_of(description)}
            | {name: values[track].item() for name, values in figures.items()}
            | {"mean_measured": moments.mean_y[track].item(), "mean_predicted": moments.mean_x[track].item()}
            for track, description in enumerate(self.tracks)
        ]

    def by_assay(self) -> dict[str, dict[str, float]]:
        """Assay -> number of `tracks` and mean of every figure over those that define it; `all` comes first."""
        rows = self.rows()
        assays = list(dict.fromkeys(row["assay"] for row in rows))
        groups = {"all": rows} | {assay: [row for row in rows if row["assay"] == assay] for assay in assays}
        return {assay: _means(group) for assay, group in groups.items()}

    def as_dict(self) -> dict[str, Any]:
        """What a JSON file keeps: counts, `by_assay`, `tracks`."""
        return {
            "windows": self.windows,
            "bins_per_track": int(self.moments._known().count.max().item()),
            "spearman_is_exact": self.spearman.is_exact,
            "by_assay": self.by_assay(),
            "tracks": self.rows(),
        }

    def _metrics(self):
        return (self.moments, self.spearman, self.poisson, self.window_pearson)

    def _figures(self) -> dict[str, torch.Tensor]:
        moments = self.moments._known()
        windows = self.window_pearson._known()
        return {
            "pearson": moments.pearson(),
            "spearman": self.spearman.compute(),
            "r2": moments.r2(),
            "poisson": self.poisson.compute(),
            "window_pearson": windows.mean_y.where(windows.count > 0, torch.nan),
        }


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the rows where a figure is defined, and in how many the correlation is not."""
    known = {name: [row[name] for row in rows if not math.isnan(row[name])] for name in TRACK_METRICS}
    means = {name: math.fsum(values) / len(values) if values else math.nan for name, values in known.items()}
    return {"tracks": len(rows)} | means | {"undefined": len(rows) - len(known["pearson"])}
