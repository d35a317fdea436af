"""Single-base tokenizers: id tables, edge cases, alignments."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenization.twins import random_sequences
from transformers import PreTrainedTokenizerFast

from genesplice_hf.errors import SequenceError
from genesplice_hf.genome.alphabet import reverse_complement
from genesplice_hf.tokenization.tokenization_nucleotide import MSATokenizer, NucleotideTokenizer

IDS = {
    "genesplice": [5, 6, 7, 8, 9],
    "hyenadna": [7, 8, 9, 10, 11, 1],
    "caduceus": [7, 8, 9, 10, 11, 1],
    "gpn": [3, 4, 5, 6, 2],
    "plantcaduceus": [3, 4, 5, 6, 2],
    "enformer": [0, 1, 2, 3, 4],
}
TOKENIZERS = {preset: NucleotideTokenizer(preset=preset) for preset in IDS}


@pytest.mark.parametrize("preset", IDS)
def test_ids_of_acgtn_in_every_spelling(preset):
    tokenizer = TOKENIZERS[preset]
    spellings = ["ACGTN", "acgtn", "ACGUN", b"ACGTN", bytearray(b"ACGTN"), np.frombuffer(b"acGTn", dtype=np.uint8)]
    spellings += [np.array(list("ACGTN"), dtype="S1"), np.array(list("ACGTN"))]
    for text in spellings:
        assert tokenizer(text)["input_ids"] == IDS[preset]
    assert tokenizer(spellings)["input_ids"] == [IDS[preset]] * len(spellings)
    assert tokenizer(np.array([list("ACGTN")] * 2, dtype="S1"))["input_ids"] == [IDS[preset]] * 2


@pytest.mark.parametrize("preset", IDS)
def test_equals_a_dictionary_and_the_rust_export(preset, tmp_path):
    tokenizer = TOKENIZERS[preset]
    tokenizer.save_pretrained(tmp_path)
    rust = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    texts = random_sequences(np.random.default_rng(2), 300, 80)
    table = dict(zip("ACGTN", IDS[preset][:5], strict=True))
    expected = [[*(table[base] for base in text), *IDS[preset][5:]] for text in texts]
    assert tokenizer(texts)["input_ids"] == expected
    assert rust(texts)["input_ids"] == expected


@pytest.mark.parametrize("preset", IDS)
@given(text=st.text(alphabet="ACGTN", max_size=50))
def test_decode_gives_back_the_sequence(preset, text):
    tokenizer = TOKENIZERS[preset]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("preset", IDS)
def test_reverse_complement_ids(preset):
    tokenizer = TOKENIZERS[preset]
    for text in random_sequences(np.random.default_rng(4), 40, 60):
        ids = np.array(tokenizer(text)["input_ids"], dtype=np.int64)
        expected = tokenizer(reverse_complement(text))["input_ids"]
        assert tokenizer.reverse_complement_ids(ids).tolist() == expected
        assert tokenizer.reverse_complement_ids(ids.tolist()) == expected


def test_written_special_tokens_keep_their_ids_and_offsets():
    tokenizer = TOKENIZERS["genesplice"]
    out = tokenizer(["AC[MASK]GT", "ACGT"], return_offsets_mapping=True)
    assert out["input_ids"] == [[5, 6, 4, 7, 8], [5, 6, 7, 8]]
    assert out["offset_mapping"][0] == [(0, 1), (1, 2), (2, 8), (8, 9), (9, 10)]
    assert tokenizer.decode(out["input_ids"][0]) == "ACNGT"
    with pytest.raises(SequenceError, match=r"`sequence` 0 holds '\[' at position 2"):
        tokenizer(["AC[MA", "SK]T"])
    with pytest.raises(SequenceError, match=r"'\[' at position 2"):
        tokenizer("AC[MASK]", split_special_tokens=True)


@pytest.mark.parametrize("letter", ["-", ".", "*", "7", " ", "?", "X", "\n"])
def test_symbols_are_refused_with_their_position(letter):
    with pytest.raises(SequenceError, match="position 2"):
        TOKENIZERS["genesplice"](f"AC{letter}T")


def test_non_ascii_is_refused_with_its_position():
    with pytest.raises(SequenceError, match="`sequence` 1 holds 'é' at position 1"):
        TOKENIZERS["gpn"](["AC", "Cé"])
    with pytest.raises(SequenceError, match="position 1"):
        TOKENIZERS["gpn"](np.array([65, 200], dtype=np.uint8))


def test_iupac_choices():
    codes = "RYSWKMBDHV"
    assert TOKENIZERS["genesplice"](codes)["input_ids"] == [9] * 10
    assert NucleotideTokenizer(iupac="unk")(codes)["input_ids"] == [1] * 10
    drawn = NucleotideTokenizer(iupac="random", seed=3)(["RR" * 40, "Y" * 40])["input_ids"]
    assert set(drawn[0]) == {5, 7} and set(drawn[1]) == {6, 8}
    assert NucleotideTokenizer(iupac="random", seed=3)("RR" * 40)["input_ids"] == drawn[0]
    assert NucleotideTokenizer(iupac="random", seed=4)("RR" * 40)["input_ids"] != drawn[0]


def test_soft_mask():
    out = NucleotideTokenizer(return_soft_mask=True)(["acGT", "AC"], padding=True, return_tensors="np")
    assert out["soft_mask"].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert "soft_mask" in NucleotideTokenizer(lowercase="keep")("ac")


def test_alignment_ids_keep_the_shape():
    tokenizer = MSATokenizer()
    assert tokenizer("-ACGT?Na.".rstrip("."))["input_ids"] == [0, 1, 2, 3, 4, 5, 0, 1]
    array = np.array([list("AC-"), list("gt?")], dtype="S1")
    assert tokenizer.encode_alignment(array).tolist() == [[1, 2, 0], [3, 4, 5]]
    assert tokenizer.encode_alignment(array.view(np.uint8)).tolist() == [[1, 2, 0], [3, 4, 5]]
    assert tokenizer.encode_alignment(["AC-", "GT?"]).tolist() == [[1, 2, 0], [3, 4, 5]]
    assert tokenizer.decode([1, 2, 0]) == "AC-"
    assert tokenizer.reverse_complement_ids([1, 2, 0, 3]) == [2, 0, 3, 4]
    with pytest.raises(SequenceError, match="rows of one length"):
        tokenizer.encode_alignment(["AC", "A"])
    with pytest.raises(SequenceError, match="position 1"):
        tokenizer("A.")


def test_presets_of_the_other_class_are_refused():
    with pytest.raises(SequenceError, match="`preset` must be one of"):
        NucleotideTokenizer(preset="nt_v1")
    with pytest.raises(TypeError, match="did you mean `lowercase`"):
        NucleotideTokenizer(lower_case="error")


def test_added_tokens_get_the_next_ids_and_bases_are_refused():
    tokenizer = NucleotideTokenizer()
    assert tokenizer.add_tokens(["[HUMAN]"]) == 1
    assert len(tokenizer) == 11 and tokenizer("[HUMAN]AC")["input_ids"] == [10, 5, 6]
    assert tokenizer.decode([10, 5, 6]) == "AC"
    with pytest.raises(SequenceError, match="written in bases"):
        tokenizer.add_tokens(["ACGT"])


def test_decoding_refuses_label_values():
    with pytest.raises(SequenceError, match="-100"):
        TOKENIZERS["genesplice"].decode([-100, 5])
