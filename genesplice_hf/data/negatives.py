"""Windows where a factor does not bind: anywhere else, matched, or at the peaks of others.

Every sampler draws from the generator that it is given, so a row and an epoch decide what is drawn. None returns
a window that touches what it was told to avoid. `avoid` should hold the positives of validation too.
Shuffled sequences are in `data/shuffle.py`. W windows, F features.
"""

import logging
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from genesplice_hf.data.fasta import Genome
from genesplice_hf.data.intervals import RangeMap, Ranges, free_starts, touches
from genesplice_hf.data.peak_formats import chromosome_key
from genesplice_hf.data.peaks import Peaks
from genesplice_hf.errors import DataError

logger = logging.getLogger(__name__)

_REFERENCE_SUFFIX = ".bed.bool.npy"
_LETTER_N, _LOWER_BIT = ord("N"), 0x20
Feature = Callable[[np.ndarray, str, int], float]


class Negative(NamedTuple):
    """A window `[start, end)` and the code of the data set that has no peak in it."""

    chrom: str
    start: int
    end: int
    dataset: int


class RandomNegatives:
    """Windows drawn evenly from what is left of the genome.

    A chromosome is drawn in proportion to its length, then a start among all that are free.

    Args:
        genome: where windows come from.
        length: their length in bp.
        avoid: what no window touches: the union of all peaks and a blacklist.
        chromosomes: to draw from, as numbers or names with or without `chr`; default every contig.
        max_n: largest share of N in a window.

    Raises:
        DataError: no window fits, or `max_n` is not in [0, 1].
    """

    _TRIES = 1000

    def __init__(
        self,
        genome: Genome,
        length: int,
        avoid: RangeMap,
        chromosomes: Sequence[object] | None = None,
        max_n: float = 0.0,
    ) -> None:
        if not 0 <= max_n <= 1:
            raise DataError(f"`max_n` must lie in [0, 1], was {max_n}.")
        wanted = None if chromosomes is None else {chromosome_key(name) for name in chromosomes}
        free = {
            chrom: free_starts(avoid[chrom], size, length)
            for chrom, size in genome.contigs.items()
            if wanted is None or chromosome_key(chrom) in wanted
        }
        self._free: dict[str, Ranges] = {chrom: ranges for chrom, ranges in free.items() if len(ranges.starts)}
        if not self._free:
            raise DataError(
                f"No window of {length} bp is free of peaks on these chromosomes; take a smaller `length`."
            )
        self._genome, self._length, self._max_n = genome, length, max_n
        sizes = np.array([genome.contigs[chrom] for chrom in self._free], dtype=np.float64)
        self._cumulative = np.cumsum(sizes) / sizes.sum()

    def sample(self, rng: np.random.Generator) -> tuple[str, int, int]:
        """A window: chromosome, start, end.

        Raises:
            DataError: 1,000 windows in a row hold too much N.
        """
        chroms = list(self._free)
        for _ in range(self._TRIES):
            chrom = chroms[int(np.searchsorted(self._cumulative, rng.random(), side="right"))]
            start = _draw(self._free[chrom], rng)
            if self._max_n >= 1 or self._n_share(chrom, start) <= self._max_n:
                return chrom, start, start + self._length
        raise DataError(f"{self._TRIES} windows in a row hold more than {self._max_n:g} N; raise `max_n`.")

    def letters(self, chrom: str, start: int) -> np.ndarray:
        """(length,) uint8 letters of a window, case kept."""
        return self._genome.array(chrom, start, start + self._length)

    def _n_share(self, chrom: str, start: int) -> float:
        return float(np.mean((self.letters(chrom, start) & ~np.uint8(_LOWER_BIT)) == _LETTER_N))


def _draw(ranges: Ranges, rng: np.random.Generator) -> int:
    ends = np.cumsum(ranges.ends - ranges.starts)
    place = int(rng.integers(ends[-1]))
    at = int(np.searchsorted(ends, place, side="right"))
    return int(ranges.ends[at] - (ends[at] - place))


def gc_share(letters: np.ndarray, chrom: str = "", start: int = 0) -> float:
    """Share of G and C among A, C, G and T (0.5 where there is none), a `Feature`."""
    upper = letters & ~np.uint8(_LOWER_BIT)
    strong = int(np.isin(upper, (ord("G"), ord("C"))).sum())
    known = strong + int(np.isin(upper, (ord("A"), ord("T"))).sum())
    return strong / known if known else 0.5


def repeat_share(letters: np.ndarray, chrom: str = "", start: int = 0) -> float:
    """Share of soft-masked (lower case) letters, a `Feature`."""
    return float(np.mean((letters & _LOWER_BIT) != 0))


def distance_to_tss(sites: dict[str, np.ndarray]) -> Feature:
    """A `Feature`: decades from the middle of a window to the nearest start site, over 7 (0 at it, 1 at 10 Mb)."""
    ordered = {chromosome_key(chrom): np.sort(np.asarray(places)) for chrom, places in sites.items()}

    def feature(letters: np.ndarray, chrom: str, start: int) -> float:
        places = ordered.get(chromosome_key(chrom), np.empty(0, dtype=np.int64))
        if not len(places):
            return 1.0
        middle = start + len(letters) // 2
        at = np.searchsorted(places, middle)
        near = min(abs(int(places[place]) - middle) for place in (at - 1, at) if 0 <= place < len(places))
        return min(1.0, float(np.log10(1 + near)) / 7)

    return feature


def matched_negatives(
    sampler: RandomNegatives,
    positives: Sequence[tuple[str, int, int]],
    rng: np.random.Generator,
    features: Sequence[Feature] = (gc_share,),
    bins: int = 50,
    max_draws: int = 1_000_000,
) -> list[tuple[str, int, int]]:
    """One random window per positive whose features fall into the same bins, in the order of the positives.

    Args:
        sampler: draws candidates.
        positives: windows of the sampler's length.
        rng: decides the candidates.
        features: values in [0, 1] of a window's letters, chromosome and start.
        bins: per feature, of equal width.
        max_draws: candidates after which to give up.

    Raises:
        DataError: a bin of the positives stays empty after `max_draws`; its centre and the remedy are told.
    """
    wanted: dict[tuple[int, ...], list[int]] = {}
    for place, (chrom, start, _) in enumerate(positives):
        wanted.setdefault(_bin(sampler, chrom, start, features, bins), []).append(place)
    chosen: dict[int, tuple[str, int, int]] = {}
    for _ in range(max_draws):
        if len(chosen) == len(positives):
            break
        window = sampler.sample(rng)
        if waiting := wanted.get(_bin(sampler, window[0], window[1], features, bins)):
            chosen[waiting.pop()] = window
    if len(chosen) < len(positives):
        empty = next(key for key, waiting in wanted.items() if waiting)
        centres = ", ".join(f"{(place + 0.5) / bins:.2f}" for place in empty)
        raise DataError(
            f"{len(positives) - len(chosen)} of {len(positives)} positives found no partner in {max_draws:,} draws, "
            f"such as those with features near ({centres}); take fewer `bins`, or leave these positives out."
        )
    return [chosen[place] for place in range(len(positives))]


def _bin(sampler: RandomNegatives, chrom: str, start: int, features: Sequence[Feature], bins: int) -> tuple[int, ...]:
    letters = sampler.letters(chrom, start)
    # The edges of `np.histogram`: a product with `bins` may fall on the other side of one.
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    return tuple(int(np.searchsorted(edges, feature(letters, chrom, start), side="right")) for feature in features)


class ScopedNegatives:
    """Windows at the peaks of other data sets, without a peak of this one: open chromatin that it does not bind.

    The rows that a data set must not draw, which are few, are found by a sorted sweep, once, and kept as a list.
    A data set that may draw none is left out with a log line; its own peaks are never returned.

    Args:
        peaks: all data sets.
        length: length of the windows around summits; None takes the peaks themselves.
        chromosomes: to draw from; default all of the peaks.
        avoid: further ranges that no window touches, such as the positives of validation.
    """

    def __init__(
        self,
        peaks: Peaks,
        length: int | None = None,
        chromosomes: Sequence[object] | None = None,
        avoid: RangeMap | None = None,
    ) -> None:
        self.peaks = peaks
        starts, ends = (peaks.start, peaks.end) if length is None else peaks.windows(length)
        self._starts, self._ends = np.asarray(starts, np.int64), np.asarray(ends, np.int64)
        usable = self._starts >= 0
        if chromosomes is not None:
            usable &= peaks.on_chromosomes(chromosomes)
        if avoid is not None:
            usable &= ~avoid.touched_rows(peaks, self._starts, self._ends)
        # Sorted by chromosome and start, so that the windows near a range lie side by side.
        order = np.flatnonzero(usable)
        self._order = order[np.lexsort((self._starts[order], peaks.chrom_codes[order]))].astype(np.int32)
        bounds = np.searchsorted(peaks.chrom_codes[self._order], np.arange(len(peaks.chroms) + 1))
        self._span_of_chrom = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
        self._longest = int((self._ends - self._starts).max(initial=1))
        self._blocked: dict[int, np.ndarray] = {code: self._sweep(code) for code in peaks.present}
        self.datasets = tuple(code for code in peaks.present if self.count(code))
        for code in sorted(set(peaks.present) - set(self.datasets)):
            logger.info("%s has no scoped negative and is left out.", peaks.datasets[code].name)

    def count(self, dataset: int) -> int:
        """How many rows of `peaks` are negatives of a data set."""
        return len(self._order) - len(self._blocked[dataset])

    def rows(self, dataset: int) -> np.ndarray:
        """Rows of `peaks` that are negatives of a data set, ascending."""
        return np.sort(np.delete(self._order, self._blocked[dataset]))

    def sample(self, dataset: int, rng: np.random.Generator) -> Negative:
        """A negative window of a data set, each with the same probability.

        Raises:
            DataError: it has none (it is not in `datasets`).
        """
        if dataset not in self._blocked or not self.count(dataset):
            name = self.peaks.datasets[dataset].name
            raise DataError(f"{name} has no scoped negative; use the codes in `datasets` only.")
        blocked, place = self._blocked[dataset], int(rng.integers(self.count(dataset)))
        # The place-th window that is not blocked: as many blocked ones lie before it as this search counts.
        place += int(np.searchsorted(blocked - np.arange(len(blocked)), place, side="right"))
        row = int(self._order[place])
        return Negative(self.peaks.chrom(row), int(self._starts[row]), int(self._ends[row]), dataset)

    def _sweep(self, dataset: int) -> np.ndarray:
        """Places in `_order` of the windows that touch a peak of a data set, ascending."""
        own = RangeMap.of_peaks(self.peaks.rows(self.peaks.dataset_codes == dataset))
        found = [
            low + self._touched(own[chrom], self._order[low:high])
            for chrom, (low, high) in zip(self.peaks.chroms, self._span_of_chrom, strict=True)
        ]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _touched(self, ranges: Ranges, rows: np.ndarray) -> np.ndarray:
        starts, ends = self._starts[rows], self._ends[rows]
        first = np.searchsorted(starts, ranges.starts - self._longest, side="right")
        last = np.searchsorted(starts, ranges.ends, side="left")
        near = [np.arange(low, high) for low, high in zip(first.tolist(), last.tolist(), strict=True)]
        candidates = np.unique(np.concatenate(near)) if near else np.empty(0, dtype=np.int64)
        return candidates[touches(ranges, starts[candidates], ends[candidates])]


def read_reference_mask(path: str | PathLike[str]) -> tuple[str, np.ndarray]:
    """Reads `EXP.TARGET.CELL.bed.bool.npy`, the negatives of one data set as a mask over the rows of a peak file.

    Returns:
        The name of the data set, and the rows that are negatives.

    Raises:
        DataError: another name, or the file holds no one-dimensional bool array.
    """
    file = Path(path)
    if not file.name.endswith(_REFERENCE_SUFFIX):
        raise DataError(f"`path` must end in {_REFERENCE_SUFFIX}, was {file.name!r}.")
    try:
        mask = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} must be a plain npy array of bool: {error}") from error
    if mask.dtype != bool or mask.ndim != 1:
        raise DataError(f"{file} must hold a bool array of one dimension, holds {mask.dtype} of shape {mask.shape}.")
    return file.name.removesuffix(_REFERENCE_SUFFIX), np.flatnonzero(mask)


class CrossFactorNegatives:
    """The same window with another factor: one that was measured in the same cell and has no peak there.

    Args:
        peaks: all data sets. A factor binds where any experiment of it in that cell has a peak.
    """

    def __init__(self, peaks: Peaks) -> None:
        self._datasets = peaks.datasets
        codes_of: dict[tuple[str, str], list[int]] = {}
        for code in peaks.present:
            codes_of.setdefault((peaks.datasets[code].cell, peaks.datasets[code].target), []).append(code)
        self._bound = {
            group: RangeMap.of_peaks(peaks.rows(np.isin(peaks.dataset_codes, codes)))
            for group, codes in codes_of.items()
        }
        self._codes_of = codes_of

    def sample(self, dataset: int, chrom: str, start: int, end: int, rng: np.random.Generator) -> Negative | None:
        """A data set of the same cell whose factor is another and not bound in `[start, end)`; None without one."""
        cell, target = self._datasets[dataset].cell, self._datasets[dataset].target
        others = [group for group in self._bound if group[0] == cell and group[1] != target]
        for place in rng.permutation(len(others)).tolist():
            if not self._bound[others[place]].touches(chrom, start, end):
                codes = self._codes_of[others[place]]
                return Negative(chrom, start, end, codes[int(rng.integers(len(codes)))])
        return None
