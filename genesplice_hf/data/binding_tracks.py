"""Binding as tracks: coverage of ChIP experiments (bigWig) along windows, with the factor and cell of each.

The annotation is that of ChIP-Atlas: tab-separated, no header, columns accession (the bigWig is `accession.bw`),
assembly, antigen class, antigen, cell class, cell type, and whatever follows. bigWig files need pyBigWig, which is
imported when the first one is opened. T bins, E experiments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from genesplice_hf.data.bed import BedTable, read_bed
from genesplice_hf.data.bigwig import BigWig, bin_coverage, count_bins
from genesplice_hf.data.fasta import Genome
from genesplice_hf.data.files import existing_file
from genesplice_hf.data.target_table import Target
from genesplice_hf.data.track_windows import Window, centred, window_letters
from genesplice_hf.errors import DataError

_SUFFIXES = (".bw", ".bigWig", ".bigwig")


class Experiment(NamedTuple):
    """One bigWig file: its accession and assembly, the factor (upper case) and the cell it was measured in."""

    accession: str
    assembly: str
    target: str
    cell: str


@dataclass(frozen=True)
class TrackWindows:
    """How loci become windows and coverage becomes bins.

    Attributes:
        context_length: bases of a window, a multiple of `pool_width`; a locus is widened or cropped around its centre.
        target_length: bins in the middle of a window that are predicted; None = all.
        pool_width: bases of a bin.
        pool: `"sum"` or `"mean"` of the bases of a bin; bases without a value count as 0.
        margin: bases beyond the window on either side, at least the largest shift of the collator.
    """

    context_length: int = 4096
    target_length: int | None = None
    pool_width: int = 128
    pool: Literal["sum", "mean"] = "sum"
    margin: int = 0

    def __post_init__(self) -> None:
        if self.pool not in ("sum", "mean"):
            raise DataError(f"`pool` must be 'sum' or 'mean', was {self.pool!r}.")
        if self.margin < 0:
            raise DataError(f"`margin` must be 0 or more, was {self.margin}.")
        bins = count_bins(self.context_length, self.pool_width, 0)
        if self.target_length is not None and not 1 <= self.target_length <= bins:
            raise DataError(
                f"`target_length` ({self.target_length}) must lie in 1..{bins}, the bins of `context_length` "
                f"({self.context_length}) / `pool_width` ({self.pool_width})."
            )


def read_annotation(path: str | PathLike[str], cell_column: int = 6) -> list[Experiment]:
    """Reads an annotation of experiments in the columns of ChIP-Atlas.

    Args:
        path: the table.
        cell_column: column of the context, counted from 1: 6 is the cell type, 5 the cell class.

    Raises:
        DataError: a line has too few columns or no accession, an accession stands twice, or there is none.
    """
    if cell_column < 5:
        raise DataError(f"`cell_column` counts from 1 and must be 5 or more, was {cell_column}.")
    found: dict[str, Experiment] = {}
    lines = existing_file(path).read_text(encoding="utf-8-sig").splitlines()
    for number, line in enumerate(lines, start=1):
        fields = [field.strip() for field in line.split("\t")]
        if not line.strip():
            continue
        if len(fields) < max(4, cell_column) or not fields[0]:
            raise DataError(f"{path}, line {number}: {cell_column} columns are needed, this line has {len(fields)}.")
        if fields[0] in found:
            raise DataError(f"{path}, line {number}: {fields[0]!r} stands twice; keep one.")
        found[fields[0]] = Experiment(fields[0], fields[1], fields[3].upper(), fields[cell_column - 1])
    if not found:
        raise DataError(f"{path} holds no experiment.")
    return list(found.values())


class TFBindTrackDataset:
    """Rows (locus, experiment) of a map-style dataset; the experiments of a locus follow each other.

    A row is a dict: `sequence` (text, with `margin` more bases on either side), `chrom`, `start`, `end`, `factor`,
    `cell`, `experiment`, `label` float32 (T,), `margin`. With `all_experiments` a row is a locus, with `factors`,
    `cells`, `experiments` (E each) and `label` (E, T).

    Args:
        loci: BED file (or table) of windows; for several assemblies a mapping from their names.
        genomes: the genome, or a mapping with the same names.
        folder: of the bigWig files.
        annotation: experiments, from `read_annotation`; with a mapping, those of its assemblies are used.
        windows: lengths, bins and pooling.
        all_experiments: see above.

    Raises:
        ImportError: pyBigWig is not installed.
        DataError: a file is absent (all are named) or no bigWig, a contig is unknown to genome or bigWig, or no
            experiment is of the assemblies.
    """

    def __init__(
        self,
        loci: str | PathLike[str] | BedTable | Mapping[str, str | PathLike[str] | BedTable],
        genomes: Genome | Mapping[str, Genome],
        folder: str | PathLike[str],
        annotation: Sequence[Experiment],
        windows: TrackWindows | None = None,
        all_experiments: bool = False,
    ) -> None:
        self.windows, self.all_experiments = windows or TrackWindows(), all_experiments
        self._genomes = genomes if isinstance(genomes, Mapping) else {"": genomes}
        tables = loci if isinstance(loci, Mapping) else {"": loci}
        if set(tables) != set(self._genomes):
            raise DataError(
                f"`loci` and `genomes` must name the same assemblies: {sorted(tables)}, {sorted(self._genomes)}."
            )
        self._loci = {name: _bed(table, self._genomes[name]) for name, table in tables.items()}
        self._experiments = {name: [one for one in annotation if name in ("", one.assembly)] for name in self._loci}
        chosen = [one for experiments in self._experiments.values() for one in experiments]
        if not all(self._experiments.values()):
            raise DataError(f"The annotation has no experiment of {sorted(self._loci)}; check its second column.")
        self._files = _open(Path(folder).expanduser(), chosen)
        for name, experiments in self._experiments.items():
            contigs = {interval.chrom: interval for interval in self._loci[name].intervals}
            for one in experiments:
                for interval in contigs.values():
                    self._files[one.accession].check(interval)
        self._sizes = [
            len(self._loci[name]) * (1 if all_experiments else len(self._experiments[name])) for name in self._loci
        ]

    def __len__(self) -> int:
        return sum(self._sizes)

    @property
    def experiments(self) -> list[Experiment]:
        """All experiments, in the order of their rows (or tracks)."""
        return [one for experiments in self._experiments.values() for one in experiments]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Row {index} of {len(self)}.")
        index %= len(self)
        for name, size in zip(self._loci, self._sizes, strict=True):
            if index < size:
                return self._row(name, index)
            index -= size
        raise IndexError(index)

    def _row(self, assembly: str, index: int) -> dict[str, Any]:
        experiments = self._experiments[assembly]
        locus, which = (index, None) if self.all_experiments else divmod(index, len(experiments))
        interval = self._loci[assembly].intervals[locus]
        window = Window(interval.chrom, *centred(interval.start, interval.end, self.windows.context_length))
        wide = Window(window.chrom, window.start - self.windows.margin, window.end + self.windows.margin)
        letters = window_letters(self._genomes[assembly], wide).tobytes().decode("ascii")
        row = {"sequence": letters, **window._asdict(), "margin": self.windows.margin}
        if which is None:
            return row | self._all_labels(experiments, window)
        one = experiments[which]
        label = self._label(one, window)
        return row | {"factor": one.target, "cell": one.cell, "experiment": one.accession, "label": label}

    def _all_labels(self, experiments: Sequence[Experiment], window: Window) -> dict[str, Any]:
        return {
            "factors": [one.target for one in experiments],
            "cells": [one.cell for one in experiments],
            "experiments": [one.accession for one in experiments],
            "label": np.stack([self._label(one, window) for one in experiments]),
        }

    def _label(self, experiment: Experiment, window: Window) -> np.ndarray:
        values = self._files[experiment.accession].values(*window)
        target = Target(experiment.accession, sum_stat=self.windows.pool)
        bins = bin_coverage(np.nan_to_num(values, nan=0.0), target, self.windows.pool_width)
        return centre_crop(bins, self.windows.target_length).astype(np.float32)


class TFBindTracksOnly(TFBindTrackDataset):
    """All experiments as tracks of one model without proteins: `label` is (T, E), and a row is a locus.

    Takes one assembly; the arguments are those of `TFBindTrackDataset` without `all_experiments`.
    """

    def __init__(
        self,
        loci: str | PathLike[str] | BedTable,
        genome: Genome,
        folder: str | PathLike[str],
        annotation: Sequence[Experiment],
        windows: TrackWindows | None = None,
    ) -> None:
        super().__init__(loci, genome, folder, annotation, windows, all_experiments=True)

    def _all_labels(self, experiments: Sequence[Experiment], window: Window) -> dict[str, Any]:
        return {"label": super()._all_labels(experiments, window)["label"].T}


def centre_crop(bins: np.ndarray, target_length: int | None) -> np.ndarray:
    """The `target_length` bins from `(n - target_length) // 2` on, of `n`; None = all."""
    if target_length is None:
        return bins
    if not 0 < target_length <= len(bins):
        raise DataError(f"`target_length` must lie in 1..{len(bins)}, the bins that there are, was {target_length}.")
    start = (len(bins) - target_length) // 2
    return bins[start : start + target_length]


def _bed(table: str | PathLike[str] | BedTable, genome: Genome) -> BedTable:
    return table if isinstance(table, BedTable) else read_bed(table, contigs=genome.contigs)


def _open(folder: Path, experiments: Sequence[Experiment]) -> dict[str, BigWig]:
    paths = {one.accession: [folder / f"{one.accession}{suffix}" for suffix in _SUFFIXES] for one in experiments}
    found = {name: next((path for path in choices if path.is_file()), None) for name, choices in paths.items()}
    absent = [name for name, path in found.items() if path is None]
    if absent:
        raise DataError(
            f"{folder} lacks {', '.join(f'{name}.bw' for name in absent[:5])} ({len(absent)} of {len(found)} files); "
            "download them, or take their lines out of the annotation."
        )
    return {name: BigWig(path) for name, path in found.items() if path is not None}
