"""Markov chains over bases: what a language model of DNA has to beat.

An order-k chain predicts a base from the k bases before it, with counts from the training windows (both strands)
and add-one smoothing. It sees those bases unmasked, which is more than a masked model sees.

Shapes: L bases.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np

from genesplice_hf.genome.alphabet import reverse_complement

_CODES = np.full(256, -1, np.int64)
for _code, _base in enumerate("ACGT"):
    _CODES[[ord(_base), ord(_base.lower())]] = _code
_BASES_AT_A_TIME = 1 << 20


def base_codes(sequence: str) -> np.ndarray:
    """(L,) int64: A0 C1 G2 T3, everything else -1."""
    return _CODES[np.frombuffer(sequence.encode("ascii"), np.uint8)]


class MarkovChain:
    """Order-k chain; `order` is the number of preceding bases, `counts` (4**k, 4) int64 start from one."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.counts = np.ones((4**order, 4), np.int64)

    def fit(self, sequences: Iterable[str]) -> "MarkovChain":
        """Adds the counts of both strands of every sequence; contexts with N are left out."""
        count({self.order: self}, sequences)
        return self

    def log_probabilities(self, codes: np.ndarray) -> np.ndarray:
        """Natural-log probability of the four bases at each position, (L, 4); NaN where the context is short."""
        index = dict(_contexts(codes, self.order))[self.order]
        out = np.full((len(codes), 4), np.nan)
        known = index >= 0
        out[known] = self.rows(index[known])
        return out

    def rows(self, index: np.ndarray) -> np.ndarray:
        """(M, 4) natural-log probabilities after the contexts (M,)."""
        counts = self.counts[index]
        return np.log(counts / counts.sum(1, keepdims=True))


def count(chains: Mapping[int, MarkovChain], sequences: Iterable[str]) -> None:
    """Adds both strands of the sequences to all chains, a million bases at a time."""
    for text in _joined(sequences):
        for strand in (text, reverse_complement(text)):
            codes = base_codes(strand)
            for order, index in _contexts(codes, max(chains)):
                if order in chains:
                    usable = (index >= 0) & (codes >= 0)
                    # Unlike bincount, `add.at` does not touch the whole table, which for order 11 is 134 MB.
                    np.add.at(chains[order].counts.reshape(-1), index[usable] * 4 + codes[usable], 1)


def predictions(
    chains: Mapping[int, MarkovChain], orders: Collection[int], codes: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each of `orders`, ascending, and its (L, 4) natural-log probabilities.

    Where a context is short (at the start, after N) the next lower of `chains` answers; NaN if there is none.
    """
    table = np.full((len(codes), 4), np.nan)
    for order, index in _contexts(codes, max(orders)):
        if order in chains:
            known = index >= 0
            table[known] = chains[order].rows(index[known])
        if order in orders:
            yield order, table.copy()


def chain_predictions(chains: Mapping[int, MarkovChain], order: int, codes: np.ndarray) -> np.ndarray:
    """(L, 4) log probabilities of the order-k chain, from the next lower chain where its context is short."""
    return dict(predictions(chains, [order], codes))[order]


def _joined(sequences: Iterable[str]) -> Iterator[str]:
    """Yields the sequences in bundles; N between two of them keeps their contexts apart."""
    bundle, length = [], 0
    for sequence in sequences:
        bundle.append(sequence)
        length += len(sequence)
        if length >= _BASES_AT_A_TIME:
            yield "N".join(bundle)
            bundle, length = [], 0
    yield "N".join(bundle)


def _contexts(codes: np.ndarray, max_order: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields k = 0, 1, ... and the (L,) index of the k bases before each position, -1 where one is missing or N."""
    index = np.zeros(len(codes), np.int64)
    yield 0, index
    for order in range(1, max_order + 1):
        before = np.full(len(codes), -1, np.int64)
        before[order:] = codes[:-order]
        index = np.where((index < 0) | (before < 0), -1, index + before * 4 ** (order - 1))
        yield order, index
