"""Are two models' errors different? Differences cell by cell, seeds as blocks.

S seeds, C test cells.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

_DRAWS = 10_000


class Difference(NamedTuple):
    """Mean squared error of one model minus that of another.

    Attributes:
        mean: over all hidden values and seeds.
        low, high: 95 % interval of the bootstrap.
        p: two-sided; never below 2 / draws.
    """

    mean: float
    low: float
    high: float
    p: float


def paired_difference(
    squares: np.ndarray, reference: np.ndarray, counts: np.ndarray, seed: int = 0, draws: int = _DRAWS
) -> Difference:
    """Bootstrap over cells and over seeds of the difference of two models that were asked the same.

    Every draw takes C cells and S seeds with replacement, both models together; the interval holds the middle 95 % of
    the drawn differences, and p is twice the smaller share of draws on one side of zero (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, chapters 13 and 16).

    Args:
        squares, reference: (S, C) sums of squared errors of the two models; one row for a baseline without seeds.
        counts: (C,) hidden values of every cell.
    """
    gaps = np.atleast_2d(squares) - np.atleast_2d(reference)
    random = np.random.default_rng(seed)
    seeds, cells = gaps.shape
    of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    of_cells = random.multinomial(cells, np.full(cells, 1 / cells), draws)
    drawn = np.einsum("ds,dc,sc->d", of_seeds, of_cells, gaps) / (of_cells @ counts)
    low, high = np.quantile(drawn, (0.025, 0.975))
    side = min(np.mean(drawn <= 0), np.mean(drawn >= 0))
    mean = float(gaps.mean(0).sum() / counts.sum())
    return Difference(mean, float(low), float(high), float(min(1.0, 2 * max(side, 1 / draws))))


def adjusted(p_values: Sequence[float]) -> list[float]:
    """False discovery rates of several comparisons (Benjamini and Hochberg 1995)."""
    return stats.false_discovery_control(p_values).tolist() if p_values else []


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval (t) of the mean of several seeds; NaN for one."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
