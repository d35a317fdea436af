"""What a model of cells has to beat: means for hidden values, logistic regression on log1p genes for cell types.

N cells, G genes, C classes; every baseline is fitted on the training cells of the same split.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import matthews_corrcoef
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from genesplice_hf.data.cell_matrix import open_cells
from genesplice_hf.data.h5ad import GeneExpressionProcessor
from genesplice_hf.scoring.expression_metrics import ExpressionSums, expression_sums
from genesplice_hf.scoring.metrics import classification_metrics
from genesplice_hf.tokenization.tokenization_gene import GeneTokenizer
from training.cells_data import SPLITS, CellTask

ROW_MEAN, GENE_MEAN, MAJORITY = "row mean", "gene mean", "majority"
# The published bars of these data were measured with this strength; the others let valid choose.
FIXED_C = 0.01
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0)
_MAX_ITERATIONS = 1000


class Baseline(NamedTuple):
    """A fitted baseline.

    Attributes:
        metrics: valid and test -> metrics.
        predicted: valid and test -> (N,) classes.
        settings: what it was fitted with.
    """

    metrics: dict[str, dict[str, float]]
    predicted: dict[str, np.ndarray]
    settings: dict[str, Any]


def mean_sums(
    rows: Dataset, collate: Callable[..., Mapping[str, torch.Tensor]], means_V: np.ndarray, batch_size: int
) -> ExpressionSums:
    """Errors at the hidden places of `rows` when the cell's or the gene's mean is predicted.

    Args:
        collate: hides values; frozen masks, so that they are those of the model's evaluation.
        means_V: a value per token, from `gene_means` of the training cells.
        batch_size: cells at a time.
    """
    sums = ExpressionSums()
    for start in range(0, len(rows), batch_size):
        batch = collate(list(rows.select(range(start, min(start + batch_size, len(rows))))))
        labels, ids = batch["labels"].numpy(), batch["input_ids"].numpy()
        sums += expression_sums(np.zeros(labels.shape), labels, batch["values"].numpy(), means_V[ids])
    return sums


def log1p_matrix(task: CellTask, split: str) -> tuple[sparse.csr_matrix, list[str]]:
    """(N, G) values before binning of all genes of the file, in the order of the rows, and the genes' names."""
    settings = task.processor.settings
    with open_cells(task.adata, settings.layer, settings.gene_column) as matrix:
        tokenizer = GeneTokenizer(genes=list(dict.fromkeys(matrix.gene_names)))
    plain: dict[str, Any] = {"value": "log1p", "num_variable_genes": None, "min_gene_counts": 0, "min_cell_genes": 0}
    plain |= {"label_key": None, "append_cls": True, "include_zero_genes": False, "store_bin_edges": False}
    steps = replace(settings, check_counts=False, **plain)
    cells = [str(name) for name in task.rows[split]["cell_id"]]
    rows = GeneExpressionProcessor(tokenizer, steps).fit(task.adata, cells)(task.adata, cells).with_format("numpy")
    lengths = np.asarray(rows["length"])
    places = (np.repeat(np.arange(len(rows)), lengths), np.concatenate(list(rows["input_ids"])))
    found = sparse.csr_matrix((np.concatenate(list(rows["values"])), places), shape=(len(rows), len(tokenizer)))
    genes = tokenizer.genes
    return found[:, tokenizer.convert_tokens_to_ids(genes)], genes


def most_variable(train_NG: sparse.csr_matrix, number: int) -> np.ndarray:
    """Places of the genes of largest variance over the training cells, zeros included."""
    mean = np.asarray(train_NG.mean(axis=0)).ravel()
    variance = np.asarray(train_NG.multiply(train_NG).mean(axis=0)).ravel() - mean**2
    return np.sort(np.argsort(-variance, kind="stable")[:number])


def cell_type_baselines(task: CellTask, num_genes: int = 1000) -> dict[str, Baseline]:
    """Majority, and logistic regression on standardised log1p genes.

    One on the most variable genes with the strength of the published bars, one with the strength that valid chooses,
    and one on the genes that the model reads.
    """
    matrices = {split: log1p_matrix(task, split) for split in SPLITS}
    genes = matrices["train"][1]
    features = {split: matrix for split, (matrix, _) in matrices.items()}
    classes = {split: task.classes(split) for split in SPLITS}
    assert task.processor.fitted is not None
    place = {name: index for index, name in enumerate(genes)}
    own = np.array([place[name] for name in task.processor.fitted.genes if name in place])
    wide = most_variable(features["train"], num_genes)
    found = {MAJORITY: _majority(classes, len(task.labels))}
    for name, columns, grid in (
        (f"logistic regression, {len(wide):,} genes, C {FIXED_C:g}", wide, (FIXED_C,)),
        (f"logistic regression, {len(wide):,} genes, C by valid", wide, GRID),
        (f"logistic regression, the model's {len(own):,} genes, C by valid", own, GRID),
    ):
        chosen = {split: matrix[:, columns].toarray() for split, matrix in features.items()}
        found[name] = logistic_regression(chosen, classes, len(task.labels), grid)
    return found


def logistic_regression(
    features: Mapping[str, np.ndarray], classes: Mapping[str, np.ndarray], num_classes: int, grid: Sequence[float]
) -> Baseline:
    """Fitted on train for every C of `grid`; the one with the largest MCC on valid, the smallest of equals."""
    fits = [
        make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=_MAX_ITERATIONS)).fit(
            features["train"], classes["train"]
        )
        for C in grid
    ]
    predicted = [{split: fit.predict(features[split]) for split in ("valid", "test")} for fit in fits]
    best = int(np.argmax([matthews_corrcoef(classes["valid"], found["valid"]) for found in predicted]))
    metrics = _measured(fits[best], features, classes, num_classes)
    return Baseline(metrics, predicted[best], {"C": grid[best], "genes": features["train"].shape[1]})


def _measured(
    fit: Any, features: Mapping[str, np.ndarray], classes: Mapping[str, np.ndarray], num_classes: int
) -> dict[str, dict[str, float]]:
    found = {}
    for split in ("valid", "test"):
        scores_NC = np.zeros((len(classes[split]), num_classes))
        scores_NC[:, fit.classes_] = fit.predict_proba(features[split])
        found[split] = classification_metrics(classes[split], scores_NC, "probabilities")
    return found


def _majority(classes: Mapping[str, np.ndarray], num_classes: int) -> Baseline:
    shares = np.bincount(classes["train"], minlength=num_classes) / len(classes["train"])
    metrics = {
        split: classification_metrics(classes[split], np.tile(shares, (len(classes[split]), 1)), "probabilities")
        for split in ("valid", "test")
    }
    predicted = {split: np.full(len(classes[split]), int(shares.argmax())) for split in ("valid", "test")}
    return Baseline(metrics, predicted, {})
