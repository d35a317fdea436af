"""Tables of tracks, as Basenji, Enformer and Borzoi write them (`targets.txt`), and pairs of strands.

A strand pair table gives for every track the one that measures the opposite strand, itself where there is none;
it is its own inverse.
"""

import csv
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from genesplice_hf.data.files import open_binary
from genesplice_hf.errors import DataError

_NEEDED = ("identifier",)


@dataclass(frozen=True)
class Target:
    """One track: what it measures, where its coverage lies, and how it is made to targets.

    Attributes:
        identifier: its name.
        file: path of its coverage as it stands in the table, "" where there is none.
        clip: limit of the binned value; None = none.
        clip_soft: from here on values grow by their square root; None = never.
        scale: factor before binning.
        sum_stat: how the bases of a bin are summed up, see `data/bigwig.py`.
        description: free text, with the assay before the first colon.
        genome: number of the species, 0 where there is one only.
    """

    identifier: str
    file: str = ""
    clip: float | None = None
    clip_soft: float | None = None
    scale: float = 1.0
    sum_stat: str = "sum"
    description: str = ""
    genome: int = 0

    @property
    def assay(self) -> str:
        """What stands before the first colon of the description, e.g. `CAGE`."""
        return self.description.split(":")[0]


@dataclass(frozen=True)
class TargetTable:
    """The tracks of a dataset, in the order of its last axis.

    Attributes:
        targets: one per track.
        strand_pair: the partner of every track, or None where the table says nothing of strands.
    """

    targets: tuple[Target, ...]
    strand_pair: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, track_indices: Sequence[int]) -> "TargetTable":
        """The tracks `track_indices`, renumbered from 0.

        Raises:
            DataError: an index out of range or twice, or one strand of a pair without the other.
        """
        chosen = check_track_indices(track_indices, len(self))
        pairs = None if self.strand_pair is None else select_strand_pair(self.strand_pair, chosen)
        return TargetTable(tuple(self.targets[index] for index in chosen), pairs)


def read_targets(path: str | PathLike[str]) -> TargetTable:
    """Reads a `targets.txt`: tab-separated, a header, columns in any order, rows in the order of the tracks.

    `identifier` must be there; `file`, `clip`, `clip_soft`, `scale`, `sum_stat`, `strand_pair`, `description` and
    `genome` may be. `strand_pair` holds numbers of the `index` column (the first one, named or not), or row numbers
    if the table has no such column.

    Raises:
        DataError: no header or row, a missing column, a cell that is no number, pairs that are not mutual; with
            the line.
    """
    with open_binary(path) as stream:
        text = stream.read().decode("utf-8-sig", "replace")
    rows = [row for row in csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE) if any(row)]
    if len(rows) < 2:
        raise DataError(f"{path} must hold a header and one row per track, has {len(rows)} lines.")
    header = [name.strip() or "index" for name in rows[0]]
    missing = [name for name in _NEEDED if name not in header]
    if missing:
        raise DataError(
            f"{path} must have the columns {list(_NEEDED)}, but its header is {header}; it lacks {missing}."
        )
    records = [_record(header, row, f"Line {number} of {path}") for number, row in enumerate(rows[1:], start=2)]
    targets = tuple(_target(record, f"Line {line} of {path}") for line, record in enumerate(records, start=2))
    return TargetTable(targets, _pairs(records, Path(path)) if "strand_pair" in header else None)


def check_strand_pair(strand_pair: Sequence[int], num_tracks: int) -> np.ndarray:
    """Returns the table as int64 (T,).

    Raises:
        DataError: another length, an index out of range, or not its own inverse.
    """
    table = np.asarray(strand_pair)
    if table.shape != (num_tracks,) or table.dtype.kind not in "iu":
        raise DataError(
            f"`strand_pair` must be {num_tracks} whole numbers, one per track, was {table.dtype} {table.shape}."
        )
    table = table.astype(np.int64)
    if table.min() < 0 or table.max() >= num_tracks:
        raise DataError(f"`strand_pair` must hold 0 to {num_tracks - 1}, holds {table.min()} to {table.max()}.")
    broken = np.flatnonzero(table[table] != np.arange(num_tracks))
    if broken.size:
        track = int(broken[0])
        raise DataError(
            f"`strand_pair` must be its own inverse, but says {track} -> {table[track]} -> {table[table[track]]}; "
            "give every track its partner, or itself."
        )
    return table


def select_strand_pair(strand_pair: Sequence[int], track_indices: Sequence[int]) -> tuple[int, ...]:
    """The pairs among `track_indices`, renumbered from 0.

    Raises:
        DataError: the other strand of a chosen track is not chosen.
    """
    place = {track: new for new, track in enumerate(track_indices)}
    lonely = [track for track in track_indices if strand_pair[track] not in place]
    if lonely:
        raise DataError(
            f"`track_indices` holds track {lonely[0]} but not {strand_pair[lonely[0]]}, its other strand in "
            "`strand_pair`; choose both, so that the reverse complement has its targets."
        )
    return tuple(place[strand_pair[track]] for track in track_indices)


def check_track_indices(track_indices: Sequence[int], num_tracks: int) -> list[int]:
    """Returns the indices as a list; raises `DataError` for an empty list, one out of range, or one twice."""
    try:
        chosen = [operator.index(track) for track in track_indices]
    except TypeError:
        raise DataError(f"`track_indices` must be whole numbers, was {track_indices!r}.") from None
    outside = [track for track in chosen if not 0 <= track < num_tracks]
    if not chosen or outside or len(set(chosen)) < len(chosen):
        raise DataError(
            f"`track_indices` must be different numbers from 0 to {num_tracks - 1}, at least one, was {chosen[:20]}."
        )
    return chosen


def _record(header: list[str], row: list[str], where: str) -> dict[str, str]:
    if len(row) != len(header):
        raise DataError(f"{where} must have {len(header)} tab-separated cells like the header, has {len(row)}.")
    return dict(zip(header, (cell.strip() for cell in row), strict=True))


def _target(record: dict[str, str], where: str) -> Target:
    scale = _number(record, "scale", where)
    return Target(
        identifier=record["identifier"],
        file=record.get("file", ""),
        clip=_number(record, "clip", where),
        clip_soft=_number(record, "clip_soft", where),
        scale=1.0 if scale is None else scale,
        sum_stat=record.get("sum_stat") or "sum",
        description=record.get("description", ""),
        genome=_whole(record.get("genome") or "0", "genome", where),
    )


def _number(record: dict[str, str], column: str, where: str) -> float | None:
    text = record.get(column, "")
    if text.lower() in ("", "na", "nan", "none"):
        return None
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{where}: `{column}` must be a number, was {text!r}.") from None


def _whole(text: str, column: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{where}: `{column}` must be a whole number, was {text!r}.") from None


def _pairs(records: list[dict[str, str]], path: Path) -> tuple[int, ...]:
    column = [_whole(record["strand_pair"], "strand_pair", str(path)) for record in records]
    numbers = [_whole(record.get("index", str(row)), "index", str(path)) for row, record in enumerate(records)]
    place = {number: row for row, number in enumerate(numbers)}
    absent = [number for number in column if number not in place]
    if absent or len(place) < len(records):
        distinct = len(place) == len(records)
        what = f"names {absent[0]}, which no row has as its index" if distinct else "needs an index once per row"
        raise DataError(f"`strand_pair` of {path} {what}; correct the table.")
    return tuple(check_strand_pair([place[number] for number in column], len(column)).tolist())
