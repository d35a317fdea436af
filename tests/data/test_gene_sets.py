"""GMT files as they are in the wild, the choice of pathways, and ontologies."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from genesplice_hf.data.gene_sets import gene_annotations, read_gmt, select_pathways
from genesplice_hf.data.ontology import propagated, read_gaf, read_obo
from genesplice_hf.errors import DataError
from genesplice_hf.tokenization.tokenization_gene import GeneTokenizer

GMT = (
    "Apoptotic process (GO:0006915)\t\tA\tB\tC\t\n"
    "'de novo' folding [x]\thttp://somewhere\tB\tD\tD\tX\r\n"
    "\n"
    "EMPTY SET\tnothing here\n"
    "ALL\t\tA\tB\tC\tD\tE\n"
)
OBO = """format-version: 1.2

[Term]
id: GO:1
name: root
alt_id: GO:9

[Term]
id: GO:2
name: middle
is_a: GO:1 ! root

[Term]
id: GO:3
name: leaf
relationship: part_of GO:2 ! middle
relationship: regulates GO:4 ! other

[Term]
id: GO:4
is_obsolete: true

[Typedef]
id: part_of
name: part of
"""


def gaf(*rows: tuple[str, str, str, str, str]) -> str:
    lines = ["!gaf-version: 2.2"]
    for symbol, qualifier, term, evidence, aspect in rows:
        cells = ["UniProtKB", "P1", symbol, qualifier, term, "PMID:1", evidence, "", aspect, *[""] * 8]
        lines.append("\t".join(cells))
    return "\n".join(lines) + "\n"


def tokenizer() -> GeneTokenizer:
    return GeneTokenizer(genes=list("EDCBA"))


@pytest.mark.parametrize("zipped", [False, True])
def test_names_with_spaces_and_empty_descriptions_survive(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "sets.gmt"
    path.write_bytes(gzip.compress(GMT.encode()) if zipped else GMT.encode())
    found = read_gmt(path)
    assert found == {
        "Apoptotic process (GO:0006915)": ["A", "B", "C"],
        "'de novo' folding [x]": ["B", "D", "X"],
        "EMPTY SET": [],
        "ALL": ["A", "B", "C", "D", "E"],
    }


def test_sets_are_chosen_by_size_and_ordered_by_name(tmp_path: Path) -> None:
    sets = {"b": ["A", "B"], "a": ["C", "D", "X"], "c": ["A"], "d": list("ABCDE"), "e": ["B", "C"]}
    found = select_pathways(sets, tokenizer(), min_genes=2, max_genes=4, max_pathways=2)
    assert found.names == ["a", "b"] and found.matched == {"a": 2, "b": 2}
    assert set(found.dropped) == {"c", "d", "e"} and "1 of 1" in found.dropped["c"]
    assert "2 largest" in found.dropped["e"]
    assert found.pathways.tolist() == [0, 0, 1, 1]
    assert found.genes.tolist() == [1, 2, 3, 4]
    found.save(tmp_path)
    assert json.loads((tmp_path / "pathways.json").read_text())["matched"] == {"a": 2, "b": 2}


def test_bad_sets_are_advice(tmp_path: Path) -> None:
    path = tmp_path / "sets.gmt"
    for text, words in (
        ("no tabs\n", "line 1 is 'no tabs'"),
        ("\tx\tA\n", "line 1"),
        ("a\t\tA\na\t\tB\n", "`path` .* names the set 'a' twice"),
        ("\n", "holds no gene set"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            read_gmt(path)
    with pytest.raises(DataError, match=r"`sets` must hold a set with 5 to 300 genes.*none of 1"):
        select_pathways({"a": ["A", "X"]}, tokenizer())
    with pytest.raises(DataError, match="`min_genes`"):
        select_pathways({"a": ["A"]}, tokenizer(), min_genes=0)


def test_annotations_reach_the_ancestors(tmp_path: Path) -> None:
    (tmp_path / "go.obo").write_text(OBO)
    rows = [
        ("A", "involved_in", "GO:3", "EXP", "P"),
        ("B", "NOT|involved_in", "GO:3", "EXP", "P"),
        ("C", "enables", "GO:9", "IEA", "F"),
        ("D", "involved_in", "GO:4", "EXP", "P"),
    ]
    (tmp_path / "go.gaf").write_text(gaf(*rows))
    ontology, found = read_obo(tmp_path / "go.obo"), read_gaf(tmp_path / "go.gaf")
    assert ontology.names == {"GO:1": "root", "GO:2": "middle", "GO:3": "leaf"}
    assert found == {"A": {"GO:3"}, "C": {"GO:9"}, "D": {"GO:4"}}
    assert propagated(found, ontology) == {"A": {"GO:1", "GO:2", "GO:3"}, "C": {"GO:1"}, "D": set()}
    assert read_gaf(tmp_path / "go.gaf", evidence={"IEA"}) == {"C": {"GO:9"}}
    assert set(read_gaf(tmp_path / "go.gaf", aspect="P")) == {"A", "D"}


def test_terms_of_too_few_or_too_many_genes_are_dropped() -> None:
    terms = {"A": {"t1", "all"}, "B": {"t1", "all"}, "C": {"t2", "all"}, "D": {"all"}, "E": {"all"}}
    found = gene_annotations(terms, tokenizer(), min_genes=2, max_share=0.5)
    assert found.names == ["t1"] and found.genes.tolist() == [3, 4] and set(found.dropped) == {"t2", "all"}
    assert np.array_equal(found.pathways, [0, 0])


def test_bad_ontologies_are_advice(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("nothing\n")
    with pytest.raises(DataError, match=r"holds no \[Term\]"):
        read_obo(tmp_path / "x")
    with pytest.raises(DataError, match=r"15 or more columns.*line 1 has 1"):
        read_gaf(tmp_path / "x")
    (tmp_path / "x").write_text(gaf(("A", "", "GO:1", "EXP", "P")))
    with pytest.raises(DataError, match="`evidence` and `aspect`"):
        read_gaf(tmp_path / "x", aspect="C")
