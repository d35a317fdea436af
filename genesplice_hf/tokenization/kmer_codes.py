"""Arithmetic of k-mers: the code of a k-mer is sum_j code(b_j) * 4^(k-1-j), computed for whole arrays at once.

M k-mers, R rows, N bases of a row.
"""

import numpy as np


def code_type(k: int) -> type[np.unsignedinteger]:
    """Returns the narrowest unsigned type that holds 4^k codes; narrow arrays are what makes this fast."""
    return np.uint16 if k <= 8 else np.uint32


def pack_kmers(bases: np.ndarray) -> np.ndarray:
    """Returns (M,) codes of (M, k) uint8 base codes 0..3."""
    k = bases.shape[1]
    wide = code_type(k)
    if k % 2 == 0:
        # Two neighbouring bases are one little-endian 16-bit word: b0 + 256 b1 -> 4 b0 + b1, half the columns.
        words = np.ascontiguousarray(bases).view("<u2")
        columns, bits = ((words << 2) | (words >> 8)) & 15, 4
    else:
        columns, bits = bases, 2
    codes = columns[:, 0].astype(wide)
    for column in range(1, columns.shape[1]):
        codes <<= bits
        codes |= columns[:, column]
    return codes


def roll_kmers(bases: np.ndarray, k: int) -> np.ndarray:
    """Returns (..., N-k+1) codes of all overlapping k-mers along the last axis of base codes 0..3, for N >= k.

    Codes of length k are joined from two of half the length, so the work grows with log2(k).
    """
    if k == 1:
        return bases
    half = k // 2
    shorter = roll_kmers(bases, half)
    codes = shorter[..., : shorter.shape[-1] - half].astype(code_type(k))
    codes <<= 2 * half
    codes |= shorter[..., half:]
    if k % 2:
        codes = codes[..., :-1] << 2
        codes |= bases[..., k - 1 :]
    return codes


def kmers_at(bases: np.ndarray, starts: np.ndarray, k: int) -> np.ndarray:
    """Returns (M,) codes of the k-mers that begin at `starts` of a flat array of base codes 0..3."""
    codes = bases[starts].astype(code_type(k))
    for offset in range(1, k):
        codes <<= 2
        codes |= bases[starts + offset]
    return codes


def touches(marked: np.ndarray, k: int) -> np.ndarray:
    """Returns (N-k+1,) bool: whether the window of k bases from each position holds a true entry, for N >= k."""
    if k == 1:
        return marked
    half = k // 2
    shorter = touches(marked, half)
    found = shorter[: shorter.size - half] | shorter[half:]
    return found[:-1] | marked[k - 1 :] if k % 2 else found


def complement_codes(k: int, alphabet: str) -> np.ndarray:
    """Returns (4^k,) the code of the reverse complement of every k-mer code."""
    pairs = np.array([alphabet.index({"A": "T", "C": "G", "G": "C", "T": "A"}[base]) for base in alphabet])
    codes = np.arange(4**k)
    reverse = np.zeros_like(codes)
    for _ in range(k):
        reverse = reverse * 4 + pairs[codes & 3]
        codes >>= 2
    return reverse
