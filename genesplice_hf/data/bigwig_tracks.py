"""Targets from the bigWig files of a table of tracks: window by window, or all at once into a `.npy` file.

Shapes: N windows, M bins, T tracks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from genesplice_hf.data.bed import BedTable
from genesplice_hf.data.bigwig import BigWig, bin_coverage, clip_extremes, count_bins
from genesplice_hf.data.target_table import Target, TargetTable
from genesplice_hf.data.track_sources import StoredExample
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval, contig_aliases


@dataclass(frozen=True)
class CoverageOptions:
    """How coverage becomes targets, beside what the table of tracks says for each.

    Attributes:
        pool_width: bases of a bin.
        crop_bp: bases cut off on either side of a window; Enformer's 131,072 bp windows lose 8,192.
        interp_nan: fill gaps by straight lines.
        blacklist: regions whose coverage is not trusted, or None.
        blacklist_buffer_bp: bases added to both sides of these (Basenji's writer adds 20).
        folder: where relative paths of the table begin; None = the working directory.
    """

    pool_width: int = 128
    crop_bp: int = 0
    interp_nan: bool = False
    blacklist: BedTable | None = None
    blacklist_buffer_bp: int = 0
    folder: str | PathLike[str] | None = None


class BigWigSource:
    """Targets of each window of a BED, from one bigWig per track; the sequences come from a FASTA file.

    The clip of a track to its extreme quantile needs all windows at once: `write_targets` does it.

    Args:
        targets: the tracks, with the paths of their files.
        bed: the windows, all of one length.
        options: bins, crop and blacklist.

    Raises:
        ImportError: pyBigWig is not installed.
        DataError: windows of different length or no multiple of `pool_width`; a file is absent or no bigWig, or has
            no contig that a window names.
    """

    def __init__(self, targets: TargetTable, bed: BedTable, options: CoverageOptions | None = None) -> None:
        self.options = options or CoverageOptions()
        self.name = f"{len(targets)} bigWig files"
        self.intervals = bed.intervals
        self.sequence_length = None
        self.num_bins, self.num_tracks = _bins_of(bed, self.options), len(targets)
        self.groups = [range(index, index + 1) for index in range(len(bed))]
        self._targets = targets.targets
        self._files = [BigWig(_path(target, self.options.folder)) for target in self._targets]
        for file in self._files:
            for interval in {interval.chrom: interval for interval in reversed(bed.intervals)}.values():
                file.check(interval)
        self._blacklist = _by_contig(self.options.blacklist, self.options.blacklist_buffer_bp)

    def __len__(self) -> int:
        return len(self.intervals)

    def read(self, index: int) -> StoredExample:
        columns = [self.read_track(index, track) for track in range(self.num_tracks)]
        return StoredExample(None, np.stack(columns, axis=1))

    def read_track(self, index: int, track: int) -> np.ndarray:
        """Targets of one window and one track, float16 (M,)."""
        window, options = self.intervals[index], self.options
        values = self._files[track].values(window.chrom, window.start, window.end)
        holes = [(low - window.start, high - window.start) for low, high in self._holes(window)]
        return bin_coverage(
            values, self._targets[track], options.pool_width, options.crop_bp, holes, options.interp_nan
        )

    def _holes(self, window: Interval) -> list[tuple[int, int]]:
        names = (window.chrom, *contig_aliases(window.chrom))
        regions = next((self._blacklist[name] for name in names if name in self._blacklist), [])
        return [(low, high) for low, high in regions if low < window.end and window.start < high]


def write_targets(
    path: str | PathLike[str],
    targets: TargetTable,
    bed: BedTable,
    options: CoverageOptions | None = None,
    clip_pct: float | None = 0.9999999,
) -> Path:
    """Writes the targets of all windows into a `.npy` file, float16 (N, M, T), for `TrackDataset.from_memmap`.

    Args:
        path: the file to write; its folder must exist.
        targets: the tracks, with the paths of their files.
        bed: the windows.
        options: bins, crop and blacklist.
        clip_pct: each track is clipped to +- this quantile of its values in all windows; None = not.

    Raises:
        ImportError, DataError: as `BigWigSource`.
    """
    source = BigWigSource(targets, bed, options)
    shape = len(source), source.num_bins, source.num_tracks
    file = Path(path).expanduser()
    written = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
    for track in range(source.num_tracks):
        values = np.stack([source.read_track(index, track) for index in range(len(source))])
        written[..., track] = values if clip_pct is None else clip_extremes(values, clip_pct)
    written.flush()
    return file


def _path(target: Target, folder: str | PathLike[str] | None) -> Path:
    if not target.file:
        raise DataError(f"`file` of the track {target.identifier!r} is empty in the table; enter its bigWig file.")
    return Path(folder or "").expanduser() / target.file


def _bins_of(bed: BedTable, options: CoverageOptions) -> int:
    length = bed.intervals[0].length_bp
    for line, interval in zip(bed.lines, bed.intervals, strict=True):
        if interval.length_bp != length:
            raise DataError(
                f"Line {line} of {bed.path}: the intervals must be of one length, but this one has "
                f"{interval.length_bp} bp and the first {length}."
            )
    return count_bins(length, options.pool_width, options.crop_bp)


def _by_contig(blacklist: BedTable | None, buffer_bp: int) -> dict[str, Sequence[tuple[int, int]]]:
    regions: dict[str, list[tuple[int, int]]] = {}
    for part in () if blacklist is None else blacklist.intervals:
        regions.setdefault(part.chrom, []).append((part.start - buffer_bp, part.end + buffer_bp))
    return dict(regions)
