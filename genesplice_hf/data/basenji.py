"""Folders of training data as Basenji writes them: `statistics.json`, `sequences.bed`, `tfrecords/<split>-<i>.tfr`.

Shapes: L bases, M bins, T tracks.
"""

import itertools
import json
import operator
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from genesplice_hf.data.bed import read_bed
from genesplice_hf.data.files import existing_file
from genesplice_hf.data.tfrecord import parse_example, read_records
from genesplice_hf.data.track_sources import StoredExample
from genesplice_hf.data.track_windows import UNKNOWN_ID
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval

_NEEDED = ("num_targets", "seq_length", "target_length")


@dataclass(frozen=True)
class BasenjiStatistics:
    """What `statistics.json` says.

    Attributes:
        num_targets, seq_length, target_length: T, L and M.
        pool_width, crop_bp: bases of a bin, and bases left out on either side; None where absent.
        num_sequences: split -> number of its windows, where the file tells.
        diagonal_offset: of contact maps (Akita), else None.
    """

    num_targets: int
    seq_length: int
    target_length: int
    pool_width: int | None
    crop_bp: int | None
    num_sequences: Mapping[str, int]
    diagonal_offset: int | None


class BasenjiRecord(NamedTuple):
    """One decoded example.

    Attributes:
        ids: uint8 (L,), A, C, G, T = 0 to 3, N = 4.
        target: float16 (M, T).
        unmappable: bool (M,), or None where the record does not say.
        genome: number of the species; 0 where the record does not say.
    """

    ids: np.ndarray
    target: np.ndarray
    unmappable: np.ndarray | None
    genome: int


def read_statistics(path: str | PathLike[str]) -> BasenjiStatistics:
    """Reads a `statistics.json`.

    Raises:
        DataError: no JSON object, or a needed entry is absent or no positive whole number.
    """
    file = existing_file(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} must hold a JSON object, holds {type(content).__name__}.")
    needed = {name: _positive(content.get(name), name, file) for name in _NEEDED}
    counts = {name.removesuffix("_seqs"): value for name, value in content.items() if name.endswith("_seqs")}
    optional: dict[str, Any] = {name: content.get(name) for name in ("pool_width", "crop_bp", "diagonal_offset")}
    return BasenjiStatistics(**needed, **optional, num_sequences=counts)


def decode_record(payload: bytes, statistics: BasenjiStatistics, with_sequence: bool = True) -> BasenjiRecord:
    """Decodes the features `sequence`, `target`, `umap` and `genome` of one record.

    `sequence` is one-hot (L, 4) or indices (L,), one byte each; the number of bytes tells which. A row of zeros
    becomes N.

    Args:
        payload: what `read_records` yields.
        statistics: the lengths of the folder.
        with_sequence: false leaves `ids` empty, for windows that are read from a FASTA file anyway.

    Raises:
        DataError: a feature is missing, or has a length or value that does not fit.
    """
    features = parse_example(payload)
    shape = statistics.target_length, statistics.num_targets
    target = _bytes(features, "target")
    if len(target) != 2 * shape[0] * shape[1]:
        raise DataError(
            f"`target` must be float16 of {shape[0]} bins and {shape[1]} tracks ({2 * shape[0] * shape[1]} bytes) by "
            f"statistics.json, has {len(target)} bytes; the number of tracks or bins differs."
        )
    ids = _decode_sequence(_bytes(features, "sequence"), statistics.seq_length) if with_sequence else np.empty(0, "u1")
    unmappable = np.frombuffer(_bytes(features, "umap"), dtype=bool) if "umap" in features else None
    if unmappable is not None and len(unmappable) != shape[0]:
        raise DataError(f"`umap` must have {shape[0]} bytes, one per bin, has {len(unmappable)}.")
    genome = int(next(iter(features.get("genome", [])), 0))
    return BasenjiRecord(ids, np.frombuffer(target, dtype="<f2").reshape(shape), unmappable, genome)


def record_files(folder: str | PathLike[str], split: str) -> list[Path]:
    """The files `<split>-<i>.tfr` of a folder or of its `tfrecords`, ordered by number (2 before 10).

    Raises:
        DataError: there is none, or a number is missing.
    """
    root = Path(folder).expanduser()
    pattern = re.compile(rf"{re.escape(split)}-(\d+)(-\d+)?\.tfr")
    places = [root / "tfrecords", root]
    found = [file for place in places if place.is_dir() for file in place.iterdir() if pattern.fullmatch(file.name)]
    if not found:
        raise DataError(f"`folder` must hold files {split}-0.tfr, ... (there or in `tfrecords`), but {root} has none.")
    files = sorted(found, key=lambda file: [int(number) for number in re.findall(r"\d+", file.name[len(split) :])])
    numbers = sorted({int(re.findall(r"\d+", file.name[len(split) :])[0]) for file in files})
    if numbers != list(range(len(numbers))):
        raise DataError(f"{root} lacks some of the files {split}-0.tfr to {split}-{numbers[-1]}.tfr; copy them again.")
    return files


class TfrecordSource:
    """The windows of one split of a Basenji folder, read in order and never all at once.

    Records lie one after the other in a compressed stream: reading forwards is fast, going back opens the file
    again. For training in random order take `StreamingTrackDataset`, or `in_memory=True` for a small set.

    Args:
        folder: holds `statistics.json`, perhaps `sequences.bed` (whose regions may be narrower than the stored
            sequences, around the same centre), and the record files (there or in `tfrecords`).
        split: `"train"`, `"valid"`, `"test"`.
        check_crc: check the checksum of every payload.
        mask_unmappable: bins that `umap` marks become NaN.
        in_memory: keep all records, as they are stored, in main memory.

    Raises:
        DataError: files are missing, or hold another number of records than `sequences.bed` says; on reading, damage
            with the name of the file and the record.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        split: str,
        check_crc: bool = True,
        mask_unmappable: bool = False,
        in_memory: bool = False,
    ) -> None:
        root = Path(folder).expanduser()
        self.name = f"{root} ({split})"
        self.statistics = read_statistics(root / "statistics.json")
        self.files = record_files(root, split)
        self.intervals = _split_intervals(root / "sequences.bed", split)
        self.with_sequence = True
        self.num_bins, self.num_tracks = self.statistics.target_length, self.statistics.num_targets
        self.sequence_length: int | None = self.statistics.seq_length
        self._check_crc, self._mask_unmappable = check_crc, mask_unmappable
        self._payloads = [list(read_records(file, check_crc)) for file in self.files] if in_memory else None
        told = len(self.intervals) if self.intervals else self.statistics.num_sequences.get(split)
        self.groups = self._ranges(told)
        self._reader: _ForwardReader | None = None

    def __len__(self) -> int:
        return self.groups[-1].stop

    def read(self, index: int) -> StoredExample:
        place = operator.index(index)
        number = next(number for number, group in enumerate(self.groups) if place in group)
        record = place - self.groups[number].start
        payload = self._payload(number, record)
        try:
            example = decode_record(payload, self.statistics, self.with_sequence)
        except DataError as error:
            raise DataError(f"Record {record} of {self.files[number]}: {error}") from error
        labels = example.target
        if self._mask_unmappable and example.unmappable is not None:
            labels = np.where(example.unmappable[:, None], np.float16(np.nan), labels)
        return StoredExample(example.ids if self.with_sequence else None, labels)

    def _payload(self, file: int, record: int) -> bytes:
        if self._payloads is not None:
            return self._payloads[file][record]
        # After a fork the parent's file position is shared, so a reader serves only the process that made it.
        if self._reader is None or not self._reader.reaches(self.files[file], record):
            self._reader = _ForwardReader(self.files[file], self._check_crc)
        return self._reader.read(record)

    def _ranges(self, told: int | None) -> list[range]:
        counts = self._counts(told)
        if told is not None and sum(counts) != told:
            raise DataError(
                f"{self.name} must hold {told} records by sequences.bed or statistics.json, holds {sum(counts)}."
            )
        ends = list(itertools.accumulate(counts))
        return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]

    def _counts(self, told: int | None) -> list[int]:
        """Records of every file: all hold as many as the first and the last holds the rest, else they are counted."""
        if self._payloads is not None:
            return [len(payloads) for payloads in self._payloads]
        first, others = _count(self.files[0]), len(self.files) - 1
        if told is not None and others and first * others < told <= first * (others + 1):
            return [first] * others + [told - first * others]
        return [first, *(_count(file) for file in self.files[1:])]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}


class _ForwardReader:
    """Records of one file in ascending order; what lies between is skipped."""

    def __init__(self, file: Path, check_crc: bool) -> None:
        self.file, self.process = file, os.getpid()
        self._records: Iterator[bytes] = read_records(file, check_crc)
        self._next = 0

    def reaches(self, file: Path, record: int) -> bool:
        return file == self.file and record >= self._next and self.process == os.getpid()

    def read(self, record: int) -> bytes:
        payload = next(itertools.islice(self._records, record - self._next, None), None)
        if payload is None:
            raise DataError(f"{self.file} ends before record {record}; copy it again, or correct sequences.bed.")
        self._next = record + 1
        return payload


def _count(file: Path) -> int:
    return sum(1 for _ in read_records(file, check_crc=False))


def _split_intervals(path: Path, split: str) -> list[Interval] | None:
    if not path.exists():
        return None
    bed = read_bed(path)
    homes = bed.column(4)
    if split not in homes:
        raise DataError(f"`split` must be one of {sorted(set(homes))}, the fourth column of {path}, was {split!r}.")
    return [interval for interval, home in zip(bed.intervals, homes, strict=True) if home == split]


def _decode_sequence(stored: bytes, length: int) -> np.ndarray:
    if len(stored) not in (length, 4 * length):
        raise DataError(f"`sequence` must have {length} or {4 * length} bytes, has {len(stored)}.")
    values = np.frombuffer(stored, dtype=np.uint8)
    if len(stored) == length:
        if values.size and values.max() > UNKNOWN_ID:
            raise DataError(f"`sequence` must hold indices 0 to {UNKNOWN_ID}, holds {values.max()}.")
        return values
    rows = values.reshape(length, 4)
    sums = rows.sum(axis=1)
    if sums.max(initial=0) > 1:
        raise DataError(f"`sequence` must be one-hot, but position {int(sums.argmax())} sums to {sums.max()}.")
    return np.where(sums == 0, UNKNOWN_ID, rows.argmax(axis=1)).astype(np.uint8)


def _bytes(features: Mapping[str, Any], key: str) -> bytes:
    value = features.get(key)
    if not isinstance(value, list) or len(value) != 1:
        raise DataError(f"A record must hold the bytes `{key}`, but holds {sorted(features)}.")
    return value[0]


def _positive(value: Any, name: str, file: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(f"`{name}` of {file} must be a positive whole number, was {value!r}.")
    return value
