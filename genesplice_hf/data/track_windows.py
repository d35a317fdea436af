"""Windows of DNA as ids of the Enformer vocabulary: A, C, G, T = 0 to 3, N = 4, off the chromosome = 4 or 5.

A window is `(chrom, start, end)`, 0-based and half-open; unlike an `Interval` it may leave its chromosome on either
side, because widening a region near an end does.

Shapes: N windows, L bases.
"""

import logging
import operator
from collections.abc import Sequence
from os import PathLike
from typing import Literal, NamedTuple

import numpy as np
import torch

from genesplice_hf.data.bed import read_bed
from genesplice_hf.data.fasta import Genome
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval
from genesplice_hf.tokenization.normalizer import SequenceNormalizer

logger = logging.getLogger(__name__)

UNKNOWN_ID, PAD_ID = 4, 5
ENFORMER_CONTEXT_BP = 196_608
OffChromosome = Literal["n", "pad"]

_LETTERS = np.frombuffer(b"ACGTNN", dtype=np.uint8)
_IDS = np.full(256, UNKNOWN_ID, dtype=np.uint8)
_IDS[_LETTERS[:4]] = np.arange(4)


class Window(NamedTuple):
    """Bases `start` to `end - 1` of `chrom`, counted from 0; those outside the chromosome are unknown."""

    chrom: str
    start: int
    end: int


class PreparedInputs(NamedTuple):
    """What `prepare_enformer_inputs` returns.

    Attributes:
        input_ids: uint8 (N, L), ids of the Enformer vocabulary.
        windows: where each row comes from.
        sequences: the letters of each row as they stand in the file (N off the chromosome), if asked for.
    """

    input_ids: torch.Tensor
    windows: list[Window]
    sequences: list[str] | None


def centred(start: int, end: int, length: int) -> tuple[int, int]:
    """`[start, end)` widened or cropped to `length` around its centre; an odd base is added or cut on the right.

    So a crop to the middle `(n - T) // 2` of what was widened gives the region back.
    """
    excess = end - start - length
    start += excess // 2 if excess >= 0 else -(-excess // 2)
    return start, start + length


def window_letters(genome: Genome, window: Window) -> np.ndarray:
    """ASCII letters of a window, uint8 (L,), case kept; N off the chromosome.

    Raises:
        DataError: the chromosome is unknown, or none of the window lies on it.
    """
    name = genome.resolve(window.chrom)
    low, high = max(0, window.start), min(genome.contigs[name], window.end)
    if low >= high:
        raise DataError(
            f"`interval` {window.chrom}:{window.start}-{window.end} (0-based) must share a base with {name!r}, which "
            f"is {genome.contigs[name]} bp long in {genome.path.name}; check the assembly that it was made for."
        )
    letters = np.full(window.end - window.start, ord("N"), dtype=np.uint8)
    letters[low - window.start : high - window.start] = genome.array(name, low, high)
    return letters


def window_text(genome: Genome, window: Window) -> str:
    """`window_letters` as text."""
    return window_letters(genome, window).tobytes().decode("ascii")


def window_ids(genome: Genome, window: Window, offchrom: OffChromosome = "n") -> np.ndarray:
    """Ids of a window, uint8 (L,).

    Args:
        genome: where the bases come from. IUPAC codes other than A, C, G, T, U become N.
        window: may leave the chromosome, not wholly.
        offchrom: what bases outside the chromosome become: `"n"` (4, as DeepMind's code) or `"pad"` (5).

    Raises:
        DataError: as `window_letters`, or `offchrom` is neither of the two.
    """
    ids = letter_ids(window_letters(genome, window))
    if pad_id(offchrom) != UNKNOWN_ID:
        length = genome.contigs[genome.resolve(window.chrom)]
        ids[: max(0, -window.start)] = PAD_ID
        ids[max(0, length - window.start) :] = PAD_ID
    return ids


def pad_id(offchrom: str) -> int:
    """The id of a base off the chromosome; raises `DataError` for an unknown choice."""
    if offchrom not in ("n", "pad"):
        raise DataError(f"`offchrom` must be 'n' (id 4) or 'pad' (id 5), was {offchrom!r}.")
    return UNKNOWN_ID if offchrom == "n" else PAD_ID


def letter_ids(sequence: str | np.ndarray) -> np.ndarray:
    """Ids uint8 (L,) of letters, by the rules of `SequenceNormalizer` (either case, U = T, other codes = N).

    Raises:
        SequenceError: a letter outside the IUPAC codes.
    """
    return _IDS[SequenceNormalizer().encode(sequence)]


def id_letters(ids: np.ndarray) -> str:
    """The DNA text of ids 0 to 5: N for 4 and 5.

    Raises:
        DataError: an id outside 0 to 5.
    """
    if ids.size and (ids.min() < 0 or ids.max() > PAD_ID):
        raise DataError(f"`input_ids` must be 0 to {PAD_ID}, were {ids.min()} to {ids.max()}.")
    return _LETTERS[ids].tobytes().decode("ascii")


def prepare_enformer_inputs(
    fasta: Genome | str | PathLike[str],
    intervals: str | PathLike[str] | Sequence[Interval | tuple[str, int, int]],
    context_length: int = ENFORMER_CONTEXT_BP,
    offchrom: OffChromosome = "n",
    return_sequence: bool = False,
) -> PreparedInputs:
    """Regions of a genome as inputs of Enformer: each is widened, or cropped, to `context_length` around its centre.

    With the default of 196,608 bp the published model predicts the 896 bins of 128 bp in the centre, 114,688 bp; a
    window made for TF-Hub (393,216 bp) is cropped to what that model reads.

    Args:
        fasta: a genome, or the path of a FASTA file.
        intervals: regions (0-based, half-open; the strand is not used), or the path of a BED file.
        context_length: bases of every row.
        offchrom: bases outside the chromosome become `"n"` (4) or `"pad"` (5).
        return_sequence: also return the letters.

    Raises:
        DataError: an unknown chromosome (with its line of the BED file), a region that misses its chromosome or has
            no base, no region at all.
    """
    genome = fasta if isinstance(fasta, Genome) else Genome(fasta)
    check_length("context_length", context_length)
    given = _regions(genome, intervals)
    cropped = sum(part.length_bp > context_length for part in given)
    if cropped:
        logger.warning("%d of %d intervals are cropped to the centre %d bp.", cropped, len(given), context_length)
    windows = [Window(part.chrom, *centred(part.start, part.end, context_length)) for part in given]
    ids = torch.from_numpy(np.stack([window_ids(genome, window, offchrom) for window in windows]))
    return PreparedInputs(ids, windows, [window_text(genome, part) for part in windows] if return_sequence else None)


def check_length(argument: str, value: int | None) -> None:
    """Raises `DataError` unless `value` is None or a whole number of 1 or more."""
    try:
        wrong = value is not None and operator.index(value) < 1
    except TypeError:
        wrong = True
    if wrong:
        raise DataError(f"`{argument}` must be a whole number of 1 or more, was {value!r}.")


def _regions(genome: Genome, intervals: str | PathLike[str] | Sequence) -> list[Interval]:
    if isinstance(intervals, (str, PathLike)):
        return list(read_bed(intervals, contigs=genome.contigs).intervals)
    regions = [part if isinstance(part, Interval) else Interval(*part) for part in intervals]
    if not regions:
        raise DataError("`intervals` must hold at least one region, it is empty.")
    return regions
