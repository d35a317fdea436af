"""From text to tensors: windows, proteins and complexes, words; and what encoders call our residues.

Shapes: B batch, R residues, N tokens of text.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoProcessor, EsmTokenizer, PreTrainedTokenizerFast

import genesplice_hf  # noqa: F401, registers the processor
from genesplice_hf.errors import SequenceError
from genesplice_hf.models.tfbind.processing_tfbind import TFBindProcessor, encode_proteins, residue_fields, residue_ids
from genesplice_hf.models.tiny_configs import tiny_tfbind
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer

LETTERS = "LAGVSERTIDPKQNFYMHWCX"


def words(vocabulary: list[str], frame: bool = True, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that puts [CLS] and [SEP] (or [SEP] alone) around them."""
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "[CLS] $A [SEP]" if frame else "$A [SEP]"
    named = [(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def text_tokenizer() -> PreTrainedTokenizerFast:
    return words(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "liver", "cell", "type", "K562"])


def protein_tokenizer(form: str = "{}", frame: bool = True) -> PreTrainedTokenizerFast:
    return words(["[CLS]", "[PAD]", "[SEP]", "[UNK]", *(form.format(letter) for letter in LETTERS)], frame)


def processor(**given: Any) -> TFBindProcessor:
    return TFBindProcessor(NucleotideTokenizer(preset="enformer"), **given)


def test_all_at_once() -> None:
    made = processor(text_tokenizer=text_tokenizer())
    found = made(dna=["ACGTN", "ACG"], proteins=["ACY", ("MK", "uw*")], contexts=["cell type liver", "K562"])
    assert found["input_ids"][0].tolist() == [0, 1, 2, 3, 4] and found["attention_mask"][1].tolist() == [1, 1, 1, 0, 0]
    assert found["protein_input_ids"].tolist() == [[0, 1, 19, 20], [10, 8, 21, 18]]
    assert found["protein_mask"].tolist() == [[True, True, True, False], [True] * 4]
    assert found["protein_chain_ids"].tolist() == [[0] * 4, [0, 0, 1, 1]]
    assert found["context_input_ids"].tolist() == [[2, 5, 6, 4, 3], [2, 7, 3, 0, 0]]
    assert found["context_mask"].sum(1).tolist() == [5, 3]
    assert set(made(proteins="ACD")) == {"protein_input_ids", "protein_mask", "protein_chain_ids"}
    with pytest.raises(SequenceError, match="at least one"):
        made()
    with pytest.raises(SequenceError, match="text_tokenizer"):
        processor()(contexts="liver")


@pytest.mark.parametrize(("sequence", "ids"), [("acdy*", [0, 1, 2, 19]), ("UZOBJX", [21] * 6), (" MW ", [10, 18])])
def test_letters(sequence: str, ids: list[int]) -> None:
    assert residue_ids(sequence) == ids


@pytest.mark.parametrize(
    ("protein", "message"),
    [
        ("AC-D", "'-' at residue 3"),
        ("A*C", r"'\*' at residue 2"),
        ("AC1", "'1' at residue 3"),
        ("", "no residues"),
        (("MK", "*"), "subunit 1 of protein 0 has no residues"),
        ((), "1 to 8 subunits"),
        (("A",) * 9, "1 to 8 subunits"),
    ],
)
def test_bad_proteins_are_advice(protein: Any, message: str) -> None:
    with pytest.raises(SequenceError, match=message):
        encode_proteins([protein])
    with pytest.raises(SequenceError, match="at least one protein"):
        encode_proteins([])


@pytest.mark.parametrize("form", ["{}", "▁{}"])
@pytest.mark.parametrize("frame", [True, False])
def test_an_encoders_ids_are_found_by_name(form: str, frame: bool) -> None:
    fields = residue_fields(protein_tokenizer(form, frame))
    ids = fields["protein_token_ids"]
    assert [LETTERS[index - 4] for index in ids[:20]] == list("ACDEFGHIKLMNPQRSTVWY")
    assert ids[20] == 1 and LETTERS[ids[21] - 4] == "X"
    assert fields["protein_suffix_ids"] == [2] and fields["protein_prefix_ids"] == ([0] if frame else [])


def test_a_vocabulary_without_amino_acids_is_refused() -> None:
    with pytest.raises(SequenceError, match="no token for 'A'"):
        residue_fields(text_tokenizer())


def test_fields_of_the_config() -> None:
    made = processor(protein_tokenizer=protein_tokenizer(), text_tokenizer=text_tokenizer())
    fields = made.encoder_fields()
    assert fields["text_special_token_ids"] == [0, 1, 2, 3]
    assert tiny_tfbind(**fields).protein_token_ids == tuple(fields["protein_token_ids"])
    assert processor().encoder_fields() == {}


def test_saved_with_the_model_and_loaded(tmp_path: Path) -> None:
    made = processor(text_tokenizer=text_tokenizer(), protein_tokenizer=protein_tokenizer(), text_max_length=3)
    tiny_tfbind().save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    for loaded in (TFBindProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is TFBindProcessor and loaded.text_max_length == 3
        one, other = (x(dna="ACG", proteins=["AC"], contexts="cell type liver K562") for x in (made, loaded))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        assert loaded.encoder_fields() == made.encoder_fields()
    processor().save_pretrained(tmp_path / "dna_only")
    assert TFBindProcessor.from_pretrained(tmp_path / "dna_only").text_tokenizer is None
    with pytest.raises(TypeError):
        TFBindProcessor("no tokenizer")


def test_esm_by_its_own_tokenizer(tmp_path: Path) -> None:
    """transformers' class with a vocabulary in ESM's order of tokens."""
    special = ["<cls>", "<pad>", "<eos>", "<unk>", *LETTERS, "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(special))
    fields = residue_fields(EsmTokenizer(str(tmp_path / "vocab.txt")))
    assert (fields["protein_prefix_ids"], fields["protein_suffix_ids"]) == ([0], [2])
    assert fields["protein_token_ids"][:3] == [5, 23, 13] and fields["protein_token_ids"][20:] == [1, 24]
