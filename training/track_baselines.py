"""What a track model has to beat: the mean of each track, and a ridge regression on k-mers around each bin.

Shapes: N windows, L bases, M bins, T tracks, F features, K canonical k-mers.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from genesplice_hf.data.tracks import TrackDataset
from genesplice_hf.scoring.streaming import StreamingPearson

logger = logging.getLogger(__name__)

KMER = 4
# Bases around the centre of a bin whose k-mers are counted: the bin, its neighbourhood, the region.
SCALES_BP = (32, 256, 2048)
ALPHAS = (1e3, 1e4, 1e5, 1e6, 1e7)
# A regression may predict less than nothing; a count may not. Share of the track's mean that is the least.
FLOOR_SHARE = 0.05
Predictor = Callable[[np.ndarray], np.ndarray]


class Ridge(NamedTuple):
    """A fitted regression: prediction = (features - mean) / sd @ weights + intercept, at least `floor`."""

    mean_F: np.ndarray
    sd_F: np.ndarray
    weights_FT: np.ndarray
    intercept_T: np.ndarray
    floor_T: np.ndarray
    alpha: float

    def __call__(self, features_MF: np.ndarray) -> np.ndarray:
        values = (features_MF - self.mean_F) / self.sd_F @ self.weights_FT + self.intercept_T
        return np.maximum(values, self.floor_T)


def track_means(train: TrackDataset) -> np.ndarray:
    """Mean of each track (T,) over all windows and bins with a value."""
    total, count = np.zeros(train.num_tracks), np.zeros(train.num_tracks)
    for item in range(len(train)):
        labels = train[item]["labels"].numpy().astype(np.float64)
        total += np.nansum(labels, axis=0)
        count += (~np.isnan(labels)).sum(axis=0)
    return total / np.maximum(count, 1)


def kmer_features(ids: np.ndarray, num_bins: int, bin_bp: int) -> np.ndarray:
    """Shares of the canonical k-mers at every scale around each bin of the centre, (M, F) float32.

    Args:
        ids: uint8 (L,), A, C, G, T = 0 to 3; anything else is unknown, and k-mers over it do not count.
        num_bins, bin_bp: the bins that the labels belong to, in the centre of the window.
    """
    classes, num_classes = _canonical(KMER)
    counts = np.zeros((len(ids) + 1, num_classes), dtype=np.int32)
    starts, kmers = _valid_kmers(ids)
    counts[starts + 1, classes[kmers]] = 1
    counts.cumsum(axis=0, out=counts)
    centres = (len(ids) - num_bins * bin_bp) // 2 + bin_bp // 2 + bin_bp * np.arange(num_bins)
    parts = []
    for scale in SCALES_BP:
        low, high = np.clip(centres - scale // 2, 0, len(ids)), np.clip(centres + scale // 2, 0, len(ids))
        found = counts[high] - counts[low]
        parts.append(found / np.maximum(found.sum(axis=1, keepdims=True), 1))
    return np.concatenate(parts, axis=1).astype(np.float32)


def fit_ridge(train: TrackDataset, valid: TrackDataset, bin_bp: int) -> Ridge:
    """Fits all tracks at once; the penalty is the one of `ALPHAS` with the best mean Pearson on valid.

    Unlabelled bins (NaN in any track) are left out.
    """
    gram, cross, sums, label_sums, rows = _sums(train, bin_bp)
    mean_F, mean_T = sums / rows, label_sums / rows
    covariance = gram / rows - np.outer(mean_F, mean_F)
    sd_F = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
    scaled = covariance / np.outer(sd_F, sd_F) * rows
    products = (cross - np.outer(sums, mean_T)) / sd_F[:, None]
    held = [(features, labels) for features, labels in _features(valid, bin_bp)]
    fitted = []
    for alpha in ALPHAS:
        weights = np.linalg.solve(scaled + alpha * np.eye(len(scaled)), products)
        ridge = Ridge(mean_F, sd_F, weights, mean_T, FLOOR_SHARE * np.maximum(mean_T, 1e-6), alpha)
        metric = StreamingPearson(train.num_tracks)
        for features, labels in held:
            metric.update(ridge(features), labels)
        fitted.append((metric.mean(), ridge))
        logger.info("ridge, penalty %g: Pearson %.4f on valid", alpha, fitted[-1][0])
    return max(fitted, key=lambda pair: pair[0])[1]


def baseline_predictions(dataset: TrackDataset, bin_bp: int, ridge: Ridge) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Predictions of the ridge and labels, (1, M, T) each, window by window."""
    for features, labels in _features(dataset, bin_bp):
        yield ridge(features)[None].astype(np.float32), labels[None]


def _features(dataset: TrackDataset, bin_bp: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for item in range(len(dataset)):
        row = dataset[item]
        yield kmer_features(row["input_ids"].numpy(), dataset.num_bins, bin_bp), row["labels"].numpy()


def _sums(train: TrackDataset, bin_bp: int) -> Sequence:
    """X'X, X'Y, sums of X and Y, and rows, over the labelled bins, in float64."""
    totals: list = []
    for features, labels in _features(train, bin_bp):
        known = ~np.isnan(labels).any(axis=1)
        x, y = features[known].astype(np.float64), labels[known].astype(np.float64)
        parts = (x.T @ x, x.T @ y, x.sum(axis=0), y.sum(axis=0), len(x))
        totals = [total + part for total, part in zip(totals, parts, strict=True)] if totals else list(parts)
    return totals


def _valid_kmers(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and numbers of the k-mers without an unknown base."""
    windows = np.lib.stride_tricks.sliding_window_view(ids, KMER)
    starts = np.flatnonzero((windows < 4).all(axis=1))
    return starts, windows[starts].astype(np.int64) @ (4 ** np.arange(KMER)[::-1])


@lru_cache
def _canonical(k: int) -> tuple[np.ndarray, int]:
    """The class of every k-mer, the same for a k-mer and its reverse complement, and how many there are."""
    numbers = np.arange(4**k)
    digits = numbers[:, None] // 4 ** np.arange(k)[::-1] % 4
    partner = (3 - digits[:, ::-1]) @ (4 ** np.arange(k)[::-1])
    _, classes = np.unique(np.minimum(numbers, partner), return_inverse=True)
    return classes, int(classes.max()) + 1
