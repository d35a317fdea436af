"""Contact maps simulated from where a motif stands and how it points, in the manner of loop extrusion.

This is a test bed, not biology: a map is a fixed function of the motif's hits in the window. Two arms run apart from
where they are loaded. The arm that moves left stops at a site on the forward strand, the one that moves right at one
on the reverse strand, each with the site's occupancy; so sites that point at each other hold a loop (a dot), one of
them alone gives a stripe, and everything between bins with a site in between is seen less (insulation).

    log enrichment(i, j) = dot * f_i r_j sf(i, j) sr(i, j) + stripe * (f_i sr(i, j) + r_j sf(i, j)) / 2
                           - insulation * (1 - sf(i, j) sr(i, j))

f_i, r_j: probability that bin i (j) stops an arm moving left (right); sf, sr: that none of the bins between does.
Contacts are distance^-1 * exp(enrichment), and the targets are made of them as of measured ones.

Shapes: L bases, W columns of the motif, N bins.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

from genesplice_hf.data.files import open_binary
from genesplice_hf.errors import DataError

PSEUDOCOUNT = 1.0


class Physics(NamedTuple):
    """Strengths of the simulated effects, as natural logarithms of contacts, and the blur in bins."""

    dot: float = 1.5
    stripe: float = 1.0
    insulation: float = 1.0
    blur: float = 0.7


PHYSICS = Physics()


class Sites(NamedTuple):
    """Occupancy of every position as the middle of a site, (L,) each, on the forward and on the reverse strand."""

    forward: np.ndarray
    reverse: np.ndarray


def read_motif(path: str | Path, name: str) -> np.ndarray:
    """(W, 4) counts of A, C, G, T of the motif whose header is or ends with `name`.

    The file holds `>header` lines, each followed by one line of four numbers per column; plain or gzip.

    Raises:
        DataError: no such motif, or lines of other than four numbers.
    """
    with open_binary(path) as stream:
        lines = stream.read().decode("ascii").splitlines()
    starts = [place for place, line in enumerate(lines) if line.startswith(">")]
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        if lines[start][1:].strip() == name:
            try:
                counts = np.array([[float(word) for word in line.split()] for line in lines[start + 1 : stop] if line])
            except ValueError as error:
                raise DataError(f"{path}: the motif {name!r} holds other than rows of numbers ({error}).") from error
            if counts.ndim != 2 or counts.shape[1] != 4:
                raise DataError(f"{path}: the motif {name!r} must have four numbers per row, got {counts.shape}.")
            return counts
    raise DataError(f"{path} holds no motif {name!r}; its first is {lines[starts[0]][1:] if starts else 'none'!r}.")


def log_odds(counts: np.ndarray) -> np.ndarray:
    """(W, 4) log2 odds against equal bases, with a pseudocount."""
    padded = counts + PSEUDOCOUNT / 4
    return np.log2(padded / padded.sum(1, keepdims=True) * 4)


def find_sites(ids: np.ndarray, weights: np.ndarray, threshold: float, softness: float = 1.0) -> Sites:
    """Occupancies: a logistic function of the score in bits over `threshold`; 0 more than four softnesses below.

    Args:
        ids: (L,) A, C, G, T = 0 .. 3, others unknown; a place with an unknown base is no site.
        weights: (W, 4) log odds.
        threshold: score with occupancy one half.
        softness: bits over which the occupancy rises.
    """
    return Sites(*(_occupancy(_scan(ids, w), threshold, softness) for w in (weights, weights[::-1, ::-1])))


def contact_matrix(sites: Sites, bin_bp: int, physics: Physics = PHYSICS) -> np.ndarray:
    """(N, N) simulated contacts of a window."""
    stop_left, stop_right = (_per_bin(values, bin_bp) for values in sites)
    num_bins = len(stop_left)
    between_left, between_right = _free_between(stop_left), _free_between(stop_right)
    free = between_left * between_right
    strength = (
        physics.dot * stop_left[:, None] * stop_right * free
        + physics.stripe * (stop_left[:, None] * between_right + stop_right * between_left) / 2
        - physics.insulation * (1 - free)
    )
    upper = np.triu(strength, 1)
    enrichment = gaussian_filter(upper + upper.T, physics.blur)
    distance = np.abs(np.subtract.outer(np.arange(num_bins), np.arange(num_bins)))
    return np.exp(enrichment) / (1 + distance)


def _scan(ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(L,) score of the motif with its middle at each position; -inf at unknown bases and where it does not fit."""
    table = np.concatenate([weights, np.full((len(weights), 1), -np.inf)], axis=1)
    scores = np.full(len(ids), -np.inf)
    places, middle = len(ids) - len(weights) + 1, len(weights) // 2
    if places > 0:
        known = np.minimum(ids, 4)
        scores[middle : middle + places] = sum(
            table[column][known[column : column + places]] for column in range(len(weights))
        )
    return scores


def _occupancy(scores: np.ndarray, threshold: float, softness: float) -> np.ndarray:
    steps = (scores - threshold) / softness
    return np.where(steps > -4, 1 / (1 + np.exp(-np.clip(steps, -30, 30))), 0.0)


def _per_bin(occupancy: np.ndarray, bin_bp: int) -> np.ndarray:
    """(N,) probability that at least one site of a bin is taken."""
    num_bins = -(-len(occupancy) // bin_bp)
    padded = np.pad(occupancy, (0, num_bins * bin_bp - len(occupancy)))
    return 1 - (1 - padded.reshape(num_bins, bin_bp)).prod(1)


def _free_between(stop: np.ndarray) -> np.ndarray:
    """(N, N): for i < j, the probability that no bin strictly between i and j stops an arm."""
    before = np.concatenate([[0.0], np.cumsum(np.log(np.maximum(1 - stop, 1e-12)))])
    rows, columns = np.indices((len(stop), len(stop)))
    between = before[np.maximum(columns, 1)] - before[np.minimum(rows + 1, len(stop))]
    return np.exp(np.where(columns > rows + 1, between, 0.0))
