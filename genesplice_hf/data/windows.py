"""Windows of a genome as rows: one by one, as a dataset in memory, or as a stream that can be resumed.

A row holds `chrom` (the file's own name), `start` and `end` (0-based, half-open), `sequence` (along the
region's strand, case kept) and `example_id`, `name|chrom:start-end` with `(-)` after it on the reverse
strand. Rows of several genomes can be put together (`datasets.concatenate_datasets`,
`interleave_datasets`): give each genome its own `name`.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value

from genesplice_hf.data.fasta import Genome
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval

logger = logging.getLogger(__name__)

WINDOW_FEATURES = Features(
    {
        "chrom": Value("string"),
        "start": Value("int64"),
        "end": Value("int64"),
        "sequence": Value("large_string"),
        "example_id": Value("string"),
    }
)
Last = Literal["shift", "drop", "short"]
# A stream's shard: small enough to share among workers and to skip fast on resuming.
_WINDOWS_PER_SHARD = 4096


class _Run(NamedTuple):
    """Consecutive windows of one stretch: `starts` of the full ones, then perhaps one other at the end."""

    chrom: str
    strand: str
    starts: range
    window_bp: int
    tail: tuple[int, int] | None

    def bounds(self) -> Iterator[tuple[int, int]]:
        for start in self.starts:
            yield start, start + self.window_bp
        if self.tail is not None:
            yield self.tail


def iter_windows(
    genome: Genome,
    window_bp: int,
    step_bp: int | None = None,
    regions: Sequence[Interval] | None = None,
    exclude: Sequence[Interval] | None = None,
    max_n_fraction: float = 0.5,
    last: Last = "shift",
    name: str = "",
) -> Iterator[dict[str, Any]]:
    """Yields the windows of `genome` in order, region by region. The arguments are checked at the call.

    Args:
        genome: where the bases come from.
        window_bp: length of a window.
        step_bp: from one start to the next; smaller than `window_bp` gives overlap. Default `window_bp`.
        regions: what to cover, in this order; default every contig. They are not merged.
        exclude: no window shares a base with these, on either strand.
        max_n_fraction: windows with a larger share of N are left out; their number is logged.
        last: what to do with the bases after the last full window of a stretch: `"shift"` moves one more
            window back so that it ends there, `"short"` yields them as a shorter window, `"drop"` leaves
            them out. Stretches shorter than `window_bp` are yielded by `"short"` only; else their number
            is logged.
        name: the genome's name in `example_id`; none when empty.

    Raises:
        DataError: an argument is out of range, an interval does not lie in the genome, or no window fits.
    """
    runs = _plan(genome, window_bp, step_bp, regions, exclude, last)
    _check_fraction(max_n_fraction)
    return _rows(runs, genome, max_n_fraction, name)


def windows_dataset(
    genome: Genome,
    window_bp: int,
    step_bp: int | None = None,
    regions: Sequence[Interval] | None = None,
    exclude: Sequence[Interval] | None = None,
    max_n_fraction: float = 0.5,
    last: Last = "shift",
    name: str = "",
) -> Dataset:
    """Holds the rows of `iter_windows` (same arguments, same errors) in main memory.

    About 1 byte per base and window; for whole genomes with overlap take `stream_windows`.
    """
    rows = iter_windows(genome, window_bp, step_bp, regions, exclude, max_n_fraction, last, name)
    columns: dict[str, list[Any]] = {column: [] for column in WINDOW_FEATURES}
    for row in rows:
        for column, value in row.items():
            columns[column].append(value)
    return Dataset.from_dict(columns, features=WINDOW_FEATURES)


def stream_windows(
    genome: Genome,
    window_bp: int,
    step_bp: int | None = None,
    regions: Sequence[Interval] | None = None,
    exclude: Sequence[Interval] | None = None,
    max_n_fraction: float = 0.5,
    last: Last = "shift",
    name: str = "",
) -> IterableDataset:
    """Streams the rows of `iter_windows` (same arguments, same errors, same order).

    The stream has one shard per 4,096 windows, so that `DataLoader` workers and processes share it, and
    `state_dict()` / `load_state_dict()` go on at the next row.
    """
    runs = _plan(genome, window_bp, step_bp, regions, exclude, last)
    _check_fraction(max_n_fraction)
    # `datasets` makes a shard of each element of the one argument that is a list.
    arguments = {"runs": _shards(runs), "genome": genome, "max_n_fraction": max_n_fraction, "name": name}
    return IterableDataset.from_generator(_rows, features=WINDOW_FEATURES, gen_kwargs=arguments)


def _plan(
    genome: Genome,
    window_bp: int,
    step_bp: int | None,
    regions: Sequence[Interval] | None,
    exclude: Sequence[Interval] | None,
    last: Last,
) -> list[_Run]:
    step_bp = window_bp if step_bp is None else step_bp
    for argument, value in (("window_bp", window_bp), ("step_bp", step_bp)):
        if value < 1:
            raise DataError(f"`{argument}` must be 1 or more, was {value}.")
    if last not in ("shift", "drop", "short"):
        raise DataError(f"`last` must be 'shift', 'drop' or 'short', was {last!r}.")
    holes: dict[str, list[Interval]] = {}
    for hole in sorted(_located(genome, exclude or ())):
        holes.setdefault(hole.chrom, []).append(hole)
    covered = _regions(genome, regions)
    stretches = [part for region in covered for part in _without(region, holes.get(region.chrom, []))]
    runs = [_tile(stretch, window_bp, step_bp, last) for stretch in stretches]
    fitting = [run for run in runs if run.starts or run.tail]
    if len(fitting) < len(runs):
        logger.info("%d stretches shorter than %d bp are left out.", len(runs) - len(fitting), window_bp)
    if not fitting:
        raise DataError(f"`window_bp` ({window_bp}) fits into no region; take a smaller one, or `last='short'`.")
    return fitting


def _regions(genome: Genome, regions: Sequence[Interval] | None) -> list[Interval]:
    if regions is None:
        return [Interval(chrom, 0, length) for chrom, length in genome.contigs.items()]
    return _located(genome, regions)


def _located(genome: Genome, intervals: Sequence[Interval]) -> list[Interval]:
    names = [genome.locate(part.chrom, part.start, part.end) for part in intervals]
    return [Interval(name, part.start, part.end, part.strand) for name, part in zip(names, intervals, strict=True)]


def _without(region: Interval, holes: Iterable[Interval]) -> Iterator[Interval]:
    """Yields the stretches of `region` that lie in none of the sorted `holes`, left to right."""
    start = region.start
    for hole in filter(region.overlaps, holes):
        if hole.start > start:
            yield Interval(region.chrom, start, hole.start, region.strand)
        start = max(start, hole.end)
    if start < region.end:
        yield Interval(region.chrom, start, region.end, region.strand)


def _tile(stretch: Interval, window_bp: int, step_bp: int, last: Last) -> _Run:
    starts = range(stretch.start, stretch.end - window_bp + 1, step_bp)
    following = starts[-1] + step_bp if starts else stretch.start
    covered = starts[-1] + window_bp if starts else stretch.start
    tail = None
    if covered < stretch.end and following < stretch.end:
        if last == "short":
            tail = following, stretch.end
        elif last == "shift" and stretch.length_bp >= window_bp:
            tail = stretch.end - window_bp, stretch.end
    return _Run(stretch.chrom, stretch.strand, starts, window_bp, tail)


def _shards(runs: Iterable[_Run]) -> list[_Run]:
    shards: list[_Run] = []
    for run in runs:
        cuts = range(0, max(1, len(run.starts)), _WINDOWS_PER_SHARD)
        pieces = [run._replace(starts=run.starts[cut : cut + _WINDOWS_PER_SHARD], tail=None) for cut in cuts]
        shards += [*pieces[:-1], pieces[-1]._replace(tail=run.tail)]
    return shards


def _rows(runs: list[_Run], genome: Genome, max_n_fraction: float, name: str) -> Iterator[dict[str, Any]]:
    left_out = 0
    for run in runs:
        for start, end in run.bounds():
            if _n_fraction(genome.array(run.chrom, start, end)) > max_n_fraction:
                left_out += 1
                continue
            yield _row(genome, run, start, end, name)
    if left_out:
        logger.info("%d windows with more than %g N are left out.", left_out, max_n_fraction)


def _row(genome: Genome, run: _Run, start: int, end: int, name: str) -> dict[str, Any]:
    prefix, suffix = f"{name}|" if name else "", "(-)" if run.strand == "-" else ""
    return {
        "chrom": run.chrom,
        "start": start,
        "end": end,
        "sequence": genome.seq(run.chrom, start, end, run.strand),
        "example_id": f"{prefix}{run.chrom}:{start}-{end}{suffix}",
    }


def _n_fraction(letters: np.ndarray) -> float:
    # 0xDF clears the bit by which lower case differs.
    return np.count_nonzero((letters & 0xDF) == ord("N")) / letters.size


def _check_fraction(max_n_fraction: float) -> None:
    if not 0 <= max_n_fraction <= 1:
        raise DataError(f"`max_n_fraction` must lie between 0 and 1, was {max_n_fraction}.")
