"""Base <-> token questions that a tokenizer answers: covering tokens, the other strand, shifted windows.

Shapes: B batch, L tokens, N bases, D hidden size.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from genesplice_hf.errors import SequenceError
from genesplice_hf.tokenization.offsets import (
    BaseMode,
    TokenMode,
    bases_of_token,
    to_base_level,
    to_token_level,
    tokens_of_base,
)


class Frame(NamedTuple):
    """One shifted window.

    Attributes:
        start: first base of the window in the given sequence.
        sequence: the window, always of the same length.
        token: index in `input_ids` of the token that holds the base, if the window is N-free.
        offset_in_token: place of the base in that token.
    """

    start: int
    sequence: str
    token: int
    offset_in_token: int


class AlignmentMixin:
    """Adds the alignment questions to a tokenizer."""

    if TYPE_CHECKING:
        k: int
        stride: int
        phase: int
        _prefix_ids: list[int]
        _suffix_ids: list[int]

    def token_of_base(self, base: int, offsets: Any = None, n_bases: int | None = None) -> int | tuple[int, int]:
        """Returns the token that covers `base`, as an index into `input_ids`.

        Args:
            base: 0-based position in the sequence.
            offsets: (L, 2) offsets of that row. Without them the sequence is taken to be free of N, and `base` to
                lie before the remainder.
            n_bases: length of the sequence; without offsets it tells where the sequence ends.

        Returns:
            One index, or for overlapping k-mers (first, last), inclusive.

        Raises:
            SequenceError: no token covers the base.
        """
        if offsets is not None:
            span = tokens_of_base(offsets, base)
        elif n_bases is not None and not 0 <= base < n_bases:
            raise SequenceError(f"`base` must be 0..{n_bases - 1}, it was {base}.")
        else:
            first, last = self._tokens_of_free_base(base, n_bases)
            span = first + len(self._prefix_ids), last + len(self._prefix_ids)
        return span if self.stride < self.k else span[0]

    def _tokens_of_free_base(self, base: int, n_bases: int | None) -> tuple[int, int]:
        if self.stride < self.k:
            last = base if n_bases is None else min(base, max(n_bases - self.k, 0))
            return max(0, base - self.k + 1), last
        phase = getattr(self, "phase", 0)
        kmers = (base - phase) // self.k
        if n_bases is not None:
            kmers = min(kmers, max(n_bases - phase, 0) // self.k)
        token = base if base < phase else phase + kmers
        if n_bases is not None and base >= phase and kmers == max(n_bases - phase, 0) // self.k:
            token += base - phase - kmers * self.k
        return token, token

    def bases_of_token(self, token: int, offsets: Any) -> tuple[int, int]:
        """Returns the half-open base interval (start, end) of `token` in a row with these (L, 2) offsets."""
        return bases_of_token(offsets, token)

    def to_base_level(self, x: Any, offsets: Any, n_bases: int, mode: BaseMode | None = None) -> Any:
        """Spreads (B, L, D) token vectors over (B, N, D) bases; see `offsets.to_base_level`."""
        return to_base_level(x, offsets, n_bases, mode)

    def to_token_level(self, y: Any, offsets: Any, mode: TokenMode = "majority") -> Any:
        """Turns (B, N) labels of bases into (B, L) labels of tokens; see `offsets.to_token_level`."""
        return to_token_level(y, offsets, mode)

    def _complement_ids(self) -> np.ndarray:
        raise NotImplementedError

    def _check_reversible(self, body: np.ndarray) -> None:
        """Raises where the ids of the other strand do not follow from these ids alone."""

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):  # type: ignore[arg-type]
            raise SequenceError(
                f"`ids` must be 0..{len(self) - 1}, they run from {ids.min()} to {ids.max()}; "  # type: ignore[arg-type]
                "replace -100 and other label values first."
            )

    def reverse_complement_ids(self, ids: Any) -> Any:
        """Returns the ids of the other strand; special tokens and pads keep their places.

        Args:
            ids: list, (L,) or (B, L), numpy or torch.

        Returns:
            The same kind and shape. Each stretch between special tokens is reversed and complemented.

        Raises:
            SequenceError: non-overlapping k-mers with leftover single bases, whose frame changes with the strand:
                tokenize the reverse complement of the text instead.
        """
        if hasattr(ids, "detach"):
            return ids.new_tensor(self.reverse_complement_ids(ids.detach().cpu().numpy()).tolist())
        if isinstance(ids, list):
            nested = bool(ids) and not isinstance(ids[0], (int, np.integer))
            rows = [self._other_strand(np.array(row, dtype=np.int64)).tolist() for row in (ids if nested else [ids])]
            return rows if nested else rows[0]
        return self._other_strand(ids) if ids.ndim == 1 else np.stack([self._other_strand(row) for row in ids])

    def _other_strand(self, ids: np.ndarray) -> np.ndarray:
        self._check_ids(ids)
        fixed = np.isin(ids, self._frame_ids())
        self._check_reversible(ids[~fixed])
        out = ids.copy()
        table = self._complement_ids()
        edges = np.flatnonzero(np.diff(np.concatenate([[True], fixed, [True]])))
        for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            out[start:end] = table[ids[start:end][::-1]]
        return out

    def _frame_ids(self) -> list[int]:
        """Ids that stand around sequences and never inside: cls, sep, bos, eos and (bracketed) pad."""
        names = ("cls_token", "sep_token", "bos_token", "eos_token", "pad_token")
        tokens = [getattr(self, name) for name in names]
        return [self.convert_tokens_to_ids(token) for token in tokens if token and len(token) > 1]  # type: ignore[attr-defined]

    def frames(self, sequence: str, window: int | None = None, base: int | None = None) -> Iterator[Frame]:
        """Yields the k windows of one length whose start is shifted by 0..k-1, for averaging over frames.

        Args:
            sequence: bases.
            window: length of every window in bp; default: the longest that fits, `len(sequence) - k + 1`.
            base: position in `sequence` whose place in the token is reported; default: the middle base that all
                windows share.

        Raises:
            SequenceError: `window` does not fit k times, or `base` is not in every window.
        """
        window = len(sequence) - self.k + 1 if window is None else window
        if not 1 <= window <= len(sequence) - self.k + 1:
            raise SequenceError(
                f"`window` must be 1..{len(sequence) - self.k + 1} bp so that {self.k} shifted windows fit in "
                f"{len(sequence)} bp, it was {window}."
            )
        base = (self.k - 1 + window) // 2 if base is None else base
        if not self.k - 1 <= base < window:
            raise SequenceError(f"`base` must be {self.k - 1}..{window - 1} to lie in every window, it was {base}.")
        for start in range(self.k):
            token = self.token_of_base(base - start, n_bases=window)
            first = token if isinstance(token, int) else token[0]
            yield Frame(start, sequence[start : start + window], first, self._offset_in_token(base - start, window))

    def _offset_in_token(self, base: int, window: int) -> int:
        phase = getattr(self, "phase", 0)
        if self.stride < self.k:
            return min(base, self.k - 1)
        whole = (window - phase) // self.k * self.k
        return (base - phase) % self.k if 0 <= base - phase < whole else 0
