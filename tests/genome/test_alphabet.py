"""The alphabet against the definition of the codes and against Biology's own laws."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genesplice_hf.genome.alphabet import BASES, IUPAC, complement, reverse_complement

PAIRS = {"A": "T", "C": "G", "G": "C", "T": "A"}
dna = st.text(alphabet="".join(IUPAC) + "".join(IUPAC).lower())


@pytest.mark.parametrize("code", IUPAC)
def test_the_complement_of_a_code_stands_for_the_complements_of_its_bases(code):
    assert set(IUPAC[complement(code)]) == {PAIRS[base] for base in IUPAC[code]}


def test_every_set_of_bases_has_one_code():
    assert len(IUPAC) == 2 ** len(BASES) - 1 == len({frozenset(bases) for bases in IUPAC.values()})


def test_worked_example():
    assert reverse_complement("ATGcN") == "NgCAT"


def test_u_pairs_with_a_and_other_letters_stay():
    assert reverse_complement("AU-*") == "*-AT"


@given(dna)
def test_twice_is_nothing(sequence):
    assert reverse_complement(reverse_complement(sequence)) == sequence


@given(dna, dna)
def test_the_opposite_strand_of_two_pieces_is_theirs_in_the_other_order(left, right):
    assert reverse_complement(left + right) == reverse_complement(right) + reverse_complement(left)


@given(dna)
def test_case_is_kept(sequence):
    opposite = reverse_complement(sequence)
    assert [letter.islower() for letter in opposite] == [letter.islower() for letter in reversed(sequence)]
