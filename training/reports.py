"""What a run leaves behind for people: a table on the console, JSON, and PNG plots."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from sklearn.metrics import ConfusionMatrixDisplay, RocCurveDisplay, confusion_matrix

Summary = Mapping[str, Mapping[str, float]]  # {metric: {"mean", "sd", "n"}}


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as strict JSON (NaN and infinity become null), whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(path.suffix + ".part")
    aside.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(path)


def metrics_table(title: str, rows: Mapping[str, Mapping[str, float] | Summary]) -> Table:
    """One line per method, one column per metric.

    Args:
        title: printed above the table.
        rows: method -> `{metric: value}`, or `{metric: {"mean", "sd", "n"}}`, printed as mean and sd.
    """
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    table = Table(title=title)
    table.add_column("method")
    for metric in metrics:
        table.add_column(metric, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(_cell(row.get(metric)) for metric in metrics))
    return table


def print_table(table: Table) -> None:
    """Prints to the console, 80 columns wide or more, so that logs of jobs keep every column."""
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)


def plot_learning_curve(path: Path, histories: Mapping[str, Sequence[Mapping[str, float]]], metric: str) -> None:
    """Training loss (left) and a dev metric (right) over optimiser steps, one line per run.

    Args:
        path: PNG file to write.
        histories: run name -> `trainer.state.log_history`.
        metric: dev metric, logged as `eval_<metric>`.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = dict(zip(("loss", f"eval_{metric}"), figure.subplots(1, 2), strict=True))
    for key, axes in panels.items():
        for name, history in histories.items():
            entries = [entry for entry in history if key in entry]
            steps, values = [entry["step"] for entry in entries], [entry[key] for entry in entries]
            axes.plot(steps, values, marker=".", label=name)
        axes.set(xlabel="optimiser step", ylabel={"loss": "training loss"}.get(key, f"dev {metric}"))
        _legend(axes)
    _save(figure, path)


def plot_roc(path: Path, labels: np.ndarray, scores_of_runs: Mapping[str, np.ndarray]) -> None:
    """ROC curves on the test split: one per run, and per class or label where there are more than two.

    Args:
        path: PNG file to write.
        labels: `(N,)` classes or `(N, T)` indicators.
        scores_of_runs: run name -> logits `(N, C)` or `(N, T)`.
    """
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, scores in scores_of_runs.items():
        for suffix, truth, column in _one_against_rest(labels, scores):
            if 0 < truth.sum() < len(truth):
                RocCurveDisplay.from_predictions(truth, column, name=f"{name}{suffix}", ax=axes)
    axes.plot([0, 1], [0, 1], linestyle=":", color="grey")
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    _save(figure, path)


def plot_confusion(path: Path, labels: np.ndarray, predicted_of_runs: Sequence[np.ndarray]) -> None:
    """Confusion matrix of the test split, counts averaged over runs; rows are the true classes."""
    classes = np.unique(np.concatenate([labels, *predicted_of_runs]))
    counts = np.mean([confusion_matrix(labels, predicted, labels=classes) for predicted in predicted_of_runs], axis=0)
    figure = Figure(figsize=(4.6, 4), layout="constrained")
    display = ConfusionMatrixDisplay(counts, display_labels=classes)
    display.plot(ax=figure.subplots(), values_format=".0f", cmap="Blues")
    _save(figure, path)


def plot_predictions(path: Path, targets: np.ndarray, predictions_of_runs: Mapping[str, np.ndarray]) -> None:
    """Regression: predicted against measured values, one colour per run."""
    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, predictions in predictions_of_runs.items():
        axes.scatter(np.ravel(targets), np.ravel(predictions), s=4, alpha=0.5, label=name)
    axes.set(xlabel="measured", ylabel="predicted")
    _legend(axes)
    _save(figure, path)


def plot_layer_curve(path: Path, curves: Mapping[str, Summary], metric: str) -> None:
    """A metric over layers with error bars of one sd; layer 0 is the embedding.

    Args:
        path: PNG file to write.
        curves: curve name -> `{layer: {"mean", "sd"}}`.
        metric: name of the vertical axis.
    """
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        layers = [int(layer) for layer in curve]
        means = [curve[layer]["mean"] for layer in curve]
        sds = [0.0 if math.isnan(curve[layer]["sd"]) else curve[layer]["sd"] for layer in curve]
        axes.errorbar(layers, means, yerr=sds, marker="o", capsize=3, label=name)
    axes.set(xlabel="layer (0 = embedding)", ylabel=metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)
    _save(figure, path)


def _one_against_rest(labels: np.ndarray, scores: np.ndarray):
    """Yields (suffix of the name, 0/1 truth, scores) for each curve of a run."""
    if labels.ndim == 2:
        yield from ((f" label {t}", labels[:, t], scores[:, t]) for t in range(labels.shape[1]))
    elif scores.shape[1] == 2:
        yield "", labels == 1, scores[:, 1] - scores[:, 0]
    else:
        margins = scores - np.log(np.exp(scores - scores.max(1, keepdims=True)).sum(1, keepdims=True))
        margins -= scores.max(1, keepdims=True)
        yield from ((f" class {c}", labels == c, margins[:, c]) for c in range(scores.shape[1]))


def _cell(value: float | Mapping[str, float] | None) -> str:
    if value is None:
        return ""
    if not isinstance(value, Mapping):
        return "-" if math.isnan(value) else f"{value:.3f}"
    if math.isnan(value["mean"]):
        return "-"
    return f"{value['mean']:.3f}" + ("" if math.isnan(value["sd"]) else f" ± {value['sd']:.3f}")


def _legend(axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _plain(value: Any) -> Any:
    """Numpy scalars, paths and undefined numbers as JSON knows them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
