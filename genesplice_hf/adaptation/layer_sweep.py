"""Probe every layer over several seeds; choose the layer on validation rows only and report the whole curve."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from genesplice_hf.adaptation.folds import check_classes, check_groups_apart, draw_part
from genesplice_hf.adaptation.probe import LinearProbe, Task, check_rows
from genesplice_hf.adaptation.probe_metrics import CLASSIFICATION_METRICS, REGRESSION_METRICS
from genesplice_hf.errors import DataError, GeneSpliceError

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class MeanAndSd:
    """A metric over the seeds: its mean, its sample standard deviation (0 with one seed) and its values."""

    mean: float
    sd: float
    values: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> "MeanAndSd":
        """Mean and standard deviation (n - 1) of `values`."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, list(values))


@dataclass(frozen=True)
class LayerScores:
    """All metrics of one layer, on validation and on test rows."""

    layer: str
    validation: dict[str, MeanAndSd]
    test: dict[str, MeanAndSd]


@dataclass(frozen=True)
class LayerSweepResult:
    """What a sweep found.

    Attributes:
        best_layer: The layer with the highest mean of `select_by` on validation rows.
        select_by: The metric that chose it.
        seeds: The seeds, in the order of the values of every metric.
        curve: The scores of every layer, in the order given.
        probes: The best layer's probes, one per seed.
    """

    best_layer: str
    select_by: str
    seeds: list[int]
    curve: list[LayerScores]
    probes: list[LinearProbe] = field(repr=False)

    @property
    def best(self) -> LayerScores:
        """The chosen layer's scores; its test scores are the result to report."""
        return next(scores for scores in self.curve if scores.layer == self.best_layer)

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `layer_sweep.json` and, in `seed_<n>/`, the best layer's probes."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "best_layer": self.best_layer,
            "select_by": self.select_by,
            "seeds": self.seeds,
            "curve": [asdict(scores) for scores in self.curve],
        }
        (folder / "layer_sweep.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for seed, probe in zip(self.seeds, self.probes, strict=True):
            probe.save(folder / f"seed_{seed}")
        return folder


class LayerSweep:
    """Fits a `LinearProbe` per layer and seed."""

    def __init__(
        self,
        task: Task = "classification",
        *,
        seeds: Sequence[int] = (0, 1, 2, 3, 4),
        select_by: str | None = None,
        grid: Sequence[float] | None = None,
        num_folds: int = 5,
        validation_fraction: float = 0.2,
    ) -> None:
        """Set the recipe.

        Args:
            task: "classification" or "regression".
            seeds: Each seed shuffles the folds and draws the validation part where `split` has none.
            select_by: The metric that chooses the layer; default auprc, or r2 for regression.
            grid, num_folds: As `LinearProbe`.
            validation_fraction: Share of the training groups (rows, without groups) drawn for validation.
        """
        metrics = CLASSIFICATION_METRICS if task == "classification" else REGRESSION_METRICS
        self.task: Task = task
        self.select_by = select_by or ("auprc" if task == "classification" else "r2")
        if self.select_by not in metrics:
            raise GeneSpliceError(f"`select_by` must be one of {', '.join(metrics)}, got {select_by!r}.")
        if not seeds or len(set(seeds)) != len(seeds):
            raise GeneSpliceError(f"`seeds` must be different whole numbers, at least one, got {list(seeds)}.")
        if not 0 < validation_fraction < 1:
            raise GeneSpliceError(f"`validation_fraction` must lie between 0 and 1, got {validation_fraction}.")
        self.seeds, self.validation_fraction = list(seeds), validation_fraction
        self.grid, self.num_folds = grid, num_folds

    def run(
        self,
        features: Mapping[str, np.ndarray],
        labels: np.ndarray,
        split: Sequence[str],
        groups: np.ndarray | None = None,
    ) -> LayerSweepResult:
        """Probe all layers.

        Args:
            features: Layer name -> (N, F) array, the same rows in every layer.
            labels: (N,) classes, or (N,) or (N, T) values.
            split: (N,) "train", "validation" or "test" per row. Without "validation" rows, every seed draws
                them from "train"; with them, the seeds only shuffle the folds.
            groups: (N,) names (chromosomes) that must straddle neither parts nor folds, or None.

        Returns:
            The whole layer curve and the layer chosen on validation rows; test rows choose nothing.

        Raises:
            DataError: NaN features, lengths that differ, a group in two parts, a part without rows or without
                one of the classes.

        Warns:
            UserWarning: Rows outside "train" whose features equal those of a "train" row.
        """
        parts, labels, groups = self._check(features, labels, split, groups)
        by_layer = {layer: self._probe_layer(x, layer, labels, parts, groups) for layer, x in features.items()}
        curve = [scores for scores, _ in by_layer.values()]
        best = max(curve, key=lambda scores: scores.validation[self.select_by].mean).layer
        return LayerSweepResult(best, self.select_by, self.seeds, curve, by_layer[best][1])

    def _probe_layer(
        self, features: np.ndarray, layer: str, labels: np.ndarray, parts: np.ndarray, groups: np.ndarray | None
    ) -> tuple[LayerScores, list[LinearProbe]]:
        scores: dict[str, list[dict[str, float]]] = {"validation": [], "test": []}
        probes = []
        for seed in self.seeds:
            drawn = self._with_validation(parts, labels, groups, seed)
            train = drawn == "train"
            probe = LinearProbe(self.task, grid=self.grid, num_folds=self.num_folds, seed=seed, layer=layer)
            probes.append(probe.fit(features[train], labels[train], None if groups is None else groups[train]))
            for part, found in scores.items():
                found.append(probe.evaluate(features[drawn == part], labels[drawn == part]))
        return LayerScores(layer, _summarise(scores["validation"]), _summarise(scores["test"])), probes

    def _with_validation(
        self, parts: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, seed: int
    ) -> np.ndarray:
        """`parts` with validation rows, drawn from the training rows where there are none."""
        drawn = parts.copy()
        if "validation" not in parts:
            rows = np.flatnonzero(parts == "train")
            own_groups = None if groups is None else groups[rows]
            stratify = self.task == "classification"
            chosen = draw_part(labels[rows], own_groups, self.validation_fraction, seed, stratify)
            drawn[rows[chosen]] = "validation"
        if self.task == "classification":
            for part in PARTS:
                check_classes(labels[drawn == part], np.unique(labels), f"The {part} part of seed {seed}")
        return drawn

    def _check(
        self, features: Mapping[str, np.ndarray], labels: np.ndarray, split: Sequence[str], groups: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        if not features:
            raise DataError("`features` must hold at least one layer.")
        for x in features.values():
            _, checked = check_rows(x, labels, groups, self.task == "classification")
        parts = _check_parts(split, len(checked))
        if groups is not None:
            groups = np.asarray(groups)
            check_groups_apart(parts, groups)
        _warn_shared_rows(next(iter(features.values())), parts)
        return parts, checked, groups


def _check_parts(split: Sequence[str], num_rows: int) -> np.ndarray:
    parts = np.asarray(split, dtype=object).astype(str).astype("<U10")
    if parts.shape != (num_rows,):
        raise DataError(f"`split` must name a part for each of the {num_rows} rows, got shape {parts.shape}.")
    unknown = sorted(set(np.asarray(split, dtype=object).tolist()) - set(PARTS), key=str)
    if unknown or not {"train", "test"} <= set(parts.tolist()):
        raise DataError(
            f"`split` must hold 'train', 'test' and optionally 'validation', got {sorted(set(parts.tolist()))}."
        )
    return parts


def _warn_shared_rows(features: np.ndarray, parts: np.ndarray) -> None:
    """Equal feature rows on both sides mean the same sequence on both sides."""
    rows = [row.tobytes() for row in np.ascontiguousarray(features)]
    seen = {row for row, part in zip(rows, parts, strict=True) if part == "train"}
    for part in PARTS[1:]:
        shared = sum(row in seen for row, own in zip(rows, parts, strict=True) if own == part)
        if shared:
            warnings.warn(
                f"{shared} of {(parts == part).sum()} {part} rows have the features of a training row: the parts "
                "share sequences, the scores will be too good.",
                stacklevel=4,
            )


def _summarise(scores: list[dict[str, float]]) -> dict[str, MeanAndSd]:
    return {metric: MeanAndSd.of([found[metric] for found in scores]) for metric in scores[0]}
