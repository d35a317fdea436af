"""Which ids of a tokenizer are DNA, and which id may stand in for which, read from the vocabulary alone.

Shapes: V ids of the vocabulary, M tokens.
"""

import re

import numpy as np
from transformers import PreTrainedTokenizerBase

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.genome.alphabet import BASES
from genesplice_hf.objectives.sampling import to_below

_DNA = re.compile(f"[{BASES}{BASES.lower()}]+")


def dna_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens made of A, C, G and T alone (upper-cased) and their ids; never a special token."""
    special = set(tokenizer.all_special_ids)
    vocabulary = tokenizer.get_vocab()
    found = {t.upper(): i for t, i in vocabulary.items() if i not in special and _DNA.fullmatch(t)}
    if not found:
        raise GeneSpliceError(
            f"`tokenizer` ({type(tokenizer).__name__}) has no token of A, C, G and T; give a DNA tokenizer"
        )
    return found


class DnaVocabulary:
    """Look-up tables over the ids of `tokenizer`.

    Attributes:
        is_dna: (V,) bool, the token consists of A, C, G and T and is not special.
        num_bases: (V,) int64, bases of each DNA token, 0 for the rest.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        tokens = dna_tokens(tokenizer)
        size = max(tokenizer.get_vocab().values()) + 1
        ids = np.fromiter(tokens.values(), np.int64, len(tokens))
        lengths = np.fromiter((len(token) for token in tokens), np.int64, len(tokens))
        self.is_dna = np.zeros(size, bool)
        self.is_dna[ids] = True
        self.num_bases = np.zeros(size, np.int64)
        self.num_bases[ids] = lengths
        self._set_pools(ids, lengths)

    def _set_pools(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """A token is replaced by one of as many bases where all of those exist (single bases, k-mers); the
        lengths of a BPE vocabulary are incomplete and form one pool."""
        complete = all(np.sum(lengths == n) == 4**n for n in np.unique(lengths).tolist())
        group = lengths if complete else np.zeros_like(lengths)
        order = np.lexsort((ids, group))
        self._pool, group = ids[order], group[order]
        self._pool_start = np.zeros(len(self.is_dna), np.int64)
        self._pool_size = np.zeros(len(self.is_dna), np.int64)
        self._pool_start[self._pool] = np.searchsorted(group, group, "left")
        self._pool_size[self._pool] = np.searchsorted(group, group, "right") - self._pool_start[self._pool]

    def check(self, input_ids: np.ndarray) -> None:
        """Raises when an id lies outside the vocabulary."""
        if input_ids.min() < 0 or input_ids.max() >= len(self.is_dna):
            raise GeneSpliceError(
                f"`input_ids` range from {input_ids.min()} to {input_ids.max()}, the tokenizer has ids 0 to "
                f"{len(self.is_dna) - 1}; were they made by another tokenizer?"
            )

    def replace(self, input_ids: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Random DNA tokens (M,) for the DNA tokens `input_ids` (M,), drawn with the bits `words` (M,)."""
        return self._pool[self._pool_start[input_ids] + to_below(words, self._pool_size[input_ids])]
