"""Says what begins at every base when N, special tokens or uneven lengths break the pattern of k-mers.

A run is a stretch without a break. Every run becomes `phase` single bases, whole k-mers, and a tail. One byte per
base (its role) carries the plan, so memory stays small whatever the input. R sequences, U runs, n bases.
"""

from dataclasses import dataclass

import numpy as np

from genesplice_hf.errors import SequenceError
from genesplice_hf.tokenization.batches import Batch
from genesplice_hf.tokenization.spans import span_mask
from genesplice_hf.tokenization.special_text import CODE_N, CODE_SKIP, FIRST_MARK

BY_LETTER, KMER, UNKNOWN_BASE, UNKNOWN_TAIL, N_TOKEN, NOTHING = range(6)


@dataclass(frozen=True)
class Scheme:
    """The rules of one k-mer tokenizer; the fields are the constructor arguments of `KmerTokenizer`."""

    k: int
    stride: int
    phase: int
    remainder: str
    short: str
    kmer_with_n: str
    collapse_n: str


@dataclass(frozen=True)
class Roles:
    """The plan of a batch.

    Attributes:
        role: (n,) uint8: what token begins at a base (by its letter, a k-mer, ...), NOTHING inside tokens.
        tail_start, tail_size: first base and size of the tails that are one unknown token.
    """

    role: np.ndarray
    tail_start: np.ndarray
    tail_size: np.ndarray

    def counts(self, batch: Batch) -> np.ndarray:
        """Returns (R,) tokens per sequence."""
        # One call per sequence: a reduction over all at once would widen every base to eight bytes first.
        begins = self.role != NOTHING
        ends = np.cumsum(batch.lengths).tolist()
        pieces = (begins[end - n : end] for end, n in zip(ends, batch.lengths.tolist(), strict=True))
        return np.fromiter(map(np.count_nonzero, pieces), dtype=np.int64, count=len(ends))

    def spans(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns first base and size of every token."""
        starts = np.flatnonzero(self.role != NOTHING)
        sizes = np.array([1, k, 1, 1, k])[self.role[starts]]
        sizes[np.searchsorted(starts, self.tail_start)] = self.tail_size
        return starts, sizes


def plan_roles(codes: np.ndarray, batch: Batch, scheme: Scheme) -> Roles:
    """Returns what token begins at every base.

    Args:
        codes: (n,) 0..3 bases, 4 N, 5 unknown letter, or marks of special text.
        batch: where sequences begin and end.
        scheme: the rules.

    Raises:
        SequenceError: `short="error"` and a run shorter than k.
    """
    role = np.full(codes.size, BY_LETTER, dtype=np.uint8)
    role[codes == CODE_SKIP] = NOTHING
    in_run = codes < (CODE_N if scheme.kmer_with_n == "restart" else FIRST_MARK)
    start, end = _runs(in_run, batch)
    first = start + _phases(start, end, batch, scheme)
    tails = _fill(role, first, end, start, scheme, batch)
    if scheme.collapse_n == "kmer" and scheme.kmer_with_n == "restart":
        n_start, n_end = _runs(codes == CODE_N, batch)
        _mark_kmers(role, n_start, (n_end - n_start) // scheme.k, scheme.k, N_TOKEN)
    return Roles(role, *tails)


def _runs(in_run: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Returns first base and end of every maximal stretch of true within one sequence, (U,) each."""
    edge = np.zeros(in_run.size + 1, dtype=np.bool_)
    edge[batch.starts] = edge[-1] = True
    edge[:-1] |= ~in_run
    edge[1:] |= ~in_run
    return np.flatnonzero(in_run & edge[:-1]), np.flatnonzero(in_run & edge[1:]) + 1


def _phases(start: np.ndarray, end: np.ndarray, batch: Batch, scheme: Scheme) -> np.ndarray:
    """Returns the single bases that come before the first k-mer: `phase` in the first run of every sequence."""
    phase = np.zeros_like(start)
    if scheme.phase:
        row = np.searchsorted(np.cumsum(batch.lengths), start, side="right")
        first = np.unique(row, return_index=True)[1]
        phase[first] = np.minimum(scheme.phase, (end - start)[first])
    return phase


def _fill(
    role: np.ndarray, first: np.ndarray, end: np.ndarray, start: np.ndarray, scheme: Scheme, batch: Batch
) -> tuple[np.ndarray, np.ndarray]:
    """Writes k-mers and tails of all runs; returns start and size of the tails that are one unknown token."""
    if scheme.stride == scheme.k:
        kmers = (end - first) // scheme.k
        tail = first + kmers * scheme.k
        _mark_kmers(role, first, kmers, scheme.k, KMER)
    else:
        kmers = np.maximum(end - first - scheme.k + 1, 0)
        tail = np.where(kmers > 0, end, first)
        role[span_mask(role.size, first + kmers, np.where(kmers > 0, end, first))] = NOTHING
        role[span_mask(role.size, first, first + kmers)] = KMER
    is_short = end - start < scheme.k
    whole = [
        _mark_tails(role, tail[affected], end[affected], mode)
        for affected, mode in ((is_short, _refuse(is_short, start, end, scheme, batch)), (~is_short, scheme.remainder))
    ]
    return np.concatenate([part[0] for part in whole]), np.concatenate([part[1] for part in whole])


def _mark_kmers(role: np.ndarray, first: np.ndarray, count: np.ndarray, k: int, kind: int) -> None:
    role[span_mask(role.size, first, first + count * k)] = NOTHING
    before = np.cumsum(count) - count
    role[np.repeat(first - k * before, count) + k * np.arange(int(count.sum()))] = kind


def _mark_tails(role: np.ndarray, start: np.ndarray, end: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    nothing = np.zeros(0, dtype=np.int64)
    if mode == "single":
        return nothing, nothing
    role[span_mask(role.size, start, end)] = UNKNOWN_BASE if mode == "unk" else NOTHING
    if mode != "pad_n":
        return nothing, nothing
    start, size = start[end > start], (end - start)[end > start]
    role[start] = UNKNOWN_TAIL
    return start, size


def _refuse(is_short: np.ndarray, start: np.ndarray, end: np.ndarray, scheme: Scheme, batch: Batch) -> str:
    """Returns the mode for short runs, after raising for `short="error"`."""
    if scheme.short == "error" and is_short.any():
        run = int(np.argmax(is_short))
        row, position = batch.locate(int(start[run]))
        raise SequenceError(
            f"`sequence` {row} has a stretch of {int(end[run] - start[run])} bases at position {position} (0-based), "
            f"shorter than `k` ({scheme.k}); pass a longer sequence or choose another `short` than 'error'."
        )
    return scheme.short
