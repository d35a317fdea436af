"""Cuts sequences into k-mers and leftover tokens where N, special tokens or uneven lengths break the pattern.

A run is a stretch without a break. Every run becomes `phase` single bases, whole k-mers, and a tail; the arrays of
all runs are expanded to tokens at once. R sequences, U runs, T tokens.
"""

from dataclasses import dataclass

import numpy as np

from genesplice_hf.errors import SequenceError
from genesplice_hf.tokenization.batches import Batch
from genesplice_hf.tokenization.special_text import CODE_N, CODE_SKIP, CODE_SPECIAL, FIRST_MARK

BY_LETTER, KMER, UNKNOWN_TOKEN, N_TOKEN = 0, 1, 2, 3


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
class TokenPlan:
    """Tokens of a batch: first base in the buffer, size in bases, how the id is found; and tokens per sequence."""

    start: np.ndarray
    size: np.ndarray
    role: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Runs:
    """Runs in buffer order: first base, length, and whether the run is made of bases; each (U,)."""

    start: np.ndarray
    length: np.ndarray
    code: np.ndarray
    is_base: np.ndarray


def plan_runs(codes: np.ndarray, batch: Batch, scheme: Scheme) -> TokenPlan:
    """Returns the tokens of every sequence.

    Args:
        codes: (bases of the batch,) 0..3 bases, 4 N, 5 unknown letter, or marks of special text.
        batch: where sequences begin and end.
        scheme: the rules.

    Raises:
        SequenceError: `short="error"` and a run shorter than k.
    """
    runs = _find_runs(codes, batch, scheme)
    phase = _phases(runs, batch, scheme)
    kmers, left = _whole_kmers(runs, phase, scheme)
    tail, tail_size, tail_role = _tails(runs, left, scheme, batch)
    is_n_run = ~runs.is_base & (runs.code == CODE_N)
    total = phase + kmers + tail
    run = np.repeat(np.arange(total.size), total)
    first = np.cumsum(total) - total
    nth = np.arange(run.size) - first[run]
    after = nth - phase[run]
    in_kmers = (after >= 0) & (after < kmers[run])
    in_tail = after >= kmers[run]
    step = np.where(runs.is_base, scheme.stride, scheme.k)[run]
    within = np.where(in_kmers, phase[run] + after * step, nth)
    past = phase[run] + (kmers[run] * step) + (after - kmers[run]) * tail_size[run]
    within = np.where(in_tail, past, within)
    size = np.where(in_kmers, scheme.k, np.where(in_tail, tail_size[run], 1))
    role = np.where(in_kmers, np.where(is_n_run, N_TOKEN, KMER)[run], np.where(in_tail, tail_role[run], BY_LETTER))
    return TokenPlan(runs.start[run] + within, size, role.astype(np.uint8), _per_sequence(runs, total, batch))


def _find_runs(codes: np.ndarray, batch: Batch, scheme: Scheme) -> Runs:
    threshold = CODE_N if scheme.kmer_with_n == "restart" else FIRST_MARK
    breaks = np.flatnonzero(codes >= threshold)
    sequence_starts = batch.starts[batch.lengths > 0]
    start = np.unique(np.concatenate([sequence_starts, breaks, breaks + 1]))
    start = start[start < codes.size]
    if scheme.collapse_n == "kmer" and threshold == CODE_N:
        inside = (codes[start] == CODE_N) & (codes[start - 1] == CODE_N) & ~np.isin(start, sequence_starts)
        start = start[~inside]
    length = np.diff(np.append(start, codes.size))
    code = codes[start]
    return Runs(start, length, code, code < threshold)


def _phases(runs: Runs, batch: Batch, scheme: Scheme) -> np.ndarray:
    phase = np.zeros_like(runs.start)
    if scheme.phase:
        base_runs = np.flatnonzero(runs.is_base)
        row = np.searchsorted(np.cumsum(batch.lengths), runs.start[base_runs], side="right")
        first = base_runs[np.unique(row, return_index=True)[1]]
        phase[first] = np.minimum(scheme.phase, runs.length[first])
    return phase


def _whole_kmers(runs: Runs, phase: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of k-mers of every run and the bases that they leave over."""
    rest = runs.length - phase
    if scheme.stride == scheme.k:
        kmers = rest // scheme.k
        kmers[~runs.is_base & (runs.code != CODE_N)] = 0
        return kmers, rest - kmers * scheme.k
    overlapping = np.maximum(rest - scheme.k + 1, 0)
    kmers = np.where(runs.is_base, overlapping, rest // scheme.k)
    left = np.where(runs.is_base, np.where(overlapping > 0, 0, rest), rest - kmers * scheme.k)
    return kmers, left


def _tails(runs: Runs, left: np.ndarray, scheme: Scheme, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns number, size and role of the tokens that follow the last whole k-mer of every run."""
    count, size, role = left.copy(), np.ones_like(left), np.full(left.size, BY_LETTER)
    is_short = runs.is_base & (runs.length < scheme.k)
    for affected, mode in ((is_short, scheme.short), (runs.is_base & ~is_short, scheme.remainder)):
        if mode == "error" and affected.any():
            _refuse_short(runs, int(np.argmax(affected)), scheme, batch)
        if mode == "pad_n":
            count[affected], size[affected] = left[affected] > 0, left[affected]
        if mode == "drop":
            count[affected] = 0
        if mode in ("pad_n", "unk"):
            role[affected] = UNKNOWN_TOKEN
    count[runs.code == CODE_SKIP] = 0
    return count, size, role


def _refuse_short(runs: Runs, run: int, scheme: Scheme, batch: Batch) -> None:
    row, position = batch.locate(int(runs.start[run]))
    raise SequenceError(
        f"`sequence` {row} has a stretch of {int(runs.length[run])} bases at position {position} (0-based), shorter "
        f"than `k` ({scheme.k}); pass a longer sequence or choose another `short` than 'error'."
    )


def _per_sequence(runs: Runs, total: np.ndarray, batch: Batch) -> np.ndarray:
    before = np.concatenate([[0], np.cumsum(total)])
    ends = np.cumsum(batch.lengths)
    return before[np.searchsorted(runs.start, ends)] - before[np.searchsorted(runs.start, ends - batch.lengths)]


def special_size(plan: TokenPlan, codes: np.ndarray, position: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Returns the token sizes with those of written special tokens set to their number of characters."""
    sizes = plan.size.copy()
    sizes[codes[plan.start] == CODE_SPECIAL] = size[np.argsort(position)]
    return sizes
