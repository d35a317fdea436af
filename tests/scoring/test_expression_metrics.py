"""Metrics of hidden expression against definitions written out, and their sums over batches."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from genesplice_hf.errors import DataError
from genesplice_hf.scoring.expression_metrics import (
    IGNORED,
    ExpressionSums,
    edge_metrics,
    expression_sums,
    mse_log1p,
    tie_floor,
    zero_metrics,
)
from genesplice_hf.tokenization.value_binning import bin_values, tie_widths, unbin_values

CELLS, GENES = 12, 30


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    values = random.integers(0, 20, (CELLS, GENES)).astype(float)
    asked = random.random(values.shape) < 0.4
    asked[:, 0] = False
    asked[0] = False
    asked[1, 1:3], asked[1, 3:] = True, False
    labels = np.where(asked, values, IGNORED)
    return {
        "predictions": values + random.normal(size=values.shape),
        "labels": labels,
        "values": np.where(asked, -1.0, values),
        "gene_means": np.broadcast_to(random.random(GENES) * 10, values.shape).copy(),
        "tie_widths": random.integers(1, 9, values.shape),
    }


def test_every_metric_is_its_definition() -> None:
    b = batch()
    found = expression_sums(**b).metrics("bin")
    asked = b["labels"] != IGNORED
    p, t = b["predictions"][asked], b["labels"][asked]
    assert found["mse_bin"] == pytest.approx(np.mean((p - t) ** 2))
    assert found["mre"] == pytest.approx(np.mean(np.abs(p - t)[t > 0] / t[t > 0]))
    rows = [(b["predictions"][i][asked[i]], b["labels"][i][asked[i]]) for i in range(CELLS) if asked[i].sum() >= 3]
    assert found["pearson_cell"] == pytest.approx(np.mean([stats.pearsonr(*row).statistic for row in rows]))
    assert found["spearman_cell"] == pytest.approx(np.mean([stats.spearmanr(*row).statistic for row in rows]))
    means = np.array([row[row > 0].mean() for row in b["values"]])
    row_mse = np.mean((np.broadcast_to(means[:, None], asked.shape)[asked] - t) ** 2)
    assert found["mse_row_mean"] == pytest.approx(row_mse)
    assert found["r2_row_mean"] == pytest.approx(1 - found["mse_bin"] / row_mse)
    gene_mse = np.mean((b["gene_means"][asked] - t) ** 2)
    assert found["r2_gene_mean"] == pytest.approx(1 - found["mse_bin"] / gene_mse)
    widths = b["tie_widths"][asked]
    assert found["mse_tie_floor"] == pytest.approx(np.mean((widths**2.0 - 1) / 12))


def test_the_relative_error_knows_neither_zeros_nor_cls() -> None:
    """The published figure divided by 1e-6 there, and was in the thousands."""
    labels = np.array([[IGNORED, 0.0, 2.0, 4.0]])
    found = expression_sums(np.array([[9.0, 5.0, 1.0, 6.0]]), labels).metrics()
    assert found["mre"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert found["mse_bin"] == pytest.approx((25 + 1 + 4) / 3)
    assert expression_sums(np.zeros((1, 4)), labels).metrics()["mre"] == 1.0


@pytest.mark.parametrize("size", [1, 5, 12])
def test_batches_of_any_size_add_up_to_the_same(size: int) -> None:
    b = batch()
    whole = expression_sums(**b).metrics()
    parts = [expression_sums(**{n: x[s : s + size] for n, x in b.items()}) for s in range(0, CELLS, size)]
    total = sum(parts, ExpressionSums())
    assert total.metrics() == pytest.approx(whole)
    rows = np.stack([part.as_row() for part in parts])
    assert ExpressionSums.from_rows(rows).metrics() == pytest.approx(whole)


def test_what_is_not_known_is_nan_and_never_zero() -> None:
    b = batch()
    found = expression_sums(b["predictions"], b["labels"]).metrics("log1p")
    assert not math.isnan(found["mse_log1p"])
    assert all(math.isnan(found[name]) for name in ("r2_row_mean", "r2_gene_mean", "mse_tie_floor"))
    nothing = expression_sums(np.zeros((2, 3)), np.full((2, 3), IGNORED)).metrics()
    assert all(math.isnan(value) for value in nothing.values())


def test_the_tie_floor_is_the_variance_of_random_digits() -> None:
    cells = [np.random.default_rng(seed).poisson(1.0, 300).astype(float) for seed in range(3)]
    brute = []
    for number, values in enumerate(cells):
        draws = [bin_values(values, 51, "random", cell_id=f"{number}-{draw}").digits for draw in range(600)]
        brute.append(np.stack(draws).var(0)[values != 0])
    assert tie_floor(cells, 51) == pytest.approx(np.concatenate(brute).mean(), rel=0.02)
    widths = np.concatenate([tie_widths(v, bin_values(v).edges)[v != 0] for v in cells])
    assert tie_floor(cells, 51) == pytest.approx(np.mean((widths**2.0 - 1) / 12))
    assert tie_floor([np.array([1.0, 2.0, 4.0])], 3) == 0.0


def test_errors_of_digits_in_log_units() -> None:
    cells = [np.log1p(np.random.default_rng(seed).gamma(1.0, 5.0, 40)) for seed in range(2)]
    binned = [bin_values(values) for values in cells]
    edges = np.stack([cell.edges for cell in binned])
    targets = np.concatenate([cell.digits for cell in binned])
    predictions = targets + np.random.default_rng(5).normal(size=len(targets))
    gaps = [
        unbin_values(predictions[40 * i : 40 * i + 40], edges[i]) - unbin_values(binned[i].digits, edges[i])
        for i in range(2)
    ]
    found = mse_log1p(predictions, targets, edges, np.array([40, 40]))
    assert found == pytest.approx(np.mean(np.concatenate(gaps) ** 2))
    assert mse_log1p(targets, targets, edges, np.array([40, 40])) == 0.0


def test_zeros_and_edges() -> None:
    random = np.random.default_rng(0)
    labels = np.where(random.random((6, 9)) < 0.3, IGNORED, random.integers(0, 3, (6, 9)))
    logits = random.normal(size=labels.shape)
    asked, truth = labels != IGNORED, labels > 0
    found = zero_metrics(logits, labels)
    chance = 1 / (1 + np.exp(-logits[asked]))
    assert found["zero_auroc"] == pytest.approx(sk.roc_auc_score(truth[asked], logits[asked]))
    assert found["zero_bce"] == pytest.approx(sk.log_loss(truth[asked], chance))
    edges = edge_metrics(logits, labels)
    auprc = sk.average_precision_score(truth[asked], logits[asked])
    assert edges["edge_auprc_ratio"] == pytest.approx(auprc / truth[asked].mean())
    assert math.isnan(edge_metrics(logits, np.zeros_like(labels))["edge_auroc"])


def test_bad_input_is_advice() -> None:
    b = batch()
    for name in ("labels", "values", "gene_means", "tie_widths"):
        with pytest.raises(DataError, match=f"`{name}` must have the shape"):
            expression_sums(**(b | {name: b[name][:, 1:]}))
    b["predictions"][b["labels"] != IGNORED] = np.nan
    with pytest.raises(DataError, match="`predictions` must be finite"):
        expression_sums(**b)
