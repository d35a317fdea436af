"""Expression values of one cell -> bin digits by the cell's own quantiles, and back.

The binning of scGPT (Cui et al., Nature Methods 2024; `scgpt/preprocess.py`) with three more rules for ties that need
no random numbers. n non-zero values of a cell, `n_bins` digits 0..n_bins - 1 (0 = not expressed), n_bins - 1 edges.
"""

import hashlib
from typing import Literal, NamedTuple

import numpy as np

from genesplice_hf.errors import DataError

TieBreak = Literal["mid", "left", "mid_floor", "random"]
TIE_BREAKS: tuple[str, ...] = ("mid", "left", "mid_floor", "random")
MIN_BINS = 3


class BinnedCell(NamedTuple):
    """One cell after binning.

    Attributes:
        digits: the input's shape, float64: 0 where the value is 0, else 1..n_bins - 1 (halves with "mid").
        edges: (n_bins - 1,) float64 quantiles of the non-zero values, zeros for a cell without any; they lead back
            by `unbin_values`.
    """

    digits: np.ndarray
    edges: np.ndarray


def bin_values(
    values: np.ndarray,
    n_bins: int = 51,
    tie_break: TieBreak = "mid",
    uniforms: np.ndarray | None = None,
    seed: int = 0,
    cell_id: str | int = 0,
) -> BinnedCell:
    """Bins one cell by the quantiles of its non-zero values.

    With edges e, a value x lies between `right` = #{e < x} and `left` = #{e <= x}; where edges coincide (counts have
    many ties) the two differ, and the rule says which digit it gets:

    | `tie_break` | digit |
    |---|---|
    | "mid" | (right + 1 + left) / 2, the mean of the random rule |
    | "left" | left |
    | "mid_floor" | "mid" rounded down, for models that embed whole digits |
    | "random" | ceil(left - u (left - right)), u uniform in [0, 1): scGPT's |

    Args:
        values: (n,) values of one cell, zeros included or not; finite, 0 or more.
        n_bins: digits in all, 3 or more.
        tie_break: see above.
        uniforms: (non-zero values,) the u of "random" in row order; None draws them for (seed, cell_id), so that a
            cell's digits depend neither on its batch nor on the order of cells.
        seed, cell_id: of the draw.

    Raises:
        DataError: values that are negative or not finite, an unknown rule, too few bins, another number of uniforms.
    """
    values = _checked(values, n_bins, tie_break)
    is_expressed = values != 0
    expressed = values[is_expressed]
    edges = bin_edges(expressed, n_bins)
    digits = np.zeros(values.shape)
    if expressed.size:
        left, right = digit_range(expressed, edges)
        if tie_break == "random":
            uniforms = cell_uniforms(seed, cell_id, expressed.size) if uniforms is None else np.asarray(uniforms)
            _check_uniforms(uniforms, expressed.size)
        digits[is_expressed] = break_ties(left, right, tie_break, uniforms)
    return BinnedCell(digits, edges)


def bin_edges(expressed: np.ndarray, n_bins: int) -> np.ndarray:
    """(n_bins - 1,) float64 quantiles of non-zero values (n,), from the smallest to the largest; zeros for n = 0."""
    if not len(expressed):
        return np.zeros(n_bins - 1)
    # Quantiles by linear interpolation between the two neighbours, written as numpy does so that ties are exact.
    ordered = np.sort(np.asarray(expressed, dtype=np.float64))
    places = np.linspace(0, 1, n_bins - 1) * (len(ordered) - 1)
    below = np.floor(places).astype(np.int64)
    low, high = ordered[below], ordered[np.minimum(below + 1, len(ordered) - 1)]
    share, gap = places - below, high - low
    return np.where(share >= 0.5, high - gap * (1 - share), low + gap * share)


def digit_range(values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(left, right) = (#{edges <= x}, #{edges < x}) for every value x; edges increase."""
    values = np.asarray(values, dtype=np.float64)
    return np.searchsorted(edges, values, side="right"), np.searchsorted(edges, values, side="left")


def break_ties(left: np.ndarray, right: np.ndarray, tie_break: str, uniforms: np.ndarray | None = None) -> np.ndarray:
    """Digits (float64) of values between `right` and `left`; see `bin_values`."""
    if tie_break == "left":
        return left.astype(np.float64)
    if tie_break == "random":
        assert uniforms is not None
        return np.ceil(uniforms * (right - left) + left)
    middle = np.where(left > right, (right + 1 + left) / 2, left)
    return np.floor(middle) if tie_break == "mid_floor" else middle


def tie_widths(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """How many digits each value may get under the random rule: max(left - right, 1), 1 for zeros."""
    left, right = digit_range(values, edges)
    return np.where(np.asarray(values) != 0, np.maximum(left - right, 1), 1)


def cell_uniforms(seed: int, cell_id: str | int, count: int) -> np.ndarray:
    """(count,) numbers in [0, 1) that belong to (seed, cell_id), whatever was drawn before."""
    name = f"{seed}:{type(cell_id).__name__}:{cell_id}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def bin_centres(edges: np.ndarray) -> np.ndarray:
    """(n_bins,) value that each digit stands for: 0, the middles between neighbouring edges, the largest value."""
    edges = np.asarray(edges, dtype=np.float64)
    return np.concatenate([[0.0], (edges[:-1] + edges[1:]) / 2, edges[-1:]])


def unbin_values(digits: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The way back: digits, or a model's predictions in digits, as values, linear between the centres of bins.

    Args:
        digits: any shape; below 0 counts as 0, above n_bins - 1 as the largest.
        edges: (n_bins - 1,) of the same cell, from `bin_values`.
    """
    centres = bin_centres(edges)
    return np.interp(digits, np.arange(len(centres)), centres)


def _checked(values: np.ndarray, n_bins: int, tie_break: str) -> np.ndarray:
    if isinstance(n_bins, bool) or not isinstance(n_bins, (int, np.integer)) or n_bins < MIN_BINS:
        raise DataError(f"`n_bins` must be a whole number, {MIN_BINS} or more, got {n_bins!r}.")
    if tie_break not in TIE_BREAKS:
        raise DataError(f"`tie_break` must be one of {', '.join(TIE_BREAKS)}, got {tie_break!r}.")
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError("`values` must be finite, but hold NaN or infinity; repair or drop the cell.")
    if values.size and values.min() < 0:
        raise DataError(
            f"`values` must be 0 or more, but the smallest is {values.min():g}; scaled data cannot be binned: give "
            "counts or log1p values."
        )
    return values


def _check_uniforms(uniforms: np.ndarray, count: int) -> None:
    if uniforms.shape != (count,):
        raise DataError(f"`uniforms` must hold one number per non-zero value, ({count},), got shape {uniforms.shape}.")
