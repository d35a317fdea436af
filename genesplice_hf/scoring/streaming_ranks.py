"""Rank correlation of tracks, from all pairs or from a random sample that streams and merges.

Ranks need all values at once. `StreamingSpearman` keeps every bin, or with a `capacity` a uniform sample of bins: each
bin draws a random key and those with the smallest keys stay (bottom-k sampling, Cohen and Kaplan 2007), so that
samples of two parts join into a sample of the whole.

Shapes: B batch (windows), M bins, T tracks, R bins that are kept.
"""

from collections.abc import Iterable

import numpy as np
import torch
from scipy.stats import rankdata

from genesplice_hf.errors import DataError
from genesplice_hf.scoring.streaming import Array, Moments, StreamingMetric


class StreamingSpearman(StreamingMetric):
    """Spearman correlation (ranks, ties averaged) of every track over windows x bins.

    Args:
        num_tracks: T.
        capacity: bins to keep, each with all its tracks; None = all, 8 bytes per bin and track.
        seed: of the sample, beside the number of the process. The sample does not depend on how the bins are cut
            into batches.

    Raises:
        DataError: a capacity below 2.
    """

    _parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]

    def __init__(self, num_tracks: int, capacity: int | None = None, seed: int = 0) -> None:
        super().__init__(num_tracks)
        if capacity is not None and capacity < 2:
            raise DataError(f"`capacity` must be at least 2 bins, or None for all, got {capacity}.")
        self.capacity = capacity
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self._random = np.random.default_rng([seed, rank])
        self._restart()

    def update(self, predictions: Array, targets: Array) -> "StreamingSpearman":
        """As `StreamingPearson.update`; values are kept in float32."""
        x_BMT, y_BMT = self._pairs(predictions, targets)
        x, y = (value.reshape(-1, self.num_tracks).float().cpu().numpy() for value in (x_BMT, y_BMT))
        self._parts.append((self._random.random(len(x)), x, y))
        self._waiting += len(x)
        self.seen += len(x)
        # Sorting at every small batch would cost more than it saves.
        if self.capacity is not None and self._waiting > 2 * self.capacity:
            self._thin()
        return self

    @property
    def is_exact(self) -> bool:
        """Has no bin been dropped?"""
        return self.capacity is None or self.seen <= self.capacity

    def compute(self) -> torch.Tensor:
        """(T,) float64, NaN where predictions or targets are constant; an estimate unless `is_exact`."""
        self._thin()
        _, x_RT, y_RT = self._parts[0]
        if np.isnan(y_RT).any():
            return torch.cat([_spearman(x[known], y[known]) for x, y, known in _columns(x_RT, y_RT)])
        return _spearman(x_RT, y_RT)

    def _thin(self) -> None:
        """Joins the parts, and keeps the bins with the smallest keys."""
        keys, x, y = (np.concatenate(values) for values in zip(*self._parts, strict=True))
        if self.capacity is not None and len(keys) > self.capacity:
            kept = np.argpartition(keys, self.capacity - 1)[: self.capacity]
            keys, x, y = keys[kept], x[kept], y[kept]
        self._parts, self._waiting = [(keys, x, y)], len(keys)

    def _join(self, others: Iterable["StreamingSpearman"]) -> None:
        for other in others:
            self._parts += other._parts
            self.seen += other.seen
        self._thin()

    def _restart(self) -> None:
        none = np.empty((0, self.num_tracks), dtype=np.float32)
        self._parts = [(np.empty(0), none, none)]
        self._waiting = self.seen = 0

    def _settings(self) -> dict:
        return {"num_tracks": self.num_tracks, "capacity": self.capacity}


def _columns(x_RT: np.ndarray, y_RT: np.ndarray):
    return ((x[:, None], y[:, None], ~np.isnan(y)) for x, y in zip(x_RT.T, y_RT.T, strict=True))


def _spearman(x: np.ndarray, y: np.ndarray) -> torch.Tensor:
    """(T,) of the columns of (R, T)."""
    if len(x) < 2:
        return torch.full((x.shape[1],), torch.nan, dtype=torch.float64)
    ranks_x, ranks_y = (torch.from_numpy(rankdata(values, axis=0)) for values in (x, y))
    return Moments.of(ranks_x, ranks_y, [0]).pearson()
