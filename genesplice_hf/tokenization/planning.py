"""Decides which tokens share a model row: truncation, overflow windows, pairs, DNABERT pieces, special tokens.

Works on token counts only, so every scheme (single bases, k-mers) uses the same rules. R rows, S segments.
"""

from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np

from genesplice_hf.errors import SequenceError
from genesplice_hf.tokenization.canvas import Plan, Segments, Specials

Part = TypeVar("Part", bound=Segments | Specials)
_NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Template:
    """The special tokens of a row: `prefix` a `separator` b `suffix` (pairs), `prefix` a `suffix` (single).

    Attributes:
        prefix, suffix, separator: ids, each may be empty.
    """

    prefix: list[int]
    suffix: list[int]
    separator: list[int]

    @property
    def size(self) -> int:
        """Number of special tokens in a row."""
        return len(self.prefix) + len(self.suffix) + len(self.separator)


@dataclass(frozen=True)
class Cut:
    """How rows that are too long are cut.

    Attributes:
        budget: tokens of the sequences that fit beside the special tokens, None for no cutting.
        strategy: "longest_first", "only_first" or "only_second" (matters for pairs).
        overlap: tokens that consecutive overflow windows share (`stride` of `__call__`).
        keep_overflow: emit one row per window instead of dropping what lies beyond the first.
        from_left: keep the end of the sequence instead of its beginning.
    """

    budget: int | None = None
    strategy: str = "longest_first"
    overlap: int = 0
    keep_overflow: bool = False
    from_left: bool = False


def plan_single(counts: np.ndarray, template: Template, cut: Cut) -> Plan:
    """One row per sequence, or per window of it when overflow is kept."""
    sample, start, count = _windows(counts, cut.budget, cut)
    segments = _segments(np.arange(sample.size), start + _first(counts)[sample], count, len(template.prefix), 0)
    return _finish([segments], [(count, 0)], template, sample)


def plan_pairs(counts: np.ndarray, template: Template, cut: Cut) -> Plan:
    """One row per pair; `counts` lists all first members, then all second members.

    Raises:
        SequenceError: overflow windows of both members at once, which have no defined order.
    """
    n_pairs = counts.size // 2
    first, second = counts[:n_pairs], counts[n_pairs:]
    budget_a, budget_b = _share_budget(first, second, cut)
    if cut.keep_overflow and cut.strategy == "longest_first" and (budget_a + budget_b < first + second).any():
        raise SequenceError(
            "`return_overflowing_tokens` with pairs needs `truncation` 'only_first' or 'only_second', "
            "it was 'longest_first'; say which member is to be windowed."
        )
    sample, start_a, count_a = _windows(first, budget_a, cut)
    again, start_b, count_b = _windows(second[sample], budget_b[sample], cut)
    sample, start_a, count_a = sample[again], start_a[again], count_a[again]
    rows, offsets = np.arange(sample.size), _first(counts)
    column = len(template.prefix) + count_a + len(template.separator)
    parts = [
        _segments(rows, start_a + offsets[:n_pairs][sample], count_a, len(template.prefix), 0),
        _segments(rows, start_b + offsets[n_pairs:][sample], count_b, column, 1),
    ]
    return _finish(parts, [(count_a, 0), (count_b, 1)], template, sample)


def plan_pieces(counts: np.ndarray, template: Template, max_piece: int, compat: bool) -> Plan:
    """Long sequences as pieces of `max_piece` tokens, each with its own special tokens, all in one row.

    With `compat` the number of pieces is floor(n / max_piece) + 1 as in the DNABERT code (Ji et al. 2021), which
    leaves an empty last piece when n is a multiple of `max_piece`; otherwise ceil(n / max_piece), at least one.
    """
    pieces = counts // max_piece + 1 if compat else np.maximum(-(-counts // max_piece), 1)
    row = np.repeat(np.arange(counts.size), pieces)
    nth = np.arange(row.size) - np.repeat(_first(pieces), pieces)
    count = np.clip(counts[row] - nth * max_piece, 0, max_piece)
    begin = nth * (max_piece + template.size)
    segments = _segments(row, _first(counts)[row] + nth * max_piece, count, begin + len(template.prefix), 0)
    specials = [_specials(row, begin + j, special, 0) for j, special in enumerate(template.prefix)]
    after = begin + len(template.prefix) + count
    specials += [_specials(row, after + j, special, 0) for j, special in enumerate(template.suffix)]
    return Plan(segments, _join(Specials, specials), counts + pieces * template.size, np.arange(counts.size))


def _first(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts


def _windows(counts: np.ndarray, budget: int | np.ndarray | None, cut: Cut) -> tuple[np.ndarray, ...]:
    """Returns sample, first token within the sample, and token count of every window."""
    everything = np.arange(counts.size)
    if budget is None:
        return everything, np.zeros_like(counts), counts
    budget = np.broadcast_to(budget, counts.shape)
    if not cut.keep_overflow:
        kept = np.minimum(counts, budget)
        return everything, counts - kept if cut.from_left else np.zeros_like(counts), kept
    step = np.maximum(budget - cut.overlap, 1)
    extra = np.maximum(-(-(counts - budget) // step), 0)
    if (cut.overlap >= budget)[extra > 0].any():
        raise SequenceError(
            f"`stride` ({cut.overlap}) is the overlap of windows in tokens and must be smaller than the room for "
            f"sequence tokens in a row ({int(budget.min())}); lower it or raise `max_length`."
        )
    sample = np.repeat(everything, extra + 1)
    nth = np.arange(sample.size) - np.repeat(_first(extra + 1), extra + 1)
    begin = nth * step[sample]
    count = np.minimum(budget[sample], counts[sample] - begin)
    return sample, counts[sample] - begin - count if cut.from_left else begin, count


def _share_budget(first: np.ndarray, second: np.ndarray, cut: Cut) -> tuple[np.ndarray, np.ndarray]:
    if cut.budget is None:
        return first, second
    if cut.strategy == "only_first":
        return _room(cut.budget - second, first), second
    if cut.strategy == "only_second":
        return first, _room(cut.budget - first, second)
    short = np.minimum(first, second)
    half = cut.budget // 2
    # The longer member loses tokens first; when both exceed half, the longer one keeps the odd token.
    shorter = np.where(first + second <= cut.budget, short, np.minimum(short, half))
    longer = np.minimum(np.maximum(first, second), cut.budget - shorter)
    first_is_longer = first > second
    return np.where(first_is_longer, longer, shorter), np.where(first_is_longer, shorter, longer)


def _room(room: np.ndarray, counts: np.ndarray) -> np.ndarray:
    if (room < np.minimum(counts, 1)).any():
        raise SequenceError(
            "`max_length` leaves no room for the member that `truncation` may cut; raise it or cut the other one."
        )
    return np.minimum(room, np.maximum(counts, 0))


def _segments(row: np.ndarray, token: np.ndarray, count: np.ndarray, column: np.ndarray | int, kind: int) -> Segments:
    return Segments(row, token, count, np.broadcast_to(column, row.shape), np.full(row.shape, kind))


def _specials(row: np.ndarray, column: np.ndarray | int, special: int, kind: int) -> Specials:
    return Specials(row, np.broadcast_to(column, row.shape), np.full(row.shape, special), np.full(row.shape, kind))


def _join(cls: type[Part], parts: list[Part]) -> Part:
    names: list[str] = [str(entry.name) for entry in fields(cls)]
    columns = [np.concatenate([_NOTHING, *(getattr(part, name) for part in parts)]) for name in names]
    return cls(*columns)


def _finish(
    parts: list[Segments], members: list[tuple[np.ndarray, int]], template: Template, sample: np.ndarray
) -> Plan:
    rows, specials, column = np.arange(sample.size), [], np.zeros(sample.size, dtype=np.int64)
    blocks = [(template.prefix, 0), *_between(members, template), (template.suffix, members[-1][1])]
    for block, kind in blocks:
        if isinstance(block, np.ndarray):
            column = column + block
            continue
        specials += [_specials(rows, column + j, special, kind) for j, special in enumerate(block)]
        column = column + len(block)
    return Plan(_join(Segments, parts), _join(Specials, specials), column, sample)


def _between(members: list[tuple[np.ndarray, int]], template: Template) -> list:
    blocks: list = [members[0]]
    for member in members[1:]:
        blocks += [(template.separator, 0), member]
    return blocks
