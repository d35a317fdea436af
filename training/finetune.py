"""Fine-tune a model on labelled sequences: `python -m training.finetune --config FILE.yaml --key value`.

Cleans the data, trains once per seed with the stock `Trainer`, measures test once per seed, and prints the result
beside the baselines. `output_dir` then holds `metrics.json`, `learning_curve.png`, `roc.png` and `confusion.png`
(`predictions.png` for a regression), `settings.json`, and per seed `seed-<n>/model`, its checkpoints, results and
test logits. Works under `torchrun`; only rank 0 prints and writes.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from genesplice_hf.adaptation.adapt import adapt, trainable_report
from genesplice_hf.errors import DataError
from genesplice_hf.objectives.schedules import STOCK_SCHEDULES, ScheduleTrainerMixin
from genesplice_hf.scoring.metrics import summarize
from genesplice_hf.version import __version__
from training import reports
from training.baselines import run_baselines
from training.checkpoints import defined, last_complete_checkpoint, prepare_folder, stored_result
from training.command import run_command
from training.epochs import TellEpoch
from training.models import load_classifier, load_tokenizer, save_trained
from training.settings import (
    LEARNING_RATES,
    DataSettings,
    MethodSettings,
    ModelSettings,
    TrainSettings,
    is_main_process,
    parse_settings,
    settings_as_dict,
    use_bf16,
    world_size,
)
from training.task import (
    Task,
    TokenDataset,
    as_is,
    flipped,
    load_task,
    predict_strands,
    task_metrics,
    tokenize,
)

SETTINGS = (DataSettings, ModelSettings, MethodSettings, TrainSettings)
# A restarted run may change where it stands and how many seeds it runs, nothing that a result depends on.
_FREE_ON_RESUME = ("output_dir", "resume", "overwrite", "seeds", "run_baselines")
_LOWER_IS_BETTER = ("mse", "loss", "poisson")


class ScheduledTrainer(ScheduleTrainerMixin, Trainer):
    """The stock Trainer with every schedule of `objectives/schedules.py`."""


class Plan(NamedTuple):
    """Everything that the runs of all seeds share."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: ModelSettings
    method: MethodSettings
    train: TrainSettings
    callbacks: Sequence[TrainerCallback]

    @property
    def folder(self) -> Path:
        return Path(self.train.output_dir)

    @property
    def best_metric(self) -> str:
        return self.train.best_metric or self.task.best_metric


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Reads the settings and runs; returns the content of `metrics.json`."""
    return finetune(*parse_settings(SETTINGS, argv), callbacks=callbacks)


def finetune(
    data: DataSettings,
    model: ModelSettings,
    method: MethodSettings,
    train: TrainSettings,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Trains one network per seed and reports mean and sd on test; the door for use from Python.

    Args:
        data: tables or sample, and how they are cleaned.
        model: the network.
        method: what is trained.
        train: how, with which seeds, and where results go.
        callbacks: further Trainer callbacks.

    Returns:
        What `metrics.json` holds: `results`, `per_seed`, `baselines`, `task`, `settings`, `environment`.

    Raises:
        DataError: settings or tables that cannot be used; `output_dir` holds another run.
    """
    plan = Plan(load_task(data), load_tokenizer(model), model, method, train, callbacks)
    if is_main_process():
        prepare_folder(
            Path(train.output_dir),
            settings_as_dict(data, model, method, train),
            resume=train.resume,
            overwrite=train.overwrite,
            free=_FREE_ON_RESUME,
        )
    runs = [run_seed(plan, seed) for seed in train.seeds]
    report = build_report(plan, runs, settings_as_dict(data, model, method, train))
    if is_main_process():
        write_report(plan, runs, report)
    return report


def run_seed(plan: Plan, seed: int) -> dict[str, Any]:
    """Trains, measures dev and test, and stores one seed; a seed that is finished already is read back."""
    folder = plan.folder / f"seed-{seed}"
    result_path = folder / "result.json"
    if (finished := stored_result(result_path, plan.train.resume)) is not None:
        return finished
    start = time.perf_counter()
    trainer = build_trainer(plan, seed, folder)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) if plan.train.resume else None)
    logits = predict_test(plan, trainer)
    result = _result(plan, trainer, seed, logits) | {"seconds": time.perf_counter() - start}
    if is_main_process():
        save_trained(trainer.model, plan.tokenizer, folder / "model", plan.method.method, plan.model)
        np.save(folder / "test_logits.npy", logits)
        reports.write_json(result_path, result)
    return result


def build_trainer(plan: Plan, seed: int, folder: Path) -> Trainer:
    """The stock Trainer around the adapted model."""
    task, train = plan.task, plan.train
    model = adapt(load_classifier(plan.model, task, seed), plan.method.method, **method_options(plan.method))
    strands = flipped(task.train.sequences) if train.augment_reverse_complement else []
    train_set = TokenDataset(tokenize(plan.tokenizer, [*task.train.sequences, *strands]), task.train.labels, seed)
    callbacks = [TellEpoch(train_set), *plan.callbacks]
    if train.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=train.early_stopping_patience))
    return ScheduledTrainer(
        schedule=train.schedule,
        schedule_options=train.schedule_options,
        model=model,
        args=training_arguments(plan, seed, folder),
        data_collator=as_is,
        train_dataset=train_set,
        eval_dataset=TokenDataset(tokenize(plan.tokenizer, task.dev.sequences), task.dev.labels),
        compute_metrics=lambda output: task_metrics(task.problem_type, output.label_ids, _logits(output.predictions)),
        callbacks=callbacks,
    )


def method_options(method: MethodSettings) -> dict[str, Any]:
    """The fields of `method` that the chosen method takes, under PEFT's names."""
    if method.method != "lora":
        return {}
    options = {"r": method.lora_rank, "lora_alpha": method.lora_alpha, "lora_dropout": method.lora_dropout}
    return options | ({"target_modules": method.lora_targets} if method.lora_targets else {})


def training_arguments(plan: Plan, seed: int, folder: Path) -> TrainingArguments:
    """Our settings in transformers' words; `trainer_options` are added last."""
    learning_rate = plan.train.learning_rate or LEARNING_RATES[plan.method.method]
    return trainer_arguments(plan.train, len(plan.task.train.labels), learning_rate, plan.best_metric, seed, folder)


def trainer_arguments(
    train: TrainSettings, num_rows: int, learning_rate: float, best_metric: str, seed: int, folder: Path
) -> TrainingArguments:
    """The same for any task of `num_rows` training rows whose checkpoints are chosen by `best_metric`."""
    every = steps_between_evaluations(num_rows, train)
    chosen = {
        "output_dir": str(folder),
        "seed": seed,
        "data_seed": seed,
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps,
        "per_device_train_batch_size": train.batch_size,
        "per_device_eval_batch_size": train.eval_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "learning_rate": learning_rate,
        "weight_decay": train.weight_decay,
        "warmup_steps": train.warmup_fraction,
        # Trainer sees that a plateau has evaluations; it does not know our schedules, which the mixin makes.
        "lr_scheduler_type": train.schedule if train.schedule in STOCK_SCHEDULES else "constant",
        "max_grad_norm": train.max_grad_norm,
        "bf16": use_bf16(train.precision),
        # Without this, processes under torchrun on CPU would each train alone.
        "use_cpu": not torch.accelerator.is_available(),
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "logging_steps": steps_between_logs(every),
        "load_best_model_at_end": True,
        "metric_for_best_model": best_metric,
        "greater_is_better": best_metric not in _LOWER_IS_BETTER,
        "restore_callback_states_from_checkpoint": True,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": not is_main_process(),
        "report_to": [],
    }
    if renamed := {"lr_scheduler_type", "lr_scheduler_kwargs"} & set(train.trainer_options):
        raise DataError(f"`trainer_options` holds {sorted(renamed)}; use `schedule` and `schedule_options`.")
    try:
        arguments = TrainingArguments(**(chosen | train.trainer_options))
    except TypeError as error:
        raise DataError(f"`trainer_options` holds a key that TrainingArguments does not have: {error}.") from error
    if arguments.world_size != world_size():
        raise DataError(f"{world_size()} processes were launched, but {arguments.world_size} train together.")
    return arguments


def steps_between_evaluations(num_rows: int, train: TrainSettings) -> int:
    """Optimiser steps per epoch divided by the evaluations asked for; at most `max_steps`."""
    rows_per_step = train.batch_size * train.gradient_accumulation * world_size()
    every = max(1, math.ceil(num_rows / rows_per_step) // train.evaluations_per_epoch)
    return min(every, train.max_steps) if train.max_steps > 0 else every


def steps_between_logs(every: int) -> int:
    """About a tenth of `every`, and a divisor of it: the mean loss since the last log dies with a process."""
    return next(steps for steps in range(max(1, every // 10), 0, -1) if every % steps == 0)


def predict_test(plan: Plan, trainer: Trainer) -> np.ndarray:
    """Test logits `(N, num_labels)` of the best checkpoint, on one strand or both."""

    def predict(sequences: Sequence[str]) -> np.ndarray:
        dataset = TokenDataset(tokenize(plan.tokenizer, sequences), plan.task.test.labels)
        return _logits(trainer.predict(dataset).predictions)

    return predict_strands(predict, plan.task.test.sequences, plan.train.average_reverse_complement)


def build_report(plan: Plan, runs: Sequence[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """The content of `metrics.json`; baselines are measured by rank 0 alone."""
    task, train = plan.task, plan.train
    wanted = train.run_baselines and is_main_process()
    return {
        "results": {split: summarize([defined(run[split]) for run in runs]) for split in ("test", "dev")},
        "per_seed": [{key: value for key, value in run.items() if key != "history"} for run in runs],
        "baselines": run_baselines(task.train, task.test, task.regression) if wanted else {},
        "task": {"problem_type": task.problem_type, "num_labels": task.num_labels, **task.report},
        "settings": settings,
        "environment": {
            "world_size": runs[0]["world_size"],
            "effective_batch_size": train.batch_size * train.gradient_accumulation * runs[0]["world_size"],
            "genesplice_hf": __version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "torch": torch.__version__,
        },
    }


def write_report(plan: Plan, runs: Sequence[dict[str, Any]], report: dict[str, Any]) -> None:
    """`metrics.json`, the plots, and the table on the console."""
    folder, labels = plan.folder, plan.task.test.labels
    reports.write_json(folder / "metrics.json", report)
    reports.plot_learning_curve(
        folder / "learning_curve.png", {f"seed {run['seed']}": run["history"] for run in runs}, plan.best_metric
    )
    logits = {f"seed {run['seed']}": np.load(folder / f"seed-{run['seed']}" / "test_logits.npy") for run in runs}
    if plan.task.regression:
        reports.plot_predictions(folder / "predictions.png", labels, logits)
    else:
        reports.plot_roc(folder / "roc.png", labels, logits)
    if plan.task.problem_type == "single_label_classification":
        reports.plot_confusion(folder / "confusion.png", labels, [scores.argmax(axis=1) for scores in logits.values()])
    reports.print_table(reports.metrics_table(_title(plan), _rows(plan, report)))


def _title(plan: Plan) -> str:
    rows = plan.task.report["rows"]
    return f"test, {rows['test']:,} rows; trained on {rows['train']:,}; mean ± sd of {len(plan.train.seeds)} seed(s)"


def _rows(plan: Plan, report: dict[str, Any]) -> dict[str, Any]:
    name = f"{plan.method.method}, {Path(plan.model.model).name}" + (
        ", random weights" if plan.model.random_weights else ""
    )
    return report["baselines"] | {name: report["results"]["test"]}


def _result(plan: Plan, trainer: Trainer, seed: int, test_logits: np.ndarray) -> dict[str, Any]:
    history = list(trainer.state.log_history)  # `evaluate` adds the best checkpoint at the last step
    dev = trainer.evaluate()
    counts = trainable_report(trainer.model)
    metrics = task_metrics(plan.task.problem_type, plan.task.test.labels, test_logits)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return {
        "seed": seed,
        "test": metrics,
        "dev": {name: dev[f"eval_{name}"] for name in metrics},
        "final_loss": losses[-1] if losses else math.nan,
        "best_step": trainer.state.best_global_step,
        "steps": trainer.state.global_step,
        "world_size": trainer.args.world_size,
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        "history": history,
    }


def _logits(predictions: Any) -> np.ndarray:
    """Some heads return more than logits; these come first."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


if __name__ == "__main__":
    run_command(main)
