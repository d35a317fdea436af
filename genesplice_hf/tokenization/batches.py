"""Reads whatever a tokenizer is called with into one byte buffer, so that a batch costs one pass, not many.

R sequences, T tokens of all sequences in a row.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from genesplice_hf.errors import SequenceError
from genesplice_hf.tokenization.normalizer import letter_error, sequence_bytes


@dataclass(frozen=True)
class Batch:
    """Sequences written one after the other.

    Attributes:
        buffer: the raw bytes of all sequences.
        lengths: (R,) bases of each sequence; for pairs all first members, then all second members.
        is_batched: false when the caller gave a single sequence (or pair).
        is_paired: whether every row has two members.
        is_literal: special tokens written in the text are not recognised.
    """

    buffer: bytes
    lengths: np.ndarray
    is_batched: bool = True
    is_paired: bool = False
    is_literal: bool = False

    @property
    def width(self) -> int | None:
        """Length of every sequence if all are equally long, else None."""
        if self.lengths.size == 0:
            return None
        first = int(self.lengths[0])
        return first if self.lengths.size == 1 or (self.lengths == first).all() else None

    @property
    def starts(self) -> np.ndarray:
        """(R,) position in the buffer at which each sequence begins."""
        return np.cumsum(self.lengths) - self.lengths

    def locate(self, position: int) -> tuple[int, int]:
        """Returns (sequence, 0-based position in it) for a position in the buffer."""
        row = int(np.searchsorted(np.cumsum(self.lengths), position, side="right"))
        return row, position - int(self.starts[row])

    def slices(self) -> list[bytes]:
        """Returns the bytes of every sequence."""
        ends = np.cumsum(self.lengths).tolist()
        return [self.buffer[end - n : end] for end, n in zip(ends, self.lengths.tolist(), strict=True)]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch, without special tokens, one sequence after the other.

    Attributes:
        ids: (T,) whole numbers, of a narrow type where the vocabulary is small.
        counts: (R,) tokens of each sequence.
        width: tokens of every sequence if that is one number, else None.
        spans: gives (starts, ends), each (T,): the half-open base interval of every token in its sequence.
    """

    ids: np.ndarray
    counts: np.ndarray
    spans: Callable[[], tuple[np.ndarray, np.ndarray]]
    width: int | None = None


def read_batch(text: Any, text_pair: Any = None, *, is_split_into_words: bool = False, joint: str = "") -> Batch:
    """Accepts str, bytes, uint8/S1 arrays, lists of them, 2-D arrays (a row per sequence) and lists of pairs.

    Args:
        text: one sequence or many.
        text_pair: the second members, of the same shape.
        is_split_into_words: the sequences come as lists of pieces, which are joined with `joint`.
        joint: what stands between pieces.

    Raises:
        SequenceError: a type that holds no sequence, or two members of unequal number.
    """
    if type(text) is str and text_pair is None and text.isascii():
        return Batch(text.encode("ascii"), np.array([len(text)]), is_batched=False)
    if is_split_into_words:
        text, text_pair = _join_words(text, joint), _join_words(text_pair, joint)
    is_batched = not _is_single(text)
    first = _listed(text)
    second = None if text_pair is None else _listed(text_pair)
    if second is None and first and all(_is_pair(item) for item in first):
        first, second = [item[0] for item in first], [item[1] for item in first]
    if second is not None and len(second) != len(first):
        raise SequenceError(f"`text_pair` must have {len(first)} sequences like `text`, it has {len(second)}.")
    buffer, lengths = _concatenate(first if second is None else first + second)
    return Batch(buffer, lengths, is_batched, second is not None)


def _is_single(text: Any) -> bool:
    if isinstance(text, np.ndarray):
        return text.ndim == 1 and (text.dtype == np.uint8 or text.dtype.str[1:] in ("S1", "U1"))
    return isinstance(text, (str, bytes, bytearray, memoryview))


def _is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2 and all(_is_single(member) for member in item)


def _listed(text: Any) -> list[Any]:
    if _is_single(text):
        return [text]
    if isinstance(text, list):
        return text
    if isinstance(text, Iterable):
        return list(text)
    return [text]


def _join_words(text: Any, joint: str) -> Any:
    if text is None:
        return None
    words = list(text)
    if all(isinstance(word, str) for word in words):
        return joint.join(words)
    return [joint.join(row) for row in words]


def _concatenate(sequences: list[Any]) -> tuple[bytes, np.ndarray]:
    if all(type(sequence) is str for sequence in sequences):
        lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
        joined = "".join(sequences)
        if joined.isascii():
            return joined.encode("ascii"), lengths
        _refuse_non_ascii(sequences)
    parts = [sequence_bytes(sequence) for sequence in sequences]
    return b"".join(parts), np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))


def _refuse_non_ascii(sequences: list[str]) -> None:
    for row, sequence in enumerate(sequences):
        for position, letter in enumerate(sequence):
            if not letter.isascii():
                raise letter_error(letter, position, row, "is no ASCII letter")
