"""Train a contact-map model on maps simulated from a motif: `python -m training.contacts --config FILE.yaml`.

The windows are real sequence, the maps are not measured: `contact_simulation` computes them from the motif's hits. The
run shows whether the model learns a known map from sequence; it says nothing about folded genomes. `output_dir` then
holds `settings.json`, `metrics.json`, `maps.png` and `model`.

Shapes: n windows, L bases, P pairs, T = 1 target.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from genesplice_hf.data.contact_targets import TargetRules, contact_targets, distance_means
from genesplice_hf.data.contacts import ContactCollator, ContactDataset, vector_as_map, window_ids
from genesplice_hf.data.fasta import read_fasta
from genesplice_hf.errors import DataError
from genesplice_hf.interpretation.plots import plot_contact_maps
from genesplice_hf.models.auto import AutoModelForContactPrediction
from genesplice_hf.scoring.contacts import CONTACT_METRICS, ContactMetrics, predict_contacts
from genesplice_hf.version import __version__
from training import reports
from training.checkpoints import last_complete_checkpoint, prepare_folder, stored_result
from training.command import run_command
from training.contact_simulation import contact_matrix, find_sites, log_odds, read_motif
from training.epochs import TellEpoch
from training.evaluation_collator import EvaluationCollatorMixin
from training.settings import is_main_process, parse_settings, settings_as_dict, use_bf16

SPLITS = ("train", "valid", "test")
_FREE_ON_RESUME = ("output_dir", "data_dir", "resume", "overwrite")


@dataclass
class ContactDataSettings:
    """Which sequence, which motif, and how maps are made of them."""

    data_dir: str = field(default=".", metadata={"help": "Folder that the files below are looked up in."})
    genomes: list[str] = field(default_factory=list, metadata={"help": "FASTA files."})
    motif_file: str = field(default="", metadata={"help": "Motifs: >name, then four counts per column, gzip or not."})
    motif_name: str = field(default="", metadata={"help": "Header of the motif."})
    motif_threshold: float = field(
        default=10.5, metadata={"help": "Score in bits at which half of the sites are taken."}
    )
    window_bp: int = field(default=131_072, metadata={"help": "Length of a window; records are cut into them."})
    train_step_bp: int | None = field(
        default=None, metadata={"help": "From one training window to the next; less than window_bp overlaps them."}
    )
    split_by: Literal["description", "random"] = field(
        default="description",
        metadata={"help": "description: the word after a record's name is train, valid or test."},
    )
    split_seed: int = field(default=0, metadata={"help": "Of a random split (0.7, 0.15, 0.15 of the windows)."})


@dataclass
class ContactTrainSettings:
    """Which network, and how it is trained."""

    model_config: dict = field(default_factory=dict, metadata={"help": "Fields of the config, with `model_type`."})
    output_dir: str = field(default="runs/contacts", metadata={"help": "Folder for everything that is written."})
    seed: int = field(default=0, metadata={"help": "Of weights, order and augmentation."})
    epochs: float = field(default=50.0, metadata={"help": "Passes over the training windows."})
    batch_size: int = field(default=2, metadata={"help": "Windows per step."})
    optimizer: Literal["adamw", "sgd"] = field(default="adamw", metadata={"help": "sgd is that of the publication."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak rate; the publication has 0.0065 for sgd."})
    momentum: float = field(default=0.99575, metadata={"help": "Of sgd."})
    weight_decay: float = field(default=0.0, metadata={"help": "Of adamw."})
    warmup_fraction: float = field(default=0.1, metadata={"help": "Share of the steps with a rising rate."})
    clip_each_tensor: float = field(
        default=10.0, metadata={"help": "Largest norm of the gradient of each tensor, as Keras' clipnorm; 0: none."}
    )
    max_shift: int = field(default=11, metadata={"help": "Bases by which windows are moved."})
    evaluations: int = field(default=10, metadata={"help": "Times that the valid windows are measured."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many measurements without a better Pearson."}
    )
    precision: Literal["auto", "fp32", "bf16"] = field(default="fp32", metadata={"help": "As in finetune."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less memory for about a third more time."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last complete checkpoint."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier run in output_dir."})

    def __post_init__(self):
        if self.resume and self.overwrite:
            raise DataError("`resume` and `overwrite` exclude each other; give one of them.")
        if self.batch_size < 1 or self.evaluations < 1:
            raise DataError("`batch_size` and `evaluations` must be at least 1.")
        if "model_type" not in self.model_config:
            raise DataError("`model_config` must hold a `model_type`, such as genesplice_akita.")


class ContactTask(NamedTuple):
    """Windows with simulated targets per split; `sites` are the expected numbers of taken sites per window."""

    datasets: dict[str, ContactDataset]
    sites: dict[str, float]


class ClipEachTensor(TrainerCallback):
    """Scales down the gradient of every tensor whose norm is above the limit, each by itself."""

    def __init__(self, limit: float):
        self.limit = limit

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        for parameter in model.parameters():
            if self.limit > 0 and parameter.grad is not None:
                torch.nn.utils.clip_grad_norm_([parameter], self.limit)


class ContactTrainer(EvaluationCollatorMixin, Trainer):
    """The stock Trainer with an augmenting collator in training and none in evaluation."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Reads the settings and runs; returns the content of `metrics.json`."""
    return train_contacts(*parse_settings((ContactDataSettings, ContactTrainSettings), argv))


def train_contacts(
    data: ContactDataSettings, train: ContactTrainSettings, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any]:
    """Simulates maps, trains, and measures the test windows beside two baselines.

    Args:
        data: which windows, and what is simulated on them.
        train: which network, and how it is trained.
        callbacks: further Trainer callbacks.

    Returns:
        `results` {method: metrics}, `windows`, `sites_per_window`, `parameters`, `seconds`, `settings`.

    Raises:
        DataError: files or settings that cannot be used; `output_dir` holds another run.
    """
    config = AutoConfig.for_model(**train.model_config)
    task = load_contact_task(data, config)
    folder, settings = Path(train.output_dir), settings_as_dict(data, train)
    if is_main_process():
        options = {"resume": train.resume, "overwrite": train.overwrite, "free": _FREE_ON_RESUME}
        prepare_folder(folder, settings, **options)
    if (finished := stored_result(folder / "metrics.json", train.resume)) is not None:
        return finished
    set_seed(train.seed)
    start = time.perf_counter()
    trainer = build_trainer(AutoModelForContactPrediction.from_config(config), task, train, folder, callbacks)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) if train.resume else None)
    seconds = time.perf_counter() - start
    predictions = baselines(task) | {"model": predicted(trainer.model, task.datasets["test"])}
    report = {
        "results": {name: measured(task.datasets["test"], vectors) for name, vectors in predictions.items()},
        "windows": {name: len(part) for name, part in task.datasets.items()},
        "sites_per_window": task.sites,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "seconds": seconds,
        "history": [entry for entry in trainer.state.log_history if "eval_pearson" in entry or "loss" in entry],
        "settings": settings,
        "versions": {
            "genesplice_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if is_main_process():
        write_report(folder, trainer.model, task, predictions["model"], report)
    return report


def load_contact_task(data: ContactDataSettings, config: Any) -> ContactTask:
    """Windows, their simulated maps, and the expected contacts per distance of the training windows.

    Raises:
        DataError: no windows of some split, a missing motif, or a window that the config's bins do not divide.
    """
    if data.window_bp % config.pool_factor:
        raise DataError(f"`window_bp` ({data.window_bp}) must be a multiple of the bin, {config.pool_factor} bp.")
    folder = Path(data.data_dir)
    weights = log_odds(read_motif(folder / data.motif_file, data.motif_name))
    windows = read_windows([folder / name for name in data.genomes], data)
    rules = TargetRules(config.diagonal_offset, config.target_crop)
    matrices: dict[str, list[np.ndarray]] = {name: [] for name in windows}
    counts = dict.fromkeys(windows, 0.0)
    for name, part in windows.items():
        for ids in part:
            sites = find_sites(ids, weights, data.motif_threshold)
            matrices[name].append(contact_matrix(sites, config.pool_factor))
            counts[name] += float(sites.forward.sum() + sites.reverse.sum()) / len(part)
    expected = np.mean([distance_means(matrix) for matrix in matrices["train"]], axis=0)
    datasets = {}
    for name, part in windows.items():
        targets = np.stack([contact_targets(matrix, rules, expected=expected)[:, None] for matrix in matrices[name]])
        datasets[name] = ContactDataset(np.stack(part), targets, config.diagonal_offset)
    return ContactTask(datasets, counts)


def read_windows(paths: Sequence[Path], data: ContactDataSettings) -> dict[str, list[np.ndarray]]:
    """{split: [(L,) ids]}; every record is cut into whole windows, all of one record in one split.

    Training windows may overlap: a map can be simulated for any of them, and one base then stands in many maps.
    """
    windows: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    records = [row for path in paths for row in read_fasta(path)]
    assigned = _assigned(records, data)
    for row, split in zip(records, assigned, strict=True):
        ids = window_ids(row["sequence"])
        step = data.train_step_bp if split == "train" and data.train_step_bp else data.window_bp
        for start in range(0, len(ids) - data.window_bp + 1, step):
            windows[split].append(ids[start : start + data.window_bp])
    empty = [name for name in SPLITS if not windows[name]]
    if empty:
        raise DataError(f"`genomes` hold no window of {data.window_bp} bp for {empty}; check `split_by`.")
    return windows


def _assigned(records: Sequence[dict[str, Any]], data: ContactDataSettings) -> list[str]:
    if data.split_by == "description":
        words = [(row["description"].split() or [""])[0] for row in records]
        wrong = [row["id"] for row, word in zip(records, words, strict=True) if word not in SPLITS]
        if wrong:
            raise DataError(f"the description of {wrong[0]!r} must begin with one of {SPLITS}; or split at random.")
        return words
    order = np.random.default_rng(data.split_seed).permutation(len(records))
    cuts = [round(0.7 * len(order)), round(0.85 * len(order))]
    places = np.searchsorted(cuts, np.argsort(order), side="right")
    return [SPLITS[place] for place in places]


def build_trainer(
    model: PreTrainedModel,
    task: ContactTask,
    train: ContactTrainSettings,
    folder: Path,
    further: Sequence[TrainerCallback] = (),
) -> ContactTrainer:
    """The stock Trainer; the best valid Pearson picks the checkpoint."""
    dataset = task.datasets["train"]
    shared = (dataset.num_bins, dataset.diagonal_offset, train.max_shift)
    collator = ContactCollator(*shared, seed=train.seed)
    callbacks: list[TrainerCallback] = [TellEpoch(collator), ClipEachTensor(train.clip_each_tensor), *further]
    if train.early_stopping_patience is not None:
        callbacks.append(transformers.EarlyStoppingCallback(train.early_stopping_patience))
    optimizers = (None, None)
    if train.optimizer == "sgd":
        optimizers = (torch.optim.SGD(model.parameters(), train.learning_rate, momentum=train.momentum), None)
    return ContactTrainer(
        ContactCollator(*shared, training=False),
        model=model,
        args=training_arguments(train, len(dataset), folder),
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=task.datasets["valid"],
        compute_metrics=lambda output: pooled(task.datasets["valid"], output.predictions, output.label_ids),
        callbacks=callbacks,
        optimizers=optimizers,
    )


def training_arguments(train: ContactTrainSettings, num_windows: int, folder: Path) -> TrainingArguments:
    """Our settings in transformers' words."""
    steps = max(1, int(train.epochs * -(-num_windows // train.batch_size)))
    every = max(1, steps // train.evaluations)
    return TrainingArguments(
        output_dir=str(folder),
        seed=train.seed,
        max_steps=steps,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        warmup_steps=train.warmup_fraction,
        lr_scheduler_type="constant" if train.optimizer == "sgd" else "cosine",
        max_grad_norm=0.0,
        bf16=use_bf16(train.precision),
        gradient_checkpointing=train.gradient_checkpointing,
        use_cpu=not torch.accelerator.is_available(),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        logging_steps=every,
        load_best_model_at_end=True,
        metric_for_best_model="pearson",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not is_main_process(),
        report_to=[],
    )


def pooled(dataset: ContactDataset, predictions: Any, labels: np.ndarray) -> dict[str, float]:
    """MSE and Pearson of the valid windows, for choosing a checkpoint."""
    metrics = ContactMetrics(dataset.diagonal_offset)
    metrics.update(labels, predictions[0] if isinstance(predictions, tuple) else predictions)
    found = metrics.compute()
    return {name: float(np.mean(found[name])) for name in ("mse", "pearson", "pearson_per_map")}


def predicted(model: PreTrainedModel, dataset: ContactDataset) -> np.ndarray:
    """(n, P, T) mean over both strands."""
    rows = [predict_contacts(model, dataset[index]["input_ids"][None])[0] for index in range(len(dataset))]
    return np.stack(rows)


def baselines(task: ContactTask) -> dict[str, np.ndarray]:
    """What can be said of a test window without its sequence: the mean training map, and the mean per distance."""
    train, test = (np.asarray(task.datasets[name].targets, dtype=np.float32) for name in ("train", "test"))
    mean = train.mean(0)
    offset = task.datasets["train"].diagonal_offset
    per_distance = distance_means(vector_as_map(mean[:, 0], offset))
    rows, columns = np.triu_indices(task.datasets["train"].num_bins, offset)
    by_distance = per_distance[columns - rows][:, None].astype(np.float32)
    return {
        "mean map": np.broadcast_to(mean, test.shape),
        "distance only": np.broadcast_to(by_distance, test.shape),
    }


def measured(dataset: ContactDataset, predictions: np.ndarray) -> dict[str, Any]:
    """Every metric, each a mean over targets, and the strata."""
    metrics = ContactMetrics(dataset.diagonal_offset)
    metrics.update(np.asarray(dataset.targets, dtype=np.float32), predictions)
    found = metrics.compute()
    return {name: float(np.mean(found[name])) for name in CONTACT_METRICS} | {"strata": found["strata"]}


def write_report(
    folder: Path, model: PreTrainedModel, task: ContactTask, predictions: np.ndarray, report: dict[str, Any]
) -> None:
    """`metrics.json`, `model`, a picture of two test windows, and the table on the console."""
    model.save_pretrained(folder / "model")
    test = task.datasets["test"]
    shown = {}
    for index in range(min(2, len(test))):
        truth = np.asarray(test.targets[index, :, 0], dtype=np.float32)
        shown[f"window {index + 1}, simulated"] = vector_as_map(truth, test.diagonal_offset)
        shown[f"window {index + 1}, predicted"] = vector_as_map(predictions[index, :, 0], test.diagonal_offset)
    plot_contact_maps(shown, folder / "maps.png", "Test windows: maps simulated from a motif, not measured")
    # Last: who resumes takes it for the end of the run.
    reports.write_json(folder / "metrics.json", report)
    rows = {name: {key: found[key] for key in CONTACT_METRICS} for name, found in report["results"].items()}
    windows = report["windows"]
    reports.print_table(reports.metrics_table(f"{windows['test']} test windows; trained on {windows['train']}", rows))


if __name__ == "__main__":
    run_command(main)
