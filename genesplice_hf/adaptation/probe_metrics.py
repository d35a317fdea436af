"""The scores of a probe: all usual ones at once, so that MCC and F1, AUROC and AUPRC cannot be mixed up."""

import warnings

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    matthews_corrcoef,
    r2_score,
    roc_auc_score,
)

CLASSIFICATION_METRICS = ("mcc", "f1", "accuracy", "auroc", "auprc")
REGRESSION_METRICS = ("r2", "pearson", "spearman")


def classification_scores(labels: np.ndarray, probabilities: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """Scores of class probabilities; with more than two classes, means over one-versus-rest (F1: macro always).

    Args:
        labels: (N,) classes, every class present.
        probabilities: (N, K), columns in the order of `classes`.
        classes: (K,).
    """
    predicted = classes[probabilities.argmax(axis=1)]
    return {
        "mcc": float(matthews_corrcoef(labels, predicted)),
        "f1": float(f1_score(labels, predicted, labels=classes, average="macro", zero_division=0)),
        "accuracy": float(accuracy_score(labels, predicted)),
        "auroc": _one_versus_rest(roc_auc_score, labels, probabilities, classes),
        "auprc": average_precision(labels, probabilities, classes),
    }


def average_precision(labels: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> float:
    """Area under the precision-recall curve: of the second of two classes, or the mean over more classes."""
    return _one_versus_rest(average_precision_score, labels, scores, classes)


def regression_scores(values: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """R2, Pearson and Spearman of (N,) or (N, T) values; with several targets, means over them."""
    columns = list(zip(values.reshape(len(values), -1).T, predicted.reshape(len(values), -1).T, strict=True))
    return {
        "r2": float(r2_score(values, predicted)),
        "pearson": float(np.mean([_pearson(x, y) for x, y in columns])),
        "spearman": float(np.mean([_pearson(_ranks(x), _ranks(y)) for x, y in columns])),
    }


def _one_versus_rest(score, labels: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> float:
    first = 1 if len(classes) == 2 else 0
    return float(np.mean([score(labels == classes[k], scores[:, k]) for k in range(first, len(classes))]))


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        warnings.warn("A correlation with a constant is undefined; it is reported as 0.", stacklevel=3)
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties sharing their mean."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts + 1) / 2)[inverse]
