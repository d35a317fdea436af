"""Measure a fine-tuned model on a table: `python -m training.evaluate --model FOLDER --table FILE.csv`.

Writes `predictions.tsv` (every row of the table, in its order) and `metrics.json` to `output_dir`; with
`--predict_only true` the table needs no labels.
"""

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from genesplice_hf.data.tables import read_table
from genesplice_hf.errors import DataError
from training import reports
from training.command import run_command
from training.models import load_trained, predict_logits
from training.settings import DataSettings, parse_settings, use_bf16
from training.task import predict_strands, probabilities, read_rows, task_metrics, tokenize

logger = logging.getLogger(__name__)


@dataclass
class EvaluateSettings:
    """Which model, which table, where to."""

    model: str = field(metadata={"help": "Folder of a fine-tuned model or adapter, or a Hub id."})
    table: str = field(metadata={"help": "csv, tsv or parquet file, plain or gzipped."})
    output_dir: str = field(default="runs/evaluate", metadata={"help": "Folder for the two result files."})
    base_model: str | None = field(default=None, metadata={"help": "Where the adapter's base is, if it moved."})
    sequence_column: str = field(default="sequence", metadata={"help": "Column that holds the DNA."})
    label_columns: list[str] = field(
        default_factory=lambda: ["label"], metadata={"help": "Column of classes or values; several: multi-label."}
    )
    predict_only: bool = field(default=False, metadata={"help": "Ignore labels; the table needs none."})
    batch_size: int = field(default=256, metadata={"help": "Sequences per forward."})
    average_reverse_complement: bool = field(default=False, metadata={"help": "Mean logits of both strands."})
    precision: str = field(default="auto", metadata={"help": "auto, fp32 or bf16."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the repository brings."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Reads the settings and runs; returns the content of `metrics.json`."""
    return evaluate(*parse_settings([EvaluateSettings], argv))


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Predicts every row of a table and, where it has labels, measures the predictions.

    Raises:
        CheckpointError: a model or adapter that does not load.
        DataError: a damaged table, or labels that the model does not know.
    """
    model, tokenizer = load_trained(settings.model, settings.base_model, settings.trust_remote_code)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    problem_type = model.config.problem_type or "single_label_classification"
    table = _read(settings, problem_type)

    def predict(sequences: Sequence[str]) -> np.ndarray:
        bf16 = use_bf16(settings.precision)
        return predict_logits(model, tokenize(tokenizer, sequences), settings.batch_size, bf16)

    logits = predict_strands(predict, list(table["sequence"]), settings.average_reverse_complement)
    report = _report(settings, table, problem_type, logits)
    folder = Path(settings.output_dir)
    reports.write_json(folder / "metrics.json", report)
    write_predictions(folder / "predictions.tsv", table, problem_type, logits, model.config.id2label)
    if "metrics" in report:
        title = f"{settings.table}, {len(table):,} rows"
        reports.print_table(reports.metrics_table(title, {settings.model: report["metrics"]}))
    return report


def write_predictions(
    path: Path, table: Dataset, problem_type: str, logits: np.ndarray, id2label: dict[int, str]
) -> None:
    """One line per row of `table`, in its order: row number from 0, sequence, label if known, prediction.

    Classes and labels come with one probability column each, named by `id2label`; a regression with its values.
    """
    scores = probabilities(problem_type, logits)
    names = [id2label[index] for index in range(scores.shape[1])]
    regression = problem_type == "regression"
    columns = [f"prediction_{name}" if regression else f"probability_{name}" for name in names]
    labels = [[_text(label)] for label in table["label"]] if "label" in table.column_names else [[]] * len(table)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        prediction = [] if regression else ["prediction"]
        writer.writerow(["row", "sequence", *(["label"] if labels[0] else []), *prediction, *columns])
        for row, sequence in enumerate(table["sequence"]):
            decided = [] if regression else [_decision(problem_type, scores[row])]
            writer.writerow([row, sequence, *labels[row], *decided, *(f"{score:.6g}" for score in scores[row])])


def _read(settings: EvaluateSettings, problem_type: str) -> Dataset:
    if settings.predict_only:
        return read_table(settings.table, settings.sequence_column, label_column=None)
    columns = DataSettings(sequence_column=settings.sequence_column, label_columns=settings.label_columns)
    if (problem_type == "multi_label_classification") != (len(settings.label_columns) > 1):
        raise DataError(
            f"The model is for {problem_type}, but `label_columns` is {settings.label_columns}; name one column per "
            "label, or pass `--predict_only true`."
        )
    return read_rows(settings.table, columns, problem_type)


def _report(settings: EvaluateSettings, table: Dataset, problem_type: str, logits: np.ndarray) -> dict[str, Any]:
    report = {"model": settings.model, "table": settings.table, "rows": len(table), "problem_type": problem_type}
    if settings.predict_only:
        return report
    return report | {"metrics": task_metrics(problem_type, np.asarray(table["label"]), logits)}


def _decision(problem_type: str, scores: np.ndarray) -> str:
    if problem_type == "single_label_classification":
        return str(int(scores.argmax()))
    return _text((scores > 0.5).astype(int).tolist())


def _text(label: Any) -> str:
    return ",".join(map(str, label)) if isinstance(label, list) else str(label)


if __name__ == "__main__":
    run_command(main)
