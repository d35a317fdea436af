"""Overlapping k-mers as what they are: windows on a chain of bases.

A *stretch* is a chain of k-mers in which each is the one before moved by one base; windows with N and the
ends of a sequence end a stretch, special tokens inside a long sequence (pieces of 510 tokens) do not.
T tokens in a stretch stand on T + k - 1 bases; token t covers the bases t .. t + k - 1.

Shapes: N tokens of the whole batch laid end to end, T k-mers among them, W windows, R runs, V ids.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.objectives.collation import TokenBatch
from genesplice_hf.objectives.vocabulary import dna_tokens

_NOT_A_KMER = -1


class KmerCode:
    """Ids of the k-mers and their codes: base 4 with A, C, G, T = 0, 1, 2, 3, first base leading.

    Attributes:
        k: bases per token.
        codes: (V,) int64, code of each id, -1 for ids that are no k-mer.
        ids: (4**k,) int64, id of each code.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        tokens = dna_tokens(tokenizer)
        self.k = max(map(len, tokens))
        kmers = [token for token in tokens if len(token) == self.k]
        stride = getattr(tokenizer, "stride", 1)
        if len(kmers) != 4**self.k or stride != 1:
            raise GeneSpliceError(
                f"`tokenizer` must cut overlapping k-mers (stride 1) and hold all of them; this one has "
                f"{len(kmers)} of the {4**self.k} {self.k}-mers and stride {stride}; use `DnaMLMCollator`"
            )
        letters = np.frombuffer("".join(kmers).encode(), np.uint8).reshape(-1, self.k)
        # Bits 1 and 2 of the ASCII letters A, C, T, G count 0, 1, 2, 3; G and T change places.
        digits = np.array([0, 1, 3, 2])[(letters >> 1) & 3]
        codes = digits @ 4 ** np.arange(self.k - 1, -1, -1)
        self.ids = np.zeros(4**self.k, np.int64)
        self.ids[codes] = [tokens[kmer] for kmer in kmers]
        self.codes = np.full(max(tokenizer.get_vocab().values()) + 1, _NOT_A_KMER)
        self.codes[self.ids] = np.arange(4**self.k)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whole numbers start, start + 1, ... (count of them) of each pair, one pair after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


class Windows:
    """All windows of `width` positions that touch a stretch, stretch after stretch: T + width - 1 of each.

    With `width` = 1 these are the tokens, with `width` = k the bases of the stretches.
    """

    def __init__(self, row_of_stretch: np.ndarray, num_tokens: np.ndarray, width: int):
        self._row_of_stretch = row_of_stretch
        self._num_tokens = num_tokens
        self._counts = num_tokens + width - 1
        self._starts = np.cumsum(self._counts) - self._counts
        # Index of the first window of the example that each stretch belongs to.
        self._origin = self._starts[np.searchsorted(row_of_stretch, row_of_stretch)]

    @property
    def rows(self) -> np.ndarray:
        """(W,) example of each window."""
        return np.repeat(self._row_of_stretch, self._counts)

    @property
    def counters(self) -> np.ndarray:
        """(W,) number of each window inside its example."""
        return _ranges(self._starts - self._origin, self._counts)

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and counters of the windows `index` alone."""
        stretch = np.searchsorted(self._starts, index, side="right") - 1
        return self._row_of_stretch[stretch], index - self._origin[stretch]

    def is_center(self, reach: int) -> np.ndarray:
        """(W,) bool: the window's number in its stretch, less `reach`, is the number of a token."""
        local = _ranges(np.zeros_like(self._counts), self._counts)
        return (local >= reach) & (local < reach + np.repeat(self._num_tokens, self._counts))


@dataclass(frozen=True)
class MaskedRuns:
    """Maximal runs of masked tokens inside a stretch.

    Attributes:
        first, last: (R,) index of the first and the last token of each run among the T tokens.
    """

    first: np.ndarray
    last: np.ndarray

    def tokens(self, which: np.ndarray) -> np.ndarray:
        """Indices of all tokens of the runs that `which` (R,) bool marks, in order."""
        return _ranges(self.first[which], (self.last - self.first + 1)[which])


class KmerStream:
    """The k-mers of a batch, in order, cut into stretches.

    Attributes:
        tokens: (T,) index of each k-mer among the N tokens.
        rows: (T,) example of each k-mer.
    """

    def __init__(self, batch: TokenBatch, is_maskable: np.ndarray, code: KmerCode, unk_token_id: int | None):
        self.code = code
        codes = code.codes[batch.input_ids]
        self.tokens = np.flatnonzero(is_maskable & (codes != _NOT_A_KMER))
        self._codes = codes[self.tokens]
        self.rows = batch.rows[self.tokens]
        self._is_first = self._find_stretches(batch.input_ids, unk_token_id)
        first = np.flatnonzero(self._is_first)
        self._lengths = np.diff(first, append=len(self.tokens))
        self._row_of_stretch = self.rows[first]

    @cached_property
    def counters(self) -> np.ndarray:
        """(T,) number of each k-mer inside its example."""
        return self.windows(1).counters

    @cached_property
    def _stretch(self) -> np.ndarray:
        return np.repeat(np.arange(len(self._lengths)), self._lengths)

    def _find_stretches(self, input_ids: np.ndarray, unk_token_id: int | None) -> np.ndarray:
        """(T,) bool, True where a stretch begins."""
        is_linked = (self._codes[:-1] & (4 ** (self.code.k - 1) - 1)) == self._codes[1:] >> 2
        same_row = self.rows[:-1] == self.rows[1:]
        is_gap = self.tokens[1:] - self.tokens[:-1] > 1
        broken = np.flatnonzero(same_row & ~is_gap & ~is_linked)
        if len(broken):
            raise GeneSpliceError(
                f"neighbouring tokens of feature {self.rows[broken[0]]} do not share {self.code.k - 1} bases; "
                "`KmerSpanCollator` needs overlapping k-mers (stride 1), for others use `DnaMLMCollator`"
            )
        is_linked &= same_row
        if (is_gap & same_row).any():
            unknown_before = np.cumsum(input_ids == unk_token_id)[self.tokens]
            is_linked &= unknown_before[1:] == unknown_before[:-1]
        return np.concatenate([[True], ~is_linked])[: len(self.tokens)]

    def windows(self, width: int) -> Windows:
        return Windows(self._row_of_stretch, self._lengths, width)

    def covered(self, is_start: np.ndarray, width: int) -> np.ndarray:
        """(T,) bool: the token lies in one of the windows (of `width`) that `is_start` (W,) marks."""
        started = np.zeros(len(is_start) + 1, np.int32)
        np.cumsum(is_start, out=started[1:])
        first = np.arange(len(self.tokens)) + self._stretch * (width - 1)
        return started[first + width] > started[first]

    def runs(self, is_masked: np.ndarray) -> MaskedRuns:
        """Cuts the masked tokens (T,) bool into maximal runs."""
        masked = np.flatnonzero(is_masked)
        borders = np.ones(len(masked) + 1, bool)
        borders[1:-1] = (np.diff(masked) > 1) | self._is_first[masked[1:]]
        return MaskedRuns(masked[borders[:-1]], masked[borders[1:]])

    def hidden_bases(self, runs: MaskedRuns, which: np.ndarray) -> np.ndarray:
        """Bases that the runs `which` (R,) bool hide: those that no token outside the run covers.

        Returns:
            Indices into the bases of all stretches, the layout of `windows(k)`.
        """
        first, last = runs.first[which], runs.last[which]
        at_start = self._is_first[first]
        at_end = np.append(self._is_first, True)[last + 1]
        begin = self._first_base(first) + np.where(at_start, 0, self.code.k - 1)
        end = self._first_base(last) + np.where(at_end, self.code.k, 1)
        return _ranges(begin, np.maximum(end - begin, 0))

    def with_bases(self, tokens: np.ndarray, where: np.ndarray, bases: np.ndarray) -> np.ndarray:
        """Ids that `tokens` (indices into T) have once the bases at `where` are replaced by `bases` (0..3)."""
        k = self.code.k
        new = np.full(len(self.tokens) + len(self._lengths) * (k - 1), -1, np.int8)
        new[where] = bases
        codes, first_base = np.zeros(len(tokens), np.int64), self._first_base(tokens)
        for j in range(k):
            old_j, new_j = self._codes[tokens] >> 2 * (k - 1 - j) & 3, new[first_base + j]
            codes = codes * 4 + np.where(new_j >= 0, new_j, old_j)
        return self.code.ids[codes]

    def _first_base(self, tokens: np.ndarray) -> np.ndarray:
        return tokens + self._stretch[tokens] * (self.code.k - 1)
