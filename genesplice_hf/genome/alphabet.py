"""The DNA alphabet: bases, IUPAC codes and the complement, said once for every other room.

Codes follow IUPAC-IUB (Cornish-Bowden, Nucleic Acids Research 13:3021, 1985).
"""

BASES = "ACGT"

# Each code and the bases it may stand for.
IUPAC = {
    "A": "A", "C": "C", "G": "G", "T": "T",
    "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC",
    "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT",
}  # fmt: skip

_COMPLEMENT = str.maketrans("ACGTURYSWKMBDHVNacgturyswkmbdhvn", "TGCAAYRSWMKVHDBNtgcaayrswmkvhdbn")


def complement(sequence: str) -> str:
    """Complements every base of `sequence`; letters outside IUPAC stay as they are, case is kept."""
    return sequence.translate(_COMPLEMENT)


def reverse_complement(sequence: str) -> str:
    """Returns the opposite strand of `sequence`, read 5' to 3'; case is kept, U pairs with A."""
    return complement(sequence)[::-1]
