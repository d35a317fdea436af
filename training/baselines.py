"""The plain methods that a network has to beat: majority, k-mer and position-specific one-hot regression.

Shapes: N sequences, L bases, K = 4 ** k k-mers. A letter outside ACGT counts towards no k-mer and is a zero row
in the one-hot code. Every baseline is fitted on train and measured on test by the same metrics as the network.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.exceptions import ConvergenceWarning, UndefinedMetricWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from genesplice_hf.errors import DataError
from genesplice_hf.scoring.metrics import classification_metrics, regression_metrics

logger = logging.getLogger(__name__)

# Letters to base numbers; everything that is not A, C, G, T or U is `_OTHER`.
_OTHER = 4
_BASE_NUMBER = np.full(256, _OTHER, dtype=np.uint8)
for _number, _letters in enumerate(("Aa", "Cc", "Gg", "TtUu")):
    _BASE_NUMBER[np.frombuffer(_letters.encode(), dtype=np.uint8)] = _number

# Of 1, 0.1, 0.01 and 0.001 the one with which 5-mers do best on GUE prom_core_all and tf/0 (ARS1 and one-hot do
# not care): a bar must not be low because its setting is poor.
DEFAULT_C = 0.001
MAX_ITERATIONS = 300
_ROWS_AT_ONCE = 4096


class LabelledSequences(NamedTuple):
    """Sequences and their labels: `(N,)` classes or values, or `(N, T)` for several targets."""

    sequences: Sequence[str]
    labels: np.ndarray


def kmer_frequencies(sequences: Sequence[str], k: int = 5) -> np.ndarray:
    """Share of each k-mer among the valid k-mers of a sequence, `(N, 4 ** k)` float32.

    Columns are in lexicographic order over ACGT. A sequence without a valid k-mer is a row of zeros.

    Raises:
        DataError: `k` outside 1..8, no sequences, or letters outside ASCII.
    """
    if not 1 <= k <= 8:
        raise DataError(f"`k` must lie in 1..8, got {k}.")
    sequences = _checked(sequences)
    frequencies_NK = np.empty((len(sequences), 4**k), dtype=np.float32)
    for start in range(0, len(sequences), _ROWS_AT_ONCE):
        part = sequences[start : start + _ROWS_AT_ONCE]
        frequencies_NK[start : start + len(part)] = _frequencies(part, k)
    return frequencies_NK


def onehot(sequences: Sequence[str]) -> np.ndarray:
    """Position-specific code `(N, 4 * L)` float32; column 4 * i + b is base b (ACGT) at position i.

    Raises:
        DataError: sequences of different lengths.
    """
    sequences = _checked(sequences)
    lengths = {len(sequence) for sequence in sequences}
    if len(lengths) > 1:
        raise DataError(
            f"One-hot regression needs sequences of one length, got {min(lengths)}..{max(lengths)} bp; cut or "
            "use the k-mer baseline."
        )
    numbers_NL = _BASE_NUMBER[_bytes("".join(sequences))].reshape(len(sequences), -1)
    codes = np.vstack([np.eye(4, dtype=np.float32), np.zeros((1, 4), dtype=np.float32)])
    return codes[numbers_NL].reshape(len(sequences), -1)


def majority(train: LabelledSequences, test: LabelledSequences) -> dict[str, float]:
    """Always says the commonest class of train, with the class shares as scores."""
    return _fit_and_measure(lambda: DummyClassifier(strategy="prior"), _no_features, train, test)


def kmer_logistic_regression(
    train: LabelledSequences, test: LabelledSequences, k: int = 5, C: float = DEFAULT_C
) -> dict[str, float]:
    """Logistic regression on standardised k-mer frequencies (lbfgs, L2 penalty 1 / C)."""
    return _fit_and_measure(lambda: _logistic(C), lambda sequences: kmer_frequencies(sequences, k), train, test)


def onehot_logistic_regression(
    train: LabelledSequences, test: LabelledSequences, C: float = DEFAULT_C
) -> dict[str, float]:
    """Logistic regression on the base at each position: additive effects. Needs equal lengths."""
    return _fit_and_measure(lambda: _logistic(C), onehot, train, test)


def mean_value(train: LabelledSequences, test: LabelledSequences) -> dict[str, float]:
    """Regression tasks: always says the mean of train."""
    return _fit_and_measure(DummyRegressor, _no_features, train, test, regression=True)


def kmer_ridge(train: LabelledSequences, test: LabelledSequences, k: int = 5) -> dict[str, float]:
    """Regression tasks: ridge regression on standardised k-mer frequencies."""
    return _fit_and_measure(_ridge, lambda sequences: kmer_frequencies(sequences, k), train, test, regression=True)


def onehot_ridge(train: LabelledSequences, test: LabelledSequences) -> dict[str, float]:
    """Regression tasks: ridge regression on the base at each position. Needs equal lengths."""
    return _fit_and_measure(_ridge, onehot, train, test, regression=True)


def run_baselines(
    train: LabelledSequences, test: LabelledSequences, regression: bool = False, k: int = 5
) -> dict[str, dict[str, float]]:
    """Every baseline that fits the data: `{name: metrics}`; a one-hot one that does not is logged, with why."""
    kmer = kmer_ridge if regression else kmer_logistic_regression
    results = {
        "mean value" if regression else "majority": (mean_value if regression else majority)(train, test),
        f"{k}-mer {'ridge' if regression else 'logistic'} regression": kmer(train, test, k=k),
    }
    lengths = {len(sequence) for table in (train, test) for sequence in table.sequences}
    if len(lengths) == 1:
        positional = onehot_ridge if regression else onehot_logistic_regression
        results[f"one-hot {'ridge' if regression else 'logistic'} regression"] = positional(train, test)
    else:
        logger.info("No one-hot baseline: the sequences have %d different lengths.", len(lengths))
    return results


def _fit_and_measure(
    build: Callable,
    featurize: Callable[[Sequence[str]], np.ndarray],
    train: LabelledSequences,
    test: LabelledSequences,
    regression: bool = False,
) -> dict[str, float]:
    train_labels, test_labels = np.asarray(train.labels), np.asarray(test.labels)
    train_features, test_features = featurize(train.sequences), featurize(test.sequences)
    if regression:
        model = build().fit(train_features, train_labels)
        return _quietly(regression_metrics, test_labels, model.predict(test_features))
    if train_labels.ndim == 2:
        model = OneVsRestClassifier(build()).fit(train_features, train_labels)
        return _quietly(classification_metrics, test_labels, model.predict_proba(test_features), "probabilities")
    return _single_label(build, train_features, train_labels, test_features, test_labels)


def _single_label(build: Callable, train_features, train_labels, test_features, test_labels) -> dict[str, float]:
    num_classes = 1 + int(max(train_labels.max(), test_labels.max()))
    # One class to learn from leaves nothing to fit: every regression is then the majority.
    model = build() if np.unique(train_labels).size > 1 else DummyClassifier(strategy="prior")
    model.fit(train_features, train_labels)
    scores_NC = np.zeros((len(test_labels), max(2, num_classes)))
    scores_NC[:, model.classes_.astype(int)] = model.predict_proba(test_features)
    return _quietly(classification_metrics, test_labels, scores_NC, "probabilities")


def _quietly(measure: Callable, *arguments) -> dict[str, float]:
    """A constant baseline has no correlation by design; its NaN needs no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        return measure(*arguments)


def _logistic(C: float):
    return make_pipeline(StandardScaler(), _Logistic(C=C, solver="lbfgs", max_iter=MAX_ITERATIONS))


def _ridge():
    return make_pipeline(StandardScaler(), Ridge(alpha=100.0))


class _Logistic(LogisticRegression):
    """Logistic regression whose stop at `max_iter` is a log line, not a warning per fit."""

    def fit(self, X, y, sample_weight=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            super().fit(X, y, sample_weight)
        if np.max(self.n_iter_) >= self.max_iter:
            logger.info("Logistic regression stopped at %d iterations.", self.max_iter)
        return self


def _no_features(sequences: Sequence[str]) -> np.ndarray:
    return np.zeros((len(sequences), 1), dtype=np.float32)


def _frequencies(sequences: Sequence[str], k: int) -> np.ndarray:
    # One long string with a separator after each sequence: no window across it is valid.
    numbers = _BASE_NUMBER[_bytes("|".join(sequences) + "|" * k)]
    num_windows = len(numbers) - k
    codes = np.zeros(num_windows, dtype=np.int64)
    valid = np.ones(num_windows, dtype=bool)
    for offset in range(k):
        letters = numbers[offset : offset + num_windows]
        codes = 4 * codes + letters
        valid &= letters != _OTHER
    lengths = np.fromiter((len(sequence) + 1 for sequence in sequences), dtype=np.int64, count=len(sequences))
    rows = np.repeat(np.arange(len(sequences)), lengths)[:num_windows]
    flat = (rows * 4**k + codes)[valid]
    counts_NK = np.bincount(flat, minlength=len(sequences) * 4**k).reshape(len(sequences), 4**k)
    return counts_NK / np.maximum(counts_NK.sum(axis=1, keepdims=True), 1)


def _checked(sequences: Sequence[str]) -> list[str]:
    sequences = list(sequences)
    if not sequences:
        raise DataError("A baseline needs at least one sequence, got none.")
    return sequences


def _bytes(text: str) -> np.ndarray:
    if not text.isascii():
        raise DataError("Sequences must be ASCII letters; a character outside ASCII was found.")
    return np.frombuffer(text.encode("ascii"), dtype=np.uint8)
