"""The command line: it parses, calls the rooms and writes what it says."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from contract_rows import TABLES
from typer.testing import CliRunner

from genesplice_hf.cli import app
from genesplice_hf.data.h5ad import GeneExpressionProcessor
from genesplice_hf.models.registry import REGISTRY
from genesplice_hf.tokenization.tokenization_gene import GeneTokenizer
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer

runner = CliRunner()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    entry = REGISTRY["genesplice"]
    folder = tmp_path_factory.mktemp("classifier")
    entry.auto_classes["AutoModelForSequenceClassification"](entry.tiny_config(num_labels=2)).save_pretrained(folder)
    NucleotideTokenizer(preset="genesplice").save_pretrained(folder)
    return str(folder)


def test_version_names_the_models() -> None:
    result = runner.invoke(app, ["version"])
    assert result.exit_code == 0 and "genesplice" in result.output


def test_embed_writes_one_row_per_sequence_and_layer(classifier: str, tmp_path: Path) -> None:
    table, out = tmp_path / "table.csv", tmp_path / "out.npz"
    table.write_text("sequence\nACGTACGT\nTTTACG\nA\n")
    assert runner.invoke(app, ["embed", classifier, str(table), str(out)]).exit_code == 0
    arrays = np.load(out)
    assert {arrays[name].shape for name in arrays} == {(3, 32)}
    assert len(arrays.files) == 3  # the embedding and two blocks


def test_mutagenesis_writes_three_rows_per_base_and_a_logo(classifier: str, tmp_path: Path) -> None:
    out, logo = tmp_path / "variants.tsv", tmp_path / "logo.png"
    result = runner.invoke(app, ["mutagenesis", classifier, "ACGTAC", "--out", str(out), "--logo", str(logo)])
    assert result.exit_code == 0, result.output
    rows = [line for line in out.read_text().splitlines() if not line.startswith("#")]
    assert len(rows) == 1 + 3 * 6 and logo.stat().st_size > 0


def test_missing_column_is_our_error(classifier: str, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("dna\nACGT\n")
    result = runner.invoke(app, ["embed", classifier, str(table), str(tmp_path / "out.npz")])
    assert result.exit_code != 0 and "dna" in str(result.exception)


@pytest.mark.parametrize("row", ["genesplice_scgpt", "genesplice_bioformer", "genesplice_genegraph"])
def test_embed_writes_a_vector_per_cell_into_obsm(row: str, tmp_path: Path) -> None:
    entry = REGISTRY[row]
    model = entry.auto_classes["AutoModelForMaskedExpression"](entry.tiny_config()).eval()
    if row in TABLES:
        TABLES[row](model)
    model.save_pretrained(tmp_path / "model")
    tokenizer = GeneTokenizer(**entry.tokenizer_kwargs)
    counts = np.random.default_rng(0).poisson(1.0, (40, 45)).astype(np.float32)
    counts[5] = 0
    obs = pd.DataFrame({"kind": ["a", "b"] * 20}, index=[f"cell{i}" for i in range(40)])
    cells = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=tokenizer.genes))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    processor = GeneExpressionProcessor(tokenizer).fit(cells)
    processor.save_pretrained(tmp_path / "model")
    out = tmp_path / "out.h5ad"
    result = runner.invoke(app, ["embed", str(tmp_path / "model"), str(tmp_path / "cells.h5ad"), str(out)])
    assert result.exit_code == 0, result.output
    found = anndata.read_h5ad(out)
    vectors = found.obsm["X_genesplice"]
    assert vectors.shape == (40, model.config.hidden_size) and list(found.obs_names) == list(cells.obs_names)
    for place in (3, 5):
        row_of = processor(cells, cells=[place])[0]
        inputs = {name: torch.tensor([row_of[name]]) for name in ("input_ids", "values")}
        with torch.no_grad():
            expected = model(**inputs).cell_embedding[0]
        np.testing.assert_allclose(vectors[place], expected.numpy(), atol=1e-5)
