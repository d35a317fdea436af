"""The BioFormer experiments: what is held equal, statistics against scipy's, baselines by hand, and going on."""

import csv
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.linear_model import Ridge

from genesplice_hf.errors import DataError
from genesplice_hf.scoring.expression_metrics import IGNORED
from training.experiments import bioformer, bioformer_runs
from training.experiments.bioformer import NAMES
from training.experiments.bioformer_card import runs_of, steps_to, verdict, with_section
from training.experiments.bioformer_data import (
    Cells,
    load_task,
    read_cells,
    shuffled_pathways,
    split_cells,
)
from training.experiments.bioformer_models import (
    build,
    experiments,
    matched_bioformer,
    parameter_split,
    part_of,
    plain,
    rungs,
    scgpt,
    switches,
)
from training.experiments.bioformer_runs import (
    Neighbours,
    RidgePerGene,
    cell_errors,
    dense,
    measure,
    row_mean,
    saved_mib,
)
from training.experiments.paired import adjusted, interval, paired_difference

WIDTH = 32


@pytest.fixture(scope="module")
def gmt(tmp_path_factory) -> Path:
    """Sets of genes of the panel."""
    genes = list(read_cells("pbmc68k_reduced").counts.var_names)
    path = tmp_path_factory.mktemp("sets") / "sets.gmt"
    path.write_text("".join(f"set {n}\t\t" + "\t".join(genes[n::5]) + "\n" for n in range(5)))
    return path


@pytest.fixture(scope="module")
def task(gmt):
    return load_task(read_cells("pbmc68k_reduced"), 40, pathways=str(gmt))


# Data


def test_the_split_is_whole_and_keeps_the_shares_of_labels():
    cells = read_cells("pbmc68k_reduced")
    split = split_cells(cells)
    assert sorted(np.concatenate(list(split.values()))) == list(range(700))
    assert [len(split[name]) for name in ("train", "valid", "test")] == [560, 70, 70]
    kinds = cells.counts.obs["bulk_labels"].astype(str).to_numpy()
    for kind in np.unique(kinds):
        expected = (kinds == kind).sum() * 0.1
        assert abs((kinds[split["test"]] == kind).sum() - expected) <= 1
    again = split_cells(cells)
    assert all(np.array_equal(split[name], again[name]) for name in split)


def test_counts_of_the_example_lead_back_to_its_logs():
    import scanpy

    counts, raw = read_cells("pbmc68k_reduced").counts, scanpy.datasets.pbmc68k_reduced().raw.X.toarray()
    whole = counts.X.toarray()
    assert np.array_equal(whole, np.rint(whole)) and whole.min() == 0
    logs = np.log1p(whole / counts.obs["n_counts"].to_numpy()[:, None] * 1e4)
    np.testing.assert_allclose(logs, raw, atol=5e-4)


def test_test_cells_have_no_say_in_genes_edges_and_means(task):
    cells = read_cells("pbmc68k_reduced")
    changed = cells.counts.copy()
    held_out = np.concatenate([split_cells(cells)["test"], split_cells(cells)["valid"]])
    changed.X[held_out] = np.random.default_rng(0).poisson(3, (len(held_out), changed.n_vars))
    other = load_task(Cells(changed, cells.settings, cells.label_key), 40)
    assert other.tokenizer.get_vocab() == task.tokenizer.get_vocab()
    assert other.knowledge.edges["edges"].sha256() == task.knowledge.edges["edges"].sha256()
    np.testing.assert_array_equal(other.gene_means("mid"), task.gene_means("mid"))


def test_questions_are_the_hidden_digits_of_held_out_cells(task):
    rows = {row["cell_id"]: row for name in ("valid", "test") for row in task.rows["mid"][name]}
    seen = [row["cell_id"] for row in task.rows["mid"]["train"]]
    assert not set(seen) & set(rows) and len(rows) == sum(task.facts["cells"][name] for name in ("valid", "test"))
    asked = 0
    for row, batch_row in zip(task.rows["mid"]["test"], _rows_of(task.questions["mid"]["test"]), strict=True):
        values = np.array(row["values"])
        hidden = batch_row["labels"][: len(values)] != IGNORED
        np.testing.assert_array_equal(batch_row["labels"][: len(values)][hidden], values[hidden].astype(np.float32))
        np.testing.assert_array_equal(batch_row["values"][: len(values)][~hidden], values[~hidden].astype(np.float32))
        assert hidden.sum() == max(1, int(0.15 * (len(values) - 1) + 1e-9)) and not hidden[0]
        asked += hidden.sum()
    assert asked > 50


def _rows_of(batches):
    for batch in batches:
        for place in range(len(batch["labels"])):
            yield {name: batch[name][place].numpy() for name in ("labels", "values", "input_ids")}


def test_controls_keep_degrees(task):
    real, control = (task.knowledge.edges[name] for name in ("edges", "shuffled edges"))
    for side in ("source", "target"):
        degrees = [torch.bincount(getattr(table, side), minlength=60) for table in (real, control)]
        assert torch.equal(*degrees)
    assert {*zip(*_ends(real), strict=True)} != {*zip(*_ends(control), strict=True)}
    sets = task.knowledge.pathways["pathways"]
    shuffled = shuffled_pathways(sets)
    np.testing.assert_array_equal(np.bincount(sets.genes), np.bincount(shuffled.genes))
    np.testing.assert_array_equal(sets.pathways, shuffled.pathways)
    pairs = set(zip(shuffled.genes.tolist(), shuffled.pathways.tolist(), strict=True))
    assert len(pairs) == len(sets.genes)
    assert pairs != set(zip(sets.genes.tolist(), sets.pathways.tolist(), strict=True))


def _ends(table):
    return table.source.tolist(), table.target.tolist()


def test_a_table_of_genes_by_cells_is_read(tmp_path):
    table = tmp_path / "counts.txt"
    table.write_text('"c1" "c2"\n"G1" 3 0\n"G2" 1 2\n')
    cells = read_cells(str(table))
    assert list(cells.counts.obs_names) == ["c1", "c2"] and list(cells.counts.var_names) == ["G1", "G2"]
    assert cells.counts.X.tolist() == [[3, 1], [0, 2]]


def test_bad_input_is_named(tmp_path):
    with pytest.raises(DataError, match="`data` must be 'pbmc68k_reduced' or a file"):
        read_cells(str(tmp_path / "absent.h5ad"))
    anndata.AnnData(np.ones((4, 3), np.float32), obs=pd.DataFrame(index=list("abcd"))).write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(DataError, match="`label_key` must be a column of obs"):
        read_cells(str(tmp_path / "x.h5ad"), label_key="kind")
    with pytest.raises(DataError, match="`only_genes_with_edges` needs `edges`"):
        load_task(read_cells("pbmc68k_reduced"), 10, only_genes_with_edges=True)
    edges = tmp_path / "edges.tsv"
    edges.write_text("source\ttarget\tweight\nNOBODY\tNOTHING\t1\n")
    with pytest.raises(DataError, match="`edges` must join genes that were chosen"):
        load_task(read_cells("pbmc68k_reduced"), 10, edges=str(edges))
    for option, word in (("--genes", "genes"), ("--seeds", "seeds")):
        with pytest.raises(DataError, match=f"`{word}` must be 1 or more"):
            bioformer.main([option, "0"])
    with pytest.raises(DataError, match="`hidden_size` must be a multiple of 8"):
        bioformer.main(["--hidden_size", "20"])


# Models


def test_the_last_rung_of_the_ladder_is_the_ablated_model(task):
    *_, last = rungs(WIDTH)
    models = []
    for candidate in (last, plain(WIDTH)):
        torch.manual_seed(0)
        models.append(build(candidate, task).train())
    batch = task.questions["mid"]["test"][0]
    losses = [model(**batch).loss for model in models]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    ours, other = ([parameter.grad for parameter in model.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


def test_every_switch_and_every_model_is_there_once(task):
    names = [model.name for model in switches(WIDTH)]
    assert len(set(names)) == 8
    asked = experiments(NAMES, WIDTH, task)
    models = {}
    for experiment in asked.values():
        for model in experiment.candidates:
            assert models.setdefault(model.name, model) == model
        assert {name for pair in experiment.comparisons for name in pair} <= set(models)
    for model in models.values():
        split = parameter_split(build(model, task))
        assert split["all"] == sum(number for part, number in split.items() if part != "all")
    knowing = {model.knowledge for model in models.values()}
    assert knowing == {None, "edges", "shuffled edges", "pathways", "shuffled pathways"}


def test_equal_parameters_are_equal(task):
    wanted = build(scgpt(WIDTH), task).num_parameters()
    found = build(matched_bioformer(scgpt(WIDTH), task), task)
    assert abs(found.num_parameters() - wanted) <= 0.01 * wanted
    assert found.config.use_pair_bias and found.config.use_opm


def test_a_parameter_of_no_part_is_an_error():
    assert part_of("bioformer.encoder.layer.0.opm.a.weight") == "pair"
    with pytest.raises(ValueError, match="add it to PARTS"):
        part_of("something.weight")


# Statistics


def test_the_bootstrap_is_scipys():
    random = np.random.default_rng(0)
    counts = random.integers(1, 6, 40).astype(float)
    first, second = random.gamma(2, 2, (1, 40)) * counts, random.gamma(2, 2.4, (1, 40)) * counts
    found = paired_difference(first, second, counts)
    gap = (first - second)[0]
    assert found.mean == pytest.approx(gap.sum() / counts.sum())
    expected = stats.bootstrap(
        (gap, counts), lambda gap, counts, axis: gap.sum(axis) / counts.sum(axis), paired=True, method="percentile",
        n_resamples=10_000, rng=1,
    ).confidence_interval  # fmt: skip
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.05 * width)
    assert found.high == pytest.approx(expected.high, abs=0.05 * width)


def test_seeds_that_disagree_widen_the_interval_and_equal_models_have_none():
    random = np.random.default_rng(0)
    counts = np.full(30, 4.0)
    reference = random.gamma(2, 2, (3, 30))
    agreeing = paired_difference(reference - 1, reference, counts)
    assert (agreeing.mean, agreeing.low, agreeing.high) == pytest.approx((-0.25, -0.25, -0.25))
    assert agreeing.p == pytest.approx(2e-4)
    disagreeing = paired_difference(reference + np.array([[3], [-3], [-3]]), reference, counts)
    assert disagreeing.low < -0.25 < disagreeing.high and disagreeing.p > 0.5
    same = paired_difference(reference, reference, counts)
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert verdict(same, 1.0) == "the same numbers to the last digit"
    assert verdict(disagreeing, 0.6) == "no difference beyond cells and seeds"
    assert verdict(agreeing, 0.01) == "a lower error"


def test_rates_and_intervals_by_hand():
    # Benjamini-Hochberg: p times number over rank, made monotone from the largest down.
    assert adjusted([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert adjusted([]) == []
    # t(0.975, 2 degrees) is 4.3027; the mean's standard error of 1, 2, 3 is 1 / sqrt(3).
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert np.isnan(interval([1.0]))


def test_steps_to_a_level_are_the_median_over_seeds():
    runs = [{"history": [(10, 5.0), (20, 3.0), (30, 4.0)]}, {"history": [(10, 2.0)]}, {"history": [(10, 9.0)]}]
    assert steps_to(runs, 3.5) == 20
    assert np.isinf(steps_to(runs[:1] + runs[2:], 1.0))


# Baselines and measurement


def test_baselines_by_hand(task):
    means, size = task.gene_means("mid"), len(task.tokenizer)
    cells = np.concatenate(
        [
            dense({name: torch.tensor([row[name]]) for name in ("input_ids", "values")}, size)
            for row in task.rows["mid"]["train"]
        ]
    )
    gene = int(np.argmax((cells > 0).sum(0)))
    assert means[gene] == pytest.approx(cells[cells[:, gene] > 0, gene].mean())
    batch = task.questions["mid"]["test"][0]
    rows, columns = np.nonzero(batch["labels"].numpy() != IGNORED)
    ridge, near = RidgePerGene(cells, 100.0, means)(batch), Neighbours(cells, 5, means)(batch)
    for row, column in list(zip(rows, columns, strict=True))[:20]:
        gene, shown = int(batch["input_ids"][row, column]), dense(batch, size)[row]
        assert shown[gene] == 0
        having = cells[cells[:, gene] > 0].copy()
        answers = having[:, gene].copy()
        having[:, gene] = 0
        direct = Ridge(alpha=100.0).fit(np.hstack([having, having > 0]), answers)
        assert ridge[row, column] == pytest.approx(direct.predict(np.hstack([shown, shown > 0])[None])[0])
        nearest = np.argsort(((cells - shown) ** 2).sum(1), kind="stable")[:5]
        digits = cells[nearest, gene][cells[nearest, gene] > 0]
        distances = np.sort(((cells - shown) ** 2).sum(1))
        if distances[4] < distances[5]:  # a tie may be resolved either way
            assert near[row, column] == pytest.approx(digits.mean() if len(digits) else means[gene])
    visible = batch["values"][0].numpy()
    assert row_mean(batch)[0, 0] == pytest.approx(visible[visible > 0].mean())


def test_measuring_is_the_mean_over_hidden_values(task):
    batches, means = task.questions["mid"]["test"], task.gene_means("mid")
    found = measure(row_mean, batches, means)
    rows = list(_rows_of(batches))
    squares = [
        (np.mean(row["values"][row["values"] > 0]) - digit) ** 2
        for row in rows
        for digit in row["labels"][row["labels"] != IGNORED]
    ]
    assert found["test"]["mse_bin"] == pytest.approx(np.mean(squares))
    assert found["test"]["r2_row_mean"] == pytest.approx(0, abs=1e-12)
    assert sum(found["cell_squares"]) / sum(found["cell_counts"]) == pytest.approx(np.mean(squares), rel=1e-6)
    errors = cell_errors((torch.zeros(1, 3),), torch.tensor([[2.0, IGNORED, 3.0]]))
    assert errors.tolist() == [[13.0, 2.0]]


def test_kept_memory_is_that_of_the_saved_tensors():
    class Twice(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2**16))

        def forward(self, values, **_):
            return SimpleNamespace(loss=(self.weight * values).square().sum())

    batch = dict.fromkeys(("input_ids", "attention_mask", "labels"), torch.zeros(1)) | {"values": torch.ones(2**16)}
    # The product keeps the values, the square the product: twice 256 KiB; the weight is a parameter.
    assert saved_mib(Twice(), batch) == pytest.approx(0.5)


# The whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    options = [
        "--experiment", "same_attention", "--genes", "30", "--hidden_size", "16", "--epochs", "1", "--learning_rates",
        "1e-3", "3e-3", "--device", "cpu", "--out", str(folder / "out"), "--cards_dir", str(folder / "cards"),
    ]  # fmt: skip
    (folder / "cards").mkdir()
    (folder / "cards" / "bioformer.md").write_text("# bioformer\n\n## Experiments\n\n## Licence\n\nfree\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = bioformer.main([*options, "--seeds", "1"])
    return folder, options, report


def test_an_experiment_leaves_runs_table_plot_and_card(finished):
    folder, _, report = finished
    runs = [json.loads(line) for line in (folder / "out" / "runs.jsonl").read_text().splitlines()]
    assert [run["model"] for run in runs] == ["scGPT d16 N2", "plain d16 N2", "BioFormer d16 N2"]
    for run in runs:
        assert run["learning_rate"] == float(min(run["valid_mse_of_rates"], key=run["valid_mse_of_rates"].get))
        assert run["valid_mse"] == min(error for _, error in run["history"])
    with (folder / "out" / "models.csv").open() as file:
        table = {row["model"]: row for row in csv.DictReader(file)}
    assert float(table["plain d16 N2"]["test_mse"]) == pytest.approx(runs[1]["test"]["mse_bin"])
    card = (folder / "cards" / "bioformer.md").read_text()
    assert f"{runs[2]['test']['mse_bin']:.1f} ± nan" in card and "BioFormer d16 N2 against plain d16 N2" in card
    assert card.index("## Experiments") < card.index("test cells") < card.index("## Licence")
    assert "lower error than the gene mean: none; higher: all 3" in card
    assert (folder / "cards" / "bioformer-pbmc68k_reduced.png").stat().st_size > 10_000
    assert report["baselines"]["gene mean"]["test"]["mse_bin"] > 0
    assert report["baselines"]["row mean"]["valid_mse"] > 0
    stored = (folder / "cards" / "bioformer-pbmc68k_reduced.json").read_text()
    assert str(folder) not in stored
    gap = json.loads(stored)["differences"]["same_attention"][0]
    assert gap["mean"] == pytest.approx(runs[2]["test"]["mse_bin"] - runs[0]["test"]["mse_bin"], abs=1e-4)


def test_finished_runs_are_kept_and_a_torn_line_is_run_again(finished, monkeypatch):
    folder, options, report = finished
    file = folder / "out" / "runs.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:50])
    trained, train = [], bioformer_runs.train

    def counted(candidate, *others):
        trained.append(candidate.name)
        return train(candidate, *others)

    monkeypatch.setattr(bioformer_runs, "train", counted)
    again = bioformer.main([*options, "--seeds", "1"])
    assert trained == ["BioFormer d16 N2"] * 2
    for run in report["runs"]:
        (other,) = runs_of(again, run["model"])
        np.testing.assert_equal([other["test"], other["history"]], [run["test"], run["history"]])
    with pytest.raises(DataError, match="epochs was 1, is 2"):
        bioformer.main([*options, "--epochs", "2"])


def test_a_section_is_replaced_where_it_stands():
    card = with_section("# x\n\n## Licence\n", "a", "first")
    card = with_section(with_section(card, "b", "second"), "a", "third")
    assert "first" not in card and card.index("third") < card.index("second") < card.index("## Licence")
