"""Train a model to predict tracks: `python -m training.tracks --config FILE.yaml --data_dir FOLDER --key value`.

Trains once per seed with the stock `Trainer` (random shifts and strands, Adam with warm-up, clipping), keeps the
checkpoint that is best on valid, and measures valid and test once per seed beside the mean of every track and a ridge
regression on k-mers. `output_dir` then holds `metrics.json`, `learning_curve.png`, `tracks.png`, `settings.json`, and
per seed `seed-<n>/model`, `result.json`, `test/` with a table of every track and plots, and `test_predictions.npy`.
Works under `torchrun`; only rank 0 prints and writes.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback

from genesplice_hf.data.tracks import TrackCollator, TrackDataset
from genesplice_hf.errors import DataError
from genesplice_hf.layers.norm import freeze_batch_norm
from genesplice_hf.objectives.schedules import ScheduleTrainerMixin
from genesplice_hf.scoring.metrics import summarize
from genesplice_hf.scoring.track_report import TRACK_METRICS, TrackReport
from genesplice_hf.version import __version__
from training import reports, track_reports
from training.checkpoints import last_complete_checkpoint, prepare_folder, stored_result
from training.command import run_command
from training.finetune import trainer_arguments
from training.settings import (
    TrainSettings,
    is_main_process,
    parse_settings,
    settings_as_dict,
    use_bf16,
)
from training.track_baselines import Ridge, baseline_predictions, fit_ridge, track_means
from training.track_task import (
    TrackDataSettings,
    TrackModelSettings,
    TrackTask,
    build_track_model,
    id_map_of,
    load_track_task,
    predict_batches,
    start_at_means,
    tokenizer_of,
)

logger = logging.getLogger(__name__)

MEAN, RIDGE = "mean of the track", "ridge on k-mers"
_FREE_ON_RESUME = ("output_dir", "data_dir", "resume", "overwrite", "seeds", "run_baselines")
# What a Trainer evaluation reports; the rest is measured once, at the end.
_WATCHED = ("pearson", "r2", "poisson")


@dataclass
class TrackTrainSettings(TrainSettings):
    """As `TrainSettings`, with the recipe of Enformer for windows of 100 kb and more."""

    output_dir: str = field(default="runs/tracks", metadata={"help": "Folder for everything that is written."})
    epochs: float = field(default=10.0, metadata={"help": "Passes over train."})
    batch_size: int = field(default=1, metadata={"help": "Windows per process and forward."})
    eval_batch_size: int = field(default=1, metadata={"help": "The same, for evaluation."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak rate."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW weight decay; 0 makes it Adam."})
    warmup_fraction: float = field(default=0.1, metadata={"help": "Share of the steps with a rising rate."})
    max_grad_norm: float = field(default=0.2, metadata={"help": "Clipping of the norm of all gradients together."})
    early_stopping_patience: int | None = field(default=None, metadata={"help": "As in finetune."})
    best_metric: str = field(
        default="loss", metadata={"help": "What picks the checkpoint on valid: loss, pearson, r2 or poisson."}
    )
    augment_reverse_complement: bool = field(
        default=True, metadata={"help": "Train on a random strand, drawn per window and epoch."}
    )
    average_reverse_complement: bool = field(
        default=True, metadata={"help": "Predict the mean of both strands at the end."}
    )
    freeze_batch_norms: bool = field(
        default=False,
        metadata={"help": "Keep the statistics of batch norms; for pretrained models, not for fresh weights."},
    )


SETTINGS = (TrackDataSettings, TrackModelSettings, TrackTrainSettings)


class TracksTrainer(ScheduleTrainerMixin, Trainer):
    """The stock Trainer with every schedule of `objectives/schedules.py`."""


class TrackPlan(NamedTuple):
    """Everything that the runs of all seeds share."""

    task: TrackTask
    data: TrackDataSettings
    model: TrackModelSettings
    train: TrackTrainSettings
    callbacks: Sequence[TrainerCallback]

    @property
    def folder(self) -> Path:
        return Path(self.train.output_dir)

    def split(self, name: str) -> TrackDataset:
        return {"valid": self.task.valid, "test": self.task.test}[name]


class WatchedTracks:
    """`compute_metrics` of a Trainer with `batch_eval_metrics`: nothing but sums is kept from batch to batch."""

    def __init__(self, descriptions: Sequence[str]) -> None:
        self.descriptions = list(descriptions)
        self._restart()

    def __call__(self, output: EvalPrediction, compute_result: bool) -> dict[str, float]:
        predictions = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        self.report.update(predictions.float(), output.label_ids)
        if not compute_result:
            return {}
        figures = self.report.by_assay()["all"]
        self._restart()
        return {name: figures[name] for name in _WATCHED}

    def _restart(self) -> None:
        # Ranks are not watched.
        self.report = TrackReport(self.descriptions, spearman_bins=2)


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Reads the settings and runs; returns the content of `metrics.json`."""
    return train_tracks(*parse_settings(SETTINGS, argv), callbacks=callbacks)


def train_tracks(
    data: TrackDataSettings,
    model: TrackModelSettings,
    train: TrackTrainSettings,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Trains one network per seed and reports mean and sd on valid and test; the door for use from Python.

    Returns:
        What `metrics.json` holds: `results` and `baselines` (split -> assay -> metric), `per_seed`, `task`,
        `settings`, `environment`.

    Raises:
        DataError: settings or files that cannot be used; `output_dir` holds another run.
    """
    if train.best_metric not in ("loss", *_WATCHED):
        raise DataError(f"`best_metric` must be one of loss, {', '.join(_WATCHED)}, got {train.best_metric!r}.")
    plan = TrackPlan(load_track_task(data), data, model, train, callbacks)
    settings = settings_as_dict(data, model, train)
    if is_main_process():
        options = {"resume": train.resume, "overwrite": train.overwrite, "free": _FREE_ON_RESUME}
        prepare_folder(plan.folder, settings, **options)
    runs = [run_seed(plan, seed) for seed in train.seeds]
    if not is_main_process():
        return {}
    baselines = run_baselines(plan) if train.run_baselines else {}
    report = build_report(plan, runs, baselines, settings)
    write_report(plan, runs, baselines, report)
    return report


def run_seed(plan: TrackPlan, seed: int) -> dict[str, Any]:
    """Trains, measures valid and test, and stores one seed; a seed that is finished already is read back."""
    folder = plan.folder / f"seed-{seed}"
    result_path = folder / "result.json"
    if (finished := stored_result(result_path, plan.train.resume)) is not None:
        return finished
    trainer = build_trainer(plan, seed, folder)
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) if plan.train.resume else None)
    seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    if not is_main_process():
        return {}
    # Without the mixed precision of training, so that whoever loads the file measures the same.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    tokenizer_of(model.config).save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    result = {
        "seed": seed,
        "valid": measure_model(plan, model, "valid", None).as_dict(),
        "test": measure_model(plan, model, "test", folder).as_dict(),
        "best_step": trainer.state.best_global_step,
        "steps": trainer.state.global_step,
        "world_size": trainer.args.world_size,
        "parameters": model.num_parameters(),
        "history": trainer.state.log_history,
        **seconds,
    }
    reports.write_json(result_path, result)
    return result


def build_trainer(plan: TrackPlan, seed: int, folder: Path) -> Trainer:
    """The stock Trainer around a fresh (or loaded) model with a head for the tracks."""
    task, train = plan.task, plan.train
    model = build_track_model(plan.model, task, plan.data.bin_bp, seed)
    if plan.model.start_at_means and plan.model.pretrained is None:
        start_at_means(model, track_means(task.train))
    if train.freeze_batch_norms:
        freeze_batch_norm(model)
    arguments = trainer_arguments(train, len(task.train), train.learning_rate, train.best_metric, seed, folder)
    arguments.batch_eval_metrics = True
    collator = TrackCollator(
        strand_pair=task.train.strand_pair,
        max_shift=plan.data.max_shift_bp,
        rc_probability=0.5 if train.augment_reverse_complement else 0.0,
        seed=seed,
        id_map=id_map_of(tokenizer_of(model.config)),
    )
    return TracksTrainer(
        schedule=train.schedule,
        schedule_options=train.schedule_options,
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=task.train,
        eval_dataset=task.valid,
        compute_metrics=WatchedTracks(task.descriptions),
        callbacks=list(plan.callbacks),
    )


def measure_model(plan: TrackPlan, model: PreTrainedModel, split: str, folder: Path | None) -> TrackReport:
    """All figures on a split; with `folder` also its table, plots and `<split>_predictions.npy`."""
    batches = predict_batches(
        model,
        plan.split(split),
        id_map_of(tokenizer_of(model.config)),
        plan.train.eval_batch_size,
        plan.train.average_reverse_complement,
        use_bf16(plan.train.precision),
    )
    if folder is None:
        return measure(batches, plan.task.descriptions)
    pairs = list(batches)
    report = measure(iter(pairs), plan.task.descriptions)
    predictions, targets = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    np.save(folder / f"{split}_predictions.npy", predictions.astype(np.float16))
    write_measured(folder / split, report, predictions, targets, plan.data.bin_bp)
    return report


def measure(pairs: Iterator[tuple[np.ndarray, np.ndarray]], descriptions: Sequence[str]) -> TrackReport:
    """All figures of predictions and labels that come batch by batch."""
    report = TrackReport(descriptions)
    for predictions, labels in pairs:
        report.update(predictions, labels)
    return report


def write_measured(
    folder: Path, report: TrackReport, predictions: np.ndarray, targets: np.ndarray, bin_bp: int
) -> None:
    """Tables of `report`, a scatter plot of all bins and the coverage of the busiest window."""
    folder.mkdir(parents=True, exist_ok=True)
    track_reports.write_track_report(folder, report)
    track_reports.plot_tracks(folder / "tracks.png", {"model": report.rows()})
    track_reports.plot_scatter(folder / "scatter.png", predictions, targets, report.tracks)
    window = track_reports.busiest_window(targets)
    track_reports.plot_profiles(
        folder / "profiles.png",
        {"predicted": predictions[window]},
        targets[window],
        report.tracks,
        bin_bp,
        f"window {window}",
    )


def run_baselines(plan: TrackPlan) -> dict[str, dict[str, TrackReport]]:
    """Method -> split -> figures, fitted on train."""
    task, bin_bp = plan.task, plan.data.bin_bp
    means, ridge = track_means(task.train), fit_ridge(task.train, task.valid, bin_bp)
    logger.info("The ridge regression takes the penalty %g.", ridge.alpha)
    return {
        MEAN: {split: measure(_constant(plan.split(split), means), task.descriptions) for split in ("valid", "test")},
        RIDGE: {split: _measure_ridge(plan, ridge, split) for split in ("valid", "test")},
    }


def _constant(dataset: TrackDataset, means: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for item in range(len(dataset)):
        labels = dataset[item]["labels"].numpy()[None]
        yield np.broadcast_to(means.astype(np.float32), labels.shape), labels


def _measure_ridge(plan: TrackPlan, ridge: Ridge, split: str) -> TrackReport:
    pairs = list(baseline_predictions(plan.split(split), plan.data.bin_bp, ridge))
    np.save(plan.folder / f"ridge_{split}_predictions.npy", np.concatenate([pair[0] for pair in pairs]).astype("f2"))
    return measure(iter(pairs), plan.task.descriptions)


def build_report(
    plan: TrackPlan,
    runs: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, Mapping[str, TrackReport]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `metrics.json`."""
    task = plan.task
    return {
        "results": {split: _over_seeds([run[split] for run in runs]) for split in ("valid", "test")},
        "baselines": {
            name: {split: report.by_assay() for split, report in splits.items()} for name, splits in baselines.items()
        },
        "per_seed": [_condensed(run) for run in runs],
        "task": {
            "windows": {"train": len(task.train), "valid": len(task.valid), "test": len(task.test)},
            "bins": task.train.num_bins,
            "bin_bp": plan.data.bin_bp,
            "read_bp": len(task.train[0]["input_ids"]),
            "tracks": len(task.descriptions),
        },
        "settings": settings,
        "environment": {
            "world_size": runs[0]["world_size"],
            "threads": torch.get_num_threads(),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "genesplice_hf": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def write_report(
    plan: TrackPlan,
    runs: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, Mapping[str, TrackReport]],
    report: Mapping[str, Any],
) -> None:
    """`metrics.json`, the plots, and the tables on the console."""
    folder, first = plan.folder, runs[0]
    reports.write_json(folder / "metrics.json", report)
    histories = {f"seed {run['seed']}": run["history"] for run in runs}
    reports.plot_learning_curve(folder / "learning_curve.png", histories, "pearson")
    methods = {f"seed {first['seed']}": first["test"]["tracks"]}
    methods |= {name: splits["test"].rows() for name, splits in baselines.items() if name != MEAN}
    track_reports.plot_tracks(folder / "tracks.png", methods)
    for split in ("valid", "test"):
        rows = {name: splits[split] for name, splits in report["baselines"].items()}
        rows[str(plan.model.model_config.get("model_type", "model"))] = report["results"][split]
        for metric in ("pearson", "poisson"):
            title = f"{split}, {report['task']['windows'][split]} windows, {len(runs)} seed(s)"
            track_reports.print_assays(title, rows, metric)


def _over_seeds(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Assay -> metric -> mean, sd and n."""
    nan = float("nan")

    def figures(run: Mapping[str, Any], assay: str) -> dict[str, float]:
        # A stored result has None where a figure is not defined.
        return {
            name: nan if run["by_assay"][assay][name] is None else run["by_assay"][assay][name]
            for name in TRACK_METRICS
        }

    return {assay: summarize([figures(run, assay) for run in measured]) for assay in measured[0]["by_assay"]}


def _condensed(run: Mapping[str, Any]) -> dict[str, Any]:
    """Without histories and tables of single tracks, which stand in the folder of the seed."""
    kept = {key: value for key, value in run.items() if key not in ("history", "valid", "test")}
    return kept | {split: run[split]["by_assay"] for split in ("valid", "test")}


if __name__ == "__main__":
    run_command(main)
