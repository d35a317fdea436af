"""Markov chains over bases: what a language model of DNA has to beat.

An order-k chain predicts a base from the k bases before it, with counts from the training windows (both strands)
and add-one smoothing. It sees those bases unmasked, which is more than a masked model sees.
"""

from collections.abc import Iterable

import numpy as np

from genesplice_hf.genome.alphabet import reverse_complement

_CODES = np.full(256, -1, np.int64)
for _code, _base in enumerate("ACGT"):
    _CODES[[ord(_base), ord(_base.lower())]] = _code


def base_codes(sequence: str) -> np.ndarray:
    """(L,) int64: A0 C1 G2 T3, everything else -1."""
    return _CODES[np.frombuffer(sequence.encode("ascii"), np.uint8)]


class MarkovChain:
    """Order-k chain; `order` is the number of preceding bases."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.counts = np.ones((4**order, 4))

    def fit(self, sequences: Iterable[str]) -> "MarkovChain":
        """Adds the counts of both strands of every sequence; contexts with N are left out."""
        for sequence in sequences:
            for strand in (sequence, reverse_complement(sequence)):
                context, base = self._contexts(base_codes(strand))
                pairs = np.bincount(context * 4 + base, minlength=self.counts.size)
                self.counts += pairs.reshape(self.counts.shape)
        return self

    def log_probabilities(self, codes: np.ndarray) -> np.ndarray:
        """Natural-log probability of the four bases at each position, (L, 4); NaN where the context is short."""
        table = np.log(self.counts / self.counts.sum(1, keepdims=True))
        out = np.full((len(codes), 4), np.nan)
        index = self._context_index(codes)
        known = index >= 0
        out[known] = table[index[known]]
        return out

    def _contexts(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        index = self._context_index(codes)
        usable = (index >= 0) & (codes >= 0)
        return index[usable], codes[usable]

    def _context_index(self, codes: np.ndarray) -> np.ndarray:
        """(L,) index of the k bases before each position; -1 where one is missing or is N."""
        index = np.zeros(len(codes), np.int64)
        bad = np.arange(len(codes)) < self.order
        for back in range(self.order, 0, -1):
            before = np.concatenate([np.full(min(back, len(codes)), -1), codes[:-back]])
            bad |= before < 0
            index = index * 4 + before
        return np.where(bad, -1, index)


def chain_predictions(chains: dict[int, MarkovChain], order: int, codes: np.ndarray) -> np.ndarray:
    """(L, 4) log probabilities of the order-k chain, from the next lower chain where its context is short."""
    out = np.full((len(codes), 4), np.nan)
    for lower in sorted((k for k in chains if k <= order), reverse=True):
        missing = np.isnan(out[:, 0])
        if not missing.any():
            break
        out[missing] = chains[lower].log_probabilities(codes)[missing]
    return out
