"""A linear probe: standardised features, then logistic or ridge regression, its strength by cross-validation.

Shapes: N rows, F features, K classes, T targets. The recipe is TraitGym's (Benegas et al. 2025) without its
imputer: missing features are an error here.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from genesplice_hf.adaptation.folds import make_folds
from genesplice_hf.adaptation.probe_metrics import average_precision, classification_scores, regression_scores
from genesplice_hf.errors import CheckpointError, DataError, GeneSpliceError

Task = Literal["classification", "regression"]

WEIGHTS = "probe.safetensors"
FACTS = "probe.json"
# The inverse strength C of logistic regression, and the strength alpha of ridge regression.
DEFAULT_GRIDS = {"classification": np.logspace(-8, 0, 10), "regression": np.logspace(-4, 6, 11)}
_FORMAT = 1
_MAX_ITERATIONS = 1000


class LinearProbe:
    """A linear model on frozen features, stored as four arrays.

    Attributes (after `fit`, `load` or `from_sklearn`):
        coef: (1, F) for two classes, (K, F) for more, (T, F) for regression; on standardised features.
        intercept: (1,), (K,) or (T,).
        mean, scale: (F,) of the training features.
        classes: (K,) classes in the order of the probabilities; None for regression.
        strength: The chosen C or alpha.
        cv_scores: Strength -> mean held-out score (average precision, or R2).
    """

    def __init__(
        self,
        task: Task = "classification",
        *,
        grid: Sequence[float] | None = None,
        num_folds: int = 5,
        seed: int = 0,
        feature_name: str | None = None,
        layer: str | None = None,
    ) -> None:
        """Set the recipe.

        Args:
            task: "classification" (logistic regression with balanced class weights) or "regression" (ridge).
            grid: Candidates for C or alpha; default 10 values of C in 1e-8..1, or 11 of alpha in 1e-4..1e6.
                A single one is used as it is, without cross-validation.
            num_folds: Folds of the cross-validation.
            seed: Seed of the folds.
            feature_name, layer: What the features are; stored with the probe.
        """
        if task not in DEFAULT_GRIDS:
            raise GeneSpliceError(f"`task` must be 'classification' or 'regression', got {task!r}.")
        self.task: Task = task
        self.grid = np.sort(np.asarray(DEFAULT_GRIDS[task] if grid is None else grid, dtype=float))
        if self.grid.size == 0 or not (self.grid > 0).all():
            raise GeneSpliceError(f"`grid` must hold positive numbers, got {self.grid.tolist()}.")
        self.num_folds, self.seed = num_folds, seed
        self.feature_name, self.layer = feature_name, layer
        self.coef: np.ndarray | None = None
        self.classes: np.ndarray | None = None
        self.cv_scores: dict[float, float] = {}
        self.strength: float | None = None
        self.single_target = True

    @property
    def is_classification(self) -> bool:
        """Whether the probe predicts classes."""
        return self.task == "classification"

    def fit(self, features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> "LinearProbe":
        """Choose the strength by cross-validation, then fit all rows.

        Args:
            features: (N, F), finite.
            labels: (N,) classes, or (N,) or (N, T) finite values.
            groups: (N,) names that must not straddle folds (chromosomes), or None.

        Returns:
            The probe itself.

        Raises:
            DataError: NaN or infinite features or values, lengths that differ, too few groups or classes.
        """
        features, labels = check_rows(features, labels, groups, self.is_classification)
        groups = None if groups is None else np.asarray(groups)
        self.cv_scores = self._cross_validate(features, labels, groups) if self.grid.size > 1 else {}
        # `max` keeps the first of equals; the strongest regularisation comes first.
        order = self.grid if self.is_classification else self.grid[::-1]
        self.strength = max(order.tolist(), key=lambda s: self.cv_scores.get(s, 0.0))
        scaler = StandardScaler().fit(features)
        regression = self._estimator(self.strength).fit(scaler.transform(features), labels)
        self._adopt(scaler, regression)
        return self

    def decision_function(self, features: np.ndarray) -> np.ndarray:
        """Linear outputs: (N, 1) for two classes, (N, K) for more, (N, T) for regression."""
        if self.coef is None:
            raise GeneSpliceError("The probe is not fitted; call `fit` or `LinearProbe.load` first.")
        features = check_features(features)
        if features.shape[1] != self.coef.shape[1]:
            raise DataError(f"`features` must have {self.coef.shape[1]} columns, got {features.shape[1]}.")
        return (features - self.mean) / self.scale @ self.coef.T + self.intercept

    def predict_proba(self, features: np.ndarray) -> np.ndarray:
        """(N, K) class probabilities, columns in the order of `classes`."""
        if not self.is_classification:
            raise GeneSpliceError("`predict_proba` needs a classification probe; use `predict`.")
        scores = self.decision_function(features)
        if scores.shape[1] == 1:
            scores = np.hstack([np.zeros_like(scores), scores])
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(N,) classes, or values in the shape of the training labels."""
        if self.classes is not None:
            return self.classes[self.predict_proba(features).argmax(axis=1)]
        values = self.decision_function(features)
        return values[:, 0] if self.single_target else values

    def evaluate(self, features: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """All metrics: mcc, f1 (macro), accuracy, auroc, auprc; or r2, pearson, spearman."""
        features, labels = check_rows(features, labels, None, self.is_classification)
        if self.classes is not None:
            return classification_scores(labels, self.predict_proba(features), self.classes)
        return regression_scores(labels, self.predict(features))

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `probe.safetensors` (coef, intercept, mean, scale; float64) and `probe.json`."""
        if self.coef is None:
            raise GeneSpliceError("The probe is not fitted; there is nothing to save.")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"coef": self.coef, "intercept": self.intercept, "mean": self.mean, "scale": self.scale}
        save_file({name: np.ascontiguousarray(a, dtype=np.float64) for name, a in arrays.items()}, folder / WEIGHTS)
        (folder / FACTS).write_text(json.dumps(self._facts(), indent=2) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "LinearProbe":
        """Read a probe that `save` wrote.

        Raises:
            CheckpointError: A missing, corrupt or contradicting file.
        """
        facts, arrays = _read(Path(folder))
        probe = cls(facts["task"], feature_name=facts["feature_name"], layer=facts["layer"])
        probe.classes = None if facts["classes"] is None else np.asarray(facts["classes"])
        probe.strength, probe.single_target = facts["strength"], facts["single_target"]
        probe.cv_scores = {float(strength): score for strength, score in facts["cv_scores"].items()}
        probe.coef, probe.intercept = arrays["coef"], arrays["intercept"]
        probe.mean, probe.scale = arrays["mean"], arrays["scale"]
        return probe

    def to_sklearn(self) -> Pipeline:
        """A fitted scikit-learn pipeline (StandardScaler, then LogisticRegression or Ridge)."""
        if self.coef is None or self.strength is None:
            raise GeneSpliceError("The probe is not fitted; call `fit` or `LinearProbe.load` first.")
        scaler, regression = StandardScaler(), self._estimator(self.strength)
        scaler.mean_, scaler.scale_, scaler.var_ = self.mean, self.scale, self.scale**2
        scaler.n_features_in_ = regression.n_features_in_ = self.coef.shape[1]
        regression.coef_, regression.intercept_ = self.coef, self.intercept
        if self.classes is not None:
            regression.classes_ = self.classes
        elif self.single_target:
            regression.coef_, regression.intercept_ = self.coef[0], float(self.intercept[0])
        return Pipeline([("scaler", scaler), ("regression", regression)])

    @classmethod
    def from_sklearn(
        cls, pipeline: Pipeline, *, feature_name: str | None = None, layer: str | None = None
    ) -> "LinearProbe":
        """Take over a fitted pipeline of a StandardScaler and a LogisticRegression or Ridge.

        Raises:
            GeneSpliceError: Another kind of pipeline.
        """
        steps = [step for _, step in pipeline.steps]
        if (
            len(steps) != 2
            or not isinstance(steps[0], StandardScaler)
            or not isinstance(steps[1], LogisticRegression | Ridge)
        ):
            names = [type(step).__name__ for step in steps]
            raise GeneSpliceError(
                f"`pipeline` must be a StandardScaler and a LogisticRegression or Ridge, got {names}."
            )
        scaler, regression = steps
        task: Task = "classification" if isinstance(regression, LogisticRegression) else "regression"
        probe = cls(task, feature_name=feature_name, layer=layer)
        probe.strength = float(regression.C if task == "classification" else regression.alpha)
        probe._adopt(scaler, regression)
        return probe

    def _adopt(self, scaler: StandardScaler, regression: LogisticRegression | Ridge) -> None:
        self.single_target = self.is_classification or np.ndim(regression.coef_) == 1
        self.coef = np.atleast_2d(regression.coef_)
        self.intercept = np.broadcast_to(np.atleast_1d(regression.intercept_), len(self.coef)).astype(np.float64)
        width = self.coef.shape[1]
        self.mean = scaler.mean_ if scaler.with_mean else np.zeros(width)
        self.scale = scaler.scale_ if scaler.with_std else np.ones(width)
        self.classes = np.asarray(regression.classes_) if self.is_classification else None

    def _estimator(self, strength: float) -> LogisticRegression | Ridge:
        if not self.is_classification:
            return Ridge(alpha=strength)
        return LogisticRegression(C=strength, class_weight="balanced", max_iter=_MAX_ITERATIONS)

    def _cross_validate(
        self, features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None
    ) -> dict[float, float]:
        folds = make_folds(labels, groups, self.num_folds, self.seed, self.is_classification)
        scores = np.array([self._score_fold(features, labels, *fold) for fold in folds])
        return dict(zip(self.grid.tolist(), scores.mean(axis=0).tolist(), strict=True))

    def _score_fold(
        self, features: np.ndarray, labels: np.ndarray, train: np.ndarray, held_out: np.ndarray
    ) -> list[float]:
        """The held-out score of every strength; the scaler sees the training rows only."""
        scaler = StandardScaler().fit(features[train])
        seen, unseen = scaler.transform(features[train]), scaler.transform(features[held_out])
        scores = []
        for strength in self.grid.tolist():
            regression = self._estimator(strength).fit(seen, labels[train])
            if self.is_classification:
                probabilities = regression.predict_proba(unseen)
                scores.append(average_precision(labels[held_out], probabilities, regression.classes_))
            else:
                scores.append(float(r2_score(labels[held_out], regression.predict(unseen))))
        return scores

    def _facts(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "task": self.task,
            "feature_name": self.feature_name,
            "layer": self.layer,
            "classes": None if self.classes is None else self.classes.tolist(),
            "single_target": self.single_target,
            "strength": self.strength,
            "cv_scores": {repr(strength): score for strength, score in self.cv_scores.items()},
        }


def check_features(features: np.ndarray) -> np.ndarray:
    """Features as (N, F) float64.

    Raises:
        DataError: Another number of dimensions, or NaN or infinite entries (counted).
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or 0 in features.shape:
        raise DataError(f"`features` must be a non-empty (rows, features) array, got shape {features.shape}.")
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise DataError(
            f"`features` must be finite: {bad.sum()} rows hold NaN or infinity, the first is row {bad.argmax()}; "
            "drop them or repair the embedding."
        )
    return features


def check_rows(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, is_classification: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels as arrays of one length; values of a regression as float64.

    Raises:
        DataError: Lengths that differ, non-finite entries, or labels of a wrong shape.
    """
    features, labels = check_features(features), np.asarray(labels)
    for name, rows in (("labels", labels), ("groups", groups)):
        if rows is not None and len(rows) != len(features):
            raise DataError(f"`{name}` has {len(rows)} rows, `features` {len(features)}; they must be equal.")
    if is_classification and labels.ndim != 1:
        raise DataError(f"`labels` of a classification must be one class a row, got shape {labels.shape}.")
    if not is_classification:
        labels = labels.astype(np.float64)
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise DataError(f"`labels` must be finite: {(~np.isfinite(labels)).sum()} entries are NaN or infinite.")
    return features, labels


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    for name in (WEIGHTS, FACTS):
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name} does not exist; pass the folder of a saved probe.")
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        arrays = load_file(folder / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"The probe in {folder} is damaged ({error}); save it again.") from error
    if facts.get("format") != _FORMAT or set(arrays) != {"coef", "intercept", "mean", "scale"}:
        raise CheckpointError(
            f"The probe in {folder} must have format {_FORMAT} and coef, intercept, mean and scale; it has format "
            f"{facts.get('format')} and {sorted(arrays)}."
        )
    return facts, arrays
