"""Where a short IUPAC pattern, such as a binding consensus, occurs in a sequence, on either strand."""

import re
from typing import NamedTuple

from genesplice_hf.errors import SequenceError
from genesplice_hf.genome.alphabet import IUPAC, reverse_complement


class MotifHit(NamedTuple):
    """One occurrence; `start` and `end` are 0-based and half-open on the forward strand."""

    start: int
    end: int
    strand: str


def find_consensus(sequence: str, pattern: str, both_strands: bool = True) -> list[MotifHit]:
    """Finds every occurrence of `pattern`, overlapping ones included, sorted by start and then strand.

    Case is ignored and U reads as T. An ambiguous letter of `sequence` is matched by an N of the pattern
    only: an unknown base is no evidence for a motif.

    Args:
        sequence: the bases to search, forward strand.
        pattern: IUPAC codes, e.g. ``WTTTAYRTTTW``, the consensus of yeast replication origins.
        both_strands: also report where the reverse strand reads `pattern`; a pattern that is its own reverse
            complement is reported once, on ``+``.

    Raises:
        SequenceError: `pattern` is empty or holds a letter outside IUPAC.
    """
    pattern, text = _normalise(pattern), _normalise(sequence)
    hits = _scan(text, pattern, "+")
    reverse = reverse_complement(pattern)
    if both_strands and reverse != pattern:
        hits += _scan(text, reverse, "-")
    return sorted(hits)


def iupac_regex(pattern: str) -> str:
    """Writes an IUPAC pattern as a regular expression over upper-case DNA letters."""
    if not pattern:
        raise SequenceError("`pattern` is empty; pass at least one IUPAC code, e.g. 'WTTTAYRTTTW'")
    return "".join(_letter_class(code, position) for position, code in enumerate(_normalise(pattern), start=1))


def _normalise(sequence: str) -> str:
    return sequence.upper().replace("U", "T")


def _letter_class(code: str, position: int) -> str:
    if code not in IUPAC:
        raise SequenceError(f"`pattern` holds {code!r} at position {position}; use the IUPAC codes {''.join(IUPAC)}")
    letters = "".join(IUPAC) if code == "N" else IUPAC[code]
    return letters if len(letters) == 1 else f"[{letters}]"


def _scan(text: str, pattern: str, strand: str) -> list[MotifHit]:
    # A lookahead consumes nothing, so that overlapping occurrences are all found.
    found = re.finditer(f"(?={iupac_regex(pattern)})", text)
    return [MotifHit(match.start(), match.start() + len(pattern), strand) for match in found]
