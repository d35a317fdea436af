"""Binding peaks as columns of at most 20 bytes a row: reading, filtering, caching, windows.

`read_peaks` streams a file of any size block by block; with `cache` the columns are memory-mapped from a folder
and the text is read once. Coordinates are 0-based and half-open.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from genesplice_hf.data.files import existing_file, nearest, open_binary
from genesplice_hf.data.peak_formats import (
    FORMATS,
    Block,
    Dataset,
    Lines,
    Names,
    PeakFormat,
    chromosome_key,
    parse_block,
)
from genesplice_hf.errors import DataError

logger = logging.getLogger(__name__)

HUMAN_CHROMOSOMES = (*range(1, 23), "X")
MOUSE_CHROMOSOMES = (*range(1, 20), "X")
# Row code = data set * 2 ** bits + chromosome: 1,024 contigs and 4 million data sets in 4 bytes.
_CHROM_BITS = 10
_BLOCK_BYTES = 1 << 22
_COLUMNS = {"start": np.int32, "end": np.int32, "summit": np.int32, "value": np.float32, "code": np.uint32}
_CACHE_VERSION = 1


@dataclass(frozen=True)
class Peaks:
    """Peaks of many data sets; every column has one entry per row.

    Attributes:
        start, end, summit: int32, 0-based; the summit is the midpoint where the file has none.
        value: float32, the column that was asked for; NaN where the file has none.
        code: uint32, data set and chromosome in one.
        chroms: names by chromosome code, as the file writes them.
        datasets: experiment, target and cell by data set code.
        skipped: faulty lines that `on_error="skip"` left out.
    """

    start: np.ndarray
    end: np.ndarray
    summit: np.ndarray
    value: np.ndarray
    code: np.ndarray
    chroms: tuple[str, ...]
    datasets: tuple[Dataset, ...]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.start)

    @property
    def chrom_codes(self) -> np.ndarray:
        """(N,) index into `chroms`."""
        return self.code & np.uint32((1 << _CHROM_BITS) - 1)

    @property
    def dataset_codes(self) -> np.ndarray:
        """(N,) index into `datasets`."""
        return self.code >> np.uint32(_CHROM_BITS)

    @property
    def bytes_per_row(self) -> int:
        """Bytes that the columns take per row."""
        return sum(getattr(self, name).dtype.itemsize for name in _COLUMNS)

    def dataset(self, row: int) -> Dataset:
        """Experiment, target and cell of a row."""
        return self.datasets[int(self.code[row]) >> _CHROM_BITS]

    def chrom(self, row: int) -> str:
        """Chromosome of a row, as the file writes it."""
        return self.chroms[int(self.code[row]) & ((1 << _CHROM_BITS) - 1)]

    @cached_property
    def present(self) -> tuple[int, ...]:
        """Codes of the data sets that have a row."""
        return tuple(np.flatnonzero(np.bincount(self.dataset_codes, minlength=len(self.datasets))).tolist())

    def rows(self, chosen: np.ndarray) -> "Peaks":
        """The peaks that a mask or an index array chooses; names keep their codes."""
        columns = {name: getattr(self, name)[chosen] for name in _COLUMNS}
        return Peaks(**columns, chroms=self.chroms, datasets=self.datasets, skipped=self.skipped)

    def joined(self, other: "Peaks") -> "Peaks":
        """The rows of both, of two parts of the same peaks (their names have the same codes).

        Raises:
            DataError: the two come from different files.
        """
        if (self.chroms, self.datasets) != (other.chroms, other.datasets):
            raise DataError("`other` must be a part of the same peaks; read all files of a task together, then split.")
        columns = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in _COLUMNS}
        return Peaks(**columns, chroms=self.chroms, datasets=self.datasets, skipped=self.skipped)

    def filter(
        self,
        chromosomes: Sequence[object] | None = None,
        targets: Sequence[str] | None = None,
        exclude_targets: Sequence[str] = (),
        cells: Sequence[str] | None = None,
        exclude_cells: Sequence[str] = (),
        usable: Callable[[str], bool] | None = None,
        fraction: float = 1.0,
        seed: int = 0,
    ) -> "Peaks":
        """Keeps the rows that meet every condition, in their order.

        Args:
            chromosomes: to keep, as numbers or names with or without `chr`.
            targets, exclude_targets: targets to keep, to leave out.
            cells, exclude_cells: cell types to keep, to leave out.
            usable: whether a target can be used, such as `ProteinStore.has`; the number of rows that this
                costs is logged.
            fraction: random share of what is left.
            seed: of that choice.

        Raises:
            DataError: a name stands nowhere in the peaks, or `fraction` is not in (0, 1].
        """
        if not 0 < fraction <= 1:
            raise DataError(f"`fraction` must lie in (0, 1], was {fraction}.")
        keep = self._keep_datasets(targets, exclude_targets, cells, exclude_cells)[self.dataset_codes]
        if chromosomes is not None:
            keep &= self.on_chromosomes(chromosomes)
        if usable is not None:
            has = {target: usable(target) for target in {self.datasets[code].target for code in self.present}}
            fine = np.array([has.get(dataset.target, False) for dataset in self.datasets], dtype=bool)
            logger.info(
                "%d rows of %d factors have no protein.",
                (~fine[self.dataset_codes]).sum(),
                sum(not one for one in has.values()),
            )
            keep &= fine[self.dataset_codes]
        chosen = np.flatnonzero(keep)
        if fraction < 1:
            count = round(fraction * len(chosen))
            chosen = np.sort(np.random.default_rng(seed).permutation(chosen)[:count])
        return self.rows(chosen)

    def on_chromosomes(self, chromosomes: Sequence[object]) -> np.ndarray:
        """(N,) bool: whether a row lies on one of these, as numbers or names with or without `chr`."""
        keys = [chromosome_key(name) for name in self.chroms]
        for name in chromosomes:
            if chromosome_key(name) not in keys:
                raise DataError(f"`chromosomes` names {name!r}, but the peaks lie on {', '.join(self.chroms)}.")
        wanted = {chromosome_key(name) for name in chromosomes}
        return np.array([key in wanted for key in keys], dtype=bool)[self.chrom_codes]

    def _keep_datasets(self, targets, exclude_targets, cells, exclude_cells) -> np.ndarray:
        keep = np.ones(len(self.datasets), dtype=bool)
        for field, wanted, unwanted in (("target", targets, exclude_targets), ("cell", cells, exclude_cells)):
            names = [getattr(dataset, field) for dataset in self.datasets]
            for name in (*(wanted or ()), *unwanted):
                if name not in names:
                    raise DataError(f"No peak has the {field} {name!r}; the nearest is {nearest(name, set(names))!r}.")
            keep &= np.array([(wanted is None or name in wanted) and name not in unwanted for name in names])
        return keep

    def windows(self, length: int, center: Literal["summit", "midpoint"] = "summit") -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends (N,) int64 of windows of `length` bp around the peaks; they may leave the chromosome."""
        if center not in ("summit", "midpoint"):
            raise DataError(f"`center` must be 'summit' or 'midpoint', was {center!r}.")
        if length < 1:
            raise DataError(f"`length` must be 1 or more, was {length}.")
        middle = self.summit if center == "summit" else (self.start.astype(np.int64) + self.end) // 2
        starts = middle.astype(np.int64) - length // 2
        return starts, starts + length


def read_peaks(
    path: str | PathLike[str],
    kind: Literal["remap", "crm", "bed", "narrowpeak", "broadpeak", "macs"] = "remap",
    target: str | None = None,
    cell: str | None = None,
    experiment: str = "",
    chromosomes: Sequence[object] | None = HUMAN_CHROMOSOMES,
    value_column: str | int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    cache: str | PathLike[str] | None = None,
) -> Peaks:
    """Reads a peak file, plain or gzip; lines of `#`, `track` and `browser`, and blank ones, are passed over.

    Args:
        path: the file.
        kind: `"remap"` names rows EXPERIMENT.TARGET.CELL, `"crm"` lists targets and gives a row for each;
            the others hold one data set: `"bed"`, `"narrowpeak"`, `"broadpeak"`, `"macs"` (the 1-based .xls).
        target, cell, experiment: of a file that holds one data set.
        chromosomes: to keep, as numbers or names with or without `chr`; None keeps all.
        value_column: name or number (from 1) of the column for `value`; by default the score of BED, the
            signal of narrowPeak and broadPeak, the fold enrichment of MACS.
        on_error: `"skip"` leaves faulty lines out, counts and logs them.
        cache: folder for memory-mapped columns, keyed by path, size, time and options; the file is then read once.

    Raises:
        DataError: the file is absent, cut off or holds no peak; a line is faulty (file and line are named);
            an option does not fit the format.
    """
    file = existing_file(path)
    if kind not in FORMATS:
        raise DataError(f"`kind` must be one of {', '.join(FORMATS)}, was {kind!r}.")
    if on_error not in ("raise", "skip"):
        raise DataError(f"`on_error` must be 'raise' or 'skip', was {on_error!r}.")
    given = _given(FORMATS[kind], kind, target, cell, experiment)
    value = _value_column(FORMATS[kind], value_column)
    wanted = None if chromosomes is None else sorted({chromosome_key(name) for name in chromosomes})

    def parse(folder: Path) -> Peaks:
        return _parse(file, FORMATS[kind], given, value, wanted, on_error == "skip", folder)

    if cache is None:
        with tempfile.TemporaryDirectory(prefix="genesplice-") as folder:
            return parse(Path(folder))
    facts = [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns, kind, given, value, wanted, on_error]
    key = hashlib.sha256(json.dumps([_CACHE_VERSION, *facts]).encode()).hexdigest()[:32]
    return _cached(Path(cache).expanduser() / key, parse)


def _given(kind: PeakFormat, name: str, target: str | None, cell: str | None, experiment: str) -> Dataset | None:
    if kind.name:
        if target is not None or cell is not None:
            raise DataError(f"`target` and `cell` must not be given for {name!r}: its rows name them.")
        return None
    if target is None:
        raise DataError(f"`target` must be given for {name!r}: its rows do not name it.")
    return Dataset(experiment, target, cell or "")


def _value_column(kind: PeakFormat, asked: str | int | None) -> int:
    if asked is None:
        return kind.value
    if isinstance(asked, int):
        if asked < 4:
            raise DataError(f"`value_column` counts from 1 and must be 4 or more, was {asked}.")
        return asked
    if asked not in kind.columns:
        raise DataError(f"`value_column` must be a number or one of {', '.join(kind.columns[4:])}, was {asked!r}.")
    return kind.columns.index(asked) + 1


def _parse(
    file: Path,
    kind: PeakFormat,
    given: Dataset | None,
    value: int,
    wanted: Sequence[str] | None,
    skip: bool,
    folder: Path,
) -> Peaks:
    """Streams the text into raw column files of `folder`, and returns the columns in memory."""
    names, lines = Names(kind, wanted, given), Lines(file, skip)
    bad = elsewhere = 0
    streams: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in _COLUMNS}
    try:
        with open_binary(file) as text:
            while block := text.read(_BLOCK_BYTES):
                parsed = parse_block(block + text.readline(), kind, value, names, lines)
                bad, elsewhere = bad + parsed.bad, elsewhere + parsed.elsewhere
                _append(streams, parsed, names, file)
    finally:
        for stream in streams.values():
            stream.close()
    for count, why in ((bad, "faulty lines"), (elsewhere, "lines on other chromosomes")):
        if count:
            logger.info("%s: %d %s are left out.", file, count, why)
    columns = {name: np.fromfile(folder / name, dtype=dtype) for name, dtype in _COLUMNS.items()}
    if not len(columns["start"]):
        raise DataError(
            f"{file} holds no peak{f' on the chromosomes {wanted}' if elsewhere else ''}; check `chromosomes`."
        )
    return Peaks(**columns, chroms=tuple(names.chroms), datasets=tuple(names.datasets), skipped=bad)


def _append(streams: dict[str, BinaryIO], block: Block, names: Names, file: Path) -> None:
    if len(names.chroms) > 1 << _CHROM_BITS or len(names.datasets) > 1 << (32 - _CHROM_BITS):
        raise DataError(f"{file} has more than {1 << _CHROM_BITS} contigs; say which ones to keep in `chromosomes`.")
    code = (block.dataset.astype(np.uint32) << np.uint32(_CHROM_BITS)) | block.chrom.astype(np.uint32)
    columns = {"start": block.start, "end": block.end, "summit": block.summit, "value": block.value, "code": code}
    for name, dtype in _COLUMNS.items():
        streams[name].write(columns[name].astype(dtype).tobytes())


def _cached(folder: Path, parse: Callable[[Path], Peaks]) -> Peaks:
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete, so that two processes or an interruption never leave half a cache.
        written = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
        try:
            peaks = parse(written)
            facts = {"chroms": peaks.chroms, "datasets": peaks.datasets, "skipped": peaks.skipped}
            (written / "names.json").write_text(json.dumps(facts), encoding="utf-8")
            del peaks
            _rename(written, folder)
        finally:
            shutil.rmtree(written, ignore_errors=True)
    facts = json.loads((folder / "names.json").read_text(encoding="utf-8"))
    columns = {name: np.memmap(folder / name, dtype=dtype, mode="r") for name, dtype in _COLUMNS.items()}
    datasets = tuple(Dataset(*names) for names in facts["datasets"])
    return Peaks(**columns, chroms=tuple(facts["chroms"]), datasets=datasets, skipped=facts["skipped"])


def _rename(written: Path, folder: Path) -> None:
    try:
        os.rename(written, folder)
    except OSError:
        # Another process was faster; its cache has the same content.
        if not folder.is_dir():
            raise
