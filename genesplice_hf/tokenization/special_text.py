"""Finds special tokens that are written out inside a sequence (`ACGT[MASK]ACGT`), as fill-mask prompts do.

Codes shared by all schemes: 0..3 bases (or ids, for single bases), then the values below.
"""

import re
from dataclasses import dataclass

import numpy as np

from genesplice_hf.tokenization.batches import Batch

CODE_N = 4
CODE_UNKNOWN = 5
FIRST_MARK = 250  # nothing below is a mark, so one maximum tells whether a buffer is plain
CODE_SPECIAL = 251
CODE_SKIP = 252
CODE_ILLEGAL = 255


@dataclass(frozen=True)
class WrittenSpecials:
    """Special tokens found in a buffer: position of the first character, number of characters, id; each (n,)."""

    position: np.ndarray
    size: np.ndarray
    ids: np.ndarray


def mark_specials(codes: np.ndarray, batch: Batch, ids: dict[str, int]) -> WrittenSpecials:
    """Overwrites written special tokens in `codes` by CODE_SPECIAL (first character) and CODE_SKIP (the rest).

    Args:
        codes: (bases of the batch,) uint8, changed in place.
        batch: the raw text.
        ids: the special tokens to look for and their ids; those of a single character are left to the table.
    """
    ends = np.cumsum(batch.lengths)
    found = []
    for match in _pattern(ids).finditer(batch.buffer) if ids else ():
        row = int(np.searchsorted(ends, match.start(), side="right"))
        if match.end() > ends[row]:
            continue
        codes[match.start()] = CODE_SPECIAL
        codes[match.start() + 1 : match.end()] = CODE_SKIP
        found.append((match.start(), match.end() - match.start(), ids[match.group().decode("ascii")]))
    return WrittenSpecials(*np.array(found, dtype=np.int64).reshape(-1, 3).T)


def _pattern(tokens: dict[str, int]) -> re.Pattern[bytes]:
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile(b"|".join(re.escape(token.encode("ascii")) for token in ordered))
