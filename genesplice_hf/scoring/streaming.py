"""Correlations of tracks that are fed batch by batch: float64, mergeable in any chunking and across processes.

Sums of raw squares lose every digit where the mean is large against the spread. Here each batch gives its count,
means and centred sums of products, and these are joined by the parallel form of Welford's update (Chan, Golub and
LeVeque 1983, eq. 1.5). A benchmark number of tracks (Avsec et al. 2021) is the Pearson correlation of each track over
all windows x bins, averaged over tracks: `StreamingPearson(num_tracks).mean()`. The correlation along the bins of one
window is another number; it is called `per_sequence_pearson`.

Shapes: B batch (windows), M bins, T tracks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch

from genesplice_hf.errors import DataError

Array: TypeAlias = torch.Tensor | np.ndarray
Metric = TypeVar("Metric", bound="StreamingMetric")
MomentsMetric = TypeVar("MomentsMetric", bound="StreamingMoments")

# Entries that are widened to float64 at once.
_ENTRIES_AT_ONCE = 1 << 22
# The least prediction whose logarithm is taken, as Keras does.
EPSILON = 1e-7


class Moments(NamedTuple):
    """Counts and centred moments of pairs (x predicted, y measured), all float64 and of one shape.

    The extremes tell a constant from one that rounding makes look variable.
    """

    count: torch.Tensor
    mean_x: torch.Tensor
    mean_y: torch.Tensor
    m_xx: torch.Tensor
    m_yy: torch.Tensor
    m_xy: torch.Tensor
    min_x: torch.Tensor
    max_x: torch.Tensor
    min_y: torch.Tensor
    max_y: torch.Tensor

    @classmethod
    def empty(cls, shape: Sequence[int]) -> "Moments":
        """Of no pair at all."""
        zeros, infinite = torch.zeros(*shape, dtype=torch.float64), torch.full(tuple(shape), torch.inf).double()
        return cls(zeros, zeros, zeros, zeros, zeros, zeros, infinite, -infinite, infinite, -infinite)

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor, dims: Sequence[int]) -> "Moments":
        """Two passes over `dims`; pairs whose y is NaN do not count."""
        dims, valid = list(dims), ~y.isnan()
        if not valid.numel():
            return cls.empty(valid.sum(dims).shape)
        x, y = x.double().where(valid, 0.0), y.double().where(valid, 0.0)
        count = valid.sum(dims).double()
        size = count.clamp(min=1)
        mean_x, mean_y = x.sum(dims, keepdim=True), y.sum(dims, keepdim=True)
        mean_x, mean_y = mean_x / size.reshape(mean_x.shape), mean_y / size.reshape(mean_y.shape)
        dx, dy = (x - mean_x).where(valid, 0.0), (y - mean_y).where(valid, 0.0)
        low_x, high_x = x.where(valid, torch.inf), x.where(valid, -torch.inf)
        low_y, high_y = y.where(valid, torch.inf), y.where(valid, -torch.inf)
        return cls(
            count,
            mean_x.reshape(count.shape),
            mean_y.reshape(count.shape),
            (dx * dx).sum(dims),
            (dy * dy).sum(dims),
            (dx * dy).sum(dims),
            low_x.amin(dims),
            high_x.amax(dims),
            low_y.amin(dims),
            high_y.amax(dims),
        )

    def join(self, other: "Moments") -> "Moments":
        """Those of both sets of pairs together."""
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = self.count * share
        return Moments(
            count,
            self.mean_x + dx * share,
            self.mean_y + dy * share,
            self.m_xx + other.m_xx + dx * dx * weight,
            self.m_yy + other.m_yy + dy * dy * weight,
            self.m_xy + other.m_xy + dx * dy * weight,
            torch.minimum(self.min_x, other.min_x),
            torch.maximum(self.max_x, other.max_x),
            torch.minimum(self.min_y, other.min_y),
            torch.maximum(self.max_y, other.max_y),
        )

    def pearson(self) -> torch.Tensor:
        """Correlation; NaN where a side is constant or there are fewer than two pairs."""
        # Two roots, since the product of two sums of squares may overflow.
        r = self.m_xy / (self.m_xx.sqrt() * self.m_yy.sqrt())
        varies = (self.max_x > self.min_x) & (self.max_y > self.min_y)
        return r.clamp(-1.0, 1.0).where(varies, torch.nan)

    def r2(self) -> torch.Tensor:
        """1 - sum (y - x)^2 / sum (y - mean y)^2; NaN where y is constant or there are fewer than two pairs."""
        residual = self.squared_error() / self.m_yy
        return (1 - residual).where(self.max_y > self.min_y, torch.nan)

    def squared_error(self) -> torch.Tensor:
        """sum (y - x)^2."""
        shift = self.mean_y - self.mean_x
        return (self.m_xx + self.m_yy - 2 * self.m_xy).clamp(min=0) + self.count * shift * shift


class StreamingMetric(ABC):
    """A figure per track that is fed batch by batch.

    `update` and `merge` work in place, as does `all_reduce`, after which every process holds the figures of all; no
    further pairs can be added then.
    """

    def __init__(self, num_tracks: int) -> None:
        if num_tracks < 1:
            raise DataError(f"`num_tracks` must be at least 1, got {num_tracks}.")
        self.num_tracks = num_tracks
        self._is_reduced = False

    @abstractmethod
    def compute(self) -> torch.Tensor:
        """The figure of each track, float64; NaN where it is not defined."""

    @abstractmethod
    def _join(self, others: Iterable) -> None:
        """Adds the pairs of `others`, which are of this class and its settings."""

    @abstractmethod
    def _restart(self) -> None:
        """Forgets all pairs."""

    def merge(self: Metric, other: Metric) -> Metric:
        """Adds the pairs that `other` has seen, and returns this object.

        Raises:
            DataError: `other` is of another kind or shape, or `all_reduce` came before.
        """
        self._demand_open()
        if type(other) is not type(self) or other._settings() != self._settings():
            raise DataError(
                f"`other` must be a {type(self).__name__} with {self._settings()}, got a {type(other).__name__}"
                + (f" with {other._settings()}." if isinstance(other, StreamingMetric) else ".")
            )
        self._join([other])
        return self

    def all_reduce(self: Metric) -> Metric:
        """Adds the pairs of all processes of `torch.distributed`, in the order of their ranks, on each of them.

        Without a process group, or in a second call, nothing happens.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized() and not self._is_reduced:
            states: list = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, self)
            self._restart()
            self._join(states)
            self._is_reduced = True
        return self

    def mean(self) -> float:
        """Mean over the tracks where the figure is defined; NaN where it is on none."""
        return self.compute().nanmean().item()

    @property
    def undefined(self) -> int:
        """Tracks (and bins, where they are kept apart) without a figure: constant, or fewer than two pairs."""
        return int(self.compute().isnan().sum())

    def _settings(self) -> dict:
        return {"num_tracks": self.num_tracks}

    def _demand_open(self) -> None:
        if self._is_reduced:
            raise DataError(
                "`all_reduce` has added up all processes, and further pairs would be counted in some only; start a "
                f"new {type(self).__name__}."
            )

    def _pairs(self, predictions: Array, targets: Array) -> tuple[torch.Tensor, torch.Tensor]:
        """Both as tensors (B, M, T) of one device; (M, T) is one window."""
        self._demand_open()
        x, y = _pairs(predictions, targets)
        if x.shape[-1] != self.num_tracks:
            raise DataError(f"`predictions` must have `num_tracks` ({self.num_tracks}) columns, got {x.shape[-1]}.")
        return x, y


class StreamingMoments(StreamingMetric):
    """Moments of every track over windows and bins; one pass serves `moments.pearson()`, `moments.r2()` and more.

    Args:
        num_tracks: T.
        over: ("batch", "bin"): one figure per track, `compute()` is (T,). ("batch",): one per bin and track over the
            windows, (M, T); all windows then have as many bins.

    Raises:
        DataError: other axes.
    """

    moments: Moments | None

    def __init__(self, num_tracks: int, over: Sequence[str] = ("batch", "bin")) -> None:
        super().__init__(num_tracks)
        if set(over) not in ({"batch", "bin"}, {"batch"}):
            raise DataError(
                f"`over` must be ('batch', 'bin') or ('batch',), got {over!r}; along the bins of each window there is "
                "`per_sequence_pearson`."
            )
        self.over = tuple(sorted(over))
        self._restart()

    def update(self: MomentsMetric, predictions: Array, targets: Array) -> MomentsMetric:
        """Adds windows; predictions and targets (B, M, T), or (M, T) for one, of any real dtype and device.

        Targets that are NaN are skipped, each by itself.

        Raises:
            DataError: shapes that differ or do not fit, predictions that are not finite where a target is known,
                infinite targets, or `all_reduce` came before.
        """
        x_BMT, y_BMT = self._pairs(predictions, targets)
        rows = max(1, _ENTRIES_AT_ONCE // max(1, x_BMT[0].numel())) if len(x_BMT) else 1
        dims = (0, 1) if "bin" in self.over else (0,)
        for x, y in zip(x_BMT.split(rows), y_BMT.split(rows), strict=True):
            self._add(Moments(*(value.cpu() for value in Moments.of(x, y, dims))))
        return self

    def _add(self, part: Moments) -> None:
        if self.moments is None:
            self.moments = Moments.empty(part.count.shape)
        if part.count.shape != self.moments.count.shape:
            raise DataError(
                f"Windows must all have {self.moments.count.shape[0]} bins with `over` ('batch',), got "
                f"{part.count.shape[0]}."
            )
        self.moments = self.moments.join(part)

    def compute(self) -> torch.Tensor:
        """How many pairs each track has; the subclasses give their figure."""
        return self._known().count

    def _known(self) -> Moments:
        return Moments.empty([self.num_tracks]) if self.moments is None else self.moments

    def _join(self, others: Iterable) -> None:
        for other in others:
            if other.moments is not None:
                self._add(other.moments)

    def _restart(self) -> None:
        self.moments = None

    def _settings(self) -> dict:
        return {"num_tracks": self.num_tracks, "over": self.over}


class StreamingPearson(StreamingMoments):
    """Pearson correlation of every track; arguments as `StreamingMoments`.

    Example:
        >>> metric = StreamingPearson(num_tracks=5313)
        >>> for batch in loader:
        ...     metric.update(model(batch["input_ids"]).logits, batch["labels"])
        >>> metric.all_reduce().mean()
    """

    def compute(self) -> torch.Tensor:
        """(T,) or (M, T); NaN where predictions or targets are constant."""
        return self._known().pearson()


class StreamingR2(StreamingMoments):
    """Coefficient of determination of every track, 1 - residual / total sum of squares; arguments likewise.

    The mean of the measured track itself scores 0, whatever is worse than that below 0.
    """

    def compute(self) -> torch.Tensor:
        """(T,) or (M, T); NaN where the targets are constant."""
        return self._known().r2()


class StreamingPoisson(StreamingMetric):
    """Poisson loss of every track, mean of p - y log p (Avsec et al. 2021), log p from `EPSILON` on.

    The term of y alone is left out, as in training; lower is better, and values of different tracks do not compare.
    """

    total: torch.Tensor
    count: torch.Tensor

    def __init__(self, num_tracks: int) -> None:
        super().__init__(num_tracks)
        self._restart()

    def update(self, predictions: Array, targets: Array) -> "StreamingPoisson":
        """As `StreamingMoments.update`; predictions are not negative."""
        x_BMT, y_BMT = self._pairs(predictions, targets)
        for x, y in zip(x_BMT, y_BMT, strict=True):
            known, x, y = ~y.isnan(), x.double(), y.double()
            losses = (x - y * x.clamp(min=EPSILON).log()).where(known, 0.0)
            self.total += losses.sum(0).cpu()
            self.count += known.sum(0).cpu()
        return self

    def compute(self) -> torch.Tensor:
        """(T,); NaN without a pair."""
        return self.total / self.count

    def _join(self, others: Iterable) -> None:
        for other in others:
            self.total, self.count = self.total + other.total, self.count + other.count

    def _restart(self) -> None:
        self.total = torch.zeros(self.num_tracks, dtype=torch.float64)
        self.count = torch.zeros(self.num_tracks, dtype=torch.float64)


def per_sequence_pearson(predictions: Array, targets: Array) -> torch.Tensor:
    """Pearson correlation along the bins of each window: not the benchmark number (see the head of this file).

    Args:
        predictions, targets: (B, M, T) or (M, T); NaN targets are skipped.

    Returns:
        (B, T) float64, NaN where a side is constant.

    Raises:
        DataError: as `StreamingMoments.update`.
    """
    x_BMT, y_BMT = _pairs(predictions, targets)
    return Moments.of(x_BMT, y_BMT, [1]).pearson().cpu()


def _pairs(predictions: Array, targets: Array) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = _tensor(predictions), _tensor(targets)
    if x.shape != y.shape or x.dim() not in (2, 3):
        raise DataError(
            "`predictions` and `targets` must both be (windows, bins, tracks) or (bins, tracks), got "
            f"{tuple(x.shape)} and {tuple(y.shape)}."
        )
    # Apple's GPUs have no float64.
    device = torch.device("cpu") if x.device.type == "mps" else x.device
    x, y = x.to(device), y.to(device)
    if bool((~x.isfinite() & ~y.isnan()).any()) or bool(y.isinf().any()):
        raise DataError(
            "`predictions` must be finite wherever `targets` are not NaN, and `targets` must not be infinite; look "
            "for an overflow, or set what is unknown to NaN in `targets`."
        )
    x = x.where(~y.isnan(), 0.0) if x.is_floating_point() else x
    return (x, y) if x.dim() == 3 else (x[None], y[None])


def _tensor(values: Array) -> torch.Tensor:
    # Arrays that are mapped from a file or broadcast cannot be written to, which torch does not know.
    return (
        values.detach() if isinstance(values, torch.Tensor) else torch.from_numpy(np.require(values, requirements="W"))
    )
