"""A stretch of a contig: coordinates are 0-based and half-open (`start` counts from 0, `end` is not in it).

The two ways in which files write coordinates each have their own constructor, so that the conversion
stands here and nowhere else: `Interval.parse` for UCSC text (1-based, inclusive), `Interval.from_bed`
and `Interval.from_bed_line` for BED (0-based, half-open).
"""

import operator
import re
from dataclasses import dataclass

from genesplice_hf.errors import DataError

_UCSC = re.compile(r"(?P<chrom>\S+):(?P<first>[\d,]+)-(?P<last>[\d,]+)")

# Names of the one mitochondrial contig (UCSC, Ensembl, others), in the order in which they are tried.
_MITOCHONDRIAL = ("chrM", "MT", "M", "chrMT")


@dataclass(frozen=True, order=True)
class Interval:
    """Bases `start` to `end - 1` of `chrom`, counted from 0, read along `strand`.

    Args:
        chrom: contig name, not empty.
        start: first base, 0-based, >= 0.
        end: one past the last base, > `start`.
        strand: `"+"` or `"-"`.

    Raises:
        DataError: a field is outside these limits.
    """

    chrom: str
    start: int
    end: int
    strand: str = "+"

    def __post_init__(self) -> None:
        if not isinstance(self.chrom, str) or not self.chrom:
            raise DataError(f"`chrom` must be a contig name, was {self.chrom!r}.")
        for field in ("start", "end"):
            object.__setattr__(self, field, _whole(field, getattr(self, field)))
        if self.start < 0:
            raise DataError(f"`start` must be 0 or more, was {self.start}; coordinates count from 0.")
        if self.end <= self.start:
            raise DataError(f"`end` ({self.end}) must be larger than `start` ({self.start}); it is exclusive.")
        if self.strand not in ("+", "-"):
            raise DataError(f"`strand` must be '+' or '-', was {self.strand!r}.")

    @classmethod
    def parse(cls, text: str, strand: str = "+") -> "Interval":
        """Reads `"chr1:100-200"`: 1-based, both ends included, commas in numbers allowed (UCSC, samtools).

        Raises:
            DataError: the text has another form, or counts from 0.
        """
        match = _UCSC.fullmatch(text.strip())
        if match is None:
            raise DataError(f"`text` must look like 'chr1:100-200' (1-based, both ends included), was {text!r}.")
        first, last = (int(match[part].replace(",", "") or 0) for part in ("first", "last"))
        if first < 1:
            raise DataError(f"{text!r} starts at {first}, but this form counts from 1; use `from_bed` for BED.")
        return cls(match["chrom"], first - 1, last, strand)

    @classmethod
    def from_bed(cls, chrom: str, start: int, end: int, strand: str = ".") -> "Interval":
        """Takes BED fields: 0-based, half-open; strand `"."` (not known) is read as `"+"`."""
        return cls(chrom, start, end, "+" if strand == "." else strand)

    @classmethod
    def from_bed_line(cls, line: str) -> "Interval":
        """Reads one BED line (3 columns or more, strand in the sixth).

        Raises:
            DataError: fewer than three columns, or columns two and three are not whole numbers.
        """
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) < 3:
            raise DataError(f"A BED line needs chrom, start and end; this one has {len(fields)} columns: {line!r}.")
        try:
            start, end = int(fields[1]), int(fields[2])
        except ValueError as error:
            raise DataError(f"Columns 2 and 3 of a BED line must be whole numbers, was {line!r}.") from error
        return cls.from_bed(fields[0], start, end, fields[5].strip() if len(fields) > 5 else ".")

    @property
    def length_bp(self) -> int:
        """Number of bases."""
        return self.end - self.start

    def overlaps(self, other: "Interval") -> bool:
        """Whether both hold at least one common base, on whichever strand."""
        return self.chrom == other.chrom and self.start < other.end and other.start < self.end

    def __str__(self) -> str:
        """UCSC text (1-based, inclusive), which `parse` reads back; the strand is not in it."""
        return f"{self.chrom}:{self.start + 1}-{self.end}"


def contig_aliases(chrom: str) -> tuple[str, ...]:
    """Names under which another file may hold the contig `chrom`, in the order in which to try them.

    The rule is fixed: `chr1` = `1` for any name, and `chrM` = `MT` = `M` = `chrMT`.
    """
    if chrom in _MITOCHONDRIAL:
        return tuple(name for name in _MITOCHONDRIAL if name != chrom)
    return (chrom.removeprefix("chr"),) if chrom.startswith("chr") else (f"chr{chrom}",)


def _whole(field: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise DataError(f"`{field}` must be a whole number of bases, was {value!r}.") from error
