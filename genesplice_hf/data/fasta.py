"""FASTA: bases by interval (`Genome`) or all records as rows (`read_fasta`); the package's only FASTA reader.

Coordinates are 0-based and half-open. Letters are kept as they stand in the file, soft-masking included.
"""

import logging
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pysam
from datasets import Dataset, Features, Value

from genesplice_hf.data.files import check_bgzip_end, existing_file, is_bgzip, is_gzip, nearest, open_binary
from genesplice_hf.errors import DataError
from genesplice_hf.genome.alphabet import IUPAC, reverse_complement
from genesplice_hf.genome.interval import contig_aliases

logger = logging.getLogger(__name__)

NUCLEOTIDES = "".join(IUPAC) + "U"
_BLANKS = b" \t\r\n\v\f"
_BLOCK_BYTES = 1 << 24


class Genome:
    """Bases of a FASTA file by interval.

    A plain or bgzip file with a current index beside it (`.fai`, and `.gzi` for bgzip) is read in place
    through pysam. Any other file is decoded once, at 1 byte per base: into an unnamed temporary file that
    is memory-mapped (`cache="mmap"`; `TMPDIR` says where, it vanishes with the object and is shared with
    forked workers), or into main memory (`cache="memory"`). Nothing is ever written beside the user's file
    unless `index=True` asks for it. Objects can be pickled; a spawned worker opens the file again.

    Args:
        path: plain, gzip or bgzip FASTA; what it is is told by its content, not by its suffix.
        cache: `"mmap"` or `"memory"`, where to decode a file without an index.
        index: write `.fai` (and `.gzi`) beside a plain or bgzip file that has no current one, then use it.

    Raises:
        DataError: the file is absent, cut off, has no header, an empty record, a name twice, or letters
            outside the IUPAC nucleotide codes. A file with an index is checked where it is read.
    """

    def __init__(
        self, path: str | PathLike[str], cache: Literal["mmap", "memory"] = "mmap", index: bool = False
    ) -> None:
        if cache not in ("mmap", "memory"):
            raise DataError(f"`cache` must be 'mmap' or 'memory', was {cache!r}.")
        self.path = existing_file(path)
        self._cache = cache
        self._reported: set[str] = set()
        if index and not _has_current_index(self.path):
            _write_index(self.path)
        indexed = _has_current_index(self.path)
        self._store: _Store = _IndexedContigs(self.path) if indexed else _DecodedContigs(self.path, cache)

    @property
    def contigs(self) -> Mapping[str, int]:
        """Name -> length in bases, in the order of the file."""
        return MappingProxyType(self._store.lengths)

    def array(self, chrom: str, start: int, end: int) -> np.ndarray:
        """Letters of `[start, end)` as ASCII codes: uint8 of shape `(end - start,)`, read-only, case kept.

        Raises:
            DataError: `chrom` is not in the file under any alias, or the interval leaves it.
        """
        name = self.locate(chrom, start, end)
        letters = self._store.read(name, start, end)
        letters.flags.writeable = False
        return letters

    def seq(self, chrom: str, start: int, end: int, strand: str = "+") -> str:
        """Letters of `[start, end)` as text, case kept; `strand="-"` gives the reverse complement.

        Raises:
            DataError: as `array`, or `strand` is neither `"+"` nor `"-"`.
        """
        if strand not in ("+", "-"):
            raise DataError(f"`strand` must be '+' or '-', was {strand!r}.")
        text = self.array(chrom, start, end).tobytes().decode("ascii")
        return text if strand == "+" else reverse_complement(text)

    def resolve(self, chrom: str) -> str:
        """Returns the file's own name of `chrom`: itself, or by the fixed alias rule (chr1 = 1, chrM = MT).

        Raises:
            DataError: the file has no such contig; the nearest name is suggested.
        """
        if chrom in self.contigs:
            return chrom
        for alias in contig_aliases(chrom):
            if alias in self.contigs:
                self._report_alias(chrom, alias)
                return alias
        raise DataError(
            f"`chrom` must be a contig of {self.path.name}, was {chrom!r}; "
            f"the nearest of its {len(self.contigs)} names is {nearest(chrom, self.contigs)!r}."
        )

    def locate(self, chrom: str, start: int, end: int) -> str:
        """Returns the file's own name of `chrom`; raises `DataError` unless `[start, end)` lies in it."""
        name = self.resolve(chrom)
        length = self.contigs[name]
        if not 0 <= start <= end <= length:
            raise DataError(
                f"The interval [{start}, {end}) must satisfy 0 <= `start` <= `end` <= {length}, "
                f"the length of {name!r} in {self.path.name}; coordinates are 0-based and half-open."
            )
        return name

    def _report_alias(self, chrom: str, alias: str) -> None:
        if chrom not in self._reported:
            self._reported.add(chrom)
            logger.info("%s: contig %r is read as %r.", self.path.name, chrom, alias)

    def __reduce__(self) -> tuple[type["Genome"], tuple[Path, str]]:
        return Genome, (self.path, self._cache)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Genome":
        # Nothing in it changes, and a second copy would decode the file again.
        return self

    def __repr__(self) -> str:
        return f"Genome({str(self.path)!r}: {len(self.contigs)} contigs, {sum(self.contigs.values())} bp)"


def read_fasta(path: str | PathLike[str], letters: str | None = NUCLEOTIDES) -> Dataset:
    """Reads every record of a FASTA file into memory, one row each, in the order of the file.

    Args:
        path: plain, gzip or bgzip FASTA.
        letters: the legal letters, either case; `None` takes all printable ASCII (for proteins).

    Returns:
        A dataset with columns `id` (first word of the header), `description` (the rest of it, may be
        empty) and `sequence` (case kept).

    Raises:
        DataError: as `Genome`.
    """
    rows = list(iter_fasta(path, letters))
    columns = {field: [getattr(row, field) for row in rows] for field in FastaRecord._fields}
    text = Value("string")
    features = Features({"id": text, "description": text, "sequence": Value("large_string")})
    return Dataset.from_dict(columns, features=features)


class FastaRecord(NamedTuple):
    """One record: `id` is the first word of the header, `description` the rest of it (may be empty)."""

    id: str
    description: str
    sequence: str


def iter_fasta(path: str | PathLike[str], letters: str | None = NUCLEOTIDES) -> Iterator[FastaRecord]:
    """Yields the records that `read_fasta` (same arguments, same errors) holds, without a dataset around them."""
    header: _Header | None = None
    parts: list[bytes] = []
    for following, part in _parts(path, letters):
        if following is not None:
            if header is not None:
                yield FastaRecord(*header, b"".join(parts).decode("ascii"))
            header, parts = following, []
        parts.append(part)
    if header is not None:
        yield FastaRecord(*header, b"".join(parts).decode("ascii"))


class _Store(Protocol):
    """Where the letters lie: lengths by contig name, and a read of an interval that is known to be legal."""

    lengths: dict[str, int]

    def read(self, name: str, start: int, end: int) -> np.ndarray: ...


class _DecodedContigs:
    """All letters of the file end to end, 1 byte per base, in main memory or a mapped temporary file."""

    def __init__(self, path: Path, cache: str) -> None:
        self.lengths: dict[str, int] = {}
        if cache == "memory":
            memory = bytearray()
            self._fill(path, memory.extend)
            self._letters = np.frombuffer(memory, dtype=np.uint8)
        else:
            with tempfile.TemporaryFile(prefix="genesplice-") as file:
                self._fill(path, file.write)
                file.flush()
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._letters = np.frombuffer(mapped, dtype=np.uint8)
        ends = np.cumsum(list(self.lengths.values())).tolist()
        self._offsets = dict(zip(self.lengths, [0, *ends], strict=False))

    def _fill(self, path: Path, write: Any) -> None:
        name = ""
        for header, part in _parts(path):
            if header is not None:
                name = header.name
                self.lengths[name] = 0
            self.lengths[name] += len(part)
            write(part)

    def read(self, name: str, start: int, end: int) -> np.ndarray:
        offset = self._offsets[name]
        return self._letters[offset + start : offset + end]


class _IndexedContigs:
    """A file with an index, read in place; every process and thread opens its own handle."""

    def __init__(self, path: Path) -> None:
        if is_bgzip(path):
            check_bgzip_end(path)
        self._path = path
        self._local = threading.local()
        handle = self._handle()
        self.lengths: dict[str, int] = dict(zip(handle.references, handle.lengths, strict=True))
        if not self.lengths:
            raise DataError(f"The index of {path} names no contig; delete it and pass `index=True`.")

    def _handle(self) -> pysam.FastaFile:
        # After a fork the parent's file position is shared, so a handle serves only the process that made it.
        if getattr(self._local, "pid", None) != os.getpid():
            try:
                self._local.handle = pysam.FastaFile(str(self._path))
            except (OSError, ValueError) as error:
                raise DataError(f"The index of {self._path} cannot be used ({error}); delete it.") from error
            self._local.pid = os.getpid()
        return self._local.handle

    def read(self, name: str, start: int, end: int) -> np.ndarray:
        try:
            text = self._handle().fetch(name, start, end).encode("latin-1") if end > start else b""
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self._path} cannot be read at 0-based {name}:{start}-{end} ({error}); "
                "delete the index and open the file again to have it checked."
            ) from error
        if len(text) != end - start or text.translate(None, _legal_bytes(NUCLEOTIDES)):
            raise DataError(
                f"{self._path} and its index disagree, or the file holds illegal letters, at 0-based "
                f"{name}:{start}-{end}; delete the index and open the file again to have it checked."
            )
        return np.frombuffer(text, dtype=np.uint8)


def _index_files(path: Path) -> list[Path]:
    suffixes = (".fai", ".gzi") if is_bgzip(path) else (".fai",)
    return [path.with_name(path.name + suffix) for suffix in suffixes]


def _has_current_index(path: Path) -> bool:
    files = _index_files(path)
    # pysam would write what is missing beside the file, so an incomplete set counts as none.
    if not all(file.exists() for file in files) or (is_gzip(path) and not is_bgzip(path)):
        return False
    stale = [file.name for file in files if file.stat().st_mtime < path.stat().st_mtime]
    if stale:
        logger.warning("%s is older than %s and is not used; pass `index=True` to renew it.", stale[0], path)
    return not stale


def _write_index(path: Path) -> None:
    if is_gzip(path) and not is_bgzip(path):
        raise DataError(f"`index=True` needs a plain or bgzip file, but {path} is gzip; recompress it with bgzip.")
    # One full pass, so that names which stand twice and illegal letters are told before an index hides them.
    for _ in _parts(path):
        pass
    try:
        pysam.faidx(str(path))
    except (OSError, pysam.SamtoolsError) as error:
        raise DataError(f"No index can be written beside {path} ({error}); pass `index=False`.") from error


class _Header(NamedTuple):
    name: str
    description: str


def _parts(path: str | PathLike[str], letters: str | None = NUCLEOTIDES) -> Iterator[tuple[_Header | None, bytes]]:
    """Yields `(header, letters)` where a record starts and `(None, letters)` where it goes on, checked."""
    check = _RecordCheck(Path(path), letters)
    with open_binary(path) as stream:
        while block := stream.read(_BLOCK_BYTES):
            # Whole lines only: a header must not be cut in two.
            first, *records = (b"\n" + block + stream.readline()).split(b"\n>")
            if rest := first.translate(None, _BLANKS):
                yield None, check.goes_on(rest)
            for record in records:
                line, _, rest = record.partition(b"\n")
                header = check.starts(line)
                yield header, check.goes_on(rest.translate(None, _BLANKS))
    check.ends()


class _RecordCheck:
    """What a FASTA file must keep to: a header first, names once, letters after each header, legal ones."""

    def __init__(self, path: Path, letters: str | None) -> None:
        self.path = path
        self.legal = _legal_bytes(letters)
        self.seen: set[str] = set()
        self.name = ""
        self.length = 0

    def starts(self, line: bytes) -> _Header:
        self.ends_record()
        self.name, description, *_ = [*line.decode("utf-8", "replace").split(maxsplit=1), "", ""]
        self.length = 0
        if not self.name:
            raise DataError(f"Record {len(self.seen) + 1} of {self.path} has no name after its `>`; name it.")
        if self.name in self.seen:
            raise DataError(f"{self.path} holds the name {self.name!r} twice; rename or remove one of the records.")
        self.seen.add(self.name)
        return _Header(self.name, description.strip())

    def goes_on(self, part: bytes) -> bytes:
        if not self.seen and part:
            raise DataError(f"{self.path} has no `>` header before its first letters; it is cut off or not FASTA.")
        if bad := part.translate(None, self.legal):
            letter, position = chr(bad[0]), self.length + part.index(bad[:1]) + 1
            raise DataError(
                f"{self.path}: {self.name!r} holds {letter!r} at base {position} (counted from 1); "
                "correct the file; in DNA and RNA the IUPAC codes are legal, and N is the unknown base."
            )
        self.length += len(part)
        return part

    def ends_record(self) -> None:
        if self.seen and not self.length:
            raise DataError(f"{self.path}: the header {self.name!r} has no sequence after it; the file is cut off.")

    def ends(self) -> None:
        if not self.seen:
            raise DataError(f"{self.path} holds no FASTA record; it is empty.")
        self.ends_record()


def _legal_bytes(letters: str | None) -> bytes:
    """Returns the legal codes: `letters` in either case, or every printable ASCII character for `None`."""
    return bytes(range(33, 127)) if letters is None else (letters.upper() + letters.lower()).encode("ascii")
