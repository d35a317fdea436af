"""Edge lists in the usual styles, edges as ids, and controls that keep what they should."""

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from genesplice_hf.data.knowledge import Edges, coexpression_edges, read_edges, shuffle_graph, to_graph
from genesplice_hf.errors import DataError
from genesplice_hf.tokenization.tokenization_gene import GeneTokenizer

STYLES = {
    "collectri": "source,target,weight\nA,B,1\nB,C,-1\n",
    "dorothea": "tf,confidence,target,mor\nA,A,B,1.0\nB,C,C,-1.0\n",
    "omnipath": (
        "source\ttarget\tsource_genesymbol\ttarget_genesymbol\tis_directed\tis_stimulation\tis_inhibition\n"
        "P1\tP2\tA\tB\tTrue\tTrue\tFalse\nP2\tP3\tB\tC\tTrue\tFalse\tTrue\n"
    ),
    "omnipath_index": (
        ",source_genesymbol,target_genesymbol,is_directed,is_stimulation,is_inhibition\n0,A,B,1,1,0\n1,B,C,1,0,1\n"
    ),
    "trrust": "A\tB\tActivation\t1;2\nB\tC\tRepression\t3\n",
}
SIGNLESS = {
    "gears": ("source,target,importance\nA,B,0.8\nB,C,0.4\n", [1.0, 0.5]),
    "beeline": ("Gene1,Gene2\nA,B\nB,C\n", [1.0, 1.0]),
    "string": ("protein1 protein2 combined_score\nA B 800\nB C 400\n", [1.0, 0.5]),
    "unknown": ("A\tB\tUnknown\t1\nB\tC\tUnknown\t2\n", [1.0, 1.0]),
}


def edges(pairs: list[tuple[str, str]], signs: list[int] | None = None) -> Edges:
    signs = np.array([1] * len(pairs) if signs is None else signs)
    ends = [np.array(column, dtype=object) for column in zip(*pairs, strict=True)]
    return Edges(*ends, np.maximum(signs, 0.0), np.maximum(-signs, 0.0), np.ones(len(pairs)))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("zipped", [False, True])
def test_signed_styles_say_the_same(style: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "edges.txt"
    path.write_bytes(gzip.compress(STYLES[style].encode()) if zipped else STYLES[style].encode())
    found = read_edges(path)
    assert list(zip(found.source, found.target, strict=True)) == [("A", "B"), ("B", "C")]
    assert (found.stimulation.tolist(), found.inhibition.tolist()) == ([1, 0], [0, 1])
    assert found.confidence.tolist() == ([1.0, 0.6] if style == "dorothea" else [1.0, 1.0])


@pytest.mark.parametrize("style", SIGNLESS)
def test_styles_without_signs(style: str, tmp_path: Path) -> None:
    (tmp_path / "edges").write_text(SIGNLESS[style][0])
    found = read_edges(tmp_path / "edges")
    assert not found.stimulation.any() and not found.inhibition.any()
    np.testing.assert_allclose(found.confidence, SIGNLESS[style][1])


def test_a_table_is_read_as_it_stands() -> None:
    frame = pd.DataFrame({"source": ["A", "NA"], "target": ["B", "C"], "weight": [0.5, -2]})
    found = read_edges(frame)
    assert found.source.tolist() == ["A", "NA"] and found.inhibition.tolist() == [0, 2]


def test_repeated_pairs() -> None:
    repeated = edges([("A", "B"), ("A", "B"), ("B", "A")], [1, -1, 1])
    merged = repeated.merged()
    assert (merged.stimulation.tolist(), merged.inhibition.tolist()) == ([1, 1], [1, 0])
    assert repeated.merged("sum").stimulation.tolist() == [1, 1]
    assert repeated.merged("drop").source.tolist() == ["B"]
    with pytest.raises(DataError, match="`edges` name A -> B more than once"):
        repeated.merged("error")
    with pytest.raises(DataError, match="`on_duplicate`"):
        repeated.merged("first")


def test_edges_become_ids_and_unknown_genes_are_named() -> None:
    tokenizer = GeneTokenizer(genes=["A", "B", "C"])
    tokenizer.add_aliases({"OLDB": "B"})
    table = to_graph(
        edges([("A", "B"), ("C", "OLDB"), ("A", "OLDB"), ("X", "A"), ("A", "Y")], [1, -1, -1, 1, 1]), tokenizer
    )
    assert table.edge_index.tolist() == [[0, 2], [1, 1]]
    assert table.features.tolist() == [[1, 1], [0, 1]]
    assert table.unknown == ["X", "Y"] and table.num_dropped == 2
    with pytest.raises(DataError, match=r"`edges` must join genes of the vocabulary, but none of 1"):
        to_graph(edges([("X", "Y")]), tokenizer)


def random_edges(seed: int = 0) -> Edges:
    random = np.random.default_rng(seed)
    pairs = sorted({(f"G{i}", f"G{j}") for i, j in random.integers(0, 40, (400, 2)) if i != j})
    return edges(pairs, random.choice([1, -1, 0], len(pairs)).tolist())


def test_a_shuffled_graph_keeps_every_signed_degree() -> None:
    graph = random_edges()
    shuffled = shuffle_graph(graph, seed=1)
    for sign in (1, -1, 0):
        for column in ("source", "target"):
            counted = [
                Counter(getattr(e, column)[(e.stimulation - e.inhibition) == sign].tolist()) for e in (graph, shuffled)
            ]
            assert counted[0] == counted[1]
    pairs = [set(zip(e.source.tolist(), e.target.tolist(), strict=True)) for e in (graph, shuffled)]
    assert len(pairs[1]) == len(graph) and not any(a == b for a, b in pairs[1])
    assert len(pairs[0] & pairs[1]) < 0.5 * len(graph)
    assert np.array_equal(shuffle_graph(graph, 1).target, shuffled.target)
    assert not np.array_equal(shuffle_graph(graph, 2).target, shuffled.target)
    with pytest.raises(DataError, match="more than once"):
        shuffle_graph(edges([("A", "B"), ("A", "B")]), 0)


def test_coexpression_takes_the_strongest() -> None:
    random = np.random.default_rng(0)
    base = random.normal(size=200)
    values = np.stack([base, base + 0.1 * random.normal(size=200), -base, random.normal(size=200), np.ones(200)], 1)
    found = coexpression_edges(values, ["A", "B", "C", "D", "E"], top_k=1, threshold=0.5)
    assert sorted(zip(found.source.tolist(), found.target.tolist(), strict=True)) == [
        ("A", "B"),
        ("A", "C"),
        ("C", "A"),
    ]
    signs = dict(zip(zip(found.source, found.target, strict=True), found.stimulation - found.inhibition, strict=True))
    assert signs["A", "B"] > 0.9 and signs["C", "A"] == pytest.approx(-1.0)
    with pytest.raises(DataError, match="`threshold`"):
        coexpression_edges(values[:, 3:], ["D", "E"], threshold=0.99)
    with pytest.raises(DataError, match="`expression`"):
        coexpression_edges(values, ["A"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("source,target\n", "`source` must hold edges"),
        ("a,b\nA,B\n", "column of source genes"),
        ("source,b\nA,B\n", "column of target genes"),
        ("source,target,weight\nA,B,strong\n", r"column 'weight' of `source` must hold numbers, row 1 is 'strong'"),
        ("source,target\nA,\n", "column 'target' of `source` is empty in row 1"),
        ("A\tB\tActivation\nA\tC\tMaybe\n", r"column 'regulation' of `source`.*'Maybe'"),
    ],
)
def test_bad_edge_lists_are_advice(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "edges").write_text(text)
    with pytest.raises(DataError, match=words):
        read_edges(tmp_path / "edges")
