"""Metrics against scikit-learn and scipy called directly, hand-worked cases, and undefined cases."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit, softmax
from sklearn import metrics as sk
from sklearn.exceptions import UndefinedMetricWarning

from genesplice_hf.errors import DataError
from genesplice_hf.scoring.metrics import classification_metrics, regression_metrics, summarize


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_binary_by_hand():
    # Confusion: TP 2, FN 1, FP 1, TN 2 -> MCC (4 - 1) / sqrt(3 ** 4) = 1/3; F1 2/3 for both classes.
    # Of the 9 positive-negative pairs 8 are in order (.3 stands below .6).
    metrics = classification_metrics([1, 1, 1, 0, 0, 0], [0.9, 0.8, 0.3, 0.6, 0.2, 0.1], kind="probabilities")
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["mcc"] == pytest.approx(1 / 3)
    assert metrics["f1"] == pytest.approx(2 / 3)
    assert metrics["auroc"] == pytest.approx(8 / 9)
    assert metrics["auprc"] == pytest.approx((1 + 1 + 3 / 4) / 3)


def test_binary_logits_equal_sklearn(rng):
    labels, logits = rng.integers(0, 2, 200), rng.normal(size=(200, 2))
    metrics = classification_metrics(labels, logits)
    chance = softmax(logits, axis=1)[:, 1]
    assert metrics["auroc"] == pytest.approx(sk.roc_auc_score(labels, chance))
    assert metrics["auprc"] == pytest.approx(sk.average_precision_score(labels, chance))
    assert metrics["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, logits.argmax(1)))
    difference = logits[:, 1] - logits[:, 0]
    assert classification_metrics(labels, difference) == pytest.approx(metrics)
    assert classification_metrics(labels, expit(difference)[:, None], kind="probabilities") == pytest.approx(metrics)


def test_multiclass_equals_sklearn(rng):
    labels, logits = rng.integers(0, 4, 300), rng.normal(size=(300, 4))
    metrics = classification_metrics(labels, logits, kind="logits")
    chances = softmax(logits, axis=1)
    assert metrics["auroc"] == pytest.approx(sk.roc_auc_score(labels, chances, multi_class="ovr", average="macro"))
    assert metrics["auprc"] == pytest.approx(sk.average_precision_score(np.eye(4)[labels], chances, average="macro"))
    assert metrics["f1"] == pytest.approx(sk.f1_score(labels, logits.argmax(1), average="macro"))
    assert classification_metrics(labels, chances) == pytest.approx(metrics)


def test_multilabel_equals_sklearn(rng):
    labels, logits = rng.integers(0, 2, (150, 3)), rng.normal(size=(150, 3))
    metrics = classification_metrics(labels, logits, kind="logits")
    assert metrics["accuracy"] == pytest.approx(sk.accuracy_score(labels, logits > 0))
    assert metrics["f1"] == pytest.approx(sk.f1_score(labels, logits > 0, average="macro"))
    assert metrics["auroc"] == pytest.approx(sk.roc_auc_score(labels, logits, average="macro"))
    assert metrics["auprc"] == pytest.approx(sk.average_precision_score(labels, logits, average="macro"))
    assert metrics["mcc"] == pytest.approx(
        np.mean([sk.matthews_corrcoef(labels[:, t], logits[:, t] > 0) for t in range(3)])
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_ranking_metrics_ignore_order_and_monotone_rescaling(seed):
    rng = np.random.default_rng(seed)
    labels, scores = np.r_[0, 1, rng.integers(0, 2, 20)], rng.normal(size=22)
    shuffle = rng.permutation(22)
    metrics = classification_metrics(labels, scores, kind="logits")
    assert classification_metrics(labels[shuffle], scores[shuffle], kind="logits") == pytest.approx(metrics)
    assert classification_metrics(labels, scores * 7, kind="logits") == pytest.approx(metrics)
    mirrored = classification_metrics(1 - labels, -scores, kind="logits")
    assert mirrored["auroc"] == pytest.approx(metrics["auroc"])
    assert mirrored["mcc"] == pytest.approx(metrics["mcc"])


@pytest.mark.parametrize("scores", [np.full((4, 2), 0.5), np.array([0.1, 0.2, 0.7, 0.9])])
def test_one_class_is_nan_with_a_named_warning(scores):
    with pytest.warns(UndefinedMetricWarning, match="`auroc` is undefined .* one class only"):
        metrics = classification_metrics([1, 1, 1, 1], scores)
    assert all(math.isnan(metrics[name]) for name in ("mcc", "auroc", "auprc"))
    assert math.isfinite(metrics["accuracy"])


def test_absent_class_is_left_out_and_named(rng):
    labels, logits = rng.integers(0, 2, 50), rng.normal(size=(50, 3))
    with pytest.warns(UndefinedMetricWarning, match=r"leave out classes \[2\]"):
        metrics = classification_metrics(labels, logits, kind="logits")
    chances = softmax(logits, axis=1)
    expected = np.mean([sk.roc_auc_score(labels == c, chances[:, c]) for c in (0, 1)])
    assert metrics["auroc"] == pytest.approx(expected)


def test_regression_equals_scipy_and_averages_columns(rng):
    targets = rng.normal(size=(80, 2))
    predictions = targets + rng.normal(size=(80, 2))
    metrics = regression_metrics(targets, predictions)
    for name, oracle in {
        "pearson": lambda a, b: stats.pearsonr(a, b)[0],
        "spearman": lambda a, b: stats.spearmanr(a, b)[0],
        "r2": sk.r2_score,
        "mse": lambda a, b: np.mean((a - b) ** 2),
    }.items():
        expected = np.mean([oracle(targets[:, t], predictions[:, t]) for t in range(2)])
        assert metrics[name] == pytest.approx(expected), name
    single = regression_metrics(targets[:, 0], predictions[:, :1])
    assert single["pearson"] == pytest.approx(stats.pearsonr(targets[:, 0], predictions[:, 0])[0])


def test_regression_of_constants_is_nan_with_a_warning():
    with pytest.warns(UndefinedMetricWarning, match="targets is constant"):
        metrics = regression_metrics([1.0, 1.0], [0.0, 2.0])
    assert math.isnan(metrics["pearson"])
    assert metrics["mse"] == pytest.approx(1.0)
    with pytest.warns(UndefinedMetricWarning, match="predictions is constant"):
        metrics = regression_metrics([0.0, 2.0], [1.0, 1.0])
    assert math.isnan(metrics["spearman"])
    assert metrics["r2"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("labels", "scores", "kind", "message"),
    [
        ([0, 1], [0.1], "auto", "same number of rows"),
        ([], [], "auto", "at least one"),
        ([0, 3], [[1, 2], [3, 4]], "logits", r"0\.\.1 .*got 0\.\.3"),
        ([0, -1], [[1, 2], [3, 4]], "logits", "got -1"),
        ([0, 1], [[1, 2], [np.nan, 4]], "logits", "finite"),
        ([0.5, 1], [[1, 2], [3, 4]], "logits", "whole numbers"),
        ([0, 1], [[1, 2], [3, 4]], "probabilities", "outside"),
        ([0, 1], [[1, 2], [3, 4]], "odds", "`kind`"),
        ([[0, 1], [1, 1]], [[1], [3]], "logits", "shape"),
    ],
)
def test_bad_input(labels, scores, kind, message):
    with pytest.raises(DataError, match=message):
        classification_metrics(labels, scores, kind=kind)


def test_summary_over_runs():
    summary = summarize([{"mcc": 0.5, "auroc": math.nan}, {"mcc": 0.7, "auroc": 0.9}])
    assert summary["mcc"] == pytest.approx({"mean": 0.6, "sd": np.std([0.5, 0.7], ddof=1), "n": 2})
    assert summary["auroc"]["mean"] == 0.9
    assert summary["auroc"]["n"] == 1
    assert math.isnan(summary["auroc"]["sd"])
    with pytest.raises(DataError, match="at least one"):
        summarize([])
    with pytest.raises(DataError, match="same metrics"):
        summarize([{"mcc": 1.0}, {"f1": 1.0}])


def test_no_warning_on_ordinary_data(rng):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classification_metrics(rng.integers(0, 2, 50), rng.normal(size=(50, 2)))
