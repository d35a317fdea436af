"""Probe every layer of a frozen model: `python -m training.probe --config FILE.yaml --key value`.

Embeds the sequences once, fits a linear probe per layer and seed, chooses the layer on validation rows, and prints
its test scores beside the baselines. Writes `metrics.json`, `layers.png` and `probes/` (the chosen layer's probes)
to `output_dir`.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genesplice_hf.adaptation.layer_sweep import LayerScores, LayerSweep, LayerSweepResult, MeanAndSd
from genesplice_hf.errors import DataError
from genesplice_hf.scoring.embeddings import EmbeddingExtractor, Pooling
from training import reports
from training.baselines import LabelledSequences, run_baselines
from training.command import run_command
from training.models import load_body, load_tokenizer
from training.settings import DataSettings, ModelSettings, parse_settings, settings_as_dict
from training.task import Task, load_task

logger = logging.getLogger(__name__)


@dataclass
class ProbeSettings:
    """How the layers are probed."""

    output_dir: str = field(default="runs/probe", metadata={"help": "Folder for everything that is written."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Each draws its own validation rows from train and dev together, and its own folds."},
    )
    pooling: Pooling = field(default="mean", metadata={"help": "How tokens become one vector per sequence."})
    layers: list[int] = field(default_factory=list, metadata={"help": "Layers to probe, 0 = embedding; none: all."})
    strengths: list[float] = field(
        default_factory=lambda: [1e-4, 1e-3, 1e-2, 1e-1],
        metadata={"help": "Candidates for C (classes) or alpha (values), chosen by cross-validation."},
    )
    num_folds: int = field(default=3, metadata={"help": "Folds of that cross-validation."})
    select_by: str | None = field(default=None, metadata={"help": "Metric that picks the layer; mcc or pearson."})
    batch_size: int = field(default=256, metadata={"help": "Sequences per forward."})
    run_baselines: bool = field(default=True, metadata={"help": "Measure the baselines on the same rows."})


SETTINGS = (DataSettings, ModelSettings, ProbeSettings)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Reads the settings and runs; returns the content of `metrics.json`."""
    return probe(*parse_settings(SETTINGS, argv))


def probe(data: DataSettings, model: ModelSettings, settings: ProbeSettings) -> dict[str, Any]:
    """Probes the layers of one model on one task.

    Raises:
        DataError: tables that cannot be used, or a multi-label task.
    """
    task = load_task(data)
    if task.problem_type == "multi_label_classification":
        raise DataError("A probe takes one label column; probe the columns of a multi-label task one by one.")
    train = _with_dev(task)
    features = embed(model, settings, [*train.sequences, *task.test.sequences], seed=data.split_seed)
    result = sweep(task, train, features, settings)
    report = build_report(task, train, result, settings, settings_as_dict(data, model, settings))
    write_report(Path(settings.output_dir), report, result, title=f"linear probe, {Path(model.model).name}")
    return report


def embed(model: ModelSettings, settings: ProbeSettings, sequences: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """Layer name -> `(N, E)` features, in the order of `sequences`."""
    body = load_body(model, seed).to("cuda" if torch.cuda.is_available() else "cpu")
    extractor = EmbeddingExtractor(
        body, load_tokenizer(model), settings.pooling, settings.layers or "all", settings.batch_size
    )
    return {str(layer): rows for layer, rows in extractor(sequences).items()}


def sweep(
    task: Task, train: LabelledSequences, features: dict[str, np.ndarray], settings: ProbeSettings
) -> LayerSweepResult:
    """Fits a probe per layer and seed; test rows choose nothing."""
    sweeper = LayerSweep(
        "regression" if task.regression else "classification",
        seeds=settings.seeds,
        select_by=settings.select_by or task.best_metric,
        grid=settings.strengths,
        num_folds=settings.num_folds,
        validation_fraction=len(task.dev.labels) / len(train.labels),
    )
    parts = ["train"] * len(train.labels) + ["test"] * len(task.test.labels)
    return sweeper.run(features, np.concatenate([train.labels, task.test.labels]), parts)


def build_report(
    task: Task, train: LabelledSequences, result: LayerSweepResult, settings: ProbeSettings, stored: dict[str, Any]
) -> dict[str, Any]:
    """The content of `metrics.json`."""
    baselines = run_baselines(train, task.test, task.regression) if settings.run_baselines else {}
    return {
        "results": {"test": _summary(result.best.test), "validation": _summary(result.best.validation)},
        "best_layer": result.best_layer,
        "selected_by": result.select_by,
        "seeds": result.seeds,
        "layers": [asdict(scores) for scores in result.curve],
        "baselines": baselines,
        "task": {"problem_type": task.problem_type, "num_labels": task.num_labels, **task.report},
        "settings": stored,
    }


def write_report(folder: Path, report: dict[str, Any], result: LayerSweepResult, title: str) -> None:
    """`metrics.json`, `layers.png`, the probes, and the table on the console."""
    reports.write_json(folder / "metrics.json", report)
    curves = {part: _curve(result.curve, part, result.select_by) for part in ("validation", "test")}
    reports.plot_layer_curve(folder / "layers.png", curves, result.select_by)
    result.save(folder / "probes")
    row = {f"{title}, layer {result.best_layer}": report["results"]["test"]}
    heading = f"test, {report['task']['rows']['test']:,} rows; layer chosen by validation {result.select_by}"
    reports.print_table(reports.metrics_table(heading, report["baselines"] | row))


def _with_dev(task: Task) -> LabelledSequences:
    """A fixed dev part would leave the seeds nothing to vary but the folds."""
    labels = np.concatenate([task.train.labels, task.dev.labels])
    return LabelledSequences([*task.train.sequences, *task.dev.sequences], labels)


def _summary(scores: dict[str, MeanAndSd]) -> dict[str, dict[str, float]]:
    return {metric: {"mean": s.mean, "sd": s.sd, "n": len(s.values)} for metric, s in scores.items()}


def _curve(curve: Sequence[LayerScores], part: str, metric: str) -> dict[str, dict[str, float]]:
    return {scores.layer: _summary(getattr(scores, part))[metric] for scores in curve}


if __name__ == "__main__":
    run_command(main)
