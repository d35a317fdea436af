"""Text of peak files to columns, block by block: ReMap BED and CRM, narrowPeak, broadPeak, MACS tables.

A block whose lines all have the same number of columns is cut in one stroke; any other block, and any block that
this stroke cannot read, goes line by line through `_Lines`, which says what is wrong and where.

Columns of a parsed block, N rows: `chrom` and `dataset` codes, `start`, `end`, `summit` (0-based) and `value`.
"""

import math
import re
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from genesplice_hf.errors import DataError

_HEADERS = (b"#", b"track", b"browser")
_BOM = b"\xef\xbb\xbf"
# What a row leaves behind where the file gives no number.
_ABSENT = (b"", b".", b"NA", b"nan", b"NaN")
_WHOLE = re.compile(r"-?[0-9]{1,18}", re.ASCII)
_MAX_POSITION = np.iinfo(np.int32).max


class Dataset(NamedTuple):
    """Which experiment measured which target in which cell; what peaks are grouped by."""

    experiment: str
    target: str
    cell: str

    @property
    def name(self) -> str:
        """`EXPERIMENT.TARGET.CELL`, as ReMap writes it."""
        return ".".join(self)


class PeakFormat(NamedTuple):
    """Where a format keeps what; columns count from 1, 0 means that there is none.

    Attributes:
        columns: column names that `value_column` may ask for.
        name: column that names the data sets of a row; 0: the whole file is one.
        several: the name column lists several targets.
        summit: column of the summit.
        relative_summit: it counts from `start`.
        origin: of the coordinates, 0 for BED and 1 for MACS tables.
        value: column read unless `value_column` asks for another.
    """

    columns: tuple[str, ...]
    name: int
    several: bool
    summit: int
    relative_summit: bool
    origin: int
    value: int


_BED9 = ("chrom", "start", "end", "name", "score", "strand", "thick_start", "thick_end", "colour")
_NARROW = (*_BED9[:6], "signal_value", "p_value", "q_value", "peak")
_MACS = (
    "chr",
    "start",
    "end",
    "length",
    "abs_summit",
    "pileup",
    "-log10(pvalue)",
    "fold_enrichment",
    "-log10(qvalue)",
)
FORMATS = {
    "remap": PeakFormat(_BED9, 4, False, 7, False, 0, 5),
    "crm": PeakFormat(_BED9, 4, True, 7, False, 0, 5),
    "bed": PeakFormat(_BED9, 0, False, 0, False, 0, 5),
    "narrowpeak": PeakFormat(_NARROW, 0, False, 10, True, 0, 7),
    "broadpeak": PeakFormat(_NARROW[:9], 0, False, 0, False, 0, 7),
    "macs": PeakFormat((*_MACS, "name"), 0, False, 5, False, 1, 8),
}


class Block(NamedTuple):
    """Columns of some rows, each `(N,)`, and how many lines were left out for their faults or chromosomes."""

    chrom: np.ndarray
    dataset: np.ndarray
    start: np.ndarray
    end: np.ndarray
    summit: np.ndarray
    value: np.ndarray
    bad: int
    elsewhere: int


def parse_remap_name(name: str) -> Dataset:
    """Splits `EXPERIMENT.TARGET.CELL` at its first two dots; the cell may hold further dots.

    Raises:
        DataError: fewer than two dots, or an empty part.
    """
    parts = name.split(".", 2)
    if len(parts) < 3 or not all(parts):
        raise DataError(f"column 4 must be EXPERIMENT.TARGET.CELL, was {name!r}")
    return Dataset(*parts)


def chromosome_key(name: object) -> str:
    """What is equal for `1`, `"1"` and `"chr1"`, and for `chrX` and `X`."""
    return str(name).removeprefix("chr").upper()


class Names:
    """Codes of chromosomes and data sets in the order in which they are met; shared by all blocks of a file.

    Args:
        kind: the format.
        wanted: chromosomes to keep, in any spelling; None keeps all.
        given: target and cell of a file whose rows do not name them.
    """

    def __init__(self, kind: PeakFormat, wanted: Sequence[object] | None, given: Dataset | None) -> None:
        self.chroms: list[str] = []
        self.datasets: list[Dataset] = []
        self._kind = kind
        self._wanted = None if wanted is None else {chromosome_key(name) for name in wanted}
        self._code_of_dataset: dict[Dataset, int] = {}
        self.chrom_codes = _Memo(self._chrom)
        self.dataset_codes = _Memo(self._dataset)
        if given is not None:
            self._code(given)

    def _chrom(self, name: bytes) -> int:
        """The code of a chromosome, or -1 for one that is not wanted."""
        text = name.decode("utf-8", "replace")
        if self._wanted is not None and chromosome_key(text) not in self._wanted:
            return -1
        self.chroms.append(text)
        return len(self.chroms) - 1

    def _dataset(self, name: bytes) -> tuple[int, ...]:
        text = name.decode("utf-8", "replace").strip()
        if not self._kind.several:
            return (self._code(parse_remap_name(text)),)
        targets = [target.strip() for target in text.split(",")]
        if not all(targets):
            raise DataError(f"column 4 must list targets, separated by commas, was {text!r}")
        return tuple(dict.fromkeys(self._code(Dataset("crm", target, "")) for target in targets))

    def _code(self, dataset: Dataset) -> int:
        if dataset not in self._code_of_dataset:
            self._code_of_dataset[dataset] = len(self.datasets)
            self.datasets.append(dataset)
        return self._code_of_dataset[dataset]


class _Memo(dict):
    """A dict that asks `answer` for a key that it meets for the first time."""

    def __init__(self, answer: Callable[[bytes], object]) -> None:
        super().__init__()
        self._answer = answer

    def __missing__(self, key: bytes) -> object:
        self[key] = value = self._answer(key)
        return value


def parse_block(text: bytes, kind: PeakFormat, value: int, names: Names, lines: "Lines") -> Block:
    """Columns of whole lines; `value` is the column of that name, counted from 1."""
    text = text.removeprefix(_BOM)
    text = (text.replace(b"\r\n", b"\n") if b"\r" in text else text).removesuffix(b"\n")
    block = _in_one_stroke(text, kind, value, names)
    return lines.parse(text, kind, value, names) if block is None else lines.passed(text, block)


def _in_one_stroke(text: bytes, kind: PeakFormat, value: int, names: Names) -> Block | None:
    """The block if all its lines are alike and sound, else None."""
    # A commented-out line may look like any other.
    if not text or text.startswith(b"#") or b"\n#" in text:
        return None
    table = _Table.cut(text)
    if table is None or table.width < max(3, kind.name):
        return None
    try:
        return _block(table, kind, value, names)
    except (ValueError, OverflowError):
        return None


def _block(table: "_Table", kind: PeakFormat, value: int, names: Names) -> Block:
    start, end = table.whole(1) - kind.origin, table.whole(2)
    summit = table.whole(kind.summit - 1) if 0 < kind.summit <= table.width else np.full(table.rows, -1)
    if (start < 0).any() or (end <= start).any() or (end > _MAX_POSITION).any():
        raise ValueError("a range that is none: `Lines` says which")
    values = table.real(value - 1) if 0 < value <= table.width else np.full(table.rows, np.nan)
    chrom = table.chrom(names)
    kept = np.flatnonzero(chrom >= 0)
    of, codes = kept, np.zeros(len(kept), dtype=np.int64)
    if kind.name:
        rows = list(map(names.dataset_codes.__getitem__, table.texts(kind.name - 1, kept)))
        of = np.repeat(kept, np.fromiter(map(len, rows), np.int64, len(rows)))
        codes = np.fromiter(chain.from_iterable(rows), np.int64, len(of))
    summit = _absolute(summit, start, end, kind)
    return Block(chrom[of], codes, start[of], end[of], summit[of], values[of], 0, table.rows - len(kept))


class _Table:
    """Lines with equally many columns: where each field begins and ends in the text, both (rows, width)."""

    def __init__(self, text: bytes, letters: np.ndarray, first: np.ndarray, last: np.ndarray) -> None:
        self._text, self._letters, self._first, self._last = text, letters, first, last
        self.rows, self.width = first.shape

    @classmethod
    def cut(cls, text: bytes) -> "_Table | None":
        """The table, or None where lines differ in their number of columns."""
        letters = np.frombuffer(text, dtype=np.uint8)
        stops = np.append(np.flatnonzero((letters == ord("\t")) | (letters == ord("\n"))), len(letters))
        is_end = np.append(letters[stops[:-1]] == ord("\n"), True)
        width = int(is_end.argmax()) + 1
        if (
            len(stops) % width
            or (np.flatnonzero(is_end) % width != width - 1).any()
            or is_end.sum() * width != len(stops)
        ):
            return None
        last = stops.reshape(-1, width)
        first = np.append(0, stops[:-1] + 1).reshape(-1, width)
        return cls(text, letters, first, last)

    def whole(self, column: int) -> np.ndarray:
        """(rows,) int64; raises ValueError unless every field is a whole number of at most 18 digits."""
        first, last = self._first[:, column], self._last[:, column]
        negative = self._letters[np.minimum(first, len(self._letters) - 1)] == ord("-")
        first = first + negative
        lengths = last - first
        if lengths.min() < 1 or lengths.max() > 18:
            raise ValueError("empty or too long")
        total = np.zeros(self.rows, dtype=np.int64)
        for place in range(int(lengths.max())):
            # Digits in front of a short number are read as 0; what lies there is another field.
            digits = self._letters[last - 1 - place].astype(np.int64) - ord("0")
            inside = place < lengths
            if ((digits < 0) | (digits > 9))[inside].any():
                raise ValueError("not a digit")
            total += np.where(inside, digits, 0) * 10**place
        return np.where(negative, -total, total)

    def real(self, column: int) -> np.ndarray:
        """(rows,) float32; raises ValueError unless every field is a finite number."""
        try:
            return self.whole(column).astype(np.float32)
        except ValueError:
            values = np.array(self.texts(column, slice(None))).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("not finite")
        return values.astype(np.float32)

    def texts(self, column: int, rows: "np.ndarray | slice") -> list[bytes]:
        """The fields of a column."""
        bounds = zip(self._first[rows, column].tolist(), self._last[rows, column].tolist(), strict=True)
        return [self._text[first:last] for first, last in bounds]

    def chrom(self, names: Names) -> np.ndarray:
        """(rows,) chromosome codes, -1 for those not wanted; names repeat, so only changes are looked up."""
        first, last = self._first[:, 0], self._last[:, 0]
        changes = np.append(True, np.diff(last - first) != 0)
        for place in range(int((last - first).max())):
            at = np.minimum(first + place, last - 1)
            changes[1:] |= self._letters[at[1:]] != self._letters[at[:-1]]
        rows = np.flatnonzero(changes)
        codes = list(map(names.chrom_codes.__getitem__, self.texts(0, rows)))
        return np.repeat(np.array(codes, dtype=np.int64), np.diff(np.append(rows, self.rows)))


def _absolute(summit: np.ndarray, start: np.ndarray, end: np.ndarray, kind: PeakFormat) -> np.ndarray:
    """0-based summits; the midpoint where the file gives none, or one outside the peak."""
    absolute = np.where(summit < 0, -1, summit + start) if kind.relative_summit else summit - kind.origin
    return np.where((absolute >= start) & (absolute < end), absolute, (start + end) // 2)


class Lines:
    """The slow and exact reader of lines; it also knows the number of the line that comes next.

    Args:
        path: for messages.
        skip: leave faulty lines out and count them, instead of raising.
    """

    def __init__(self, path: Path, skip: bool) -> None:
        self.path, self.skip = path, skip
        self._number = 0

    def passed(self, text: bytes, block: Block) -> Block:
        """Counts the lines of a block that was read in one stroke."""
        self._number += text.count(b"\n") + 1
        return block

    def parse(self, text: bytes, kind: PeakFormat, value: int, names: Names) -> Block:
        """Reads line by line.

        Raises:
            DataError: a line is faulty and `skip` is off; file and line are named.
        """
        rows: list[tuple[int, int, int, int, int, float]] = []
        bad = elsewhere = 0
        for line in text.split(b"\n"):
            self._number += 1
            if not line.strip() or line.startswith(_HEADERS) or self._is_macs_header(line, kind):
                continue
            try:
                found = self._line(line, kind, value, names)
            except DataError as error:
                if not self.skip:
                    raise DataError(f"{self.path}, line {self._number}: {error}.") from error
                bad += 1
            else:
                rows += found
                elsewhere += not found
        whole = np.array([row[:5] for row in rows], dtype=np.int64).reshape(-1, 5).T
        value_of = np.array([row[5] for row in rows], dtype=np.float32)
        return Block(whole[0], whole[1], whole[2], whole[3], whole[4], value_of, bad, elsewhere)

    def _line(self, line: bytes, kind: PeakFormat, value: int, names: Names) -> list[tuple]:
        """The rows of a line: one per data set, none on a chromosome that is not wanted."""
        fields = [field.strip() for field in (line.split(b"\t") if b"\t" in line else line.split())]
        if len(fields) < max(3, kind.name):
            raise DataError(f"{max(3, kind.name)} columns are needed, this line has {len(fields)}")
        start, end = _number(fields[1], "start") - kind.origin, _number(fields[2], "end")
        if start < 0 or end <= start or end > _MAX_POSITION:
            raise DataError(
                f"`start` ({start + kind.origin}) must be {kind.origin} or more and `end` ({end}) larger than it"
            )
        shown = fields[kind.summit - 1] if 0 < kind.summit <= len(fields) else b""
        summit = -1 if shown in _ABSENT else _number(shown, "summit")
        shown = fields[value - 1] if 0 < value <= len(fields) else b""
        number = math.nan if shown in _ABSENT else _real(shown)
        if (chrom := names.chrom_codes[fields[0]]) < 0:
            return []
        summit = int(_absolute(np.array(summit), np.array(start), np.array(end), kind))
        codes = names.dataset_codes[fields[kind.name - 1]] if kind.name else (0,)
        return [(chrom, code, start, end, summit, number) for code in codes]

    @staticmethod
    def _is_macs_header(line: bytes, kind: PeakFormat) -> bool:
        return kind.origin == 1 and line.split(b"\t")[:2] == [b"chr", b"start"]


def _number(field: bytes, name: str) -> int:
    text = field.decode("utf-8", "replace")
    if not _WHOLE.fullmatch(text):
        raise DataError(f"`{name}` must be a whole number, was {text!r}")
    return int(text)


def _real(field: bytes) -> float:
    try:
        number = float(field)
    except ValueError as error:
        raise DataError(f"the value column must hold a number, was {field.decode('utf-8', 'replace')!r}") from error
    return number if math.isfinite(number) else math.nan
