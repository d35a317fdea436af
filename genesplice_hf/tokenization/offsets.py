"""Functions between token level and base level that need nothing but `offset_mapping`.

Shapes: B batch, L tokens, N bases, D hidden size. Arrays may be numpy or torch (gradients flow through torch).
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from genesplice_hf.errors import SequenceError

BaseMode = Literal["repeat", "mean", "center", "first", "sum", "bend"]
TokenMode = Literal["any", "majority", "mean", "center"]
IGNORED = -100


def offset_array(offsets: Any) -> np.ndarray:
    """Returns offsets (lists of pairs, numpy or torch) as a (B, L, 2) int64 array."""
    if hasattr(offsets, "detach"):
        offsets = offsets.detach().cpu().numpy()
    if isinstance(offsets, list) and offsets and not isinstance(offsets[0], tuple) and _ragged(offsets):
        raise SequenceError("`offsets` must have rows of one length; tokenize with `padding=True`.")
    array = np.asarray(offsets, dtype=np.int64)
    if array.ndim == 2 and array.shape[-1] == 2:
        array = array[None]
    if array.ndim != 3 or array.shape[-1] != 2:
        raise SequenceError(f"`offsets` must have shape (B, L, 2) or (L, 2), it was {array.shape}.")
    return array


def _ragged(rows: list[Any]) -> bool:
    return isinstance(rows[0], list) and len({len(row) for row in rows}) > 1


def bases_of_token(offsets: Any, token: int) -> tuple[int, int]:
    """Returns the half-open base interval (start, end) of one token of a single row of offsets (L, 2)."""
    start, end = offset_array(offsets)[0, token].tolist()
    return start, end


def tokens_of_base(offsets: Any, base: int) -> tuple[int, int]:
    """Returns (first, last) token, inclusive, that cover `base` in a single row of offsets (L, 2).

    Raises:
        SequenceError: no token covers the base.
    """
    spans = offset_array(offsets)[0]
    covering = np.flatnonzero((spans[:, 0] <= base) & (base < spans[:, 1]))
    if covering.size == 0:
        raise SequenceError(f"`base` ({base}) is covered by no token of this row: dropped, cut off or not there.")
    return int(covering[0]), int(covering[-1])


def to_base_level(x: Any, offsets: Any, n_bases: int, mode: BaseMode | None = None) -> Any:
    """Spreads token vectors over the bases that the tokens cover.

    Args:
        x: (B, L, ...) numpy or torch.
        offsets: (B, L, 2) half-open base intervals, (0, 0) for special tokens and pads.
        n_bases: N, bases of the longest sequence.
        mode: "repeat" (the token of the base; the default where tokens do not overlap), "mean" (over all covering
            tokens; the default where they do), "sum", "first", "center" (the covering token whose middle is
            nearest) or "bend" (overlapping tokens: token b - (k-1)//2, repeated at both ends, as the BEND
            benchmark does; Marin et al. 2024).

    Returns:
        (B, N, ...) of the kind of `x`; zeros for bases without a token.
    """
    spans = offset_array(offsets)
    first, last = _cover(spans, n_bases)
    if mode is None:
        mode = "mean" if (last > first).any() else "repeat"
    if mode in ("repeat", "first"):
        return _pick(x, first, first >= 0)
    if mode == "center":
        return _pick(x, _nearest(spans, first, last), first >= 0)
    if mode == "bend":
        return _pick(x, _bend(spans, n_bases), first >= 0)
    if mode not in ("mean", "sum"):
        raise SequenceError(f"`mode` must be repeat, mean, center, first, sum or bend, it was {mode!r}.")
    total = _pick(x, first, first >= 0)
    for step in range(1, int((last - first).max(initial=0)) + 1):
        total = total + _pick(x, first + step, (first >= 0) & (first + step <= last))
    return total / _like(np.maximum(last - first + 1, 1), total) if mode == "mean" else total


def _cover(spans: np.ndarray, n_bases: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first and the last covering token of every base, (B, N) each, -1 where there is none."""
    batch, n_tokens = spans.shape[:2]
    size = np.minimum(spans[..., 1], n_bases) - np.minimum(spans[..., 0], n_bases)
    flat_size = size.ravel()
    token = np.repeat(np.arange(batch * n_tokens), flat_size)
    within = np.arange(token.size) - np.repeat(np.cumsum(flat_size) - flat_size, flat_size)
    base = spans[..., 0].ravel()[token] + within + token // max(n_tokens, 1) * n_bases
    first, last = np.full(batch * n_bases, -1), np.full(batch * n_bases, -1)
    last[base] = token % max(n_tokens, 1)
    first[base[::-1]] = (token % max(n_tokens, 1))[::-1]
    return first.reshape(batch, n_bases), last.reshape(batch, n_bases)


def _nearest(spans: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    rows = np.arange(len(spans))[:, None]
    middle = (spans[..., 0] + spans[..., 1]) // 2
    base = np.arange(first.shape[1])[None]
    best = first.copy()
    for step in range(1, int((last - first).max(initial=0)) + 1):
        other = np.minimum(first + step, last)
        closer = np.abs(middle[rows, other] - base) < np.abs(middle[rows, best] - base)
        best = np.where(closer, other, best)
    return best


def _bend(spans: np.ndarray, n_bases: int) -> np.ndarray:
    real = spans[..., 1] > spans[..., 0]
    k = int((spans[..., 1] - spans[..., 0]).max(initial=1))
    first = np.argmax(real, axis=1)[:, None]
    last = real.shape[1] - 1 - np.argmax(real[:, ::-1], axis=1)[:, None]
    return np.clip(np.arange(n_bases)[None] - (k - 1) // 2 + first, first, last)


def _like(values: np.ndarray, x: Any) -> Any:
    """Returns (B, N) `values` as the kind of `x` with trailing axes for broadcasting."""
    values = values.reshape(*values.shape, *[1] * (x.ndim - values.ndim))
    return values if isinstance(x, np.ndarray) else x.new_tensor(values.tolist())


def _pick(x: Any, index: np.ndarray, valid: np.ndarray) -> Any:
    rows = np.arange(len(index))[:, None]
    return x[rows, np.where(valid, index, 0)] * _like(valid.astype(np.int64), x)


def to_token_level(y: Any, offsets: Any, mode: TokenMode = "majority") -> Any:
    """Turns labels of bases into labels of tokens.

    Args:
        y: (B, N) or (N,) labels of bases, numpy, torch or lists; -100 marks bases without a label.
        offsets: (B, L, 2) half-open base intervals.
        mode: "any" (the largest label in the token), "majority" (ties go to the smaller label), "mean" (float) or
            "center" (the label of the middle base).

    Returns:
        (B, L) of the kind of `y` (float for "mean"); -100 for special tokens, pads and tokens without a label.
    """
    spans = offset_array(offsets)
    labels = np.atleast_2d(np.asarray(y.detach().cpu().numpy() if hasattr(y, "detach") else y))
    if mode not in ("any", "majority", "mean", "center"):
        raise SequenceError(f"`mode` must be any, majority, mean or center, it was {mode!r}.")
    if spans[..., 1].max(initial=0) > labels.shape[1]:
        raise SequenceError(
            f"`y` has {labels.shape[1]} bases, the offsets reach {int(spans[..., 1].max())}; pass one label per base."
        )
    out = np.full(spans.shape[:2], IGNORED, dtype=np.float64 if mode == "mean" else labels.dtype)
    for cells, windows in _windows_by_size(spans, labels):
        out[cells] = _summarise(windows, mode)
    if not hasattr(y, "detach"):
        return out
    return (y.float() if mode == "mean" else y).new_tensor(out.tolist())


def _windows_by_size(spans: np.ndarray, labels: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields (index of the tokens, (n, size) labels of their bases) for every token size."""
    size = spans[..., 1] - spans[..., 0]
    for width in np.unique(size[size > 0]).tolist():
        row, token = np.nonzero(size == width)
        start = spans[row, token, 0]
        yield (row, token), labels[row[:, None], start[:, None] + np.arange(width)]


def _summarise(labels: np.ndarray, mode: TokenMode) -> np.ndarray:
    """Returns (n,) one label for each row of (n, size) labels."""
    known = labels != IGNORED
    if mode == "center":
        return labels[:, labels.shape[1] // 2]
    if mode == "mean":
        total, count = np.where(known, labels, 0).sum(axis=1), known.sum(axis=1)
        return np.where(count > 0, total / np.maximum(count, 1), IGNORED)
    if mode == "any":
        lowest = labels.min(initial=IGNORED)
        largest = np.where(known, labels, lowest).max(axis=1)
        return np.where(known.any(axis=1), largest, IGNORED)
    votes = np.where(known, (labels[:, :, None] == labels[:, None, :]).sum(axis=2), 0)
    winners = np.where((votes == votes.max(axis=1, keepdims=True)) & known, labels, np.iinfo(np.int64).max)
    return np.where(known.any(axis=1), winners.min(axis=1), IGNORED)


def kmer_logits_to_base(logits: Any, offset_in_token: int, kmer_ids: np.ndarray, alphabet: str) -> Any:
    """Marginalises k-mer logits to one base: log p(base) at a position of the k-mer.

    log p(b) = logsumexp over the 4^(k-1) k-mers with b at `offset_in_token`, renormalised over A, C, G, T.

    Args:
        logits: (..., vocabulary) numpy or torch.
        offset_in_token: position of the base in the k-mer, 0..k-1.
        kmer_ids: (4^k,) ids of the k-mers in the order of `alphabet`.
        alphabet: order of the k-mer codes.

    Returns:
        (..., 4) log-probabilities in the order A, C, G, T.

    Raises:
        SequenceError: `offset_in_token` outside the k-mer.
    """
    k = round(np.log2(kmer_ids.size) / 2)
    if not 0 <= offset_in_token < k:
        raise SequenceError(f"`offset_in_token` must be 0..{k - 1}, it was {offset_in_token}.")
    picked = logits[..., kmer_ids]
    shape = (*picked.shape[:-1], 4**offset_in_token, 4, 4 ** (k - 1 - offset_in_token))
    folded = picked.reshape(shape)
    by_base = _log_sum_exp(folded, (-3, -1))[..., [alphabet.index(base) for base in "ACGT"]]
    return by_base - _log_sum_exp(by_base, (-1,))[..., None]


def _log_sum_exp(x: Any, axes: tuple[int, ...]) -> Any:
    if not isinstance(x, np.ndarray):
        return x.logsumexp(axes)
    peak = x.max(axis=axes, keepdims=True)
    return np.log(np.exp(x - peak).sum(axis=axes)) + np.squeeze(peak, axis=axes)
