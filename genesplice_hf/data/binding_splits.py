"""Train and validation of binding data that share no chromosome, factor or cell, and what they still share.

A criterion holds rows out: chromosomes, targets, cells. Training rows meet none of them. Validation rows meet any
of them (`combine="union"`) or all of them (`"intersection"`: a held-out factor on a held-out chromosome); rows
that meet some but not all are then in neither part.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from genesplice_hf.data.files import nearest
from genesplice_hf.data.intervals import RangeMap
from genesplice_hf.data.peak_formats import chromosome_key
from genesplice_hf.data.peaks import Peaks
from genesplice_hf.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BindingSplit:
    """The parts, and the rows that are in neither."""

    train: Peaks
    valid: Peaks
    unused: int


@dataclass(frozen=True)
class BindingSplitReport:
    """What train and validation hold and share.

    Attributes:
        train, valid, unused: rows.
        shared_targets, shared_cells, shared_chromosomes: names in both.
        overlapping: validation rows whose peak shares a base with a training peak of any data set.
        similar_targets: pairs (validation target, training target, identity) of proteins that are as similar as
            the limit or more; None where no sequences were given.
    """

    train: int
    valid: int
    unused: int
    shared_targets: tuple[str, ...]
    shared_cells: tuple[str, ...]
    shared_chromosomes: tuple[str, ...]
    overlapping: int
    similar_targets: tuple[tuple[str, str, float], ...] | None = None

    def __str__(self) -> str:
        shared = [
            f"{len(names)} {what}"
            for names, what in (
                (self.shared_chromosomes, "chromosomes"),
                (self.shared_targets, "targets"),
                (self.shared_cells, "cells"),
            )
        ]
        text = (
            f"{self.train:,} train rows, {self.valid:,} validation rows, {self.unused:,} in neither; in both: "
            f"{', '.join(shared)}; {self.overlapping:,} validation peaks overlap a training peak"
        )
        if self.similar_targets is None:
            return text
        pairs = "; ".join(f"{one} = {other} ({identity:.0%})" for one, other, identity in self.similar_targets[:5])
        return f"{text}; {len(self.similar_targets)} held-out targets resemble a training target" + (
            f": {pairs}" if pairs else ""
        )


def split_binding(
    peaks: Peaks,
    chromosomes: Sequence[object] | None = None,
    targets: Sequence[str] | None = None,
    cells: Sequence[str] | None = None,
    combine: Literal["union", "intersection"] = "union",
) -> BindingSplit:
    """Holds chromosomes, targets and cells out for validation; see the head of the file.

    Args:
        peaks: all rows.
        chromosomes: as numbers or names, with or without `chr`; `even_chromosomes(peaks)` is a usual choice.
        targets, cells: names.
        combine: `"union"` or `"intersection"` of the criteria.

    Raises:
        DataError: no criterion, a name that the peaks do not have, or an empty part.
    """
    if combine not in ("union", "intersection"):
        raise DataError(f"`combine` must be 'union' or 'intersection', was {combine!r}.")
    held = []
    if chromosomes is not None:
        held.append(peaks.on_chromosomes(chromosomes))
    for field, wanted in (("target", targets), ("cell", cells)):
        if wanted is not None:
            held.append(_named(peaks, field, wanted))
    if not held:
        raise DataError("Give at least one of `chromosomes`, `targets` and `cells` to hold out.")
    any_held, all_held = np.logical_or.reduce(held), np.logical_and.reduce(held)
    is_valid = any_held if combine == "union" else all_held
    for name, mask in (("train", ~any_held), ("validation", is_valid)):
        if not mask.any():
            raise DataError(f"The {name} part would be empty; hold out other names, or combine by 'union'.")
    unused = len(peaks) - int(is_valid.sum()) - int((~any_held).sum())
    return BindingSplit(peaks.rows(~any_held), peaks.rows(is_valid), unused)


def even_chromosomes(peaks: Peaks) -> list[str]:
    """The chromosomes of even number, in the spelling of the peaks."""
    numbered = [(name, chromosome_key(name)) for name in peaks.chroms]
    return [name for name, key in numbered if key.isdigit() and int(key) % 2 == 0]


def _named(peaks: Peaks, field: str, wanted: Sequence[str]) -> np.ndarray:
    names = [getattr(dataset, field) for dataset in peaks.datasets]
    for name in wanted:
        if name not in names:
            raise DataError(f"No peak has the {field} {name!r}; the nearest is {nearest(name, set(names))!r}.")
    return np.isin(names, list(wanted))[peaks.dataset_codes]


def split_report(
    split: BindingSplit, sequences: Mapping[str, str] | None = None, identity: float = 0.95
) -> BindingSplitReport:
    """Counts rows and looks for what leaks from train into validation; the report is logged as text too.

    Args:
        split: from `split_binding`.
        sequences: target -> amino acids; held-out targets are then compared with all training targets.
        identity: from which on two proteins count as the same.
    """
    train, valid = (_facts(part) for part in (split.train, split.valid))
    similar = None
    if sequences is not None:
        similar = tuple(similar_proteins(train["target"], valid["target"] - train["target"], sequences, identity))
    touched = RangeMap.of_peaks(split.train).touched_rows(split.valid, split.valid.start, split.valid.end)
    shared = {field: tuple(sorted(train[field] & valid[field])) for field in train}
    report = BindingSplitReport(
        len(split.train),
        len(split.valid),
        split.unused,
        shared["target"],
        shared["cell"],
        shared["chrom"],
        int(touched.sum()),
        similar,
    )
    logger.info("%s.", report)
    return report


def _facts(part: Peaks) -> dict[str, set[str]]:
    datasets = [part.datasets[code] for code in part.present]
    chroms = {part.chroms[code] for code in np.unique(part.chrom_codes).tolist()}
    return {"target": {one.target for one in datasets}, "cell": {one.cell for one in datasets}, "chrom": chroms}


def similar_proteins(
    train: set[str], held_out: set[str], sequences: Mapping[str, str], identity: float = 0.95
) -> list[tuple[str, str, float]]:
    """Pairs (held-out target, training target, identity) at or above `identity`, most similar first.

    Identity is 1 - edit distance / length of the longer sequence. Pairs that differ too much in length are not
    compared. Targets without a sequence are left out.
    """
    found = []
    for name in sorted(held_out & sequences.keys()):
        for other in sorted(train & sequences.keys()):
            one, two = sequences[name], sequences[other]
            if min(len(one), len(two)) < identity * max(len(one), len(two)):
                continue
            share = 1 - edit_distance(one, two) / max(len(one), len(two))
            if share >= identity:
                found.append((name, other, share))
    return sorted(found, key=lambda pair: -pair[2])


def edit_distance(one: str, two: str) -> int:
    """Levenshtein distance: substitutions, insertions and deletions that turn one text into the other.

    Bit-parallel: a column of the table is two whole numbers (Myers, J ACM 46:395, 1999; Hyyro 2003).
    """
    if not one or not two:
        return len(one) + len(two)
    places: dict[str, int] = {}
    for at, letter in enumerate(one):
        places[letter] = places.get(letter, 0) | 1 << at
    everything, top = (1 << len(one)) - 1, 1 << (len(one) - 1)
    plus, minus, distance = everything, 0, len(one)
    for letter in two:
        equal = places.get(letter, 0)
        diagonal = (((equal & plus) + plus) ^ plus) | equal | minus
        row_plus = minus | ~(diagonal | plus) & everything
        row_minus = plus & diagonal
        distance += bool(row_plus & top) - bool(row_minus & top)
        row_plus = (row_plus << 1 | 1) & everything
        row_minus = (row_minus << 1) & everything
        plus = row_minus | ~(diagonal | row_plus) & everything
        minus = row_plus & diagonal
    return distance
