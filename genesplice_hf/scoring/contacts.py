"""How well contact maps are predicted, and by how much two alleles' maps differ.

Shapes: M maps, P pairs i + k <= j in the order of `numpy.triu_indices(N, k)`, T targets, N bins.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from genesplice_hf.data.contacts import Augmentation, augment, map_size, rc_permutation, vector_as_map
from genesplice_hf.errors import DataError

# What is reported per target, beside the strata.
CONTACT_METRICS = (
    "mse", "pearson", "spearman", "pearson_per_map", "spearman_per_map", "insulation_pearson",
)  # fmt: skip


class ContactMetrics:
    """Metrics over maps that come in batches; sums are float64.

    Args:
        diagonal_offset: k of the vectors.
        num_strata: pairs are divided into so many groups of nearly equal distance ranges.
        insulation_window: bins to each side of a point whose contacts across it are its insulation score.
    """

    def __init__(self, diagonal_offset: int = 2, num_strata: int = 4, insulation_window: int = 4) -> None:
        if num_strata < 1 or insulation_window < 1:
            raise DataError(
                f"`num_strata` and `insulation_window` must be at least 1, got {num_strata} and {insulation_window}."
            )
        self.offset, self.num_strata, self.window = diagonal_offset, num_strata, insulation_window
        self._targets: list[np.ndarray] = []
        self._predictions: list[np.ndarray] = []
        self._per_map: list[dict[str, np.ndarray]] = []
        self._pooled: _Moments | None = None
        self._strata: list[_Moments] = []

    def update(self, targets: Any, predictions: Any) -> None:
        """Takes (M, P, T) arrays or tensors; targets that are NaN do not count.

        Raises:
            DataError: shapes that differ, or a number of pairs that no map has.
        """
        truth, found = _as_array(targets), _as_array(predictions)
        if truth.ndim != 3 or truth.shape != found.shape:
            raise DataError(
                f"`predictions` must be (maps, pairs, targets) as `targets` {truth.shape}, got {found.shape}."
            )
        groups = distance_strata(map_size(truth.shape[1], self.offset), self.offset, self.num_strata)
        if self._pooled is None:
            self._pooled = _Moments(truth.shape[-1])
            self._strata = [_Moments(truth.shape[-1]) for _ in groups]
        for y, p in zip(truth, found, strict=True):
            self._pooled.add(y, p)
            for moments, pairs in zip(self._strata, groups, strict=True):
                moments.add(y[pairs], p[pairs])
            self._per_map.append(self._of_one_map(y, p))
        # Ranks over all maps need all values; float32 keeps their order but for ties beyond seven digits.
        self._targets.append(truth.astype(np.float32).reshape(-1, truth.shape[-1]))
        self._predictions.append(found.astype(np.float32).reshape(-1, truth.shape[-1]))

    def compute(self) -> dict[str, Any]:
        """`CONTACT_METRICS` as lists with one number per target (NaN = undefined), and `strata`.

        `pearson` and `spearman` are over all pairs of all maps; `*_per_map` are means over maps;
        `insulation_pearson` is the mean over maps of the correlation of insulation scores; `strata` lists
        `first_bin`, `last_bin` (distances) and `pearson` of every group.

        Raises:
            DataError: no maps were given.
        """
        if self._pooled is None:
            raise DataError("`compute` needs at least one `update`.")
        truth, found = np.concatenate(self._targets), np.concatenate(self._predictions)
        found_metrics = {
            "mse": self._pooled.mse().tolist(),
            "pearson": self._pooled.pearson().tolist(),
            "spearman": spearman(truth, found).tolist(),
        }
        for name in ("pearson", "spearman", "insulation"):
            stacked = np.stack([one[name] for one in self._per_map])
            key = "insulation_pearson" if name == "insulation" else f"{name}_per_map"
            found_metrics[key] = _nanmean(stacked).tolist()
        return found_metrics | {"strata": self._stratum_rows()}

    def _of_one_map(self, y: np.ndarray, p: np.ndarray) -> dict[str, np.ndarray]:
        moments = _Moments(y.shape[-1])
        moments.add(y, p)
        insulation = _Moments(y.shape[-1])
        insulation.add(
            insulation_scores(vector_as_map(y, self.offset), self.window),
            insulation_scores(vector_as_map(p, self.offset), self.window),
        )
        return {"pearson": moments.pearson(), "spearman": spearman(y, p), "insulation": insulation.pearson()}

    def _stratum_rows(self) -> list[dict[str, Any]]:
        pairs = len(self._targets[0]) // max(len(self._per_map) and self._maps_in_first(), 1)
        size = map_size(pairs, self.offset)
        edges = _edges(size, self.offset, self.num_strata)
        return [
            {"first_bin": int(start), "last_bin": int(stop) - 1, "pearson": moments.pearson().tolist()}
            for start, stop, moments in zip(edges[:-1], edges[1:], self._strata, strict=True)
        ]

    def _maps_in_first(self) -> int:
        return round(len(self._per_map) * len(self._targets[0]) / sum(map(len, self._targets)))


def distance_strata(num_bins: int, diagonal_offset: int, num_strata: int) -> list[np.ndarray]:
    """Indices of the pairs of each group; groups are ranges of distance, as equally wide as whole bins allow."""
    rows, columns = np.triu_indices(num_bins, diagonal_offset)
    edges = _edges(num_bins, diagonal_offset, num_strata)
    return [np.flatnonzero((columns - rows >= start) & (columns - rows < stop)) for start, stop in pairwise(edges)]


def insulation_scores(contact_map: np.ndarray, window: int) -> np.ndarray:
    """(N, ...) mean of the contacts between the `window` bins before a bin and the `window` bins after it.

    Low where the bin is a boundary. Unknown pixels do not count; bins nearer to an end than the window are NaN.

    Args:
        contact_map: (N, N, ...), NaN = unknown.
        window: bins to each side.
    """
    scores = np.full(contact_map.shape[:1] + contact_map.shape[2:], np.nan)
    for place in range(window, len(contact_map) - window):
        square = contact_map[place - window : place, place + 1 : place + 1 + window]
        scores[place] = _nanmean(square.reshape(-1, *square.shape[2:]).astype(np.float64))
    return scores


def spearman(targets: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """(T,) rank correlation over the rows of (n, T) whose target is known; ties get their mean rank."""
    found = np.full(targets.shape[-1], np.nan)
    for column in range(targets.shape[-1]):
        known = ~np.isnan(targets[:, column]) & ~np.isnan(predictions[:, column])
        moments = _Moments(1)
        ranks = [rankdata(values[known, column])[:, None] for values in (targets, predictions)]
        moments.add(*ranks)
        found[column] = moments.pearson()[0]
    return found


def scd(reference: Any, alternative: Any) -> np.ndarray:
    """Squared contact difference, (..., T): sqrt(sum over pairs of (reference - alternative)^2) of (..., P, T)."""
    ref, alt = _two_vectors(reference, alternative)
    return np.sqrt(np.nansum((ref - alt) ** 2, axis=-2))


def ssd(reference: Any, alternative: Any) -> np.ndarray:
    """Difference of strengths, (..., T): sqrt(sum alternative^2) - sqrt(sum reference^2) of (..., P, T)."""
    ref, alt = _two_vectors(reference, alternative)
    return np.sqrt(np.nansum(alt**2, axis=-2)) - np.sqrt(np.nansum(ref**2, axis=-2))


@torch.no_grad()
def predict_contacts(
    model: torch.nn.Module, ids: np.ndarray, rc: bool = True, shifts: Sequence[int] = (0,)
) -> np.ndarray:
    """(M, P, T) float32: the mean prediction over both strands and small shifts, each undone.

    Args:
        model: a model for contact prediction; it is put into eval mode.
        ids: (M, L) uint8 ids.
        rc: also predict the reverse complement.
        shifts: bases by which the window is moved.
    """
    model.eval()
    config: Any = model.config
    permutation = rc_permutation(config.map_size(ids.shape[1]), config.diagonal_offset)
    device = next(model.parameters()).device
    ways = [Augmentation(shift, strand) for shift in shifts for strand in ((False, True) if rc else (False,))]
    total = 0.0
    for way in ways:
        moved = np.stack([augment(row, None, way, permutation)[0] for row in ids])
        predicted = model(torch.from_numpy(moved).to(device)).logits.float().cpu().numpy()
        total = total + (predicted[:, permutation] if way.rc else predicted)
    return np.asarray(total / len(ways), dtype=np.float32)


class _Moments:
    """Means and central sums of x, y and xy per target, merged without raw sums (Chan et al. 1983)."""

    def __init__(self, num_targets: int) -> None:
        self.n, self.mean_x, self.mean_y, self.xx, self.yy, self.xy, self.error = (
            np.zeros(num_targets) for _ in range(7)
        )

    def add(self, targets: np.ndarray, predictions: np.ndarray) -> None:
        """(n, T) values; rows with NaN do not count."""
        x, y = targets.astype(np.float64), predictions.astype(np.float64)
        known = ~np.isnan(x) & ~np.isnan(y)
        n = known.sum(0)
        safe = np.maximum(n, 1)
        x, y = np.where(known, x, 0.0), np.where(known, y, 0.0)
        mean_x, mean_y = x.sum(0) / safe, y.sum(0) / safe
        dx, dy = np.where(known, x - mean_x, 0.0), np.where(known, y - mean_y, 0.0)
        total = np.maximum(self.n + n, 1)
        gap_x, gap_y, weight = mean_x - self.mean_x, mean_y - self.mean_y, self.n * n / total
        self.xx += (dx * dx).sum(0) + gap_x**2 * weight
        self.yy += (dy * dy).sum(0) + gap_y**2 * weight
        self.xy += (dx * dy).sum(0) + gap_x * gap_y * weight
        self.mean_x += gap_x * n / total
        self.mean_y += gap_y * n / total
        self.error += ((x - y) ** 2).sum(0)
        self.n += n

    def pearson(self) -> np.ndarray:
        """(T,); NaN where either side is constant."""
        scale = np.sqrt(self.xx * self.yy)
        return np.divide(self.xy, scale, out=np.full_like(scale, np.nan), where=scale > 0)

    def mse(self) -> np.ndarray:
        return np.divide(self.error, self.n, out=np.full_like(self.error, np.nan), where=self.n > 0)


def _edges(num_bins: int, offset: int, num_strata: int) -> np.ndarray:
    return np.unique(np.linspace(offset, num_bins, num_strata + 1).round().astype(int))


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Over the first axis; NaN where nothing is known, without a warning."""
    known = ~np.isnan(values)
    count = known.sum(0)
    total = np.where(known, values, 0.0).sum(0)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def _as_array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        return values.detach().float().cpu().numpy() if values.dtype != torch.float64 else values.detach().numpy()
    return np.asarray(values)


def _two_vectors(reference: Any, alternative: Any) -> tuple[np.ndarray, np.ndarray]:
    ref, alt = _as_array(reference).astype(np.float64), _as_array(alternative).astype(np.float64)
    if ref.shape != alt.shape or ref.ndim < 2:
        raise DataError(
            f"`alternative` must be (..., pairs, targets) as `reference` {ref.shape}, got {alt.shape}; realign maps "
            "of windows with other coordinates first."
        )
    return ref, alt
