"""Training on cells: learning on real counts, LoRA from end to end on planted types, resume, baselines, bad input."""

import json
import os
import signal
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoConfig, TrainerCallback

from genesplice_hf.data.h5ad import GeneExpressionProcessor
from genesplice_hf.errors import DataError
from genesplice_hf.models.auto import AutoModelForMaskedExpression
from genesplice_hf.objectives.expression import DataCollatorForExpression, DataCollatorForMaskedExpression
from training import cells, cells_card
from training.cells_baselines import cell_type_baselines, most_variable
from training.cells_data import CellDataSettings, load_cell_task, pbmc68k_counts, split_cells
from training.models import load_trained

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("B cell", "NK", "T cell")
GENES = 30
TINY: dict[str, Any] = {
    "model_type": "genesplice_scgpt",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "norm_first": True,
    "cell_emb_style": "avg-pool",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
QUICK = ["--batch_size", "16", "--precision", "fp32", "--early_stopping_patience", "none", "--run_baselines", "false"]
QUICK += ["--plot_embeddings", "false", "--trainer_options", '{"disable_tqdm": true}']


def planted(num_cells: int = 150, seed: int = 0) -> anndata.AnnData:
    """Counts of cells of three types, each with ten genes of its own that it expresses five times as much."""
    rng = np.random.default_rng(seed)
    types = np.arange(num_cells) % len(KINDS)
    rates = np.ones((num_cells, GENES))
    for kind in range(len(KINDS)):
        rates[types == kind, 10 * kind : 10 * kind + 10] = 5.0
    counts = sparse.csr_matrix(rng.poisson(rates).astype(np.float32))
    obs = pd.DataFrame({"kind": np.array(KINDS)[types]}, index=[f"cell{row}" for row in range(num_cells)])
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"G{gene}" for gene in range(GENES)]))


@pytest.fixture(scope="module")
def cells_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cells") / "planted.h5ad"
    planted().write_h5ad(path)
    return str(path)


def run(folder: Path, data: str, *more: str, callbacks: tuple[TrainerCallback, ...] = (), **config: Any) -> dict:
    model = json.dumps(TINY | config)
    argv = ["--output_dir", str(folder), "--data", data, "--label_key", "kind", "--model_config", model, *QUICK, *more]
    return cells.main(argv, callbacks=callbacks)


CELL_TYPE = ["--task", "cell_type", "--method", "lora", "--pretrain_epochs", "1", "--learning_rate", "2e-2"]


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 2000


def test_five_epochs_on_pbmc68k_beat_the_row_mean_clearly(tmp_path: Path) -> None:
    config = str(ROOT / "training" / "configs" / "pbmc68k_masked.yaml")
    report = cells.main(["--config", config, "--output_dir", str(tmp_path)])
    row_mean = {split: report["baselines"]["row mean"][split]["mse_bin"] for split in ("valid", "test")}
    for split in ("valid", "test"):
        assert report["results"][split]["mse_bin"]["mean"] < 0.85 * row_mean[split]
        assert report["results"][split]["pearson_cell"]["mean"] > 0.3
    assert report["task"]["cells"] == {"train": 560, "valid": 70, "test": 70}
    assert report["comparison"]["row mean"]["mse_bin"]["mean"] == pytest.approx(
        report["results"]["test"]["mse_bin"]["mean"] - row_mean["test"]
    )
    # What was saved says the same of the same hidden places, however cells are put in batches.
    saved = tmp_path / "seed-0" / "model"
    model = AutoModelForMaskedExpression.from_pretrained(saved).eval()
    processor = GeneExpressionProcessor.from_pretrained(saved)
    assert len(processor.tokenizer.genes) == 100 and model.config.vocab_size == len(processor.tokenizer)
    collate = DataCollatorForMaskedExpression.for_model(
        model.config, processor.tokenizer, truncation="top_expressed", frozen_masks=True, seed=0
    )
    adata = pbmc68k_counts()
    parts = split_cells(adata.obs["bulk_labels"].astype(str).to_numpy(), np.ones(700, dtype=bool), 0)
    with pytest.warns(UserWarning, match="vocabulary"):
        rows = list(processor(adata, parts["test"]))
    squares = []
    for start in range(0, len(rows), 9):
        batch = collate(rows[start : start + 9])
        with torch.no_grad():
            gaps = model(**batch).logits - batch["labels"]
        squares.append(gaps[batch["labels"] != -100].square())
    assert torch.cat(squares).mean().item() == pytest.approx(report["results"]["test"]["mse_bin"]["mean"], rel=1e-4)


def test_lora_on_planted_types_learns_and_leaves_every_file(tmp_path: Path, cells_file: str) -> None:
    folder = tmp_path / "run"
    report = run(
        folder, cells_file, *CELL_TYPE, "--epochs", "7", "--run_baselines", "true",
        "--plot_embeddings", "true", "--processor_options", '{"value": "log1p"}', input_emb_style="scaling",
        mask_embedding=True,
    )  # fmt: skip
    assert report["results"]["test"]["mcc"]["mean"] > 0.7
    assert report["task"]["cells"] == {"train": 120, "valid": 15, "test": 15}
    assert all(is_png(folder / f"{name}.png") for name in ("learning_curve", "confusion", "umap"))
    regression = next(name for name in report["baselines"] if "C 0.01" in name)
    gaps = [seed["test"]["mcc"] - report["baselines"][regression]["test"]["mcc"] for seed in report["per_seed"]]
    assert report["comparison"][regression]["mcc"]["mean"] == pytest.approx(np.mean(gaps))
    seed = report["per_seed"][0]
    assert seed["pretraining"]["valid"]["mse_log1p"] > 0
    assert seed["trainable_parameters"] < seed["total_parameters"] / 2
    check_reloaded(folder / "seed-0")
    write_card(folder, tmp_path / "cards", report)


def check_reloaded(folder: Path) -> None:
    """Adapter, base and processor give the stored logits back, and know the types' names."""
    model, _ = load_trained(str(folder / "model"))
    processor = GeneExpressionProcessor.from_pretrained(folder / "model")
    adata = planted()
    parts = split_cells(adata.obs["kind"].to_numpy(), np.ones(adata.n_obs, dtype=bool), 0)
    rows = processor(adata, parts["test"]).remove_columns("cell_type_labels")
    with torch.no_grad():
        logits = model(**DataCollatorForExpression(processor.tokenizer, seed=0)(list(rows))).logits.numpy()
    np.testing.assert_allclose(logits, np.load(folder / "test_logits.npy"), atol=1e-5)
    assert model.config.id2label == dict(enumerate(KINDS))


def write_card(folder: Path, cards: Path, report: dict) -> None:
    """The card holds the run's figures and nothing of this machine."""
    cells_card.main(["--runs", str(folder), "--cards_dir", str(cards)])
    text = (cards / "cell-types.md").read_text(encoding="utf-8")
    assert f"{report['results']['test']['mcc']['mean']:.3f}" in text and "15 test cells" in text
    assert report["task"]["vocabulary_sha256"] in text
    assert str(folder.parent) not in text + (cards / "cell-types.json").read_text(encoding="utf-8")
    assert is_png(cards / "cell-types_planted_umap.png") and is_png(cards / "cell-types_planted_confusion.png")


def test_card_on_disk_holds_the_measured_numbers() -> None:
    measured = json.loads((ROOT / "model_cards" / "cell-types.json").read_text(encoding="utf-8"))
    assert (ROOT / "model_cards" / "cell-types.md").read_text(encoding="utf-8") == cells_card.card_text(measured)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, cells_file: str) -> str:
    folder = tmp_path_factory.mktemp("masked")
    run(folder, cells_file, "--epochs", "1")
    return str(folder / "seed-0" / "model")


@pytest.mark.parametrize("method", ["full", "ia3", "linear_probe"])
def test_other_methods_start_from_a_pretrained_folder(tmp_path: Path, cells_file: str, base: str, method: str) -> None:
    argv = ["--task", "cell_type", "--method", method, "--model", base, "--epochs", "1"]
    report = run(tmp_path / method, cells_file, *argv)
    weights = AutoModelForMaskedExpression.from_pretrained(base).state_dict()
    model, _ = load_trained(str(tmp_path / method / "seed-0" / "model"))
    saved = {name.removeprefix("base_model.model."): tensor for name, tensor in model.state_dict().items()}
    gene = saved["scgpt.embeddings.gene.weight"]
    assert torch.equal(gene, weights["scgpt.embeddings.gene.weight"]) == (method != "full")
    assert report["per_seed"][0]["pretraining"] == {}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "genesplice_bioformer", "pair_hidden_size": 4, "opm_hidden_size": 4, "pair_init": "prior",
         "prior_channels": 2},
        {"model_type": "genesplice_genegraph", "graph_hidden_size": 8, "graph_num_heads": 2, "graph_num_layers": 1},
    ],
    ids=lambda config: config["model_type"],
)  # fmt: skip
def test_models_with_edges_train_and_keep_them(tmp_path: Path, cells_file: str, config: dict) -> None:
    edges = tmp_path / "edges.tsv"
    edges.write_text("source\ttarget\tweight\nG0\tG1\t1\nG2\tG11\t-1\nG2\tUNKNOWN\t1\n")
    report = run(tmp_path / "run", cells_file, "--max_steps", "2", "--edges", str(edges), **config)
    assert np.isfinite(report["results"]["test"]["mse_bin"]["mean"])
    model = AutoModelForMaskedExpression.from_pretrained(tmp_path / "run" / "seed-0" / "model")
    table = model.gene_prior if config["model_type"].endswith("bioformer") else model.gene_graph
    assert len(table) == 2


class KillAt(TrainerCallback):
    """The power fails at a step of the second training."""

    def __init__(self, step: int) -> None:
        self.step, self.trainings = step, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainings += 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainings == 2 and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def test_resume_after_a_kill_equals_the_uninterrupted_run(tmp_path: Path, cells_file: str) -> None:
    options = (cells_file, *CELL_TYPE, "--epochs", "2", "--evaluations_per_epoch", "2")
    whole = run(tmp_path / "whole", *options)
    # Fresh: a fork of a process in which libraries have started threads may wait for them for ever.
    arguments = (tmp_path / "cut", *options)
    child = get_context("spawn").Process(target=run, args=arguments, kwargs={"callbacks": (KillAt(10),)})
    child.start()
    child.join(600)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "metrics.json").exists()
    pretrained = tmp_path / "cut" / "seed-0" / "pretrained" / "model.safetensors"
    written = pretrained.stat().st_mtime_ns
    resumed = run(*arguments, "--resume", "true")
    assert pretrained.stat().st_mtime_ns == written
    assert without_times(resumed) == without_times(whole)
    np.testing.assert_array_equal(*(np.load(tmp_path / n / "seed-0" / "test_logits.npy") for n in ("whole", "cut")))


def without_times(report: dict) -> list[dict]:
    seeds = [{k: v for k, v in seed.items() if k not in ("seconds", "cpu_seconds")} for seed in report["per_seed"]]
    return json.loads(json.dumps(seeds))


def test_regression_equals_a_direct_call_of_sklearn(cells_file: str) -> None:
    settings = CellDataSettings(cells_file, label_key="kind", num_genes=12, choose_genes_by="variance")
    task = load_cell_task(settings, AutoConfig.for_model(**TINY), with_labels=True)
    found = cell_type_baselines(task, num_genes=20)
    adata = planted()
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    parts = split_cells(adata.obs["kind"].to_numpy(), np.ones(adata.n_obs, dtype=bool), 0)
    values, names = adata.X.toarray(), adata.obs["kind"].to_numpy()
    wide = np.sort(np.argsort(-values[parts["train"]].var(axis=0), kind="stable")[:20])
    np.testing.assert_array_equal(most_variable(sparse.csr_matrix(values[parts["train"]]), 20), wide)
    fit = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    fit.fit(values[parts["train"]][:, wide], names[parts["train"]])
    predicted = fit.predict(values[parts["test"]][:, wide])
    ours = found["logistic regression, 20 genes, C 0.01"]
    assert ours.metrics["test"]["accuracy"] == np.mean(predicted == names[parts["test"]])
    np.testing.assert_array_equal(np.array(KINDS)[ours.predicted["test"]], predicted)
    own = np.sort(np.argsort(-values[parts["train"]].var(axis=0), kind="stable")[:12])
    assert task.processor.tokenizer.genes == [f"G{gene}" for gene in own]
    assert found["logistic regression, the model's 12 genes, C by valid"].settings["genes"] == 12


def test_split_holds_every_cell_once_and_every_type_everywhere() -> None:
    strata = np.array(["a"] * 200 + ["b"] * 8 + ["c"] * 2)
    usable = np.arange(210) != 5
    parts = split_cells(strata, usable, seed=0)
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.flatnonzero(usable))
    assert [len(parts[name]) for name in ("train", "valid", "test")] == [167, 21, 21]
    assert all("b" in strata[cells] for cells in parts.values())
    assert set(np.flatnonzero(strata == "c")) <= set(parts["train"])
    assert not np.array_equal(split_cells(strata, usable, seed=1)["test"], parts["test"])


def with_column(path: Path, **columns: Any) -> str:
    adata = planted(60)
    for name, values in columns.items():
        adata.obs[name] = values
    adata.write_h5ad(path)
    return str(path)


def test_cells_without_a_label_are_left_out_and_counted(tmp_path: Path) -> None:
    labels = planted(60).obs["kind"].to_numpy().astype(object)
    labels[:7] = None
    data = with_column(tmp_path / "some.h5ad", kind=pd.Categorical(labels))
    task = load_cell_task(CellDataSettings(data, label_key="kind"), AutoConfig.for_model(**TINY), with_labels=True)
    assert task.report["cells_without_label"] == 7 and sum(task.report["cells"].values()) == 53


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--task", "cell_type", "--label_key", "type"], "`label_key` must be a column of `obs`"),
        (["--task", "cell_type", "--label_key", "none"], "`label_key` must name the column"),
        (["--task", "cell_type", "--label_key", "one"], "`label_key` 'one' must hold two cell types or more"),
        (["--task", "cell_type", "--split_key", "part"], "'T cell'.*which the cells that were fitted on do not have"),
        (["--split_key", "kind"], "`split_key` must hold train, valid and test alone, got .*'B cell'"),
        (["--data", "absent.h5ad"], "absent.h5ad"),
        (["--layer", "counts"], "`layer` must be one of"),
        (["--processor_options", '{"bins": 3}'], "`processor_options` may hold .*n_bins.*got .'bins'"),
        (["--model_config", '{"model_type": "genesplice"}'], "`model_type` of genesplice_scgpt"),
        (["--best_metric", "mre"], "`best_metric` must be one of loss, mse_bin"),
        (["--average_reverse_complement", "true"], "are of DNA"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_advice(tmp_path: Path, more: list[str], words: str) -> None:
    kinds = planted(60).obs["kind"].to_numpy()
    # Train has no T cells.
    part = np.where(kinds == "T cell", "test", np.where(np.arange(60) % 5 == 0, "valid", "train"))
    data = with_column(tmp_path / "cells.h5ad", one="same", part=part)
    with pytest.raises(DataError, match=words):
        run(tmp_path / "run", data, "--epochs", "1", *more)
