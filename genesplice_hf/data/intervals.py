"""Sets of positions on chromosomes as sorted, disjoint ranges: which windows touch them, where free ones begin.

All arrays are int64, coordinates 0-based and half-open; every question is answered by binary search.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from genesplice_hf.data.peak_formats import chromosome_key
from genesplice_hf.data.peaks import Peaks
from genesplice_hf.genome.interval import Interval


class Ranges(NamedTuple):
    """Disjoint ranges in ascending order: starts (N,) and ends (N,)."""

    starts: np.ndarray
    ends: np.ndarray


NO_RANGES = Ranges(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


def merge(starts: np.ndarray, ends: np.ndarray) -> Ranges:
    """Joins ranges that overlap or touch; any order, (N,) each."""
    if not len(starts):
        return NO_RANGES
    order = np.argsort(starts, kind="stable")
    starts, reach = np.asarray(starts, np.int64)[order], np.maximum.accumulate(np.asarray(ends, np.int64)[order])
    first = np.append(True, starts[1:] > reach[:-1])
    last = np.append(np.flatnonzero(first)[1:] - 1, len(starts) - 1)
    return Ranges(starts[first], reach[last])


def touches(ranges: Ranges, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(N,) bool: whether `[start, end)` shares a base with any range."""
    before = np.searchsorted(ranges.starts, ends, side="left") - 1
    reach = np.append(ranges.ends, -1)[before]
    return (before >= 0) & (reach > np.asarray(starts))


def free_starts(ranges: Ranges, chromosome_bp: int, length: int) -> Ranges:
    """Ranges of starts at which `length` bp lie on the chromosome and share no base with `ranges`."""
    lefts = np.append(0, ranges.ends)
    rights = np.minimum(np.append(ranges.starts, chromosome_bp), chromosome_bp)
    fits = rights - lefts >= length
    return Ranges(lefts[fits], rights[fits] - length + 1)


class RangeMap:
    """Ranges by chromosome, whatever its spelling (`1`, `"1"`, `"chr1"`).

    Args:
        parts: chromosome, starts and ends, several times for the same chromosome if need be.
    """

    def __init__(self, parts: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> None:
        gathered: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for chrom, starts, ends in parts:
            gathered.setdefault(chromosome_key(chrom), []).append((starts, ends))
        self._ranges: Mapping[str, Ranges] = {
            chrom: merge(*(np.concatenate(column) for column in zip(*found, strict=True)))
            for chrom, found in gathered.items()
        }

    @classmethod
    def of_peaks(cls, *tables: Peaks, regions: Sequence[Interval] = ()) -> "RangeMap":
        """The union of all peaks, and of further regions such as a blacklist."""
        parts = [part for table in tables for part in _by_chromosome(table)]
        parts += [(region.chrom, np.array([region.start]), np.array([region.end])) for region in regions]
        return cls(parts)

    def __getitem__(self, chrom: object) -> Ranges:
        return self._ranges.get(chromosome_key(chrom), NO_RANGES)

    def touches(self, chrom: object, start: int, end: int) -> bool:
        """Whether `[start, end)` of a chromosome shares a base with any range."""
        return bool(touches(self[chrom], np.array([start]), np.array([end]))[0])

    def touched_rows(self, peaks: Peaks, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """(N,) bool: which of the windows, one per row of `peaks`, share a base with any range."""
        chroms, answer = peaks.chrom_codes, np.zeros(len(peaks), dtype=bool)
        for code, chrom in enumerate(peaks.chroms):
            rows = np.flatnonzero(chroms == code)
            answer[rows] = touches(self[chrom], starts[rows], ends[rows])
        return answer


def _by_chromosome(peaks: Peaks) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
    codes = peaks.chrom_codes
    for code, chrom in enumerate(peaks.chroms):
        rows = np.flatnonzero(codes == code)
        if len(rows):
            yield chrom, peaks.start[rows], peaks.end[rows]
