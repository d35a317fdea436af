"""Motif search against a letter-by-letter twin and against hand-made cases."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genesplice_hf.errors import SequenceError
from genesplice_hf.genome.motif import find_consensus, iupac_regex

ARS = "WTTTAYRTTTW"
CODES = {
    "A": "A", "C": "C", "G": "G", "T": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT",
    "K": "GT", "M": "AC", "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT",
}  # fmt: skip
PAIR = {"A": "T", "C": "G", "G": "C", "T": "A"}
# The code of the complements of a set of bases, by that set.
PAIR_OF_SETS = {frozenset(PAIR[base] for base in bases): code for code, bases in CODES.items()}


def twin(sequence: str, pattern: str) -> set:
    """Compares letter by letter; the other strand is searched in the mirrored sequence."""

    def at(text: str) -> list[int]:
        width = len(pattern)
        starts = range(len(text) - width + 1)
        return [s for s in starts if all(b in CODES[c] for b, c in zip(text[s : s + width], pattern, strict=True))]

    mirrored = "".join(PAIR[base] for base in reversed(sequence))
    ends = {(len(sequence) - s, "-") for s in at(mirrored)}
    return {(s, s + len(pattern), "+") for s in at(sequence)} | {(e - len(pattern), e, s) for e, s in ends}


@given(st.text("ACGT", max_size=40), st.text("ACGTRYSWKMBDHVN", min_size=1, max_size=5))
def test_hits_equal_the_twin(sequence, pattern):
    found = [tuple(hit) for hit in find_consensus(sequence, pattern)]
    palindrome = "".join(PAIR_OF_SETS[frozenset(CODES[code])] for code in reversed(pattern)) == pattern
    assert found == sorted(hit for hit in twin(sequence, pattern) if not palindrome or hit[2] == "+")


def test_ars_consensus_on_both_strands():
    assert find_consensus("GGATTTATGTTTAGG", ARS) == [(2, 13, "+")]
    assert find_consensus("CCTAAACATAAATCC", ARS) == [(2, 13, "-")]
    assert find_consensus("CCTAAACATAAATCC", ARS, both_strands=False) == []


def test_overlapping_hits_are_all_found():
    assert [hit.start for hit in find_consensus("AAAA", "AA", both_strands=False)] == [0, 1, 2]


def test_a_palindrome_is_reported_once():
    assert find_consensus("TGAATTCA", "GAATTC") == [(1, 7, "+")]


def test_case_and_rna_are_read_and_unknown_bases_are_no_evidence():
    assert [hit.start for hit in find_consensus("acgUacgt", "acgt")] == [0, 4]
    assert find_consensus("ANA", "AWA") == []
    assert [hit.start for hit in find_consensus("ANA", "ANA")] == [0]


@pytest.mark.parametrize("pattern, message", [("", "empty"), ("ACX", "'X' at position 3"), ("A-", "'-'")])
def test_bad_patterns_are_refused(pattern, message):
    with pytest.raises(SequenceError, match=message):
        find_consensus("ACGT", pattern)


def test_regex_has_a_class_per_ambiguous_code():
    assert iupac_regex("WaC") == "[AT]AC"
