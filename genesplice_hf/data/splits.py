"""Train and test that share nothing: splits by chromosome or at random, duplicates, overlaps, and a report.

Two sequences are the same when their letters are, upper or lower case; with `both_strands=True` also when
one is the reverse complement of the other. No function changes the order of the rows that it keeps.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict

from genesplice_hf.data.files import nearest
from genesplice_hf.errors import DataError
from genesplice_hf.genome.alphabet import reverse_complement


@dataclass(frozen=True)
class SplitReport:
    """Where every row went: `rows_in` equals the sum of all other counts.

    Attributes:
        rows_in: rows before.
        rows_out: rows after, by the name of the part.
        duplicates: rows removed because an earlier row has the same sequence (and label).
        conflicts: rows removed because a row with the same sequence has another label.
        overlaps: rows removed because another dataset holds their sequence.
        unlabelled: rows left out because they have no clear label.
        unused: rows left out because fewer were asked for.
    """

    rows_in: int
    rows_out: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0
    conflicts: int = 0
    overlaps: int = 0
    unlabelled: int = 0
    unused: int = 0

    def __str__(self) -> str:
        kept = ", ".join(f"{name} {count:,}" for name, count in self.rows_out.items())
        reasons = {
            "duplicates": self.duplicates,
            "conflicting labels": self.conflicts,
            "overlaps with other datasets": self.overlaps,
            "without a clear label": self.unlabelled,
            "not asked for": self.unused,
        }
        removed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count) or "none"
        return f"{self.rows_in:,} rows: kept {kept}; left out {removed}"


class Cleaned(NamedTuple):
    """A dataset without the rows that were asked away, and the count of those."""

    dataset: Dataset
    report: SplitReport


class Splits(NamedTuple):
    """The named parts of one dataset, and the count of their rows."""

    datasets: DatasetDict
    report: SplitReport


def split_by_chromosome(
    dataset: Dataset, held_out: Sequence[str] | Mapping[str, Sequence[str]], column: str = "chrom"
) -> Splits:
    """Puts whole chromosomes aside; all others are `train`.

    Args:
        dataset: rows with a chromosome name in `column`.
        held_out: names for `test`, or part -> names, such as `{"dev": ["chr8"], "test": ["chr9"]}`.
        column: the column of chromosome names.

    Raises:
        DataError: a name is not in the dataset or in two parts, or no row is left for `train`.
    """
    if isinstance(held_out, str):
        raise DataError(f"`held_out` must be a list of names or a dict of lists, was the text {held_out!r}.")
    parts = held_out if isinstance(held_out, Mapping) else {"test": held_out}
    chroms = list(_column(dataset, column))
    home = _homes(parts, dict.fromkeys(chroms))
    return _split(dataset, [home.get(chrom, "train") for chrom in chroms], ["train", *parts])


def deduplicate(
    dataset: Dataset,
    column: str = "sequence",
    conflicting_labels: Literal["drop", "keep_first", "error"] = "drop",
    label_column: str = "label",
    both_strands: bool = False,
) -> Cleaned:
    """Keeps the first row of each sequence.

    Args:
        dataset: rows with a sequence in `column`; labels are compared if it has `label_column`.
        column: the column of sequences.
        conflicting_labels: for a sequence that stands with several labels: `"drop"` removes all its rows,
            `"keep_first"` keeps the first, `"error"` raises.
        label_column: the column of labels.
        both_strands: also take a sequence and its reverse complement for the same.

    Raises:
        DataError: an unknown choice or column, or a conflict under `"error"`.
    """
    if conflicting_labels not in ("drop", "keep_first", "error"):
        raise DataError(f"`conflicting_labels` must be 'drop', 'keep_first' or 'error', was {conflicting_labels!r}.")
    keys = _keys(dataset, column, both_strands)
    has_labels = label_column in dataset.column_names
    labels = [_hashable(label) for label in dataset[label_column][:]] if has_labels else [None] * len(keys)
    labels_of: dict[str, set[Hashable]] = defaultdict(set)
    for key, label in zip(keys, labels, strict=True):
        labels_of[key].add(label)
    disputed = {key for key, values in labels_of.items() if len(values) > 1}
    if disputed and conflicting_labels == "error":
        raise DataError(
            f"{len(disputed):,} sequences stand with more than one label, first in row "
            f"{_first(keys, disputed)}; correct the table, or pass `conflicting_labels='drop'`."
        )
    return _keep_first(dataset, keys, labels, disputed, drop=conflicting_labels == "drop")


def remove_overlap(train: Dataset, *others: Dataset, column: str = "sequence", both_strands: bool = False) -> Cleaned:
    """Removes from `train` every row whose sequence stands in one of `others` (dev, test).

    Args:
        train: the dataset that gives way.
        *others: the datasets that stay as they are.
        column: the column of sequences in all of them.
        both_strands: also remove reverse complements.

    Raises:
        DataError: a dataset has no such column, or `others` is empty.
    """
    if not others:
        raise DataError("`others` must hold at least one dataset, such as dev or test.")
    taken = {key for other in others for key in _keys(other, column, both_strands)}
    kept = [row for row, key in enumerate(_keys(train, column, both_strands)) if key not in taken]
    report = SplitReport(len(train), {"train": len(kept)}, overlaps=len(train) - len(kept))
    return Cleaned(_select(train, kept), report)


def random_split(
    dataset: Dataset,
    fractions: Mapping[str, float],
    seed: int,
    column: str = "sequence",
    both_strands: bool = False,
) -> Splits:
    """Splits at random so that all rows of one sequence fall into the same part.

    Args:
        dataset: rows with a sequence in `column`.
        fractions: part -> share of the rows, such as `{"train": 0.8, "dev": 0.1, "test": 0.1}`; sum 1.
            Parts miss their share by less than the largest group of equal sequences.
        seed: the same seed gives the same parts.
        column: the column of sequences.
        both_strands: also keep reverse complements together.

    Raises:
        DataError: the fractions are not positive or do not sum to 1, or a part would be empty.
    """
    if not fractions or min(fractions.values()) <= 0 or not math.isclose(sum(fractions.values()), 1):
        raise DataError(f"`fractions` must be positive and sum to 1, was {dict(fractions)}.")
    groups: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(_keys(dataset, column, both_strands)):
        groups[key].append(row)
    homes = np.empty(len(dataset), dtype=np.int64)
    bounds = np.rint(np.cumsum(list(fractions.values()))[:-1] * len(dataset))
    placed = 0
    members = list(groups.values())
    for group in np.random.default_rng(seed).permutation(len(members)):
        homes[members[group]] = np.searchsorted(bounds, placed, side="right")
        placed += len(members[group])
    names = list(fractions)
    return _split(dataset, [names[home] for home in homes.tolist()], names)


def check_overlap(train: Dataset, test: Dataset, column: str = "sequence", both_strands: bool = False) -> None:
    """Raises `DataError`, with the number and the remedy, if `test` holds a sequence of `train`."""
    known = set(_keys(train, column, both_strands))
    keys = _keys(test, column, both_strands)
    shared = sum(key in known for key in keys)
    if shared:
        raise DataError(
            f"{shared:,} of {len(keys):,} test rows have a sequence that stands in train too, the first is "
            f"test row {_first(keys, known)}; call `remove_overlap(train, test)` and train on what is left."
        )


def _homes(parts: Mapping[str, Sequence[str]], present: Iterable[str]) -> dict[str, str]:
    """Returns chromosome -> part, after checking that each named one exists and has one part."""
    home: dict[str, str] = {}
    present = list(present)
    for part, names in parts.items():
        for name in names:
            if name not in present:
                raise DataError(
                    f"`held_out` names {name!r}, but the dataset holds {sorted(present)}; "
                    f"the nearest is {nearest(name, present)!r}."
                )
            if home.setdefault(name, part) != part:
                raise DataError(f"`held_out` puts {name!r} into {home[name]!r} and {part!r}; choose one.")
    return home


def _split(dataset: Dataset, homes: Sequence[str], names: Sequence[str]) -> Splits:
    rows: dict[str, list[int]] = {name: [] for name in names}
    for row, home in enumerate(homes):
        rows[home].append(row)
    for name, members in rows.items():
        if not members:
            raise DataError(f"The part {name!r} would be empty; the dataset has {len(dataset)} rows.")
    parts = DatasetDict({name: _select(dataset, members) for name, members in rows.items()})
    return Splits(parts, SplitReport(len(dataset), {name: len(members) for name, members in rows.items()}))


def _keep_first(
    dataset: Dataset, keys: Sequence[str], labels: Sequence[Hashable], disputed: set[str], drop: bool
) -> Cleaned:
    kept: list[int] = []
    first_label: dict[str, Hashable] = {}
    duplicates = conflicts = 0
    for row, (key, label) in enumerate(zip(keys, labels, strict=True)):
        if drop and key in disputed:
            conflicts += 1
        elif key not in first_label:
            first_label[key] = label
            kept.append(row)
        elif first_label[key] == label:
            duplicates += 1
        else:
            conflicts += 1
    report = SplitReport(len(keys), {"rows": len(kept)}, duplicates=duplicates, conflicts=conflicts)
    return Cleaned(_select(dataset, kept), report)


def _select(dataset: Dataset, rows: list[int]) -> Dataset:
    return dataset.select(rows, keep_in_memory=True)


def _column(dataset: Dataset, column: str) -> Iterable:
    if column not in dataset.column_names:
        raise DataError(f"`column` must be a column of the dataset, was {column!r}; it has {dataset.column_names}.")
    return dataset[column][:]


def _keys(dataset: Dataset, column: str, both_strands: bool) -> list[str]:
    """Returns what is equal for equal sequences: upper case, and on both strands the smaller of the two."""
    keys = [sequence.upper() for sequence in _column(dataset, column)]
    return [min(key, reverse_complement(key)) for key in keys] if both_strands else keys


def _first(keys: Sequence[str], wanted: set[str]) -> int:
    return next(row for row, key in enumerate(keys, start=1) if key in wanted)


def _hashable(label: object) -> Hashable:
    return tuple(label) if isinstance(label, list) else label  # type: ignore[return-value]
