"""Golden cases: every plain text must give the ids that the original tokenizers gave."""

import json
from pathlib import Path

import pytest

from genesplice_hf.tokenization.tokenization_kmer import KmerTokenizer
from genesplice_hf.tokenization.tokenization_nucleotide import MSATokenizer, NucleotideTokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenization"
DNABERT = {"short": "drop", "max_piece": 510, "max_piece_compat": True}
TOKENIZERS = {
    "caduceus_char": lambda: NucleotideTokenizer(preset="caduceus"),
    "hyenadna_char": lambda: NucleotideTokenizer(preset="hyenadna", add_prefix=True),
    "gpn_char": lambda: NucleotideTokenizer(preset="gpn"),
    "gpn_msa_char": MSATokenizer,
    "nt_v1_6mer": lambda: KmerTokenizer(preset="nt_v1"),
    "nt_v2_3mer": lambda: KmerTokenizer(preset="nt_v2_3mer"),
    **{f"dnabert_k{k}": lambda k=k: KmerTokenizer(preset=f"dnabert{k}", **DNABERT) for k in (3, 4, 5, 6)},
}


def load(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_plain_cases_one_by_one_and_as_a_batch(name):
    tokenizer = TOKENIZERS[name]()
    cases = [case for case in load(name)["cases"] if case["plain"]]
    expected = [case.get("ids", case.get("ids_hf")) for case in cases]
    texts = [case["text"] for case in cases]
    assert len(cases) >= 37
    assert [tokenizer(text)["input_ids"] for text in texts] == expected
    assert tokenizer(texts)["input_ids"] == expected
    assert tokenizer([text.encode() for text in texts])["input_ids"] == expected


@pytest.mark.parametrize("name", [n for n in TOKENIZERS if "gpn" not in n and "nt" not in n])
def test_plain_cases_without_special_tokens(name):
    tokenizer = TOKENIZERS[name]()
    cases = [case for case in load(name)["cases"] if case["plain"] and case["ids_no_special"] is not None]
    assert cases
    got = tokenizer([case["text"] for case in cases], add_special_tokens=False)["input_ids"]
    assert got == [case["ids_no_special"] for case in cases]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_vocabulary_equals_the_reference_in_order(name):
    tokenizer = TOKENIZERS[name]()
    vocabulary = load(name)["vocab"]
    assert tokenizer.convert_ids_to_tokens(range(len(vocabulary))) == vocabulary
    assert tokenizer.convert_tokens_to_ids(vocabulary) == list(range(len(vocabulary)))
    assert len(tokenizer) == len(vocabulary) == tokenizer.vocab_size


@pytest.mark.parametrize("k", [3, 4, 5, 6])
def test_written_vocab_file_equals_the_published_one_byte_for_byte(k, tmp_path):
    KmerTokenizer(preset=f"dnabert{k}").save_pretrained(tmp_path)
    published = "".join(f"{token}\n" for token in load(f"dnabert_k{k}")["vocab"])
    assert (tmp_path / "vocab.txt").read_bytes() == published.encode()


def test_complement_map_of_caduceus():
    recorded = load("caduceus_char")["complement_map"]
    assert {str(i): j for i, j in NucleotideTokenizer(preset="caduceus").complement_map.items()} == {
        key: value for key, value in recorded.items() if int(key) < 12
    }


def test_lower_case_is_folded_where_the_reference_says_unknown():
    cases = [case for case in load("nt_v1_6mer")["cases"] if case["tag"] == "lower"]
    tokenizer = KmerTokenizer(preset="nt_v1")
    assert cases
    for case in cases:
        assert tokenizer(case["text"])["input_ids"] == tokenizer(case["text"].upper())["input_ids"]
