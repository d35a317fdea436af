"""Windows with a deletion or an inversion, of the same length as the reference window, and maps brought back to it.

Coordinates are 0-based and half-open.

Shapes: N bins, L bases.
"""

from typing import Literal, NamedTuple

import numpy as np

from genesplice_hf.data.fasta import Genome
from genesplice_hf.errors import DataError
from genesplice_hf.genome.alphabet import reverse_complement
from genesplice_hf.genome.interval import Interval

Extend = Literal["right", "symmetric"]


class StructuralWindow(NamedTuple):
    """One window with both alleles.

    Attributes:
        reference, alternative: L bases each.
        source: (L,) position in the genome that each base of the alternative comes from.
        window: where the reference lies.
    """

    reference: str
    alternative: str
    source: np.ndarray
    window: Interval


def deletion_window(
    genome: Genome, window: Interval, deletion: Interval, extend: Extend = "right"
) -> StructuralWindow:
    """The window without the deleted bases; as many more are read after it ("right") or half on each side.

    Raises:
        DataError: the deletion does not lie inside the window, or the contig ends before the extension does.
    """
    _demand_inside(window, deletion)
    if extend not in ("right", "symmetric"):
        raise DataError(f"`extend` must be 'right' or 'symmetric', got {extend!r}.")
    left = deletion.length_bp // 2 if extend == "symmetric" else 0
    start, end = window.start - left, window.end + deletion.length_bp - left
    if start < 0:
        raise DataError(f"the window {window} has no {left} bp before it; pass extend='right', or move it.")
    genome.locate(window.chrom, start, end)
    source = np.concatenate([np.arange(start, deletion.start), np.arange(deletion.end, end)])
    text = genome.seq(window.chrom, start, deletion.start) + genome.seq(window.chrom, deletion.end, end)
    return StructuralWindow(genome.seq(window.chrom, window.start, window.end), text, source, window)


def inversion_window(genome: Genome, window: Interval, inversion: Interval) -> StructuralWindow:
    """The window with the reverse complement of some of its bases in their place.

    Raises:
        DataError: the inversion does not lie inside the window.
    """
    _demand_inside(window, inversion)
    reference = genome.seq(window.chrom, window.start, window.end)
    first, last = inversion.start - window.start, inversion.end - window.start
    text = reference[:first] + reverse_complement(reference[first:last]) + reference[last:]
    source = np.arange(window.start, window.end)
    source[first:last] = source[first:last][::-1].copy()
    return StructuralWindow(reference, text, source, window)


def reference_bins(structural: StructuralWindow, bin_bp: int, crop: int = 0) -> np.ndarray:
    """(N,) the bin of the reference's map that each bin of the alternative's map shows; -1 = none.

    A bin is where the base in its middle comes from, so that edges of a variant inside a bin are rounded to a bin.

    Args:
        structural: the window.
        bin_bp: bases per bin; divides the window.
        crop: bins that the maps lack at each side.

    Raises:
        DataError: `bin_bp` does not divide the window.
    """
    length = len(structural.source)
    if bin_bp < 1 or length % bin_bp:
        raise DataError(f"`bin_bp` must divide the window of {length} bp, got {bin_bp}.")
    num_bins = length // bin_bp - 2 * crop
    middles = structural.source[bin_bp // 2 :: bin_bp][crop : crop + num_bins]
    bins = (middles - structural.window.start) // bin_bp - crop
    return np.where((bins >= 0) & (bins < num_bins), bins, -1)


def realigned(contact_map: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """The alternative's map (N, N, ...) in the reference's bins; NaN where the alternative shows none.

    Args:
        contact_map: of the alternative, symmetric.
        bins: of `reference_bins`.

    Raises:
        DataError: other numbers of bins.
    """
    if contact_map.shape[:2] != (len(bins), len(bins)):
        raise DataError(f"`contact_map` must be ({len(bins)}, {len(bins)}, ...), got shape {contact_map.shape}.")
    shown = np.flatnonzero(bins >= 0)
    out = np.full(contact_map.shape, np.nan, dtype=np.result_type(contact_map, np.float32))
    out[np.ix_(bins[shown], bins[shown])] = contact_map[np.ix_(shown, shown)]
    return out


def _demand_inside(window: Interval, variant: Interval) -> None:
    if variant.chrom != window.chrom or variant.start < window.start or variant.end > window.end:
        raise DataError(f"the variant {variant} must lie inside the window {window}.")
