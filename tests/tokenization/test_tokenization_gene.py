"""Gene tokens: scGPT's vocabularies, names in four spellings, and files that bring everything back."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import genesplice_hf  # noqa: F401, registers the tokenizer
from genesplice_hf.errors import DataError
from genesplice_hf.tokenization.gene_names import GeneMatchWarning, read_pairs
from genesplice_hf.tokenization.tokenization_gene import GeneTokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "scgpt_binning" / "tokenization.json").read_text())
GENES = ["TP53", "MYC", "HLA-A", "RP11-34P13.7", "GATA1"]


def in_order(tokenizer: GeneTokenizer) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


@pytest.mark.parametrize("name", ["vocab_specials_first", "vocab_specials_last_with_duplicates"])
def test_a_list_of_genes_in_scgpts_order(name: str) -> None:
    case = GOLDEN[name]
    tokenizer = GeneTokenizer(
        genes=case["genes"],
        order="upstream",
        specials_first=case["special_first"],
        eoc_token="<eoc>" if "<eoc>" in case["specials"] else None,
    )
    assert in_order(tokenizer) == case["itos"]
    assert tokenizer.convert_tokens_to_ids("NOT_A_GENE") == case["default_index"] == tokenizer.pad_token_id


def test_a_map_keeps_its_ids_and_gets_the_specials() -> None:
    case = GOLDEN["vocab_from_dict_append_specials"]
    tokenizer = GeneTokenizer(genes=case["token2idx"])
    assert tokenizer.get_vocab() == case["stoi"]
    lookup = case["lookup"]
    assert tokenizer.convert_tokens_to_ids(lookup["tokens"]) == lookup["ids"]


def test_a_list_keeps_its_order_by_default() -> None:
    assert GeneTokenizer(genes=[*GENES, "TP53"]).genes == GENES


def test_text_becomes_ids_behind_cls() -> None:
    tokenizer = GeneTokenizer(genes=GENES)
    batch = tokenizer(["MYC HLA-A RP11-34P13.7", "GATA1"], padding=True)
    cls, pad = tokenizer.cls_token_id, tokenizer.pad_token_id
    assert batch["input_ids"] == [[cls, 1, 2, 3], [cls, 4, pad, pad]]
    assert batch["attention_mask"] == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert tokenizer([["MYC", "GATA1"]], is_split_into_words=True)["input_ids"] == [[cls, 1, 4]]
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "MYC HLA-A RP11-34P13.7"
    assert GeneTokenizer(genes=GENES, add_cls=False)("MYC")["input_ids"] == [1]


def full() -> GeneTokenizer:
    tokenizer = GeneTokenizer(genes=GENES)
    tokenizer.add_aliases({"P53": "TP53", "GF1": "GATA1"})
    tokenizer.add_ensembl({"MYC": "ENSG00000136997.21", "HLA-A": "ENSG00000206503"})
    return tokenizer


def test_names_in_four_spellings() -> None:
    names = ["TP53", "P53", "ENSG00000136997.3", "ENSG00000206503", " GATA1 ", "tp53", "NOPE", "<cls>"]
    match = full().convert_genes(names)
    assert match.ids.tolist() == [0, 0, 1, 2, 4, -1, -1, -1]
    assert match.unmatched == ["tp53", "NOPE", "<cls>"] and match.fraction == 5 / 8
    assert match.aliases["P53"] == "TP53" and match.aliases["ENSG00000136997.3"] == "MYC"
    assert match.duplicates == {"TP53": ["TP53", "P53"]}
    assert "5 of 8" in match.summary()


def test_a_vocabulary_of_ensembl_ids_takes_symbols() -> None:
    tokenizer = GeneTokenizer(genes=["ENSG00000136997", "ENSG00000206503"])
    tokenizer.add_ensembl({"MYC": "ENSG00000136997.2"})
    tokenizer.add_aliases({"C-MYC": "MYC"})
    assert tokenizer.convert_genes(["MYC", "C-MYC", "ENSG00000206503.1"]).ids.tolist() == [0, 0, 1]


def test_everything_comes_back_from_files(tmp_path: Path) -> None:
    tokenizer = full()
    tokenizer.add_genes(["SOX2"])
    tokenizer.save_pretrained(tmp_path)
    for again in (GeneTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert type(again) is GeneTokenizer and again.get_vocab() == tokenizer.get_vocab()
        assert again.convert_genes(["P53", "ENSG00000136997"]).ids.tolist() == [0, 1]
        assert again.special_tokens_map == tokenizer.special_tokens_map and again.eoc_token == "<eoc>"
        again.save_pretrained(tmp_path / "second")
        assert (tmp_path / "second/vocab.json").read_text() == (tmp_path / "vocab.json").read_text()


def test_scgpts_own_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"A1BG": 1, "TP53": 0, "<pad>": 2, "<cls>": 3, "<eoc>": 4}))
    tokenizer = GeneTokenizer(vocab_file=tmp_path / "vocab.json")
    assert in_order(tokenizer) == ["TP53", "A1BG", "<pad>", "<cls>", "<eoc>"] and tokenizer.genes == ["TP53", "A1BG"]


def test_new_genes_get_new_ids() -> None:
    tokenizer = GeneTokenizer(genes=GENES)
    before = tokenizer.get_vocab()
    assert tokenizer.add_genes(["SOX2", "MYC", "KLF4", "SOX2"]) == 2
    assert len(tokenizer) == len(before) + 2 and tokenizer.get_vocab().items() >= before.items()
    assert tokenizer("KLF4")["input_ids"][1] == len(before) + 1
    assert tokenizer.genes[-2:] == ["SOX2", "KLF4"]


def test_matching_warns_and_refuses() -> None:
    tokenizer = GeneTokenizer(genes=GENES)
    with pytest.warns(GeneMatchWarning, match="1 of 3 genes matched"):
        tokenizer.convert_genes(["TP53", "X1", "X2"])
    with pytest.raises(DataError, match=r"`genes`.*none of 2.*\['X1', 'X2'\]"):
        tokenizer.convert_genes(["X1", "X2"])
    with pytest.raises(DataError, match=r"`min_match` is 0\.9"):
        tokenizer.convert_genes(["TP53", "MYC", "X1"], min_match=0.9)
    with pytest.raises(DataError, match="`names`"):
        tokenizer.convert_genes("TP53")
    assert np.array_equal(tokenizer.convert_genes(["TP53", "X1"]).is_matched, [True, False])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "`vocab_file`.*`genes`"),
        ({"genes": {"A": 0, "B": 2}}, "ids of `genes`"),
        ({"genes": {"A": 0, "B": 0}}, "ids of `genes`"),
        ({"genes": ["A B"]}, "`genes`.*white space"),
        ({"genes": ["A", ""]}, "`genes`"),
        ({"genes": "TP53"}, "`genes` must be a list"),
        ({"genes": ["A"], "order": "best"}, "`order`"),
        ({"genes": ["A"], "pad_token": None}, "`pad_token`"),
    ],
)
def test_bad_vocabularies_are_advice(arguments: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        GeneTokenizer(**arguments)


def test_bad_files_are_advice(tmp_path: Path) -> None:
    for content in ("not json", "[1, 2]", '{"A": "x"}'):
        (tmp_path / "vocab.json").write_text(content)
        with pytest.raises(DataError, match="`vocab_file`"):
            GeneTokenizer(vocab_file=tmp_path / "vocab.json")
    table = tmp_path / "aliases.tsv"
    table.write_text("# comment\nalias\tname\nP53\tTP53\n\nP53\tTP53\n")
    assert read_pairs(table, ("alias", "name")) == {"P53": "TP53"}
    table.write_text("P53\tTP53\nP53\tMYC\n")
    with pytest.raises(DataError, match="two meanings"):
        read_pairs(table, ("alias", "name"))
    table.write_text("P53\n")
    with pytest.raises(DataError, match="line 1"):
        read_pairs(table, ("alias", "name"))
    tokenizer = GeneTokenizer(genes=GENES)
    with pytest.raises(DataError, match="`text_pair`"):
        tokenizer.build_inputs_with_special_tokens([1], [2])
    with pytest.raises(DataError, match="`ids`"):
        tokenizer.convert_ids_to_tokens([999])
