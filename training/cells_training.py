"""The Trainers behind `training.cells`: masked expression and cell types, on rows of a `CellTask`.

B cells of a batch, E hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from datasets import concatenate_datasets
from transformers import EarlyStoppingCallback, EvalPrediction, TrainerCallback, TrainingArguments

from genesplice_hf.adaptation.adapt import adapt
from genesplice_hf.objectives.expression import DataCollatorForExpression, DataCollatorForMaskedExpression
from genesplice_hf.scoring.cell_embeddings import embed_cells
from genesplice_hf.scoring.expression_metrics import ExpressionSums, expression_sums
from training.cells_data import CellDataSettings, CellTask
from training.cells_models import CellModelSettings, ClassifierReads, masked_model
from training.epochs import TellEpoch
from training.evaluation_collator import EvaluationCollatorMixin
from training.finetune import ScheduledTrainer, method_options, trainer_arguments
from training.settings import LEARNING_RATES, MethodSettings, TrainSettings
from training.task import task_metrics

CLASSIFICATION = "single_label_classification"


@dataclass
class CellTaskSettings:
    """What is learned."""

    task: Literal["masked_expression", "cell_type"] = field(
        default="masked_expression", metadata={"help": "Hidden values (all weights train), or labels of cells."}
    )
    pretrain_epochs: float = field(
        default=0.0, metadata={"help": "cell_type: passes of masked expression over the training cells beforehand."}
    )
    pretrain_learning_rate: float = field(default=1e-3, metadata={"help": "Peak rate of those passes."})
    plot_embeddings: bool = field(default=True, metadata={"help": "cell_type: draw a UMAP of valid and test cells."})


@dataclass
class CellTrainSettings(TrainSettings):
    """As `TrainSettings`, with an output folder of its own."""

    output_dir: str = field(default="runs/cells", metadata={"help": "Folder for everything that is written."})


class CellTrainer(EvaluationCollatorMixin, ScheduledTrainer):
    """The stock Trainer with frozen masks in evaluation."""


class Plan(NamedTuple):
    """Everything that the runs of all seeds share."""

    cells: CellTaskSettings
    data: CellDataSettings
    task: CellTask
    model: CellModelSettings
    config: Any
    method: MethodSettings
    train: TrainSettings
    callbacks: Sequence[TrainerCallback]

    @property
    def folder(self) -> Path:
        return Path(self.train.output_dir)

    @property
    def mse(self) -> str:
        """Name of the error, with the unit of the values."""
        return f"mse_{self.task.processor.settings.value}"

    def collator(self, seed: int, *, training: bool, masked: bool) -> Any:
        """Stacks cells; in evaluation the same genes are read and hidden in every run."""
        steps = self.task.processor.settings
        options: dict[str, Any] = {"truncation": "random" if training else "top_expressed"}
        options |= {"pad_value": steps.pad_value, "max_seq_len": getattr(self.config, "max_seq_len", None)}
        options["seed"] = seed if training else self.data.split_seed
        if not masked:
            return DataCollatorForExpression(self.task.processor.tokenizer, **options)
        options |= {"mask_ratio": self.data.mask_ratio, "mask_value": steps.mask_value, "frozen_masks": not training}
        return DataCollatorForMaskedExpression(self.task.processor.tokenizer, **options)


class MaskedMetrics:
    """`compute_metrics` of a Trainer with `batch_eval_metrics`: only sums are kept from batch to batch."""

    def __init__(self, value: str) -> None:
        self.value, self.sums = value, ExpressionSums()

    def __call__(self, output: EvalPrediction, compute_result: bool) -> dict[str, float]:
        self.sums += ExpressionSums.from_rows(torch.as_tensor(output.predictions).cpu().numpy())
        if not compute_result:
            return {}
        found, self.sums = self.sums.metrics(self.value), ExpressionSums()
        return {name: found[name] for name in masked_metrics(self.value)}


def masked_metrics(value: str) -> tuple[str, ...]:
    """What is measured of hidden values in these units."""
    return (f"mse_{value}", "mre", "pearson_cell", "spearman_cell")


def sums_per_cell(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """(B, sums) for `preprocess_logits_for_metrics`; a row per cell, so that repeated cells of a last batch can go."""
    predicted = logits[0] if isinstance(logits, tuple) else logits
    pairs = zip(predicted.float().cpu().numpy(), labels.cpu().numpy(), strict=True)
    rows = np.stack([expression_sums(p[None], t[None]).as_row() for p, t in pairs])
    return torch.from_numpy(rows).to(labels.device)


def masked_trainer(plan: Plan, train: TrainSettings, seed: int, folder: Path) -> CellTrainer:
    """The Trainer of masked expression."""
    rows, steps = plan.task.masked("train"), plan.task.processor.settings
    num_genes = int(np.sum(rows["length"])) - len(rows) * int(steps.append_cls)
    mean = float(np.concatenate(list(rows["values"])).sum() / max(1, num_genes))
    collate = plan.collator(seed, training=True, masked=True)
    metric = train.best_metric or plan.mse
    arguments = trainer_arguments(train, len(rows), train.learning_rate or 1e-3, metric, seed, folder)
    arguments.batch_eval_metrics = True
    return CellTrainer(
        plan.collator(seed, training=False, masked=True),
        schedule=train.schedule,
        schedule_options=train.schedule_options,
        model=masked_model(plan.model, plan.task.processor, seed, mean),
        args=_for_cells(arguments, metric),
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=plan.task.masked("valid"),
        compute_metrics=MaskedMetrics(steps.value),
        preprocess_logits_for_metrics=sums_per_cell,
        callbacks=_callbacks(plan, train, collate),
    )


def classifier_trainer(plan: Plan, model: Any, seed: int, folder: Path) -> CellTrainer:
    """The Trainer around the adapted classifier."""
    train, method = plan.train, plan.method
    rows, metric = plan.task.labelled("train"), train.best_metric or "mcc"
    collate = plan.collator(seed, training=True, masked=False)
    rate = train.learning_rate or LEARNING_RATES[method.method]
    arguments = trainer_arguments(train, len(rows), rate, metric, seed, folder)
    return CellTrainer(
        plan.collator(seed, training=False, masked=False),
        schedule=train.schedule,
        schedule_options=train.schedule_options,
        model=adapt(model, method.method, **method_options(method)),
        args=_for_cells(arguments, metric),
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=plan.task.labelled("valid"),
        compute_metrics=lambda output: task_metrics(CLASSIFICATION, output.label_ids, logits_of(output.predictions)),
        callbacks=_callbacks(plan, train, collate),
    )


def held_out_vectors(plan: Plan, model: Any) -> np.ndarray:
    """(valid + test cells, E) what the classifier's head reads."""
    rows = concatenate_datasets([plan.task.labelled(split) for split in ("valid", "test")])
    collate = plan.collator(plan.data.split_seed, training=False, masked=False)
    return embed_cells(ClassifierReads(model), rows, collate, plan.train.eval_batch_size)  # type: ignore[arg-type]


def _for_cells(arguments: TrainingArguments, metric: str) -> TrainingArguments:
    # Other inputs of these models have "labels" in their names too.
    arguments.label_names = ["labels"]
    arguments.greater_is_better = metric != "loss" and not metric.startswith("mse")
    return arguments


def _callbacks(plan: Plan, train: TrainSettings, collate: Any) -> list[TrainerCallback]:
    found: list[TrainerCallback] = [TellEpoch(collate), *plan.callbacks]
    if train.early_stopping_patience is not None:
        found.append(EarlyStoppingCallback(early_stopping_patience=train.early_stopping_patience))
    return found


def logits_of(predictions: Any) -> np.ndarray:
    return predictions[0] if isinstance(predictions, tuple) else predictions
