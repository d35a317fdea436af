"""Cells of an AnnData as rows: the steps against scanpy's, nothing learned from test cells, and every complaint."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
from scipy import sparse, stats

from genesplice_hf.data.cell_matrix import CountsWarning, chosen_cells, open_cells
from genesplice_hf.data.expression_settings import ExpressionSettings
from genesplice_hf.data.h5ad import GeneExpressionProcessor
from genesplice_hf.errors import DataError
from genesplice_hf.objectives.expression import DataCollatorForMaskedExpression
from genesplice_hf.tokenization.gene_names import GeneMatchWarning
from genesplice_hf.tokenization.tokenization_gene import GeneTokenizer
from genesplice_hf.tokenization.value_binning import bin_values, unbin_values

GENES = [f"G{i}" for i in range(60)]
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "scgpt_binning" / "binning.json").read_text())


def counts(cells: int = 30, genes: int = 60, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.poisson(random.gamma(0.5, 2.0, genes), (cells, genes)).astype(np.float32)


def cells(matrix: np.ndarray | None = None, names: list[str] | None = None) -> anndata.AnnData:
    matrix = counts() if matrix is None else matrix
    kinds = [["T", "B", "NK"][i % 3] for i in range(len(matrix))]
    obs = pd.DataFrame({"kind": kinds, "batch": [f"b{i % 2}" for i in range(len(matrix))]})
    obs["total"] = matrix.sum(1) * 2 + 1
    obs.index = [f"cell{i}" for i in range(len(matrix))]
    names = [f"G{i}" for i in range(matrix.shape[1])] if names is None else names
    return anndata.AnnData(sparse.csr_matrix(matrix), obs=obs, var=pd.DataFrame(index=names))


def processor(genes: list[str] | None = None, **settings: Any) -> GeneExpressionProcessor:
    return GeneExpressionProcessor(GeneTokenizer(genes=genes or GENES), ExpressionSettings(**settings))


def test_rows_are_scanpys_values_binned() -> None:
    adata = cells()
    found = processor().fit(adata)
    dataset = found(adata)
    expected = adata.copy()
    scanpy.pp.filter_genes(expected, min_counts=3)
    assert found.fitted.genes == sorted(expected.var_names, key=GENES.index)
    whole = adata.copy()
    scanpy.pp.normalize_total(whole, target_sum=1e4)
    scanpy.pp.log1p(whole)
    values = whole[:, found.fitted.genes].X.toarray()
    for row, line in zip(dataset, values, strict=True):
        ids = [found.tokenizer.convert_tokens_to_ids(gene) for gene in found.fitted.genes]
        assert row["input_ids"] == [found.tokenizer.cls_token_id, *np.array(ids)[line > 0].tolist()]
        assert row["values"] == [0.0, *bin_values(line[line > 0]).digits.tolist()]
        assert row["length"] == len(row["input_ids"])
    assert dataset["cell_id"][:2] == ["cell0", "cell1"]
    assert str(dataset.features["input_ids"].feature.dtype) == "int32"


KEEPS_THREADS = """
import torch
import anndata, numba, numpy, scipy.sparse
from genesplice_hf.data.h5ad import ExpressionSettings, GeneExpressionProcessor
from genesplice_hf.tokenization.tokenization_gene import GeneTokenizer
counts = scipy.sparse.csr_matrix(numpy.random.default_rng(0).poisson(1.0, (30, 20)).astype("float32"))
cells = anndata.AnnData(counts)
GeneExpressionProcessor(GeneTokenizer(genes=list(cells.var_names)), ExpressionSettings()).fit(cells)
assert numba.get_num_threads() == 2 and torch.get_num_threads() == 1, torch.get_num_threads()
"""


def test_torch_keeps_its_number_of_threads(run_python) -> None:
    run_python(KEEPS_THREADS, OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="2")


def test_normalised_logs_are_scgpts() -> None:
    case = GOLDEN["preprocessor_normalize_log1p"]
    matrix = np.array(case["matrix"])
    found = processor(value="log1p", min_gene_counts=0, include_zero_genes=True, append_cls=False)
    adata = cells(matrix)
    rows = np.array(found.fit(adata)(adata)["values"])
    np.testing.assert_allclose(rows, case["log1p"], rtol=1e-5)
    plain = processor(value="log1p", log1p=False, min_gene_counts=0, include_zero_genes=True, append_cls=False)
    np.testing.assert_allclose(np.array(plain.fit(adata)(adata)["values"]), case["normed"], rtol=1e-5)


def test_other_values() -> None:
    matrix = counts()
    adata = cells(matrix)
    raw = processor(value="counts", min_gene_counts=0).fit(adata)(adata)
    assert raw[3]["values"][1:] == matrix[3][matrix[3] > 0].tolist()
    ranked = processor(value="rank", min_gene_counts=0).fit(adata)(adata)
    expressed = matrix[3][matrix[3] > 0]
    np.testing.assert_allclose(ranked[3]["values"][1:], stats.rankdata(expressed) / len(expressed), rtol=1e-6)
    dense = processor(include_zero_genes=True, min_gene_counts=0).fit(adata)(adata)
    assert {len(row) for row in dense["values"]} == {61}
    panel = processor(value="log1p", size_factor_key="total", min_gene_counts=0).fit(adata)(adata)
    expected = np.log1p(expressed / adata.obs["total"].iloc[3] * 1e4)
    np.testing.assert_allclose(panel[3]["values"][1:], expected, rtol=1e-5)


def test_edges_lead_back_to_values() -> None:
    adata = cells()
    logs = processor(value="log1p").fit(adata)(adata)
    binned = processor(store_bin_edges=True, tie_break="left").fit(adata)(adata)
    for one, other in zip(binned, logs, strict=True):
        edges = np.array(one["bin_edges"])
        back = unbin_values(np.array(one["values"][1:]), edges)
        assert np.abs(back - other["values"][1:]).max() <= np.diff(edges).max() + 1e-6


def test_random_ties_belong_to_the_cell_and_not_to_the_chunk() -> None:
    adata = cells()
    found = processor(tie_break="random").fit(adata)
    whole = found(adata)
    part = found(adata, cells=["cell20", "cell3"])
    assert part["cell_id"][:] == ["cell3", "cell20"]
    assert part[0] == whole[3] and part[1] == whole[20]
    assert found(adata[::-1].copy())[29 - 7] == whole[7]


def test_a_file_on_disk_is_the_object_in_memory(tmp_path: Path) -> None:
    adata = cells()
    adata.layers["other"] = adata.X * 2
    for layer, dense in (("X", False), ("X", True), ("other", False)):
        copy = adata.copy()
        copy.X = copy.X.toarray() if dense else copy.X
        copy.write_h5ad(tmp_path / "cells.h5ad")
        expected = processor(layer=layer).fit(copy)(copy)
        for backed in (False, True):
            found = processor(layer=layer).fit(tmp_path / "cells.h5ad", backed=backed)
            assert found(tmp_path / "cells.h5ad", backed=backed).to_dict() == expected.to_dict()
    assert list(found.stream(tmp_path / "cells.h5ad")) == list(expected)


def test_raw_and_dense_and_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    adata = cells()
    expected = processor().fit(adata)(adata).to_dict()
    adata.raw = adata.copy()
    adata.X = adata.X.toarray() * 0
    assert processor(layer="raw").fit(adata)(adata).to_dict() == expected
    monkeypatch.setattr("genesplice_hf.data.cell_matrix._CHUNK_CELLS", 7)
    assert processor(layer="raw").fit(adata)(adata).to_dict() == expected


def test_variable_genes_are_those_of_the_training_cells() -> None:
    matrix = counts(80)
    train = np.arange(80) < 50
    found = processor(num_variable_genes=12).fit(cells(matrix), train_cells=train).fitted
    assert len(found.genes) == 12
    changed = matrix.copy()
    changed[50:] = np.random.default_rng(9).poisson(40, changed[50:].shape)
    again = processor(num_variable_genes=12).fit(cells(changed), train_cells=train).fitted
    assert again.genes == found.genes and again.variances == found.variances
    assert processor(num_variable_genes=12).fit(cells(changed)).fitted.genes != found.genes
    values = cells(matrix[:50])
    scanpy.pp.normalize_total(values, target_sum=1e4)
    scanpy.pp.log1p(values)
    np.testing.assert_allclose(found.variances, values[:, found.genes].X.toarray().var(0), rtol=1e-4)


def test_with_scikit_misc_counts_choose_the_variable_genes(tmp_path: Path) -> None:
    pytest.importorskip("skmisc.loess", reason="scikit-misc, of the extra `rna`, is not installed")
    matrix = counts(120)
    found = processor(num_variable_genes=12).fit(cells(matrix))
    assert found.fitted.report.variable_genes_flavor == "seurat_v3"
    expected = cells(matrix)
    scanpy.pp.filter_genes(expected, min_counts=3)
    scanpy.pp.highly_variable_genes(expected, n_top_genes=12, flavor="seurat_v3")
    assert found.fitted.genes == list(expected.var_names[expected.var["highly_variable"]])
    found.save_pretrained(tmp_path)
    assert GeneExpressionProcessor.from_pretrained(tmp_path).fitted == found.fitted
    with pytest.raises(DataError, match=r"`num_variable_genes` \(4\) cannot be chosen from .* genes"):
        processor(num_variable_genes=4).fit(cells(counts(30, 12)))


@pytest.mark.parametrize("value", ["bin", "counts"])
def test_without_scikit_misc_logs_choose_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str) -> None:
    """Of scaled counts, whatever the tokens' values are."""
    for name in ("skmisc", "skmisc.loess"):
        monkeypatch.setitem(sys.modules, name, None)
    matrix = counts(120)
    found = processor(num_variable_genes=12, value=value).fit(cells(matrix))
    assert found.fitted.report.variable_genes_flavor == "seurat"
    expected = cells(matrix)
    scanpy.pp.normalize_total(expected, target_sum=1e4)
    scanpy.pp.log1p(expected)
    expected = expected[:, matrix.sum(0) >= 3].copy()
    scanpy.pp.highly_variable_genes(expected, n_top_genes=12, flavor="seurat")
    # Genes may share a score, and the twelfth one then stands for another.
    scores = expected.var["dispersions_norm"]
    np.testing.assert_allclose(scores[found.fitted.genes].sort_values(), scores.sort_values()[-12:], rtol=1e-4)
    found.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "processor_config.json").read_text())
    assert content["fitted"]["report"]["variable_genes_flavor"] == "seurat"
    assert GeneExpressionProcessor.from_pretrained(tmp_path).fitted == found.fitted
    assert processor().fit(cells(matrix)).fitted.report.variable_genes_flavor is None
    with pytest.raises(DataError, match="`variable_genes_flavor` 'seurat_v3' needs scikit-misc"):
        processor(num_variable_genes=12, variable_genes_flavor="seurat_v3").fit(cells(matrix))


def test_a_flavour_can_be_asked_for() -> None:
    found = processor(num_variable_genes=12, variable_genes_flavor="seurat").fit(cells(counts(120)))
    assert found.fitted.report.variable_genes_flavor == "seurat"
    with pytest.raises(DataError, match="`variable_genes_flavor` must be 'auto', 'seurat' or 'seurat_v3'"):
        processor(variable_genes_flavor="cell_ranger")


def test_duplicates_are_added_up_and_unknown_genes_reported() -> None:
    matrix = counts(genes=4)
    adata = cells(matrix, ["G1", "G1", "NOPE", "ENSG00000141510.5"])
    tokenizer = GeneTokenizer(genes=["G1", "TP53"])
    tokenizer.add_ensembl({"TP53": "ENSG00000141510"})
    settings = ExpressionSettings(value="counts", include_zero_genes=True, min_gene_counts=0)
    found = GeneExpressionProcessor(tokenizer, settings).fit(adata)
    report = found.fitted.report
    assert report.unmatched == ["NOPE"] and report.duplicates == {"G1": ["G1", "G1"]}
    assert report.aliases == {"ENSG00000141510.5": "TP53"} and report.num_matched == 3
    rows = np.array(found(adata)["values"])[:, 1:]
    np.testing.assert_array_equal(rows, np.stack([matrix[:, 0] + matrix[:, 1], matrix[:, 3]], axis=1))


def test_labels_batches_and_further_columns() -> None:
    adata = cells()
    found = processor(label_key="kind", batch_key="batch", obs_columns=["total"]).fit(adata, train_cells=range(20))
    dataset = found(adata)
    assert found.fitted.labels == ["B", "NK", "T"] and found.fitted.batches == ["b0", "b1"]
    assert dataset["cell_type_labels"][:3] == [2, 0, 1] and dataset["batch_labels"][:3] == [0, 1, 0]
    assert dataset["total"][:] == adata.obs["total"].tolist()
    adata.obs["kind"] = adata.obs["kind"].astype(object)
    adata.obs.loc["cell1", "kind"] = None
    assert found(adata)["cell_type_labels"][1] == -100


def test_everything_comes_back_from_a_folder(tmp_path: Path) -> None:
    adata = cells()
    found = processor(num_variable_genes=20, tie_break="random", label_key="kind").fit(adata, train_cells=range(20))
    found.save_pretrained(tmp_path)
    again = GeneExpressionProcessor.from_pretrained(tmp_path)
    assert again.settings == found.settings and again.fitted == found.fitted
    assert again(adata).to_dict() == found(adata).to_dict()
    np.testing.assert_array_equal(again.gene_priority(), found.gene_priority())
    assert (found.gene_priority() > 0).sum() == 20
    content = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps(content | {"settings": {"colour": 3}}))
    with pytest.raises(DataError, match="another version"):
        GeneExpressionProcessor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps(content | {"processor_class": "Other"}))
    with pytest.raises(DataError, match="GeneExpressionProcessor"):
        GeneExpressionProcessor.from_pretrained(tmp_path)


class Config:
    n_bins, mask_value, pad_value, input_emb_style = 7, -5, -6, "category"


def test_model_and_data_share_their_numbers() -> None:
    found = GeneExpressionProcessor.for_model(Config(), GeneTokenizer(genes=GENES), min_gene_counts=0)
    settings = found.settings
    assert (settings.n_bins, settings.mask_value, settings.pad_value) == (7, -5, -6)
    assert settings.tie_break == "mid_floor"
    adata = cells()
    values = np.concatenate(found.fit(adata)(adata)["values"])
    assert set(values) <= set(range(7))


def test_rows_go_into_the_collator() -> None:
    adata = cells()
    found = processor(label_key="kind").fit(adata)
    batch = DataCollatorForMaskedExpression(found.tokenizer, seed=0)(list(found(adata)))
    assert batch["input_ids"].shape == batch["values"].shape and batch["cell_type_labels"].shape == (30,)


def test_pbmc68k_counts_come_back_from_its_logs() -> None:
    adata = scanpy.datasets.pbmc68k_reduced()
    raw = np.expm1(adata.raw.X.toarray()) * adata.obs["n_counts"].to_numpy()[:, None] / 1e4
    restored = anndata.AnnData(sparse.csr_matrix(np.round(raw)), obs=adata.obs, var=adata.raw.var)
    assert (np.abs(raw - np.round(raw)) / np.maximum(raw, 1)).max() < 1e-3
    found = processor(list(adata.raw.var_names), value="log1p", size_factor_key="n_counts", min_gene_counts=0)
    rows = found.fit(restored)(restored)
    lengths = np.array(rows["length"]) - 1
    assert (lengths.min(), np.median(lengths), lengths.max()) == (183, 243, 409)
    first = adata.raw.X[0].toarray().ravel()
    np.testing.assert_allclose(rows[0]["values"][1:], first[first > 0], rtol=2e-3)


def with_value(value: float) -> anndata.AnnData:
    matrix = counts()
    matrix[4, 5] = value
    return cells(matrix)


@pytest.mark.parametrize(
    ("adata", "settings", "words"),
    [
        (with_value(np.nan), {}, r"`layer` 'X' holds NaN or infinity, first in cell 'cell4'"),
        (with_value(-2.5), {}, r"`layer` 'X' holds negative values \(smallest -2.5, first in cell 'cell4'\)"),
        (cells(), {"layer": "counts"}, r"`layer` must be one of \['X'\], got 'counts'"),
        (cells(), {"gene_column": "symbol"}, "`gene_column` must be a column of `var`"),
        (cells(), {"label_key": "type"}, "`label_key` must be a column of `obs`.*nearest is"),
        (cells(), {"batch_key": "donor"}, "`batch_key` must be a column of `obs`"),
        (cells(), {"size_factor_key": "sizes"}, "`size_factor_key` must be a column of `obs`"),
        (cells(counts() * 0), {}, "`min_gene_counts` .3. leaves none of 60 matched genes"),
        (cells(names=[f"X{i}" for i in range(60)]), {}, "`genes` must name genes of the vocabulary"),
        (cells(counts()[:0]), {}, "`source` must hold cells"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_bad_data_is_advice(adata: anndata.AnnData, settings: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        processor(**settings).fit(adata)


def test_logs_and_fractions_are_explained() -> None:
    logs = cells(np.log1p(counts()))
    with pytest.warns(CountsWarning, match=r"`layer` 'X' looks log-transformed.*`target_sum=None`"):
        processor().fit(logs)
    with pytest.warns(CountsWarning, match=r"no whole numbers"):
        processor().fit(cells(counts() * 30.3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor(target_sum=None, log1p=False).fit(logs)
        processor(check_counts=False).fit(logs)
        processor().fit(cells())


def test_empty_cells_and_silent_genes_are_reported() -> None:
    matrix = counts()
    matrix[3] = 0
    matrix[:, 7] = 0
    adata = cells(matrix)
    found = processor().fit(adata)
    assert found.fitted.report.num_empty_cells == 1 and found.fitted.report.num_silent_genes >= 1
    with pytest.warns(CountsWarning, match=r"1 cells .*'cell3'.*`min_cell_genes=1`"):
        rows = found(adata)
    assert rows[3]["input_ids"] == [found.tokenizer.cls_token_id] and rows[3]["values"] == [0.0]
    kept = processor(min_cell_genes=1).fit(adata)(adata)
    assert "cell3" not in kept["cell_id"][:] and len(kept) == 29
    with pytest.raises(DataError, match="`append_cls` is False"):
        processor(append_cls=False).fit(adata)(adata)
    with pytest.raises(DataError, match="`min_cell_genes`"):
        processor(min_cell_genes=1000).fit(adata)(adata)


def test_few_matches_warn_with_the_fraction() -> None:
    names = [f"G{i}" if i < 20 else f"X{i}" for i in range(60)]
    with pytest.warns(GeneMatchWarning, match=r"20 of 60 genes matched \(33.3%\)"):
        found = processor().fit(cells(names=names))
    assert len(found.fitted.report.unmatched) == 40
    with pytest.raises(DataError, match=r"`min_match` is 0\.9"):
        processor(min_match=0.9).fit(cells(names=names))


def test_repeated_cell_names_are_told_apart() -> None:
    adata = cells()
    adata.obs_names = ["a", "b", "a", *(f"c{i}" for i in range(27))]
    with pytest.warns(CountsWarning, match="`obs_names` are not unique"), open_cells(adata) as matrix:
        assert matrix.cell_ids[:3] == ["a", "b", "a-1"] and len(set(matrix.cell_ids)) == 30


def test_bad_use_is_advice(tmp_path: Path) -> None:
    adata = cells()
    with pytest.raises(DataError, match="call `fit`"):
        processor()(adata)
    found = processor(label_key="kind").fit(adata, train_cells=["cell0", "cell3"])
    with pytest.raises(DataError, match=r"`label_key` 'kind' holds \['B', 'NK'\]"):
        found(adata)
    other = cells(names=[*GENES[30:], *(f"X{i}" for i in range(30))])
    narrow = processor().fit(cells(counts(genes=10)))
    with pytest.raises(DataError, match="`source` must hold genes that the processor was fitted on"):
        narrow(other)
    with pytest.raises(DataError, match="`path`"):
        processor().fit(tmp_path / "none.h5ad")
    (tmp_path / "bad.h5ad").write_text("no hdf5")
    with pytest.raises(DataError, match=r"`source` \(bad.h5ad\) cannot be read"):
        processor().fit(tmp_path / "bad.h5ad")
    with pytest.raises(DataError, match="`source` must be an AnnData or a path"):
        processor().fit(3)
    adata.obs["total"] = 0.0
    with pytest.raises(DataError, match="`size_factor_key` 'total' must hold numbers above 0"):
        processor(size_factor_key="total").fit(adata)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (["cell1", "nobody"], r"`cells` names cells.*'nobody'"),
        (np.ones(3, dtype=bool), r"`cells` must have one entry per cell"),
        ([99], "`cells` must choose"),
        (np.zeros(30, dtype=bool), "`cells` must choose"),
    ],
)
def test_bad_choices_of_cells_are_advice(chosen: Any, words: str) -> None:
    with open_cells(cells()) as matrix, pytest.raises(DataError, match=words):
        chosen_cells(matrix, chosen, "cells")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"value": "bins"}, "`value`"),
        ({"tie_break": "best"}, "`tie_break`"),
        ({"n_bins": 1}, "`n_bins`"),
        ({"target_sum": 0}, "`target_sum`"),
        ({"target_sum": None, "size_factor_key": "n"}, "`size_factor_key` needs `target_sum`"),
        ({"num_variable_genes": 0}, "`num_variable_genes`"),
        ({"value": "log1p", "store_bin_edges": True}, "`store_bin_edges`"),
    ],
)
def test_bad_settings_are_advice(settings: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        ExpressionSettings(**settings)
