"""Where examples of (sequence, tracks) lie: a `.npz` file, a memory-mapped `.npy` with a BED, bigWigs, TFRecords.

A source gives example `i` as it is stored; windows, crops and track selection are the work of `TrackDataset`.

Shapes: N examples, L bases, M bins, T tracks.
"""

import zipfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from genesplice_hf.data.bed import BedTable
from genesplice_hf.data.files import existing_file
from genesplice_hf.data.track_windows import PAD_ID
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval


class StoredExample(NamedTuple):
    """One example as it is stored.

    Attributes:
        ids: uint8 (L,), or None where the sequence comes from a FASTA file.
        labels: (M, T), any float type; NaN = unknown.
    """

    ids: np.ndarray | None
    labels: np.ndarray


class TrackSource(Protocol):
    """What `TrackDataset` reads from: M bins and T tracks of N examples."""

    name: str
    num_bins: int
    num_tracks: int

    @property
    def sequence_length(self) -> int | None:
        """L of the stored sequences; None where they come from a FASTA file."""

    @property
    def intervals(self) -> Sequence[Interval] | None:
        """Where each example lies, around the same centre as its sequence; None where that is not known."""

    @property
    def groups(self) -> Sequence[range]:
        """Row numbers that are read fastest together and in order, such as the records of one file."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> StoredExample: ...


class NpzSource:
    """`sequence` uint8 (N, L) and `target` (N, M, T) of a `.npz` file, in main memory.

    Places are read from `chrom`, `start` and `end`, each (N,), or from `coords` (N, 3); both may be absent.

    Raises:
        DataError: an array is missing, has another shape or type, or holds an id above 5.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        file = existing_file(path)
        self.name = str(file)
        with _load(file) as arrays:
            self._ids, self._labels = (_array(arrays, key, file) for key in ("sequence", "target"))
            places = _places(arrays)
        self._check()
        self.num_bins, self.num_tracks = self._labels.shape[1:]
        self.sequence_length: int | None = self._ids.shape[1]
        self.intervals = None if places is None else self._intervals(places)
        self.groups = [range(index, index + 1) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, index: int) -> StoredExample:
        return StoredExample(self._ids[index], self._labels[index])

    def _check(self) -> None:
        if self._ids.ndim != 2 or self._ids.dtype != np.uint8:
            raise DataError(f"`sequence` of {self.name} must be uint8 (N, L), was {_kind(self._ids)}.")
        if self._ids.size and self._ids.max() > PAD_ID:
            raise DataError(f"`sequence` of {self.name} must hold ids 0 to {PAD_ID}, holds {self._ids.max()}.")
        check_targets(self._labels, "target", self.name, len(self._ids))

    def _intervals(self, places: list[tuple[str, int, int]]) -> list[Interval]:
        if len(places) != len(self):
            raise DataError(f"The coordinates of {self.name} must be {len(self)} rows, were {len(places)}.")
        intervals = [Interval(*place) for place in places]
        other = next((part for part in intervals if part.length_bp != self._ids.shape[1]), None)
        if other is not None:
            raise DataError(
                f"The coordinates of {self.name} must span {self._ids.shape[1]} bp, not {other.length_bp}."
            )
        return intervals


class MemmapSource:
    """Targets (N, M, T) of a `.npy` file, mapped and not loaded, and a BED with one row per example, same order.

    Raises:
        DataError: another shape or type, or another number of rows than the BED has.
    """

    def __init__(self, path: str | PathLike[str], bed: BedTable) -> None:
        self._path = existing_file(path)
        self.name = str(self._path)
        labels = self._map()
        check_targets(labels, "targets", self.name, len(bed), f"the rows of {bed.path}")
        self.num_bins, self.num_tracks = labels.shape[1:]
        self.sequence_length = None
        self.intervals = bed.intervals
        self.groups = [range(index, index + 1) for index in range(len(bed))]

    def __len__(self) -> int:
        return len(self.intervals)

    def read(self, index: int) -> StoredExample:
        # Mapped anew where the object was pickled or forked, so that no worker drags the file's bytes along.
        return StoredExample(None, self._map()[index])

    def _map(self) -> np.ndarray:
        try:
            return np.load(self._path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise DataError(f"{self._path} is not a whole .npy file of numbers: {error}.") from error


def check_targets(labels: np.ndarray, argument: str, name: str, rows: int, of_what: str = "sequences") -> None:
    """Raises `DataError` unless `labels` are floats (N, M, T) with `rows` rows and at least one bin and track."""
    if labels.ndim != 3 or labels.dtype.kind != "f" or 0 in labels.shape[1:]:
        raise DataError(f"`{argument}` of {name} must be floats (N, bins, tracks), was {_kind(labels)}.")
    if len(labels) != rows:
        raise DataError(f"`{argument}` of {name} must have one row for each of {rows} {of_what}, has {len(labels)}.")


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"


def _load(file: Path) -> np.lib.npyio.NpzFile:
    try:
        arrays = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} is not a whole .npz file: {error}.") from error
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise DataError(f"`path` must be a .npz file with `sequence` and `target`, but {file} holds one array.")
    return arrays


def _array(arrays: np.lib.npyio.NpzFile, key: str, file: Path) -> np.ndarray:
    if key not in arrays:
        raise DataError(f"{file} must hold the array `{key}`, but holds {sorted(arrays.files)}.")
    try:
        return arrays[key]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"The array `{key}` of {file} cannot be read ({error}); copy the file again.") from error


def _places(arrays: np.lib.npyio.NpzFile) -> list[tuple[str, int, int]] | None:
    if "coords" in arrays:
        rows = arrays["coords"].tolist()
    elif all(key in arrays for key in ("chrom", "start", "end")):
        rows = list(zip(*(arrays[key].tolist() for key in ("chrom", "start", "end")), strict=True))
    else:
        return None
    return [(_text(chrom), int(start), int(end)) for chrom, start, end in rows]


def _text(chrom: str | bytes) -> str:
    return chrom.decode("ascii") if isinstance(chrom, bytes) else chrom
