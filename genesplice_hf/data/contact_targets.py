"""From a balanced contact matrix to the targets of Akita: log(observed / expected), clipped, smoothed and cut.

The steps of Fudenberg, Kelley and Pollard 2020 (methods, "Hi-C data processing"). Files in the `.cool` format
(Abdennur and Mirny 2020) are read by h5py (``pip install genesplice-hf[tracks]``); pooling of sparse neighbourhoods is
given as a function, `cooltools.lib.numutils.adaptive_coarsegrain` for that of the publication.

Shapes: N bins.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

from genesplice_hf.data.contacts import map_to_vector
from genesplice_hf.data.files import existing_file
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval

logger = logging.getLogger(__name__)

CoarseGrain = Callable[[np.ndarray, np.ndarray], np.ndarray]


class TargetRules(NamedTuple):
    """How targets are made of a matrix.

    Attributes:
        diagonal_offset: nearer diagonals count as noise: they take the median of this one, and no target.
        crop: bins without a target at each side.
        clip: largest absolute value of the logarithm.
        kernel_stddev: of a Gaussian over the finished map, in bins; 0 = none.
    """

    diagonal_offset: int = 2
    crop: int = 32
    clip: float = 2.0
    kernel_stddev: float = 0.0


RULES = TargetRules()


def contact_targets(
    matrix: np.ndarray,
    rules: TargetRules = RULES,
    blacklist: Sequence[int] = (),
    expected: np.ndarray | None = None,
    counts: np.ndarray | None = None,
    coarse_grain: CoarseGrain | None = None,
) -> np.ndarray:
    """(P,) float16 targets of one window.

    Args:
        matrix: (N, N) balanced contacts, symmetric, NaN where unknown.
        rules: see `TargetRules`.
        blacklist: bins whose contacts are not trusted.
        expected: (N,) mean contact per distance, for example of the chromosome; None = of this window.
        counts: (N, N) raw counts, for coarse-graining.
        coarse_grain: (balanced, counts) -> (N, N) balanced contacts with sparse neighbourhoods pooled; None = left
            out, with a warning where there are counts.

    Returns:
        The pairs of `np.triu_indices(N - 2 * crop, diagonal_offset)`; unknown ones are interpolated.

    Raises:
        DataError: a matrix that is not square and symmetric, negative, or too small; everything is unknown.
    """
    contacts = _checked(matrix, rules)
    contacts[list(blacklist)] = np.nan
    contacts[:, list(blacklist)] = np.nan
    contacts = without_near_diagonals(contacts, rules.diagonal_offset)
    contacts = _coarse_grained(contacts, counts, coarse_grain)
    level = distance_means(contacts) if expected is None else np.asarray(expected, dtype=np.float64)
    contact_map = interpolated(log_observed_over_expected(contacts, level, rules.clip))
    near = np.abs(np.subtract.outer(np.arange(len(contact_map)), np.arange(len(contact_map))))
    contact_map[near < rules.diagonal_offset] = 0.0
    if rules.kernel_stddev > 0:
        contact_map = gaussian_filter(contact_map, rules.kernel_stddev)
    inner = contact_map[rules.crop : len(contact_map) - rules.crop, rules.crop : len(contact_map) - rules.crop]
    return map_to_vector(inner, rules.diagonal_offset).astype(np.float16)


def read_cool(path: str, region: str, balance: bool = True) -> np.ndarray:
    """(N, N) contacts of a region; balanced ones are NaN in bins that balancing left out.

    Args:
        path: a `.cool` file, or `file.mcool::resolutions/2048`.
        region: `chr1:1-1,048,576` (1-based, both ends included); every bin that it touches.
        balance: multiply by the weights stored in the file.

    Raises:
        DataError: h5py is not installed, no such file, group or contig, no weights, or a region without bins.
    """
    try:
        import h5py
    except ImportError as error:
        raise DataError("`.cool` files need h5py: pip install 'genesplice-hf[tracks]'.") from error
    name, _, group = path.partition("::")
    wanted = Interval.parse(region)
    with h5py.File(existing_file(name), "r") as opened:
        try:
            cool = opened[group or "/"]
            first, last = _bins_of(cool, wanted)
            matrix = _pixels(cool, first, last)
            weights = cool["bins/weight"][first:last] if balance else None
        except KeyError as error:
            raise DataError(
                f"{path} lacks a part of the cooler format ({error}); balance it, or name its group."
            ) from error
    return matrix if weights is None else matrix * weights[:, None] * weights


def _bins_of(cool: Any, wanted: Interval) -> tuple[int, int]:
    names = [name.decode() for name in cool["chroms/name"][:]]
    if wanted.chrom not in names:
        raise DataError(f"`region` is on {wanted.chrom!r}; the file has {', '.join(names[:8])}.")
    start, stop = (int(place) for place in cool["indexes/chrom_offset"][names.index(wanted.chrom) :][:2])
    touched = (cool["bins/start"][start:stop] < wanted.end) & (cool["bins/end"][start:stop] > wanted.start)
    if not touched.any():
        raise DataError(f"`region` {wanted} lies beyond the bins of {wanted.chrom}.")
    places = np.flatnonzero(touched)
    return start + int(places[0]), start + int(places[-1]) + 1


def _pixels(cool: Any, first: int, last: int) -> np.ndarray:
    """Counts between bins first .. last - 1; the file holds the upper triangle, row after row."""
    low, high = (int(cool["indexes/bin1_offset"][place]) for place in (first, last))
    rows, columns, counts = (cool[f"pixels/{name}"][low:high] for name in ("bin1_id", "bin2_id", "count"))
    inside = columns < last
    rows, columns = rows[inside] - first, columns[inside] - first
    matrix = np.zeros((last - first, last - first))
    matrix[rows, columns] = matrix[columns, rows] = counts[inside]
    return matrix


def without_near_diagonals(contacts: np.ndarray, offset: int) -> np.ndarray:
    """Diagonals nearer than `offset` take its median, and no contact is larger than that."""
    median = float(np.nanmedian(np.diagonal(contacts, offset)))
    distance = np.abs(np.subtract.outer(np.arange(len(contacts)), np.arange(len(contacts))))
    levelled = np.where((distance < offset) & ~np.isnan(contacts), median, contacts)
    return np.clip(levelled, 0, median)


def distance_means(contacts: np.ndarray) -> np.ndarray:
    """(N,) mean of the known contacts at each distance; NaN where none is known."""
    means = np.full(len(contacts), np.nan)
    for distance in range(len(contacts)):
        diagonal = np.diagonal(contacts, distance)
        known = ~np.isnan(diagonal)
        if known.any():
            means[distance] = diagonal[known].mean()
    return means


def log_observed_over_expected(contacts: np.ndarray, expected: np.ndarray, clip: float) -> np.ndarray:
    """Natural logarithm of contacts / expected, clipped; no contact where one is expected is -clip."""
    if expected.shape != (len(contacts),):
        raise DataError(f"`expected` must be ({len(contacts)},), one mean per distance, got shape {expected.shape}.")
    distance = np.abs(np.subtract.outer(np.arange(len(contacts)), np.arange(len(contacts))))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = contacts / expected[distance]
        return np.clip(np.where(np.isfinite(ratio), np.log(ratio), np.nan), -clip, clip)


def interpolated(contact_map: np.ndarray) -> np.ndarray:
    """Unknown values by linear interpolation along their diagonal, where distances are equal; 0 where all are unknown.

    Beyond the last known value of a diagonal it is repeated.
    """
    filled = contact_map.copy()
    places = np.arange(len(filled))
    for distance in range(len(filled)):
        rows = places[: len(filled) - distance]
        values = filled[rows, rows + distance]
        known = ~np.isnan(values)
        values = np.interp(rows, rows[known], values[known]) if known.any() else np.zeros(len(rows))
        filled[rows, rows + distance] = filled[rows + distance, rows] = values
    return filled


def _checked(matrix: np.ndarray, rules: TargetRules) -> np.ndarray:
    contacts = np.array(matrix, dtype=np.float64)
    if contacts.ndim != 2 or contacts.shape[0] != contacts.shape[1]:
        raise DataError(f"`matrix` must be square, got shape {contacts.shape}.")
    if len(contacts) <= 2 * rules.crop + rules.diagonal_offset:
        raise DataError(
            f"`matrix` has {len(contacts)} bins, which must be more than 2 x `crop` + `diagonal_offset` = "
            f"{2 * rules.crop + rules.diagonal_offset}."
        )
    if not np.allclose(contacts, contacts.T, equal_nan=True):
        raise DataError("`matrix` must be symmetric; pass both triangles.")
    if (contacts < 0).any():
        raise DataError("`matrix` must not be negative; pass balanced contacts, not their logarithm.")
    if np.isnan(np.diagonal(contacts, rules.diagonal_offset)).all():
        raise DataError(f"`matrix` is unknown all along the diagonal {rules.diagonal_offset}; the window has no data.")
    return contacts


def _coarse_grained(contacts: np.ndarray, counts: np.ndarray | None, coarse_grain: CoarseGrain | None) -> np.ndarray:
    if coarse_grain is None:
        if counts is not None:
            logger.warning("`counts` have no effect without `coarse_grain`; sparse neighbourhoods are not pooled.")
        return contacts
    if counts is None:
        raise DataError("`coarse_grain` needs `counts`, the raw contacts of the window.")
    return np.asarray(coarse_grain(contacts, counts), dtype=np.float64)
