"""Windows of FASTA files of any size by number, without holding them: what pretraining reads from.

`StreamedWindows` knows the windows as a few stretches per contig, not one by one, and reads a window when it is asked
for; `Permutation` visits the numbers in a shuffled order of which any place can be computed alone. Together they
shuffle whole genomes in memory that does not grow with them, and go on anywhere without reading what came before.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from genesplice_hf.data.fasta import Genome
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval
from genesplice_hf.objectives.sampling import mix

_BLOCK_BP = 1 << 24
_WINDOWS_AT_A_TIME = 1 << 20
_ROUNDS = 6


class Source(NamedTuple):
    """Stretches of a genome that windows are cut from, in this order, and its name in `example_id`."""

    genome: Genome
    label: str
    stretches: Sequence[Interval]


class Permutation:
    """A shuffled order of `range(size)`, any place of which is computed alone: no list, no state.

    A Feistel network is a bijection whatever its round function (Luby and Rackoff, SIAM J. Comput. 17, 1988); on the
    smallest even number of bits that `size` fits into, it is walked until it falls inside the range (Black and
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002), less than four times on average.

    Args:
        size: numbers to order, 1 or more.
        key: whole numbers (a seed, the number of the pass, ...) that name the order.
    """

    def __init__(self, size: int, *key: int) -> None:
        if size < 1:
            raise DataError(f"`size` must be 1 or more, was {size}.")
        self.size = size
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._shift, self._mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
        word = np.zeros(1, np.uint64)
        for part in key:
            word = mix(word + mix(np.array([part], np.uint64) + np.uint64(1)))
        self._round_keys = mix(np.arange(_ROUNDS, dtype=np.uint64) + mix(word))

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """(M,) int64: the numbers that stand at these places (M,), each in `range(size)`."""
        numbers = self._scramble(np.asarray(places).astype(np.uint64))
        while (outside := numbers >= self.size).any():
            numbers[outside] = self._scramble(numbers[outside])
        return numbers.astype(np.int64)

    def _scramble(self, numbers: np.ndarray) -> np.ndarray:
        left, right = numbers >> self._shift, numbers & self._mask
        for key in self._round_keys:
            left, right = right, left ^ (mix(right + key) & self._mask)
        return (left << self._shift) | right


class StreamedWindows(Dataset):
    """The windows of `data.windows.iter_windows(..., last="drop")` over several genomes, read when they are asked for.

    Building it reads every stretch once, 16 million bases at a time, to find the runs of N: windows with more than
    `max_n_fraction` of it get no number. What is kept is one entry per stretch and run of N.

    Args:
        sources: where to cut; a stretch shorter than a window gives none.
        window_bp: length of a window.
        step_bp: from one start to the next.
        max_n_fraction: the largest share of N.

    Raises:
        DataError: no window of a source fits, or all of them hold too much N.
    """

    def __init__(self, sources: Sequence[Source], window_bp: int, step_bp: int, max_n_fraction: float) -> None:
        for argument, value in (("window_bp", window_bp), ("step_bp", step_bp)):
            if value < 1:
                raise DataError(f"`{argument}` must be 1 or more, was {value}.")
        self.window_bp, self.step_bp = window_bp, step_bp
        self._sources = list(sources)
        self._segments: list[tuple[int, str, int]] = []
        counts: list[int] = []
        for number, source in enumerate(self._sources):
            before = len(counts)
            for chrom, start, count in self._find(source, max_n_fraction):
                self._segments.append((number, chrom, start))
                counts.append(count)
            if len(counts) == before:
                raise DataError(
                    f"`window_bp` ({window_bp}) fits into no stretch of {source.genome.path.name} with at most "
                    f"{max_n_fraction:.0%} N; take a smaller one, or leave the file out."
                )
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A row as `data.windows` makes it: `chrom`, `start`, `end`, `sequence`, `example_id`."""
        source, chrom, start = self.locate(number)
        end = start + self.window_bp
        return {
            "chrom": chrom,
            "start": start,
            "end": end,
            "sequence": source.genome.seq(chrom, start, end),
            "example_id": f"{source.label}|{chrom}:{start}-{end}",
        }

    def locate(self, number: int) -> tuple[Source, str, int]:
        """Where the window of this number lies: source, contig and start; negative numbers count from the end."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        number %= len(self)
        at = int(np.searchsorted(self._ends, number, side="right"))
        source, chrom, start = self._segments[at]
        first = int(self._ends[at - 1]) if at else 0
        return self._sources[source], chrom, start + (number - first) * self.step_bp

    def _find(self, source: Source, max_n_fraction: float) -> Iterator[tuple[str, int, int]]:
        """Yields contig, first start and number of windows of every run of windows that may be used."""
        for stretch in source.stretches:
            starts = range(stretch.start, stretch.end - self.window_bp + 1, self.step_bp)
            if not starts:
                continue
            runs = n_runs(source.genome, stretch)
            for first, count in usable(starts, self.window_bp, runs, max_n_fraction):
                yield stretch.chrom, first, count


def n_runs(genome: Genome, stretch: Interval) -> np.ndarray:
    """(R, 2) int64: first base and end of every run of N in a stretch, read block by block."""
    parts = [np.zeros((0, 2), np.int64)]
    for start in range(stretch.start, stretch.end, _BLOCK_BP):
        letters = genome.array(stretch.chrom, start, min(start + _BLOCK_BP, stretch.end))
        # 0xDF clears the bit by which lower case differs.
        is_n = np.concatenate([[False], (letters & 0xDF) == ord("N"), [False]])
        parts.append(np.flatnonzero(is_n[1:] != is_n[:-1]).reshape(-1, 2) + start)
    return np.concatenate(parts)


def usable(starts: range, window_bp: int, n_runs_R2: np.ndarray, max_n_fraction: float) -> Iterator[tuple[int, int]]:
    """Yields (first start, count) of the runs of consecutive windows with at most `max_n_fraction` of N."""
    for first in range(0, len(starts), _WINDOWS_AT_A_TIME):
        part = starts[first : first + _WINDOWS_AT_A_TIME]
        begins = np.arange(part.start, part.stop, part.step, dtype=np.int64)
        num_n = _n_before(begins + window_bp, n_runs_R2) - _n_before(begins, n_runs_R2)
        kept = np.concatenate([[False], num_n / window_bp <= max_n_fraction, [False]])
        for begin, end in np.flatnonzero(kept[1:] != kept[:-1]).reshape(-1, 2).tolist():
            yield part[begin], end - begin


def _n_before(positions: np.ndarray, n_runs_R2: np.ndarray) -> np.ndarray:
    """Bases N that lie before each position."""
    if not len(n_runs_R2):
        return np.zeros_like(positions)
    lengths = n_runs_R2[:, 1] - n_runs_R2[:, 0]
    run = np.searchsorted(n_runs_R2[:, 0], positions, side="right") - 1
    inside = np.minimum(positions - n_runs_R2[run, 0], lengths[run])
    return np.where(run < 0, 0, (np.cumsum(lengths) - lengths)[run] + inside)


def without(region: Interval, holes: Iterable[Interval]) -> list[Interval]:
    """The stretches of `region` that lie in none of the `holes`, left to right."""
    start, stretches = region.start, []
    for hole in sorted(hole for hole in holes if hole.overlaps(region)):
        if hole.start > start:
            stretches.append(Interval(region.chrom, start, hole.start))
        start = max(start, hole.end)
    return [*stretches, Interval(region.chrom, start, region.end)] if start < region.end else stretches
