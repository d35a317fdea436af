"""Sequence -> tracks as a map-style dataset, and the collator that shifts and reverse-complements both together.

Ids are those of the Enformer vocabulary (A, C, G, T = 0 to 3, N = 4, padding = 5). Targets cover the centre of the
window, `bins` equal stretches from left to right.

Shapes: B batch, L bases, M bins, T tracks.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from datasets import Array2D, Dataset, Features, IterableDataset, List, Value

from genesplice_hf.data.basenji import TfrecordSource
from genesplice_hf.data.bed import BedTable, read_bed
from genesplice_hf.data.bigwig_tracks import BigWigSource, CoverageOptions
from genesplice_hf.data.fasta import Genome
from genesplice_hf.data.target_table import TargetTable, check_track_indices, read_targets
from genesplice_hf.data.track_collation import TrackCollator as TrackCollator
from genesplice_hf.data.track_sources import MemmapSource, NpzSource, TrackSource
from genesplice_hf.data.track_windows import (
    OffChromosome,
    Window,
    centred,
    check_length,
    id_letters,
    pad_id,
    window_ids,
    window_text,
)
from genesplice_hf.errors import DataError

PathText = str | PathLike[str]


@dataclass(frozen=True)
class TrackOptions:
    """How the examples of a source become items.

    Attributes:
        context_length: bases of `input_ids`: the window is widened (needs the genome) or cropped around its
            centre, the targets stay. None = as stored, or as wide as the interval.
        target_length: keep this many bins in the centre; None = all.
        track_indices: keep these tracks, in this order; None = all.
        offchrom: what bases off the chromosome become: `"n"` (id 4) or `"pad"` (id 5).
        return_sequence: items also hold `sequence`, the letters of the window (as in the FASTA file, N off the
            chromosome; from stored ids where there is no genome).
        augment: items ask `TrackCollator` for a random shift and reverse complement. For training only.
    """

    context_length: int | None = None
    target_length: int | None = None
    track_indices: Sequence[int] | None = None
    offchrom: OffChromosome = "n"
    return_sequence: bool = False
    augment: bool = False


class TrackDataset(torch.utils.data.Dataset):
    """Items of `input_ids` uint8 (L,), `labels` float32 (M, T), `interval` (chrom, start, end) and `index`.

    `interval` is where `input_ids` come from, 0-based and half-open; it may leave the chromosome, and is None where
    the source does not know. NaN in `labels` marks bins without a value. With `options.return_sequence` an item
    also holds `sequence`, and with `options.augment` the key `augment`, the epoch of `set_epoch`, for `TrackCollator`.

    The usual doors are `from_npz`, `from_memmap`, `from_bigwig` and `from_tfrecords`. `Trainer` takes `interval` and
    `index` away before the collator sees them unless `TrainingArguments(remove_unused_columns=False)`.

    Args:
        source: where the examples lie.
        genome: where bases come from; needed if the source holds no sequences, or to widen the window. With a genome
            and known intervals the bases are always read from it.
        options: window, bins and tracks.
        targets: the table of all tracks of the source, or its path.
        bed: the table that the intervals come from, for splits by its columns.

    Raises:
        DataError: options that do not fit the source, another number of tracks than `targets` has, an unknown
            chromosome or one that an interval misses.
    """

    def __init__(
        self,
        source: TrackSource,
        genome: Genome | None = None,
        options: TrackOptions | None = None,
        targets: TargetTable | PathText | None = None,
        bed: BedTable | None = None,
    ) -> None:
        self.source, self.genome, self.bed = source, genome, bed
        self.options = options = options or TrackOptions()
        table = read_targets(targets) if isinstance(targets, (str, PathLike)) else targets
        if table is not None and len(table) != source.num_tracks:
            raise DataError(
                f"`targets` must list the {source.num_tracks} tracks of {source.name}, but lists {len(table)}."
            )
        self._tracks = None
        if options.track_indices is not None:
            self._tracks = check_track_indices(options.track_indices, source.num_tracks)
            table = None if table is None else table.select(self._tracks)
        self.targets = table
        self._check_lengths()
        self._check_places()
        self._rows = np.arange(len(source))
        # Shared, so that `set_epoch` also reaches the persistent workers of a `DataLoader`.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @classmethod
    def from_npz(
        cls,
        path: PathText,
        genome: Genome | None = None,
        options: TrackOptions | None = None,
        targets: TargetTable | PathText | None = None,
    ) -> "TrackDataset":
        """From `sequence` uint8 (N, L) and `target` (N, M, T) of a `.npz` file, held in main memory.

        Places come from its arrays `chrom`, `start` and `end`, or `coords`, where it has them.
        """
        return cls(NpzSource(path), genome, options, targets)

    @classmethod
    def from_memmap(
        cls,
        path: PathText,
        bed: PathText | BedTable,
        genome: Genome,
        options: TrackOptions | None = None,
        targets: TargetTable | PathText | None = None,
    ) -> "TrackDataset":
        """From targets (N, M, T) in a `.npy` file, a BED with the window of each row, and the genome's FASTA."""
        table = bed if isinstance(bed, BedTable) else read_bed(bed, contigs=genome.contigs)
        return cls(MemmapSource(path, table), genome, options, targets, table)

    @classmethod
    def from_bigwig(
        cls,
        targets: TargetTable | PathText,
        bed: PathText | BedTable,
        genome: Genome,
        options: TrackOptions | None = None,
        coverage: CoverageOptions | None = None,
    ) -> "TrackDataset":
        """From the bigWig file of each track, a BED of windows of one length, and the genome's FASTA.

        Coverage is read and binned window by window; `write_targets` of `data/bigwig_tracks.py` does it once for all,
        with the clip to extreme quantiles that needs all windows.
        """
        tracks = targets if isinstance(targets, TargetTable) else read_targets(targets)
        table = bed if isinstance(bed, BedTable) else read_bed(bed, contigs=genome.contigs)
        return cls(BigWigSource(tracks, table, coverage), genome, options, tracks, table)

    @classmethod
    def from_tfrecords(
        cls,
        folder: PathText,
        split: str,
        genome: Genome | None = None,
        options: TrackOptions | None = None,
        targets: TargetTable | PathText | None = None,
        mask_unmappable: bool = False,
        in_memory: bool = False,
    ) -> "TrackDataset":
        """From one split of a Basenji folder; the last two arguments are those of `TfrecordSource`.

        With a genome, and `sequences.bed` in the folder, bases are read from the genome, so that Basenji's windows of
        131,072 bp serve as Enformer's with `context_length=196608`.
        """
        source = TfrecordSource(folder, split, mask_unmappable=mask_unmappable, in_memory=in_memory)
        source.with_sequence = genome is None or source.intervals is None
        return cls(source, genome, options, targets)

    @property
    def num_bins(self) -> int:
        """M of the labels."""
        return self.options.target_length or self.source.num_bins

    @property
    def num_tracks(self) -> int:
        """T of the labels."""
        return self.source.num_tracks if self._tracks is None else len(self._tracks)

    @property
    def strand_pair(self) -> tuple[int, ...] | None:
        """The partner of each track on the other strand, where `targets` says so."""
        return None if self.targets is None else self.targets.strand_pair

    @property
    def groups(self) -> list[np.ndarray]:
        """Items that are read fastest together and in order, for `StreamingTrackDataset`; each stands in one group."""
        if len(self.source.groups) == len(self.source):
            return list(np.arange(len(self))[:, None])
        # Groups are stretches of rows, so items in the order of their rows are in that of their groups.
        order = np.argsort(self._rows, kind="stable")
        starts = [group.start for group in self.source.groups[1:]]
        return [part for part in np.split(order, np.searchsorted(self._rows[order], starts)) if part.size]

    def set_epoch(self, epoch: int) -> None:
        """Makes the next items ask for the augmentation of `epoch` (Accelerate and `Trainer` call it)."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int) -> dict[str, Any]:
        row = int(self._rows[operator.index(item)])
        stored = self.source.read(row)
        window = self.window(item)
        ids = self._stored_ids(stored.ids) if self._is_stored else self._read_ids(window)
        result = {"input_ids": torch.from_numpy(ids), "labels": self._labels(stored.labels, row)}
        result |= {"interval": None if window is None else tuple(window), "index": row}
        if self.options.return_sequence:
            result["sequence"] = self._letters(ids, window)
        return result | ({"augment": int(self._epoch[0])} if self.options.augment else {})

    def window(self, item: int) -> Window | None:
        """Where the bases of item number `item` come from."""
        if self.source.intervals is None:
            return None
        interval = self.source.intervals[int(self._rows[item])]
        length = self.options.context_length or self.source.sequence_length or interval.length_bp
        return Window(interval.chrom, *centred(interval.start, interval.end, length))

    def select(self, items: Sequence[int] | np.ndarray) -> "TrackDataset":
        """A dataset of these items, in this order; `index` stays the row of the source.

        Raises:
            DataError: an item out of range, or none.
        """
        chosen = np.asarray(items, dtype=np.int64)
        if not chosen.size or chosen.min() < 0 or chosen.max() >= len(self):
            raise DataError(f"`items` must be numbers from 0 to {len(self) - 1}, at least one, was {items!r}.")
        part = object.__new__(type(self))
        part.__dict__ = self.__dict__ | {"_rows": self._rows[chosen]}
        part._epoch = self._epoch.clone().share_memory_()
        return part

    def table(self) -> Dataset:
        """One row per item: `item`, `index`, `chrom`, `start`, `end` of its region, for `data/splits.py`.

        Raises:
            DataError: the source does not know where its examples lie.
        """
        if self.source.intervals is None:
            raise DataError(f"{self.source.name} holds no coordinates; splits by place need `chrom`, `start`, `end`.")
        regions = [self.source.intervals[row] for row in self._rows.tolist()]
        columns: dict[str, Any] = {"item": range(len(self)), "index": self._rows.tolist()}
        columns |= {name: [getattr(region, name) for region in regions] for name in ("chrom", "start", "end")}
        return Dataset.from_dict({name: list(values) for name, values in columns.items()})

    def to_datasets(self) -> IterableDataset:
        """The items as a stream of the `datasets` library, with `chrom`, `start`, `end` for `interval`.

        It has one shard per group of the source, so that workers share it and `state_dict()` goes on where it was.
        """
        ids: dict[str, Any] = {"input_ids": List(Value("uint8"))}
        ids["labels"] = Array2D((self.num_bins, self.num_tracks), "float32")
        ids |= {"chrom": Value("string"), "start": Value("int64"), "end": Value("int64"), "index": Value("int64")}
        ids |= {"sequence": Value("large_string")} if self.options.return_sequence else {}
        # `datasets` makes a shard of each element of the one argument that is a list.
        arguments = {"dataset": self, "groups": self.groups}
        return IterableDataset.from_generator(_plain_rows, features=Features(ids), gen_kwargs=arguments)

    @property
    def _is_stored(self) -> bool:
        return self.source.sequence_length is not None and (self.genome is None or self.source.intervals is None)

    def _check_lengths(self) -> None:
        options, source = self.options, self.source
        pad_id(options.offchrom)
        check_length("context_length", options.context_length)
        check_length("target_length", options.target_length)
        if (options.target_length or 0) > source.num_bins:
            raise DataError(
                f"`target_length` ({options.target_length}) exceeds the {source.num_bins} bins of {source.name}."
            )
        if self.genome is None and source.sequence_length is None:
            raise DataError(f"`genome` must be given, since {source.name} holds no sequences.")
        if self._is_stored and (options.context_length or 0) > (source.sequence_length or 0):
            raise DataError(
                f"`context_length` ({options.context_length}) is larger than the {source.sequence_length} bp stored "
                f"in {source.name}; pass `genome` (and coordinates) to widen the windows, or take a smaller one."
            )

    def _check_places(self) -> None:
        """Each interval shares a base with its chromosome, told at once and not in the middle of an epoch."""
        if self._is_stored or self.genome is None:
            return
        for number, interval in enumerate(self.source.intervals or ()):
            length = self.genome.contigs[self.genome.resolve(interval.chrom)]
            if interval.start >= length:
                where = f"Line {self.bed.lines[number]} of {self.bed.path}" if self.bed else f"Row {number}"
                raise DataError(
                    f"{where}: `interval` {interval.chrom}:{interval.start}-{interval.end} lies outside the "
                    f"chromosome, which is {length} bp long in {self.genome.path.name}; check the assembly."
                )

    def _read_ids(self, window: Window | None) -> np.ndarray:
        assert self.genome is not None and window is not None
        return window_ids(self.genome, window, self.options.offchrom)

    def _stored_ids(self, ids: np.ndarray | None) -> np.ndarray:
        assert ids is not None
        start, end = centred(0, len(ids), self.options.context_length or len(ids))
        return ids[start:end].copy()

    def _labels(self, stored: np.ndarray, row: int) -> torch.Tensor:
        if stored.shape != (self.source.num_bins, self.source.num_tracks):
            raise DataError(
                f"Row {row} of {self.source.name} must have {self.source.num_bins} bins and "
                f"{self.source.num_tracks} tracks, has {stored.shape}."
            )
        start, end = centred(0, len(stored), self.num_bins)
        labels = stored[start:end] if self._tracks is None else stored[start:end, self._tracks]
        if np.isinf(labels).any():
            raise DataError(f"Row {row} of {self.source.name} holds infinite targets; use NaN for unknown bins.")
        # A copy: what is mapped from a file, or kept by the source, must not change through a tensor.
        return torch.from_numpy(np.array(labels, dtype=np.float32))

    def _letters(self, ids: np.ndarray, window: Window | None) -> str:
        if self.genome is None or window is None:
            return id_letters(ids)
        return window_text(self.genome, window)


def _plain_rows(dataset: TrackDataset, groups: list[np.ndarray]) -> Iterator[dict[str, Any]]:
    for item in np.concatenate(groups).tolist():
        row = dataset[item]
        chrom, start, end = row.pop("interval") or (None, None, None)
        yield row | {"input_ids": row["input_ids"].numpy(), "labels": row["labels"].numpy()} | {
            "chrom": chrom, "start": start, "end": end,
        }  # fmt: skip
