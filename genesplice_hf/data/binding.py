"""Rows to learn binding from: a window, a factor, a cell, and whether the factor binds there.

`BindingDataset` puts peaks and negatives of several kinds together. Which windows a row shows depends on seed,
epoch and row alone, whatever worker asks for it. T bins of a window.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, NamedTuple

import numpy as np

from genesplice_hf.data.binding_splits import BindingSplit
from genesplice_hf.data.fasta import Genome
from genesplice_hf.data.files import existing_file
from genesplice_hf.data.intervals import RangeMap, touches
from genesplice_hf.data.negatives import CrossFactorNegatives, Negative, RandomNegatives, ScopedNegatives
from genesplice_hf.data.peak_formats import chromosome_key
from genesplice_hf.data.peaks import Peaks
from genesplice_hf.data.shuffle import dinucleotide_shuffle
from genesplice_hf.data.track_windows import Window, window_letters
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval


class Positive(NamedTuple):
    """The positive row that a negative is drawn for: its row of the peaks, its data set and its window."""

    row: int
    dataset: int
    chrom: str
    start: int
    end: int


# Draws a negative for a positive; None where this positive has none.
NegativeSource = Callable[[Positive, np.random.Generator], Negative | None]


def random_source(sampler: RandomNegatives, peaks: Peaks) -> NegativeSource:
    """Windows of `RandomNegatives`, each with a random data set of `peaks` (the training set)."""

    def draw(positive: Positive, rng: np.random.Generator) -> Negative:
        return Negative(*sampler.sample(rng), peaks.present[int(rng.integers(len(peaks.present)))])

    return draw


def matched_source(windows: Sequence[tuple[str, int, int]]) -> NegativeSource:
    """The windows of `matched_negatives`, one per row of the peaks, with the row's own data set."""
    return lambda positive, rng: Negative(*windows[positive.row], positive.dataset)


def scoped_source(sampler: ScopedNegatives) -> NegativeSource:
    """Windows of `ScopedNegatives` for the row's own data set."""
    usable = frozenset(sampler.datasets)
    return lambda positive, rng: sampler.sample(positive.dataset, rng) if positive.dataset in usable else None


def cross_factor_source(sampler: CrossFactorNegatives) -> NegativeSource:
    """The row's own window with a factor that is not bound there."""
    return lambda one, rng: sampler.sample(one.dataset, one.chrom, one.start, one.end, rng)


def shuffle_source() -> NegativeSource:
    """The row's own window, whose letters `BindingDataset` shuffles when the kind is called `"shuffle"`."""
    return lambda one, rng: Negative(one.chrom, one.start, one.end, one.dataset)


def negative_sources(
    split: BindingSplit,
    part: Literal["train", "valid"],
    genome: Genome,
    length: int,
    kinds: Sequence[str] = ("random", "scoped"),
    blacklist: Sequence[Interval] = (),
    max_n: float = 0.0,
) -> dict[str, NegativeSource]:
    """Sources for one part of a split.

    All windows lie on the chromosomes of the part. In training none shares a base with a validation peak. In
    validation random windows avoid all peaks, and scoped ones are peaks of any data set, since a single held-out
    factor has no others beside it.

    Args:
        split: from `split_binding`.
        part: whose rows the negatives go with.
        genome, length: of the windows.
        kinds: any of `"random"`, `"scoped"`, `"cross_factor"` and `"shuffle"`.
        blacklist, max_n: of random windows; see `RandomNegatives`.

    Raises:
        DataError: an unknown part or kind, or no window is free.
    """
    if part not in ("train", "valid"):
        raise DataError(f"`part` must be 'train' or 'valid', was {part!r}.")
    own, other = (split.train, split.valid) if part == "train" else (split.valid, split.train)
    chromosomes = [own.chroms[code] for code in np.unique(own.chrom_codes).tolist()]

    def random() -> NegativeSource:
        avoid = RangeMap.of_peaks(own, other, regions=blacklist)
        here = [
            name for name in genome.contigs if chromosome_key(name) in {chromosome_key(one) for one in chromosomes}
        ]
        return random_source(RandomNegatives(genome, length, avoid, here, max_n), own)

    def scoped() -> NegativeSource:
        if part == "train":
            return scoped_source(ScopedNegatives(own, length, avoid=RangeMap.of_peaks(other)))
        return scoped_source(ScopedNegatives(own.joined(other), length, chromosomes))

    builders: dict[str, Callable[[], NegativeSource]] = {
        "random": random,
        "scoped": scoped,
        "cross_factor": lambda: cross_factor_source(CrossFactorNegatives(own)),
        "shuffle": shuffle_source,
    }
    if unknown := set(kinds) - set(builders):
        raise DataError(f"`kinds` may hold {', '.join(builders)}, not {', '.join(sorted(unknown))}.")
    return {kind: builders[kind]() for kind in kinds}


class BindingDataset:
    """Positives and negatives as rows of a map-style dataset.

    Rows `0 .. N - 1` are the peaks, the negatives of each kind follow. A row is a dict: `sequence` (text, with
    `margin` bases more on either side for shifts), `chrom`, `start`, `end`, `factor`, `cell`, `label` (1.0 or 0.0;
    with `bin_bp` float32 (T,)), `kind`, `read_value` and `peaks_nr` (NaN where there is none), `margin`.

    Args:
        peaks: the positives, such as those of the training split.
        genome: where the bases come from; off its ends they are N.
        length: of the windows in bp.
        negatives: kind -> source; `"shuffle"` shuffles letters and keeps the dinucleotides.
        ratios: kind -> negatives per positive; 1 by default.
        center: `"summit"` or `"midpoint"`.
        peaks_nr: data set name -> number of peaks, from `read_peaks_nr`.
        bin_bp: label bins of this width by the peaks of the row's data set instead of the window.
        margin: bases beyond the window on either side, at least the largest shift of the collator.
        seed: of all draws.

    Raises:
        DataError: no peaks, an argument out of range, or no negative can be drawn.
    """

    _TRIES = 100

    def __init__(
        self,
        peaks: Peaks,
        genome: Genome,
        length: int = 4096,
        negatives: Mapping[str, NegativeSource] | None = None,
        ratios: Mapping[str, float] | None = None,
        center: Literal["summit", "midpoint"] = "summit",
        peaks_nr: Mapping[str, float] | None = None,
        bin_bp: int | None = None,
        margin: int = 0,
        seed: int = 0,
    ) -> None:
        if not len(peaks):
            raise DataError("`peaks` must hold at least one row; check the filters and the split.")
        if bin_bp is not None and (bin_bp < 1 or length % bin_bp):
            raise DataError(f"`length` ({length}) must be a multiple of `bin_bp` ({bin_bp}).")
        if margin < 0:
            raise DataError(f"`margin` must be 0 or more, was {margin}.")
        self.peaks, self.genome, self.length, self.margin = peaks, genome, length, margin
        self.bin_bp, self.seed, self.epoch = bin_bp, seed, 0
        self._negatives, self._peaks_nr = dict(negatives or {}), dict(peaks_nr or {})
        self._starts, self._ends = peaks.windows(length, center)
        self._bound: dict[int, RangeMap] = {}
        self._blocks = self._block_starts(ratios or {})

    def _block_starts(self, ratios: Mapping[str, float]) -> list[tuple[int, str]]:
        """First row of each kind, and the end of all."""
        if unknown := set(ratios) - set(self._negatives):
            raise DataError(f"`ratios` names {sorted(unknown)}, but `negatives` holds {sorted(self._negatives)}.")
        first, blocks = 0, []
        for kind in ("positive", *self._negatives):
            blocks.append((first, kind))
            first += len(self.peaks) if kind == "positive" else round(ratios.get(kind, 1.0) * len(self.peaks))
        return [*blocks, (first, "")]

    def __len__(self) -> int:
        return self._blocks[-1][0]

    def set_epoch(self, epoch: int) -> None:
        """Draws other negatives from now on; evaluation leaves the epoch at 0."""
        self.epoch = epoch

    @property
    def targets(self) -> list[str]:
        """The factor of each row's positive, for `BalancedSampler`."""
        names = [dataset.target for dataset in self.peaks.datasets]
        codes = self.peaks.dataset_codes[self._place(np.arange(len(self)))].tolist()
        return [names[code] for code in codes]

    def _place(self, index: Any) -> Any:
        """The row of the peaks that stands behind a row of the dataset."""
        firsts = np.array([first for first, _ in self._blocks[:-1]])
        return (index - firsts[np.searchsorted(firsts, index, side="right") - 1]) % len(self.peaks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Row {index} of {len(self)}.")
        index %= len(self)
        kind = next(name for first, name in reversed(self._blocks[:-1]) if index >= first)
        positive = self._positive(int(self._place(index)))
        if kind == "positive":
            return self._example(Negative(*positive[2:], positive.dataset), kind, positive.row)
        rng = np.random.default_rng([self.seed, self.epoch, index])
        return self._example(self._draw(kind, positive, rng), kind, positive.row, rng)

    def _positive(self, row: int) -> Positive:
        code = int(self.peaks.dataset_codes[row])
        return Positive(row, code, self.peaks.chrom(row), int(self._starts[row]), int(self._ends[row]))

    def _draw(self, kind: str, positive: Positive, rng: np.random.Generator) -> Negative:
        """A negative of this row, or of another one drawn at random if it has none."""
        for _ in range(self._TRIES):
            found = self._negatives[kind](positive, rng)
            if found is not None:
                return found
            positive = self._positive(int(rng.integers(len(self.peaks))))
        raise DataError(
            f"{self._TRIES} positives in a row have no negative of the kind {kind!r}; leave this kind out."
        )

    def _example(
        self, window: Negative, kind: str, row: int, rng: np.random.Generator | None = None
    ) -> dict[str, Any]:
        wide = Window(window.chrom, window.start - self.margin, window.end + self.margin)
        sequence = window_letters(self.genome, wide).tobytes().decode("ascii")
        if kind == "shuffle" and rng is not None:
            sequence = dinucleotide_shuffle(sequence.upper(), rng)
        dataset, bound = self.peaks.datasets[window.dataset], kind == "positive"
        return {
            "sequence": sequence,
            "chrom": window.chrom,
            "start": window.start,
            "end": window.end,
            "factor": dataset.target,
            "cell": dataset.cell,
            "label": float(bound) if self.bin_bp is None else self._bins(window, kind),
            "kind": kind,
            "read_value": float(self.peaks.value[row]) if bound else math.nan,
            "peaks_nr": float(self._peaks_nr.get(dataset.name, math.nan)),
            "margin": self.margin,
        }

    def _bins(self, window: Negative, kind: str) -> np.ndarray:
        """(T,) 1.0 where a bin shares a base with a peak of the data set."""
        starts = np.arange(window.start, window.end, self.bin_bp, dtype=np.int64)
        if kind == "shuffle":
            return np.zeros(len(starts), dtype=np.float32)
        if window.dataset not in self._bound:
            own = self.peaks.rows(self.peaks.dataset_codes == window.dataset)
            self._bound[window.dataset] = RangeMap.of_peaks(own)
        ranges = self._bound[window.dataset][window.chrom]
        return touches(ranges, starts, starts + (self.bin_bp or 1)).astype(np.float32)


def read_peaks_nr(path: str | PathLike[str]) -> dict[str, float]:
    """Data set name -> number of peaks, from `experiments[].details.datasets[].{dataset_name, peaks_NR}`.

    Data sets whose number is absent or no number are left out, so that they are missing and never 0.

    Raises:
        DataError: the file is no JSON, or has no `experiments`.
    """
    try:
        content = json.loads(existing_file(path).read_text(encoding="utf-8"))
        experiments = content["experiments"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} must be JSON with a list `experiments` ({error}).") from error
    datasets = [dataset for one in experiments for dataset in (one.get("details") or {}).get("datasets") or ()]
    counts = {str(dataset.get("dataset_name")): _count(dataset.get("peaks_NR")) for dataset in datasets}
    return {name: count for name, count in counts.items() if not math.isnan(count)}


def _count(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if number > 0 and math.isfinite(number) else math.nan
