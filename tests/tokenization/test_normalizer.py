"""The normaliser, letter by letter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genesplice_hf.errors import SequenceError
from genesplice_hf.genome.alphabet import IUPAC
from genesplice_hf.tokenization.normalizer import SequenceNormalizer, letter_error, sequence_bytes

LEGAL = "ACGTUNRYSWKMBDHV"


@given(st.text(alphabet=LEGAL + LEGAL.lower(), max_size=40))
def test_default_rules_equal_string_methods(text):
    expected = "".join(letter if letter in "ACGTN" else "N" for letter in text.upper().replace("U", "T"))
    normalizer = SequenceNormalizer()
    assert normalizer(text) == expected
    assert normalizer(text.encode()) == expected
    assert normalizer(np.frombuffer(text.encode(), dtype=np.uint8)) == expected
    assert normalizer.soft_mask(text).tolist() == [letter.islower() for letter in text]


def test_every_other_byte_is_refused():
    normalizer = SequenceNormalizer()
    for byte in set(range(256)) - set((LEGAL + LEGAL.lower()).encode()):
        with pytest.raises(SequenceError, match="at position 3"):
            normalizer(b"ACG" + bytes([byte]))


def test_symbols_pass():
    assert SequenceNormalizer(symbols="-?")("ac-?n") == "AC-?N"


def test_random_draws_stay_within_the_code_and_keep_case():
    normalizer = SequenceNormalizer(iupac="random", seed=5)
    for code, bases in IUPAC.items():
        if 1 < len(bases) < 4:
            assert set(normalizer(code * 60)) == set(bases)
            assert set(normalizer.resolve((code.lower() * 60).encode(), np.array([60])).decode()) == set(bases.lower())
    assert normalizer("NRN")[0] == "N"
    assert normalizer("ACRY" * 9) == SequenceNormalizer(iupac="random", seed=5)("ACRY" * 9)


@pytest.mark.parametrize("option", [{"lowercase": "x"}, {"iupac": "x"}, {"rna": "x"}])
def test_wrong_options_name_their_choices(option):
    with pytest.raises(SequenceError, match=f"`{next(iter(option))}` must be one of"):
        SequenceNormalizer(**option)


def test_refusals_by_option():
    with pytest.raises(SequenceError, match="lower case"):
        SequenceNormalizer(lowercase="error")("ACg")
    with pytest.raises(SequenceError, match="ambiguity"):
        SequenceNormalizer(iupac="error")("ACR")
    with pytest.raises(SequenceError, match="RNA"):
        SequenceNormalizer(rna="error")("ACu")
    assert SequenceNormalizer(lowercase="unk", iupac="unk")("ACgR") == "ACXX"


def test_what_holds_no_sequence_is_refused():
    with pytest.raises(SequenceError, match="it was int"):
        sequence_bytes(7)
    with pytest.raises(SequenceError, match="'é' at position 1"):
        sequence_bytes("Aé")
    assert "`sequence` 4" in str(letter_error("-", 2, 4))
