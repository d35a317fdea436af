"""One place that decides what becomes of every byte of a DNA text: case, IUPAC codes, RNA, foreign symbols.

The decision is a 256-entry table (byte in, upper-case letter out), so a whole chromosome is normalised by one
`bytes.translate`. Letters that the rules refuse become `ILLEGAL`, and the caller learns sequence and position.
"""

import re
import zlib
from typing import Literal

import numpy as np

from genesplice_hf.errors import SequenceError
from genesplice_hf.genome.alphabet import IUPAC

ILLEGAL = 0
UNKNOWN = ord("X")  # no IUPAC code of DNA: every vocabulary answers it with its unknown token

_AMBIGUOUS = "".join(code for code, bases in IUPAC.items() if 1 < len(bases) < 4)
_AMBIGUOUS_BYTES = (_AMBIGUOUS + _AMBIGUOUS.lower()).encode("ascii")
_AMBIGUOUS_PATTERN = re.compile(b"[" + _AMBIGUOUS_BYTES + b"]")
_CHOICES = {
    "lowercase": ("upper", "error", "unk", "keep"),
    "iupac": ("N", "unk", "error", "random"),
    "rna": ("U->T", "error"),
}

Sequence = str | bytes | bytearray | memoryview | np.ndarray


def sequence_bytes(sequence: Sequence) -> bytes:
    """Returns the bytes of one sequence given as text, bytes, or a numpy array of uint8, S1 or U1.

    Raises:
        SequenceError: a letter outside ASCII (with its position), or a type that holds no sequence.
    """
    if isinstance(sequence, str):
        return _ascii(sequence)
    if isinstance(sequence, (bytes, bytearray, memoryview)):
        return bytes(sequence)
    if isinstance(sequence, np.ndarray) and sequence.dtype in (np.dtype(np.uint8), np.dtype("S1")):
        return sequence.tobytes()
    if isinstance(sequence, np.ndarray) and sequence.dtype.kind == "U":
        return _ascii("".join(sequence.ravel().tolist()))
    raise SequenceError(
        f"`sequence` must be str, bytes or a numpy array of uint8, S1 or U1, it was {type(sequence).__name__}; "
        "decode ids first if these are token ids."
    )


def _ascii(text: str) -> bytes:
    try:
        return text.encode("ascii")
    except UnicodeEncodeError as error:
        raise letter_error(text[error.start], error.start) from None


def letter_error(letter: str, position: int, row: int | None = None, reason: str = "") -> SequenceError:
    """Builds the complaint about one letter; `position` is 0-based inside sequence number `row`."""
    where = "" if row is None else f" {row}"
    why = reason or "is neither a base nor an IUPAC code"
    return SequenceError(
        f"`sequence`{where} holds {letter!r} at position {position} (0-based), which {why}; "
        "only A, C, G, T, U, N and IUPAC codes are accepted: remove gaps, spaces and symbols, or mark the base as N."
    )


class SequenceNormalizer:
    """Turns raw sequence text into upper-case A, C, G, T, N by rules that are chosen once.

    Args:
        lowercase: "upper" (fold case), "error", "unk" (soft-masked bases become X, that is unknown) or
            "keep" (fold case as "upper"; tokenizers then return the soft mask).
        iupac: what R, Y, S, W, K, M, B, D, H, V become: "N", "unk", "error" or "random" (one of the bases that
            the code allows, drawn from `seed` and the sequence itself, so batch and order change nothing).
        rna: "U->T" or "error".
        symbols: further characters that pass unchanged (for alignments: "-?").
        seed: seed of `iupac="random"`.

    Raises:
        SequenceError: an option outside the lists above.
    """

    def __init__(
        self,
        lowercase: Literal["upper", "error", "unk", "keep"] = "upper",
        iupac: Literal["N", "unk", "error", "random"] = "N",
        rna: Literal["U->T", "error"] = "U->T",
        symbols: str = "",
        seed: int = 0,
    ):
        self.lowercase, self.iupac, self.rna, self.symbols, self.seed = lowercase, iupac, rna, symbols, seed
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise SequenceError(f"`{name}` must be one of {allowed}, it was {getattr(self, name)!r}.")
        self.table = self._build_table()

    def _build_table(self) -> bytes:
        table = bytearray([ILLEGAL]) * 256
        for letter in "ACGTN" + self.symbols:
            table[ord(letter)] = ord(letter)
        for code in _AMBIGUOUS:
            table[ord(code)] = {"N": ord("N"), "unk": UNKNOWN, "error": ILLEGAL, "random": ord(code)}[self.iupac]
        table[ord("U")] = ord("T") if self.rna == "U->T" else ILLEGAL
        for letter in "ACGTUN" + _AMBIGUOUS:
            table[ord(letter.lower())] = self._lower(table[ord(letter)])
        return bytes(table)

    def _lower(self, answer_to_upper: int) -> int:
        if answer_to_upper == ILLEGAL or self.lowercase in ("upper", "keep"):
            return answer_to_upper
        return UNKNOWN if self.lowercase == "unk" else ILLEGAL

    def __call__(self, sequence: Sequence) -> str:
        """Returns the normalised sequence as text of the same length."""
        return self.encode(sequence).tobytes().decode("ascii")

    def encode(self, sequence: Sequence) -> np.ndarray:
        """Returns the normalised sequence as a uint8 array of upper-case letters, one per base.

        Raises:
            SequenceError: a letter that the rules refuse, with its 0-based position.
        """
        raw = sequence_bytes(sequence)
        letters = np.frombuffer(self.resolve(raw, np.array([len(raw)])).translate(self.table), dtype=np.uint8)
        if letters.size and letters.min() == ILLEGAL:
            position = int(np.argmin(letters))
            raise letter_error(chr(raw[position]), position, reason=self.reason(raw[position]))
        return letters

    def soft_mask(self, sequence: Sequence) -> np.ndarray:
        """Returns a boolean array, true where the base is written in lower case."""
        return lower_case(sequence_bytes(sequence))

    def resolve(self, raw: bytes, lengths: np.ndarray) -> bytes:
        """Replaces ambiguity codes by drawn bases when `iupac="random"`; otherwise returns `raw` itself.

        Args:
            raw: sequences written one after the other.
            lengths: bases of each sequence.
        """
        if self.iupac != "random" or not _AMBIGUOUS_PATTERN.search(raw):
            return raw
        ends = np.cumsum(lengths).tolist()
        starts = [0, *ends[:-1]]
        return b"".join(self._draw(raw[start:end]) for start, end in zip(starts, ends, strict=True))

    def _draw(self, raw: bytes) -> bytes:
        generator = np.random.default_rng([self.seed, zlib.crc32(raw)])

        def choose(match: re.Match[bytes]) -> bytes:
            letter = match.group().decode("ascii")
            options = IUPAC[letter.upper()]
            base = options[int(generator.integers(len(options)))]
            return (base.lower() if letter.islower() else base).encode("ascii")

        return _AMBIGUOUS_PATTERN.sub(choose, raw)

    def reason(self, byte: int) -> str:
        """Says why `byte` is refused, for the error message."""
        letter = chr(byte)
        if byte > 127:
            return "is no ASCII letter"
        if letter.islower() and self.lowercase == "error" and letter.upper() in "ACGTUN" + _AMBIGUOUS:
            return 'is lower case (soft-masked) and `lowercase="error"` refuses it'
        if letter.upper() in _AMBIGUOUS:
            return 'is an ambiguity code and `iupac="error"` refuses it'
        if letter.upper() == "U":
            return 'is an RNA base and `rna="error"` refuses it'
        return ""


def lower_case(raw: bytes) -> np.ndarray:
    """Returns a boolean array, true where a byte of `raw` is a lower-case letter (bit 0x20 of ASCII letters)."""
    return np.frombuffer(raw, dtype=np.uint8) >= ord("a")
