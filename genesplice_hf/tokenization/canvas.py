"""Places the tokens of a batch into model rows: special tokens, windows, pairs, pieces and padding.

R model rows, S segments (a segment is a stretch of one sequence's tokens inside one row), W row width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from genesplice_hf.tokenization.spans import span_mask


@dataclass(frozen=True)
class Segments:
    """Which stretch of tokens goes to which place.

    Attributes:
        row: (S,) model row.
        token: (S,) index of the first token in the batch's flat token array.
        count: (S,) number of tokens.
        column: (S,) place of the first token in its row, before padding on the left.
        kind: (S,) token type, 0 or 1.
    """

    row: np.ndarray
    token: np.ndarray
    count: np.ndarray
    column: np.ndarray
    kind: np.ndarray


@dataclass(frozen=True)
class Specials:
    """Special tokens by row, column (before left padding), id and token type; each array (n,)."""

    row: np.ndarray
    column: np.ndarray
    ids: np.ndarray
    kind: np.ndarray


@dataclass(frozen=True)
class Plan:
    """Everything that a canvas needs: `length` (R,) tokens per row and `sample` (R,) its sequence."""

    segments: Segments
    specials: Specials
    length: np.ndarray
    sample: np.ndarray


class BlockCanvas:
    """Rows of equal content, the usual case: prefix, `count` tokens, suffix, then padding up to `width`."""

    def __init__(self, rows: int, count: int, prefix: list[int], suffix: list[int], width: int, left: bool):
        self.shape, self.count, self.prefix, self.suffix = (rows, width), count, prefix, suffix
        self.content = len(prefix) + count + len(suffix)
        self.start = width - self.content if left else 0
        self.is_rectangular = True

    @property
    def sample(self) -> np.ndarray:
        """(R,) the sequence of every row: its own."""
        return np.arange(self.shape[0])

    def paint(self, values: np.ndarray, fill: Any, dtype: Any = None) -> np.ndarray:
        """Returns (R, W, ...): `values` of the tokens in their places, `fill` everywhere else."""
        first = self.start + len(self.prefix)
        tail, dtype = values.shape[1:], dtype or values.dtype
        if self.count == self.shape[1]:
            return values.reshape(*self.shape, *tail).astype(dtype, copy=False)
        out = np.empty((*self.shape, *tail), dtype=dtype)
        out[:, :first] = fill
        out[:, first + self.count :] = fill
        out[:, first : first + self.count] = values.reshape(self.shape[0], self.count, *tail)
        return out

    def needs_pads(self) -> bool:
        """Whether any cell will hold a pad."""
        return self.content < self.shape[1]

    def ids(self, values: np.ndarray, pad: int) -> np.ndarray:
        """Returns (R, W) int64 ids with special tokens and pads."""
        out = self.paint(values, pad, np.int64)
        for offset, special in enumerate(self.prefix):
            out[:, self.start + offset] = special
        for offset, special in enumerate(self.suffix, start=self.start + self.content - len(self.suffix)):
            out[:, offset] = special
        return out

    def attention_mask(self) -> np.ndarray:
        """Returns (R, W) int64: 1 for tokens and special tokens, 0 for pads."""
        if self.content == self.shape[1]:
            return np.ones(self.shape, dtype=np.int64)
        mask = np.zeros(self.shape, dtype=np.int64)
        mask[:, self.start : self.start + self.content] = 1
        return mask

    def token_types(self) -> np.ndarray:
        """Returns (R, W) zeros: there is one sequence per row."""
        return np.zeros(self.shape, dtype=np.int64)

    def widths(self) -> list[int]:
        """Returns the number of columns of every row."""
        return [self.shape[1]] * self.shape[0]

    def rows(self, painted: np.ndarray) -> list[Any]:
        """Returns one nested list per row."""
        return painted.tolist()


class RaggedCanvas:
    """Rows of any content; arrays are one flat line of cells until `finish` folds them to (R, W)."""

    def __init__(self, plan: Plan, width: np.ndarray, left: bool):
        self.plan, self.width, self.sample = plan, width, plan.sample
        self.is_rectangular = bool(width.size == 0 or (width == width[0]).all())
        self.base = np.cumsum(width) - width
        self.start = self.base + (width - plan.length if left else 0)
        self.cells = int(width.sum())
        self._special_cells = self.start[plan.specials.row] + plan.specials.column
        parts = plan.segments
        cell = self.start[parts.row] + parts.column
        self._moves = list(zip(cell.tolist(), parts.token.tolist(), parts.count.tolist(), strict=True))

    def finish(self, flat: np.ndarray) -> np.ndarray:
        """Folds cells to (R, W, ...) where all rows are equally wide."""
        if not self.is_rectangular:
            return flat
        width = int(self.width[0]) if self.width.size else 0
        return flat.reshape(self.width.size, width, *flat.shape[1:])

    def paint(self, values: np.ndarray, fill: Any, dtype: Any = None) -> np.ndarray:
        """Returns the token `values` in their cells, `fill` everywhere else."""
        flat = np.full((self.cells, *values.shape[1:]), fill, dtype=dtype or values.dtype)
        # Slices, not index arrays: those would need eight bytes per token and widen narrow values first.
        for cell, token, count in self._moves:
            flat[cell : cell + count] = values[token : token + count]
        return self.finish(flat)

    def needs_pads(self) -> bool:
        """Whether any cell will hold a pad."""
        return bool((self.width > self.plan.length).any())

    def ids(self, values: np.ndarray, pad: int) -> np.ndarray:
        """Returns int64 ids with special tokens and pads."""
        out = self.paint(values, pad, np.int64)
        out.reshape(-1)[self._special_cells] = self.plan.specials.ids
        return out

    def attention_mask(self) -> np.ndarray:
        """Returns int64: 1 for tokens and special tokens, 0 for pads."""
        return self.finish(span_mask(self.cells, self.start, self.start + self.plan.length).astype(np.int64))

    def token_types(self) -> np.ndarray:
        """Returns int64: 1 for the second member of a pair and the separator after it, 0 elsewhere."""
        types = np.zeros(self.cells, dtype=np.int64)
        for (cell, _, count), kind in zip(self._moves, self.plan.segments.kind.tolist(), strict=True):
            if kind:
                types[cell : cell + count] = kind
        types[self._special_cells] = self.plan.specials.kind
        return self.finish(types)

    def widths(self) -> list[int]:
        """Returns the number of columns of every row."""
        return self.width.tolist()

    def rows(self, painted: np.ndarray) -> list[Any]:
        """Returns one nested list per row."""
        if self.is_rectangular:
            return painted.tolist()
        flat = painted.tolist()
        return [flat[b : b + w] for b, w in zip(self.base.tolist(), self.width.tolist(), strict=True)]


Canvas = BlockCanvas | RaggedCanvas


@dataclass(frozen=True)
class Padding:
    """How wide rows become.

    Attributes:
        strategy: "do_not_pad", "longest" or "max_length".
        max_length: width for "max_length".
        multiple_of: widths are rounded up to it when there is padding.
        left: pads go before the tokens.
    """

    strategy: str = "do_not_pad"
    max_length: int | None = None
    multiple_of: int | None = None
    left: bool = False

    def widths(self, lengths: np.ndarray) -> np.ndarray:
        """Returns (R,) row widths for rows of `lengths` tokens."""
        if self.strategy == "do_not_pad" or lengths.size == 0:
            return lengths
        return np.maximum(lengths, self.width(int(lengths.max())))

    def width(self, longest: int) -> int:
        """Returns the width of a row of `longest` tokens that is the longest of its batch."""
        if self.strategy == "do_not_pad":
            return longest
        width = longest if self.strategy == "longest" else max(longest, self.max_length or 0)
        return -(-width // self.multiple_of) * self.multiple_of if self.multiple_of else width
