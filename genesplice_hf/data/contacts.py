"""Contact maps as targets: from balanced matrices to vectors, their reverse complement, and examples to train on.

The targets are those of Akita (Fudenberg, Kelley and Pollard 2020): log(observed / expected) contacts at one
resolution, of the upper triangle from the diagonal offset k on, row after row as `numpy.triu_indices(N, k)` has them.

Shapes: N bins, P = (N - k)(N - k + 1) / 2 pairs, T targets, L bases.
"""

import logging
import math
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch

from genesplice_hf.data.fasta import Genome
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer

logger = logging.getLogger(__name__)

UNKNOWN_ID = 4
# Ids of A, C, G, T, N and padding under the reverse complement.
_COMPLEMENT = np.array([3, 2, 1, 0, 4, 5], dtype=np.uint8)


def map_size(num_pairs: int, diagonal_offset: int) -> int:
    """N of a vector of P pairs.

    Raises:
        DataError: no map has so many pairs.
    """
    rows = (math.isqrt(8 * num_pairs + 1) - 1) // 2 if num_pairs > 0 else 0
    if num_pairs < 1 or rows * (rows + 1) // 2 != num_pairs:
        raise DataError(f"`num_pairs` must be n(n + 1) / 2 for a whole n, the triangle of a map, got {num_pairs}.")
    return rows + diagonal_offset


def map_to_vector(contact_map: np.ndarray, diagonal_offset: int) -> np.ndarray:
    """(N, N, ...) -> (P, ...): the pairs i + offset <= j.

    Raises:
        DataError: the map is not square, or too small.
    """
    size = len(contact_map)
    if contact_map.ndim < 2 or contact_map.shape[1] != size or size <= diagonal_offset:
        raise DataError(
            f"`contact_map` must be (N, N, ...) with N > `diagonal_offset` ({diagonal_offset}), got shape "
            f"{contact_map.shape}."
        )
    return contact_map[np.triu_indices(size, diagonal_offset)]


def vector_as_map(vector: np.ndarray, diagonal_offset: int, fill: float = np.nan) -> np.ndarray:
    """(P, ...) -> (N, N, ...): the symmetric map, `fill` nearer to the diagonal than the offset."""
    size = map_size(len(vector), diagonal_offset)
    contact_map = np.full((size, size, *vector.shape[1:]), fill, dtype=np.result_type(vector, np.float16))
    rows, columns = np.triu_indices(size, diagonal_offset)
    contact_map[rows, columns] = vector
    contact_map[columns, rows] = vector
    return contact_map


def rc_permutation(num_bins: int, diagonal_offset: int) -> np.ndarray:
    """(P,): `vector[rc_permutation(N, k)]` belongs to the reverse complement of the sequence; its own inverse.

    Pair (i, j) takes the value of pair (N - 1 - j, N - 1 - i).
    """
    rows, columns = np.triu_indices(num_bins, diagonal_offset)
    place = np.full((num_bins, num_bins), -1, dtype=np.int64)
    place[rows, columns] = np.arange(len(rows))
    return place[num_bins - 1 - columns, num_bins - 1 - rows]


class Augmentation(NamedTuple):
    """What is done to an example: bases moved to the right by `shift`, then the reverse complement."""

    shift: int = 0
    rc: bool = False


def augment(
    ids: np.ndarray, labels: np.ndarray | None, augmentation: Augmentation, permutation: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """New ids (L,) and labels (P, T).

    A shift of a few bases, far less than a bin, leaves the labels; what comes in at the end is unknown bases. The
    reverse complement reorders the pairs by `permutation` (of `rc_permutation`).
    """
    out = ids
    if augmentation.shift:
        out = np.full_like(ids, UNKNOWN_ID)
        start, stop = max(augmentation.shift, 0), len(ids) + min(augmentation.shift, 0)
        out[start:stop] = ids[start - augmentation.shift : stop - augmentation.shift]
    if augmentation.rc:
        out = _COMPLEMENT[out[::-1]]
        labels = None if labels is None else labels[permutation]
    return out, labels


class ContactDataset(torch.utils.data.Dataset):
    """Windows with their contacts, map style: `input_ids` uint8 (L,), `labels` float32 (P, T), `index`.

    Args:
        ids: (n, L) uint8 ids (A, C, G, T = 0 .. 3, N = 4), or a sequence of windows to be read from `genome`.
        targets: (n, P, T), an array or a memory map; read row by row.
        diagonal_offset: k of the targets.
        genome: bases by interval, where `ids` is intervals.

    Raises:
        DataError: other numbers of rows, another number of pairs than any map has, intervals without a genome or of
            unequal lengths.
    """

    def __init__(
        self,
        ids: np.ndarray | Sequence[Interval],
        targets: np.ndarray,
        diagonal_offset: int = 2,
        genome: Genome | None = None,
    ) -> None:
        if targets.ndim != 3 or len(targets) != len(ids) or not len(ids):
            raise DataError(
                f"`targets` must be (windows, pairs, targets) for the {len(ids)} windows, at least one, got shape "
                f"{targets.shape}."
            )
        self.num_bins, self.diagonal_offset = map_size(targets.shape[1], diagonal_offset), diagonal_offset
        self.intervals = None if isinstance(ids, np.ndarray) else list(ids)
        if self.intervals is not None:
            self._check_intervals(genome)
        elif isinstance(ids, np.ndarray) and ids.ndim != 2:
            raise DataError(f"`ids` must be (windows, bases), got shape {ids.shape}.")
        self.ids, self.targets, self.genome = ids, targets, genome
        self._tokenizer = NucleotideTokenizer(preset="enformer")

    @classmethod
    def from_npz(cls, path: str | PathLike[str], diagonal_offset: int = 2) -> "ContactDataset":
        """From an `.npz` with `sequence` (n, L) uint8 and `target` (n, P, T)."""
        with np.load(path, allow_pickle=False) as stored:
            missing = sorted({"sequence", "target"} - set(stored.files))
            if missing:
                raise DataError(f"{path} lacks {missing}; it must hold `sequence` and `target`.")
            return cls(stored["sequence"], stored["target"], diagonal_offset)

    @classmethod
    def from_genome(
        cls, genome: Genome, intervals: Sequence[Interval], targets: str | PathLike[str], diagonal_offset: int = 2
    ) -> "ContactDataset":
        """Windows of a FASTA, and the `.npy` of their targets in the same order, which stays on the disk."""
        return cls(list(intervals), np.load(targets, mmap_mode="r", allow_pickle=False), diagonal_offset, genome)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "input_ids": self._bases(index),
            "labels": np.asarray(self.targets[index], dtype=np.float32),
            "index": index,
        }

    def _bases(self, index: int) -> np.ndarray:
        if self.intervals is None:
            return np.asarray(self.ids[index], dtype=np.uint8)
        window = self.intervals[index]
        assert self.genome is not None  # the constructor has seen to it
        return window_ids(self.genome.seq(window.chrom, window.start, window.end, window.strand), self._tokenizer)

    def _check_intervals(self, genome: Genome | None) -> None:
        if genome is None:
            raise DataError("`genome` must be given where `ids` are intervals.")
        assert self.intervals is not None
        lengths = {interval.length_bp for interval in self.intervals}
        if len(lengths) > 1:
            raise DataError(f"`ids` must be intervals of one length, got {sorted(lengths)[:4]} bp.")
        for interval in self.intervals:
            genome.locate(interval.chrom, interval.start, interval.end)


class ContactCollator:
    """Stacks examples of `ContactDataset`, in training with a random shift and strand for each.

    Args:
        num_bins, diagonal_offset: of the targets.
        max_shift: bases; shifts are uniform in -max_shift .. max_shift. 11 as published.
        rc_probability: of the reverse complement.
        seed: what is drawn depends on seed, epoch and `index` alone, not on batch, worker or order.
        training: False changes nothing in the examples.
    """

    def __init__(
        self,
        num_bins: int,
        diagonal_offset: int = 2,
        max_shift: int = 11,
        rc_probability: float = 0.5,
        seed: int = 0,
        training: bool = True,
    ) -> None:
        if max_shift < 0 or not 0 <= rc_probability <= 1:
            raise DataError(
                f"`max_shift` must be 0 or more and `rc_probability` in 0 .. 1, got {max_shift} and {rc_probability}."
            )
        self.permutation = rc_permutation(num_bins, diagonal_offset)
        self.max_shift, self.rc_probability, self.seed, self.training = max_shift, rc_probability, seed, training
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draws anew."""
        self.epoch = epoch

    def draw(self, index: int) -> Augmentation:
        """What happens to the example `index` in this epoch."""
        if not self.training:
            return Augmentation()
        generator = np.random.default_rng([self.seed, self.epoch, index])
        shift = int(generator.integers(-self.max_shift, self.max_shift + 1))
        return Augmentation(shift, bool(generator.random() < self.rc_probability))

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids` (B, L) and `labels` (B, P, T)."""
        pairs = [
            augment(row["input_ids"], row["labels"], self.draw(int(row["index"])), self.permutation)
            for row in examples
        ]
        ids, labels = zip(*pairs, strict=True)
        return {"input_ids": torch.from_numpy(np.stack(ids)), "labels": torch.from_numpy(np.stack(labels))}


def window_ids(sequence: str, tokenizer: NucleotideTokenizer | None = None) -> np.ndarray:
    """(L,) uint8 ids of a sequence: A, C, G, T = 0 .. 3, everything ambiguous = 4."""
    tokenizer = tokenizer or NucleotideTokenizer(preset="enformer")
    return np.asarray(tokenizer([sequence], return_tensors="np")["input_ids"][0], dtype=np.uint8)
