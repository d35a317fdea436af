"""Metrics of predictions against truth, and their summary over seeds: thin doors over scikit-learn and scipy.

Shapes: N examples, C classes, T targets (labels of a multi-label task, or columns of a regression).
A metric that the data cannot define (one class only, a constant column) is NaN and raises scikit-learn's
`UndefinedMetricWarning` with the reason; it is never silently 0 and never stops a long evaluation.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import stats
from scipy.special import softmax
from sklearn import metrics as sk
from sklearn.exceptions import UndefinedMetricWarning

from genesplice_hf.errors import DataError

ScoreKind = Literal["auto", "logits", "probabilities"]

CLASSIFICATION_METRICS = ("accuracy", "mcc", "f1", "auroc", "auprc")
REGRESSION_METRICS = ("pearson", "spearman", "r2", "mse")


def classification_metrics(labels, logits_or_probabilities, kind: ScoreKind = "auto") -> dict[str, float]:
    """How well do scores tell classes apart?

    | key | single label | multi-label |
    |---|---|---|
    | `accuracy` | fraction of right top-1 classes | fraction of examples with every label right |
    | `mcc` | Matthews correlation, multi-class form (Gorodkin 2004) | mean over labels |
    | `f1` | F1 per class, unweighted mean (macro) | the same over labels |
    | `auroc` | binary: of class 1; otherwise one-vs-rest, unweighted mean over classes | mean over labels |
    | `auprc` | average precision, averaged like `auroc` | mean over labels |

    Args:
        labels: integer classes `(N,)`, or 0/1 indicators `(N, T)` for a multi-label task.
        logits_or_probabilities: `(N, C)`; `(N,)` or `(N, 1)` scores of class 1 for a binary task; `(N, T)`
            for a multi-label task.
        kind: what the scores are. Single-column and multi-label scores are cut at 0 when logits and at 0.5
            when probabilities; "auto" takes scores that all lie in [0, 1] for probabilities.

    Returns:
        `{"accuracy", "mcc", "f1", "auroc", "auprc"}`. A class or label with no positive (or no negative)
        example is left out of the means and named in an `UndefinedMetricWarning`; with one class in
        `labels`, `mcc`, `auroc` and `auprc` are NaN.

    Raises:
        DataError: shapes that do not match, no rows, scores that are not finite, labels out of range.
    """
    truth, scores = _checked(labels, logits_or_probabilities)
    _require_whole_numbers(truth)
    truth = truth.astype(np.int64)
    probabilities = _are_probabilities(scores, kind)
    if truth.ndim == 2:
        return _multilabel_metrics(truth, scores, 0.5 if probabilities else 0.0)
    if scores.ndim == 1 or scores.shape[1] == 1:
        return _single_score_metrics(truth, scores.reshape(-1), 0.5 if probabilities else 0.0)
    return _multiclass_metrics(truth, scores, probabilities)


def regression_metrics(targets, predictions) -> dict[str, float]:
    """How close are predicted values to measured ones?

    `pearson`, `spearman` (ranks, ties averaged), `r2` (coefficient of determination,
    1 - residual / total sum of squares) and `mse`, each computed per column and averaged over columns.

    Args:
        targets: measured values `(N,)` or `(N, T)`.
        predictions: the same shape (`(N, 1)` is read as `(N,)`).

    Raises:
        DataError: shapes that do not match, no rows, values that are not finite.
    """
    truth, predicted = _checked(targets, predictions)
    truth, predicted = truth.reshape(len(truth), -1), predicted.reshape(len(predicted), -1)
    if truth.shape != predicted.shape:
        raise DataError(f"`predictions` must have the shape of `targets` {truth.shape}, got {predicted.shape}.")
    columns = [_regression_column(truth[:, t], predicted[:, t], t) for t in range(truth.shape[1])]
    return {name: _nanmean([column[name] for column in columns]) for name in REGRESSION_METRICS}


def summarize(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation (n - 1) over runs, for example over seeds.

    Args:
        runs: one dict of metrics per run, all with the same keys.

    Returns:
        `{metric: {"mean", "sd", "n"}}`; `n` counts the runs in which the metric is defined, `sd` is NaN
        below two of them.

    Raises:
        DataError: no runs, or runs with different keys.
    """
    if not runs:
        raise DataError("`runs` must hold at least one dict of metrics, got none.")
    if any(set(run) != set(runs[0]) for run in runs):
        raise DataError("`runs` must all hold the same metrics; summarise different tasks apart.")
    return {name: _mean_sd([run[name] for run in runs]) for name in runs[0]}


def _mean_sd(values: Sequence[float]) -> dict[str, float]:
    defined = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    mean = float(defined.mean()) if len(defined) else math.nan
    sd = float(defined.std(ddof=1)) if len(defined) > 1 else math.nan
    return {"mean": mean, "sd": sd, "n": len(defined)}


def _checked(truth, scores) -> tuple[np.ndarray, np.ndarray]:
    truth, scores = np.asarray(truth), np.asarray(scores, dtype=np.float64)
    if truth.ndim not in (1, 2) or scores.ndim not in (1, 2):
        raise DataError(f"Truth and scores must have 1 or 2 dimensions, got {truth.ndim} and {scores.ndim}.")
    if len(truth) != len(scores) or not len(truth):
        raise DataError(
            f"Truth and scores must have the same number of rows, at least one: got {len(truth)} and {len(scores)}."
        )
    if not np.isfinite(scores).all() or not np.isfinite(truth.astype(np.float64)).all():
        raise DataError("Truth and scores must be finite; drop or repair rows with NaN or infinity first.")
    return truth, scores


def _require_whole_numbers(labels: np.ndarray) -> None:
    if not np.array_equal(labels, np.round(labels.astype(np.float64))):
        raise DataError("`labels` must be whole numbers (classes); use `regression_metrics` for values.")


def _are_probabilities(scores: np.ndarray, kind: str) -> bool:
    if kind not in ("auto", "logits", "probabilities"):
        raise DataError(f"`kind` must be 'auto', 'logits' or 'probabilities', got {kind!r}.")
    inside = bool((scores >= 0).all() and (scores <= 1).all())
    if kind == "probabilities" and not inside:
        raise DataError("`kind` is 'probabilities' but some scores lie outside [0, 1]; pass kind='logits'.")
    return inside if kind == "auto" else kind == "probabilities"


def _require_labels_below(labels: np.ndarray, num_classes: int) -> None:
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(
            f"`labels` must lie in 0..{num_classes - 1} (the scores have {num_classes} classes), got "
            f"{labels.min()}..{labels.max()}."
        )


def _decision_metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": float(sk.accuracy_score(truth, predicted)),
        "mcc": _mcc(truth, predicted),
        "f1": float(sk.f1_score(truth, predicted, average="macro", zero_division=0)),
    }


def _mcc(truth: np.ndarray, predicted: np.ndarray) -> float:
    if np.unique(truth).size < 2:
        return _undefined("mcc", "the labels hold one class only")
    return float(sk.matthews_corrcoef(truth, predicted))


def _single_score_metrics(truth: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    _require_labels_below(truth, 2)
    decisions = _decision_metrics(truth, (scores > threshold).astype(np.int64))
    return decisions | _ranking_metrics(truth[:, None], scores[:, None])


def _multiclass_metrics(truth: np.ndarray, scores: np.ndarray, probabilities: bool) -> dict[str, float]:
    num_classes = scores.shape[1]
    _require_labels_below(truth, num_classes)
    decisions = _decision_metrics(truth, scores.argmax(axis=1))
    if num_classes == 2:
        # The difference ranks examples exactly as the softmax does, without its rounding at the ends.
        return decisions | _ranking_metrics(truth[:, None], scores[:, 1:] - scores[:, :1])
    chances = scores if probabilities else softmax(scores, axis=1)
    return decisions | _ranking_metrics(np.eye(num_classes, dtype=np.int64)[truth], chances)


def _multilabel_metrics(truth: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    if truth.shape != scores.shape:
        raise DataError(f"Multi-label scores must have the shape of `labels` {truth.shape}, got {scores.shape}.")
    _require_labels_below(truth, 2)
    predicted = (scores > threshold).astype(np.int64)
    mcc = _nanmean([_mcc(truth[:, t], predicted[:, t]) for t in range(truth.shape[1])])
    return {
        "accuracy": float((truth == predicted).all(axis=1).mean()),
        "mcc": mcc,
        "f1": float(np.mean([_binary_f1(truth[:, t], predicted[:, t]) for t in range(truth.shape[1])])),
    } | _ranking_metrics(truth, scores)


def _binary_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(sk.f1_score(truth, predicted, zero_division=0))


def _ranking_metrics(indicators: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """`auroc` and `auprc`, averaged over the columns that hold both a positive and a negative example."""
    positives = indicators.sum(axis=0)
    usable = np.flatnonzero((positives > 0) & (positives < len(indicators)))
    if not len(usable):
        reason = "the labels hold one class only"
        return {"auroc": _undefined("auroc", reason), "auprc": _undefined("auprc", reason)}
    if len(usable) < indicators.shape[1]:
        left_out = sorted(set(range(indicators.shape[1])) - set(usable.tolist()))
        _warn(f"`auroc` and `auprc` leave out classes {left_out}: all or none of the examples belong to them.")
    return {
        "auroc": _column_mean(sk.roc_auc_score, indicators, scores, usable),
        "auprc": _column_mean(sk.average_precision_score, indicators, scores, usable),
    }


def _column_mean(metric: Callable, indicators: np.ndarray, scores: np.ndarray, columns: np.ndarray) -> float:
    return float(np.mean([metric(indicators[:, c], scores[:, c]) for c in columns]))


def _regression_column(truth: np.ndarray, predicted: np.ndarray, column: int) -> dict[str, float]:
    mse = float(sk.mean_squared_error(truth, predicted))
    if np.ptp(truth) == 0:
        _warn(f"`pearson`, `spearman` and `r2` are undefined (NaN): column {column} of the targets is constant.")
        return {"pearson": math.nan, "spearman": math.nan, "r2": math.nan, "mse": mse}
    r2 = float(sk.r2_score(truth, predicted))
    if np.ptp(predicted) == 0:
        _warn(f"`pearson` and `spearman` are undefined (NaN): column {column} of the predictions is constant.")
        return {"pearson": math.nan, "spearman": math.nan, "r2": r2, "mse": mse}
    pearson = float(stats.pearsonr(truth, predicted).statistic)
    spearman = float(stats.spearmanr(truth, predicted).statistic)
    return {"pearson": pearson, "spearman": spearman, "r2": r2, "mse": mse}


def _nanmean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def _undefined(metric: str, reason: str) -> float:
    _warn(f"`{metric}` is undefined (NaN): {reason}.")
    return math.nan


def _warn(message: str) -> None:
    warnings.warn(message, UndefinedMetricWarning, stacklevel=4)
