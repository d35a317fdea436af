"""BED files as they are met: any white space, headers, comments, blank lines, compressed or not.

Coordinates are 0-based and half-open. Everything after the third column is kept as text.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from genesplice_hf.data.files import open_binary
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval, contig_aliases

_NOT_ROWS = ("#", "track", "browser")
_STANDARD = ("name", "score", "strand", "thickStart", "thickEnd", "itemRgb")


@dataclass(frozen=True)
class BedTable:
    """The rows of a BED file, in its order.

    Attributes:
        path: the file.
        intervals: one per row; the strand is that of column 6 if it holds one, else `"+"`.
        lines: the line number of each row, counted from 1, for messages.
        extra: the fields after the third of each row, as text.
        names: names of those fields, where the file has a header line; else ().
    """

    path: Path
    intervals: tuple[Interval, ...]
    lines: tuple[int, ...]
    extra: tuple[tuple[str, ...], ...]
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.intervals)

    def column(self, which: str | int) -> list[str]:
        """The text of one column of every row.

        Args:
            which: number of the column, counted from 1 as in descriptions of BED (4 or more); or its name in the
                header of the file. In a file without one, `"name"` is 4, `"score"` 5, `"strand"` 6; `"split"`,
                as Basenji's `sequences.bed` has it, is 4.

        Raises:
            DataError: the file has no such column, or some row is shorter.
        """
        place = which - 4 if isinstance(which, int) else self._place(which)
        short = [line for line, fields in zip(self.lines, self.extra, strict=True) if not 0 <= place < len(fields)]
        if short:
            raise DataError(
                f"`column` {which!r} must stand in every row of {self.path}, but line {short[0]} has "
                f"{3 + len(self.extra[self.lines.index(short[0])])} columns; name another, or complete the file."
            )
        return [fields[place] for fields in self.extra]

    def _place(self, name: str) -> int:
        names = self.names or (("split",) if name == "split" else _STANDARD)
        if name not in names:
            raise DataError(f"`column` must be one of {list(names)} in {self.path}, was {name!r}; or pass its number.")
        return names.index(name)


def read_bed(
    path: str | PathLike[str],
    chrom_map: Mapping[str, str] | None = None,
    contigs: Iterable[str] | None = None,
) -> BedTable:
    """Reads a BED file of three columns or more, plain, gzip or bgzip.

    Blank lines and lines that begin with `#`, `track` or `browser` are left out. One line of column names (with or
    without `#`) may stand before the first row.

    Args:
        path: the file; fields are separated by tabs, or by any white space if a line has no tab.
        chrom_map: name in the file -> name to use; other names stay.
        contigs: the names that are legal (such as `genome.contigs`); the fixed aliases (chr1 = 1, chrM = MT) are
            taken for them. Default: every name.

    Raises:
        DataError: no row, fewer than three columns, coordinates that are no numbers, `end` not larger than `start`,
            a negative start, or an unknown chromosome; with the line.
    """
    known = None if contigs is None else _Names(contigs)
    names: tuple[str, ...] = ()
    rows: list[tuple[int, Interval, tuple[str, ...]]] = []
    for number, line in _lines(path):
        if header := _header(line, started=bool(rows)):
            names = header[3:]
        elif not _is_comment(line):
            rows.append((number, *_row(line, f"Line {number} of {path}", chrom_map or {}, known)))
    if not rows:
        raise DataError(f"{path} holds no BED row; it is empty or holds headers alone.")
    numbers, intervals, extra = zip(*rows, strict=True)
    return BedTable(Path(path), intervals, numbers, extra, names)


def near_names(name: str, names: Iterable[str], shown: int = 3) -> str:
    """The names that are spelled most like `name`, best first, for messages."""
    return ", ".join(repr(other) for other in difflib.get_close_matches(name, list(names), n=shown, cutoff=0.0))


class _Names:
    """Legal contig names, with the fixed aliases."""

    def __init__(self, contigs: Iterable[str]) -> None:
        self.contigs = dict.fromkeys(contigs)

    def resolve(self, chrom: str, where: str) -> str:
        for name in (chrom, *contig_aliases(chrom)):
            if name in self.contigs:
                return name
        raise DataError(
            f"{where} names the chromosome {chrom!r}, which is unknown; the nearest of the {len(self.contigs)} names "
            f"are {near_names(chrom, self.contigs)}. Pass `chrom_map` to rename it, or the genome it belongs to."
        )


def _lines(path: str | PathLike[str]) -> Iterator[tuple[int, str]]:
    with open_binary(path) as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                line = raw.decode("utf-8-sig").strip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"Line {number} of {path} is no text ({error.reason}); it is not a BED file."
                ) from error
            if line.strip():
                yield number, line


def _fields(line: str) -> list[str]:
    return [field.strip() for field in line.split("\t")] if "\t" in line else line.split()


def _is_comment(line: str) -> bool:
    return line.startswith("#") or line.split()[0] in _NOT_ROWS


def _header(line: str, started: bool) -> tuple[str, ...]:
    """The column names if `line` is a header, else ()."""
    fields = _fields(line.lstrip("#").strip())
    if started or len(fields) < 3 or line.split()[0] in _NOT_ROWS[1:]:
        return ()
    is_header = [field.lower() for field in fields[1:3]] in (
        ["start", "end"], ["chromstart", "chromend"], ["start", "stop"], ["begin", "end"],
    )  # fmt: skip
    return tuple(fields) if is_header else ()


def _row(
    line: str, where: str, chrom_map: Mapping[str, str], known: _Names | None
) -> tuple[Interval, tuple[str, ...]]:
    fields = _fields(line)
    if len(fields) < 3:
        raise DataError(f"{where} must hold chrom, start and end, but has {len(fields)} columns: {line!r}.")
    chrom = chrom_map.get(fields[0], fields[0])
    try:
        start, end = int(fields[1]), int(fields[2])
    except ValueError:
        raise DataError(f"{where} must hold whole numbers in columns 2 and 3, was {line!r}.") from None
    if end <= start:
        raise DataError(f"{where}: `end` ({end}) must be larger than `start` ({start}); swap or remove them.")
    strand = fields[5] if len(fields) > 5 and fields[5] in ("+", "-") else "+"
    try:
        interval = Interval(chrom if known is None else known.resolve(chrom, where), start, end, strand)
    except DataError as error:
        raise error if str(error).startswith(where) else DataError(f"{where}: {error}") from None
    return interval, tuple(fields[3:])
