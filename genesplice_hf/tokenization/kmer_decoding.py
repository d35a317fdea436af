"""Turns k-mer ids back into bases. T tokens, k bases per k-mer; `tokenizer` is a `KmerTokenizer`."""

from typing import Any

import numpy as np

from genesplice_hf.tokenization.vocabularies import Vocabulary

_NOTHING, _HIDDEN_KMER, _HIDDEN_BASE, _LETTER, _KMER = range(5)


class KmerDecoder:
    """Tables by id: what a token stands for, and the letters it spells.

    Attributes:
        kind: (tokens,) nothing (special), a hidden k-mer ([MASK], and [UNK] when k-mers overlap), a hidden base,
            a single letter or a k-mer.
        letters: (tokens, k) uint8, the letters; only the first counts for single letters.
    """

    def __init__(self, tokenizer: Any):
        vocabulary: Vocabulary = tokenizer.vocabulary
        self.k, self.overlapping = tokenizer.k, tokenizer.stride < tokenizer.k
        self.separator, self.start = tokenizer.sep_token_id, tokenizer.cls_token_id
        codes = vocabulary.codes_by_id()
        added = np.full(len(tokenizer) - codes.size, -1)
        codes = np.concatenate([codes, added])
        self.kind = np.where(codes >= 0, _KMER, _NOTHING)
        shifts = 2 * np.arange(self.k - 1, -1, -1)
        alphabet = np.frombuffer(vocabulary.alphabet.encode("ascii"), dtype=np.uint8)
        self.letters = alphabet[np.maximum(codes, 0)[:, None] >> shifts & 3]
        self._set_singles(vocabulary, tokenizer)

    def _set_singles(self, vocabulary: Vocabulary, tokenizer: Any) -> None:
        for token, index in vocabulary.named().items():
            if len(token) == 1:
                self.kind[index] = _LETTER
                self.letters[index] = ord(token)
        if tokenizer.mask_token_id is not None:
            self._hide(tokenizer.mask_token_id, _HIDDEN_KMER)
        hidden = _HIDDEN_KMER if self.overlapping or tokenizer.kmer_with_n == "unk" else _HIDDEN_BASE
        if tokenizer.unk_token_id is not None:
            self._hide(tokenizer.unk_token_id, hidden)

    def _hide(self, index: int, kind: int) -> None:
        self.kind[index], self.letters[index] = kind, ord("N")

    def decode(self, ids: np.ndarray) -> str:
        """Returns the bases of (T,) ids: no special tokens, N for what no visible token tells."""
        if not self.overlapping:
            return self._side_by_side(ids)
        return "".join(self._overlapping(part) for part in self._sequences(ids))

    def _side_by_side(self, ids: np.ndarray) -> str:
        kind = self.kind[ids]
        size = np.array([0, self.k, 1, 1, self.k])[kind]
        shown = np.arange(self.k)[None] < size[:, None]
        return self.letters[ids][shown].tobytes().decode("ascii")

    def _sequences(self, ids: np.ndarray) -> list[np.ndarray]:
        """Splits at separators, except between the pieces of one long sequence ([SEP] directly before [CLS])."""
        if self.separator is None:
            return [ids]
        ends = np.flatnonzero(ids == self.separator)
        following = np.append(ids, -1)[ends + 1]
        return np.split(ids, ends[following != self.start] + 1)

    def _overlapping(self, ids: np.ndarray) -> str:
        """Stretches of windows, with the single letters (N as its own token) between them."""
        ids = ids[self.kind[ids] != _NOTHING]
        single = self.kind[ids] == _LETTER
        edges = np.flatnonzero(np.diff(single)) + 1
        return "".join(self._letters_or_windows(part) for part in np.split(ids, edges))

    def _letters_or_windows(self, ids: np.ndarray) -> str:
        if ids.size and self.kind[ids[0]] == _LETTER:
            return self.letters[ids, 0].tobytes().decode("ascii")
        return self._windows(ids)

    def _windows(self, ids: np.ndarray) -> str:
        if ids.size == 0:
            return ""
        bases = np.full(ids.size + self.k - 1, ord("N"), dtype=np.uint8)
        visible = np.flatnonzero(self.kind[ids] == _KMER)
        # Ascending place in the token: the first covering token writes last and so has the last word.
        for place in range(self.k):
            bases[visible + place] = self.letters[ids[visible], place]
        return bases.tobytes().decode("ascii")
