"""Coverage of bigWig files, and how Basenji makes targets of it.

The steps stand in `bin_coverage` in the order in which they are done (Kelley, PLoS Computational Biology 16:e1008050,
2020; calico/baskerville, `scripts/hound_data_read.py`). bigWig files are read by pyBigWig, an optional package
(`pip install genesplice-hf[tracks]`).

Shapes: L bases of a window, M bins.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from types import MappingProxyType
from typing import Any

import numpy as np

from genesplice_hf.data.bed import near_names
from genesplice_hf.data.files import existing_file
from genesplice_hf.data.target_table import Target
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval, contig_aliases

_BASELINE_QUANTILE = 0.5
# Below this many bins a window says too little about its own baseline.
_FEWEST_BINS = 8
_LARGEST = float(np.finfo(np.float16).max)


class BigWig:
    """Values per base of a bigWig file; every process and thread opens its own handle, objects can be pickled.

    Raises:
        ImportError: pyBigWig is not installed.
        DataError: the file is absent or no bigWig.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = existing_file(path)
        self._local = threading.local()
        self._contigs: dict[str, int] = dict(self._handle().chroms())

    @property
    def contigs(self) -> Mapping[str, int]:
        """Name -> length in bases."""
        return MappingProxyType(self._contigs)

    def values(self, chrom: str, start: int, end: int) -> np.ndarray:
        """The value of every base of `[start, end)`, float32; NaN where the file has none, and off the chromosome.

        Raises:
            DataError: the file has no such contig under any alias (chr1 = 1, chrM = MT), or cannot be read there;
                with file, chromosome and range.
        """
        where = f"{self.path} at 0-based {chrom}:{start}-{end}"
        name = self._resolve(chrom, where)
        values = np.full(end - start, np.nan, dtype=np.float32)
        low, high = max(0, start), min(self._contigs[name], end)
        if low < high:
            try:
                values[low - start : high - start] = self._handle().values(name, low, high, numpy=True)
            except (RuntimeError, OSError, ValueError) as error:
                raise DataError(f"{where} cannot be read ({error}); copy the file again.") from error
        return values

    def check(self, interval: Interval) -> None:
        """Raises `DataError`, with file, chromosome and range, unless the file has the contig of `interval`."""
        self._resolve(interval.chrom, f"{self.path} at 0-based {interval.chrom}:{interval.start}-{interval.end}")

    def _resolve(self, chrom: str, where: str) -> str:
        for name in (chrom, *contig_aliases(chrom)):
            if name in self._contigs:
                return name
        raise DataError(
            f"{where}: the file has no contig {chrom!r}; the nearest of its {len(self._contigs)} names are "
            f"{near_names(chrom, self._contigs) or 'none'}. Is it of the same assembly as the intervals?"
        )

    def _handle(self) -> Any:
        # After a fork the parent's file position is shared, so a handle serves only the process that made it.
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.handle = self._open()
            self._local.pid = os.getpid()
        return self._local.handle

    def _open(self) -> Any:
        try:
            import pyBigWig
        except ImportError as error:
            raise ImportError(
                "bigWig files are read by `pyBigWig`, which is not installed; run `pip install genesplice-hf[tracks]`."
            ) from error
        try:
            handle = pyBigWig.open(str(self.path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{self.path} is no whole bigWig file ({error}); copy it again.") from error
        if handle is None or not handle.isBigWig():
            raise DataError(f"{self.path} must be a bigWig file of values, but is another kind (bigBed?).")
        return handle

    def __reduce__(self) -> tuple[type["BigWig"], tuple[Any]]:
        return BigWig, (self.path,)


def bin_coverage(
    values: np.ndarray,
    target: Target,
    pool_width: int,
    crop_bp: int = 0,
    blacklist: Sequence[tuple[int, int]] = (),
    interp_nan: bool = False,
) -> np.ndarray:
    """Coverage per base of one window -> targets float16 (M,).

    1. With `interp_nan`, NaN are filled by straight lines between their neighbours (0 beyond the ends).
    2. Baseline = median of the window; 0 if the window holds NaN, or has fewer than 8 bins.
    3. Values in the blacklist are clipped to +- baseline.
    4. NaN become the baseline.
    5. `crop_bp` are cut off on either side, the rest is multiplied by `target.scale` and pooled by `target.sum_stat`:
       sum | mean = avg | sum_sqrt = sqrt(1 + sum) - 1 | mean_sqrt | median | max | peak = sqrt(4 mean) within 0 to 1.
    6. Soft clip: x above c = `target.clip_soft` becomes c - 1 + sqrt(x - c + 1). Then hard clip to +- `target.clip`,
       then to the range of float16.

    Args:
        values: (L,), NaN = no value.
        target: scale, pooling and limits of the track.
        pool_width: bases of a bin.
        crop_bp: bases cut off on either side.
        blacklist: stretches `(start, end)` of the window, counted from its first base; they may leave it.
        interp_nan: see step 1.

    Raises:
        DataError: L without the crop is no positive multiple of `pool_width`, an unknown `sum_stat`, or a square
            root of a negative number.
    """
    num_bins = count_bins(len(values), pool_width, crop_bp)
    coverage = np.array(values, dtype=np.float32)
    if interp_nan:
        coverage = _interpolated(coverage)
    baseline = _baseline(coverage, num_bins)
    for start, end in blacklist:
        stretch = coverage[max(0, start) : max(0, end)]
        np.clip(stretch, -baseline, baseline, out=stretch)
    coverage[np.isnan(coverage)] = baseline
    kept = coverage[crop_bp : len(coverage) - crop_bp] * np.float32(target.scale)
    pooled = _pool(kept.reshape(num_bins, pool_width), target)
    return _clipped(pooled, target).astype(np.float16)


def clip_extremes(targets: np.ndarray, clip_pct: float = 0.9999999) -> np.ndarray:
    """Clips one track over all windows, float16 (N, M), to +- its `clip_pct` quantile: the last step of all."""
    if not 0 < clip_pct <= 1:
        raise DataError(f"`clip_pct` must be a quantile above 0, at most 1, was {clip_pct}.")
    limit = np.quantile(targets.astype(np.float32), clip_pct)
    return np.clip(targets, -limit, limit).astype(targets.dtype)


def count_bins(length: int, pool_width: int, crop_bp: int) -> int:
    """M of a window of `length` bases.

    Raises:
        DataError: what the crop leaves is no positive multiple of `pool_width`.
    """
    if pool_width < 1 or crop_bp < 0:
        raise DataError(f"`pool_width` must be 1 or more and `crop_bp` 0 or more, were {pool_width} and {crop_bp}.")
    kept = length - 2 * crop_bp
    if kept < 1 or kept % pool_width:
        raise DataError(
            f"The interval must be a multiple of `pool_width` ({pool_width}) without `crop_bp` ({crop_bp}) on either "
            f"side, but of {length} bp {kept} are left; choose intervals that fit."
        )
    return kept // pool_width


def _baseline(coverage: np.ndarray, num_bins: int) -> float:
    if num_bins < _FEWEST_BINS or np.isnan(coverage).any():
        return 0.0
    return float(np.quantile(coverage, _BASELINE_QUANTILE))


def _interpolated(coverage: np.ndarray) -> np.ndarray:
    known = np.pad(~np.isnan(coverage), 1, constant_values=True)
    padded = np.pad(coverage, 1)
    places = np.arange(len(padded))
    return np.interp(places, places[known], padded[known])[1:-1].astype(np.float32)


def _mean(bins: np.ndarray) -> np.ndarray:
    return bins.mean(axis=1, dtype=np.float32)


def _sum(bins: np.ndarray) -> np.ndarray:
    return bins.sum(axis=1, dtype=np.float32)


_POOLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": _sum,
    "mean": _mean,
    "avg": _mean,
    "sum_sqrt": lambda bins: np.sqrt(1 + _sum(bins)) - 1,
    "mean_sqrt": lambda bins: np.sqrt(1 + _mean(bins)) - 1,
    "avg_sqrt": lambda bins: np.sqrt(1 + _mean(bins)) - 1,
    "median": lambda bins: np.median(bins, axis=1),
    "max": lambda bins: bins.max(axis=1),
    "peak": lambda bins: np.clip(np.sqrt(4 * _mean(bins)), 0, 1),
}


def _pool(bins: np.ndarray, target: Target) -> np.ndarray:
    if target.sum_stat not in _POOLS:
        raise DataError(f"`sum_stat` of {target.identifier!r} must be one of {list(_POOLS)}, was {target.sum_stat!r}.")
    with np.errstate(invalid="ignore"):
        pooled = _POOLS[target.sum_stat](bins)
    if np.isnan(pooled).any():
        raise DataError(
            f"`sum_stat` {target.sum_stat!r} of {target.identifier!r} takes the root of a negative number; coverage "
            "of the minus strand may be stored below 0: pass `scale=-1`."
        )
    return pooled


def _clipped(values: np.ndarray, target: Target) -> np.ndarray:
    if target.clip_soft is not None:
        excess = np.maximum(values - np.float32(target.clip_soft), 0)
        values = np.where(excess > 0, np.float32(target.clip_soft - 1) + np.sqrt(excess + 1), values)
    if target.clip is not None:
        values = np.clip(values, -target.clip, target.clip)
    return np.clip(values, -_LARGEST, _LARGEST)
