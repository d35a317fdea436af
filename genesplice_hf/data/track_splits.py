"""Splits of track datasets: by a column of the BED, by chromosome, or in folds that share no base.

Each function returns the parts by name; `index` of their items stays the row of the source.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from genesplice_hf.data.splits import split_by_chromosome
from genesplice_hf.data.tracks import TrackDataset
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval


def split_tracks_by_column(dataset: TrackDataset, column: str | int = "split") -> dict[str, TrackDataset]:
    """Parts by the text of a column of the BED, in the order in which they appear.

    Args:
        dataset: made from a BED.
        column: name or number, as in `BedTable.column`; Basenji's `sequences.bed` has the split in column 4.

    Raises:
        DataError: the dataset was made from no BED, or this has no such column.
    """
    if dataset.bed is None:
        raise DataError("`dataset` was made from no BED file, so it has no columns; split it by chromosome.")
    homes = dataset.bed.column(column)
    rows = dataset.table()["index"][:]
    return _parts(dataset, [homes[row] for row in rows])


def split_tracks_by_chromosome(
    dataset: TrackDataset, held_out: Sequence[str] | Mapping[str, Sequence[str]]
) -> dict[str, TrackDataset]:
    """Whole chromosomes put aside; all others are `train`. Arguments and errors as `split_by_chromosome`."""
    parts = split_by_chromosome(dataset.table(), held_out).datasets
    return {name: dataset.select(rows["item"][:]) for name, rows in parts.items()}


def contig_folds(dataset: TrackDataset, num_folds: int, seed: int = 0, gap_bp: int = 0) -> list[TrackDataset]:
    """Folds of about equal size of which no two share a base.

    Windows that overlap, or lie less than `gap_bp` apart, form one contig; a contig is never cut. The largest are
    dealt out first, each to the smallest fold, and the seed decides among equals.

    Args:
        dataset: its source knows where the windows lie (as widened by `context_length`).
        num_folds: 2 or more, at most the number of contigs.
        seed: the same seed gives the same folds.
        gap_bp: see above.

    Raises:
        DataError: fewer contigs than folds, or no coordinates.
    """
    contigs = _contigs(dataset, gap_bp)
    if not 2 <= num_folds <= len(contigs):
        raise DataError(
            f"`num_folds` must lie between 2 and {len(contigs)}, the number of contigs (windows that do not overlap "
            f"any other), was {num_folds}."
        )
    order = np.random.default_rng(seed).permutation(len(contigs)).tolist()
    folds: list[list[int]] = [[] for _ in range(num_folds)]
    for place in sorted(order, key=lambda place: -len(contigs[place])):
        min(folds, key=len).extend(contigs[place])
    return [dataset.select(sorted(fold)) for fold in folds]


def _contigs(dataset: TrackDataset, gap_bp: int) -> list[list[int]]:
    """Items that hang together, by place."""
    dataset.table()
    windows = [dataset.window(item) for item in range(len(dataset))]
    places = [Interval(part.chrom, max(0, part.start), max(1, part.end)) for part in windows if part is not None]
    contigs: list[list[int]] = []
    chrom, reach = "", 0
    for item in sorted(range(len(places)), key=lambda item: places[item]):
        place = places[item]
        if not contigs or place.chrom != chrom or place.start >= reach + gap_bp:
            contigs.append([])
            reach = 0
        contigs[-1].append(item)
        chrom, reach = place.chrom, max(reach, place.end)
    return contigs


def _parts(dataset: TrackDataset, homes: Sequence[str]) -> dict[str, TrackDataset]:
    members: dict[str, list[int]] = {}
    for item, home in enumerate(homes):
        members.setdefault(home, []).append(item)
    return {home: dataset.select(items) for home, items in members.items()}
