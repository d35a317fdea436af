"""Train a TF-binding classifier: `python -m training.binding --config FILE.yaml --key value`.

Two tasks: peaks of factors against each other on held-out chromosomes, with the 5-mer baseline on the same split;
and motifs planted in random DNA, with held-out factors. Trains once per seed with the stock `Trainer`; `output_dir`
then holds `metrics.json`, `settings.json`, `learning_curve.png`, and per seed `seed-<n>/model` and test scores.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    set_seed,
)

from genesplice_hf.data.binding_batches import BindingCollator
from genesplice_hf.errors import DataError
from genesplice_hf.scoring.metrics import classification_metrics, summarize
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer
from genesplice_hf.version import __version__
from training import reports
from training.baselines import LabelledSequences, run_baselines
from training.binding_data import (
    BindingTask,
    Motif,
    PlantedOptions,
    Row,
    best_site_scores,
    peak_set_task,
    planted_task,
    read_motifs,
    read_peak_set,
)
from training.checkpoints import defined, last_complete_checkpoint, prepare_folder, stored_result
from training.command import run_command
from training.epochs import TellEpoch
from training.finetune import Plan, ScheduledTrainer, training_arguments
from training.settings import (
    MethodSettings,
    ModelSettings,
    TrainSettings,
    is_main_process,
    parse_settings,
    settings_as_dict,
)
from training.task import Task

logger = logging.getLogger(__name__)


@dataclass
class BindingSettings:
    """The task and the network."""

    task: Literal["peak_sets", "planted_motifs"] = field(
        default="peak_sets", metadata={"help": "Peaks of factors against each other, or motifs in random DNA."}
    )
    data_dir: str = field(default=".", metadata={"help": "Folder of the files below."})
    peak_fastas: dict = field(
        default_factory=dict, metadata={"help": "Factor -> FASTA of its peaks with headers chrom:start-end, as JSON."}
    )
    dev_chromosomes: list[str] = field(default_factory=list, metadata={"help": "Held out to pick the checkpoint."})
    test_chromosomes: list[str] = field(default_factory=list, metadata={"help": "Held out and measured once."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Use a random part of the training windows."})
    motifs: str | None = field(default=None, metadata={"help": "Count matrices of the planted sites."})
    planted: dict = field(default_factory=dict, metadata={"help": "Fields of PlantedOptions, as JSON."})
    factor_residues: int = field(default=4, metadata={"help": "Random vectors that describe a factor of a peak set."})
    factor_width: int = field(default=32, metadata={"help": "Their width."})
    data_seed: int = field(default=0, metadata={"help": "Seed of factors and windows."})
    dna_tokens: str = field(default="enformer", metadata={"help": "Preset of NucleotideTokenizer for the DNA trunk."})
    dna_config: dict = field(default_factory=dict, metadata={"help": "Config of the DNA trunk with its model_type."})
    model_options: dict = field(default_factory=dict, metadata={"help": "Fields of TFBindConfig, as JSON."})


SETTINGS = (BindingSettings, TrainSettings)
_FREE_ON_RESUME = ("output_dir", "data_dir", "resume", "overwrite", "seeds", "run_baselines")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Reads the settings and runs; returns the content of `metrics.json`."""
    return train_binding(*parse_settings(SETTINGS, argv))


def train_binding(
    settings: BindingSettings, train: TrainSettings, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any]:
    """Trains one network per seed and measures it on every test part; the door for use from Python.

    Args:
        settings: the task and the network.
        train: how, with which seeds, and where results go.
        callbacks: further Trainer callbacks.

    Returns:
        What `metrics.json` holds: `results`, `per_seed`, `baselines`, `task`, `settings`, `environment`.

    Raises:
        DataError: settings or files that cannot be used; `output_dir` holds another run.
    """
    task, motifs = load_task(settings)
    folder = Path(train.output_dir)
    everything = settings_as_dict(settings, train)
    if is_main_process():
        options = {"resume": train.resume, "overwrite": train.overwrite, "free": _FREE_ON_RESUME}
        prepare_folder(folder, everything, **options)
    runs = [run_seed(settings, train, task, seed, callbacks) for seed in train.seeds]
    results = {part: summarize([defined(run["test"][part]) for run in runs]) for part in runs[0]["test"]}
    compared: dict[str, Any] = baselines(task, motifs) if train.run_baselines else {}
    report = {
        "results": results,
        "per_seed": [{key: value for key, value in run.items() if key != "history"} for run in runs],
        "baselines": compared,
        "task": task.report,
        "settings": everything,
        "environment": {
            "genesplice_hf": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }
    if is_main_process():
        reports.write_json(folder / "metrics.json", report)
        histories = {f"seed {run['seed']}": run["history"] for run in runs}
        reports.plot_learning_curve(folder / "learning_curve.png", histories, train.best_metric or "auroc")
        table = compared | {f"TFBind, {part}": summary for part, summary in results.items()}
        reports.print_table(reports.metrics_table(f"{settings.task}, {len(runs)} seed(s)", table))
    return report


def load_task(settings: BindingSettings) -> tuple[BindingTask, list[Motif]]:
    """The rows of the task that `settings` describe, and its motifs where it has any.

    Raises:
        DataError: a setting is missing or unknown, or a file cannot be used.
    """
    folder = Path(settings.data_dir).expanduser()
    if settings.task == "planted_motifs":
        if settings.motifs is None:
            raise DataError("`motifs` must name a file of count matrices for the task 'planted_motifs'.")
        motifs = read_motifs(folder / settings.motifs)
        return planted_task(motifs, _planted_options(settings)), motifs
    sets = [read_peak_set(factor, folder / path) for factor, path in settings.peak_fastas.items()]
    task = peak_set_task(
        sets, settings.dev_chromosomes, settings.test_chromosomes, settings.factor_residues, settings.factor_width,
        settings.data_seed, settings.max_train_rows,
    )  # fmt: skip
    return task, []


def _planted_options(settings: BindingSettings) -> PlantedOptions:
    try:
        return PlantedOptions(**({"seed": settings.data_seed} | settings.planted))
    except TypeError as error:
        raise DataError(f"`planted` may hold {', '.join(PlantedOptions._fields)}: {error}.") from error


def build_model(settings: BindingSettings, task: BindingTask) -> PreTrainedModel:
    """A TFBind classifier with random weights, whose DNA trunk is trained too."""
    width = next(iter(task.factors.values())).states.shape[1]
    chosen = {
        "protein_dim": width,
        "context_mode": "none",
        "conditioning": [],
        "freeze_dna": False,
    } | settings.model_options
    config = AutoConfig.for_model("genesplice_tfbind", dna_config=settings.dna_config, **chosen)
    return AutoModelForSequenceClassification.from_config(config)


def run_seed(
    settings: BindingSettings,
    train: TrainSettings,
    task: BindingTask,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Trains, measures and stores one seed; a seed that is finished already is read back."""
    start, folder = time.perf_counter(), Path(train.output_dir) / f"seed-{seed}"
    if (finished := stored_result(folder / "result.json", train.resume)) is not None:
        return finished
    set_seed(seed)
    model = build_model(settings, task)
    trainer = build_trainer(settings, train, task, model, seed, folder, callbacks)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) if train.resume else None)
    collator = build_collator(settings, task)
    # With the vectors of other factors the network can only tell what does not depend on the factor.
    stranger = build_collator(settings, task, exchanged=True)
    measured: dict[str, dict[str, float]] = {}
    for part, rows in task.test.items():
        scores = predict(model, rows, collator, train.eval_batch_size)
        np.save(folder / f"{part.replace(' ', '_')}_scores.npy", scores)
        measured |= measure(part, rows, scores)
        strange = predict(model, rows, stranger, train.eval_batch_size)
        measured[f"{part}, factors exchanged"] = pair_metrics(rows, strange)
    model.save_pretrained(folder / "model")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "seed": seed,
        "test": measured,
        "final_loss": losses[-1] if losses else math.nan,
        "best_step": trainer.state.best_global_step,
        "steps": trainer.state.global_step,
        "parameters": sum(one.numel() for one in model.parameters()),
        "seconds": time.perf_counter() - start,
        "history": list(trainer.state.log_history),
    }
    reports.write_json(folder / "result.json", result)
    return result


def build_trainer(
    settings: BindingSettings,
    train: TrainSettings,
    task: BindingTask,
    model: PreTrainedModel,
    seed: int,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """The Trainer; windows are read from either strand where `augment_reverse_complement` says so."""
    counted = LabelledSequences([], np.empty(len(task.train)))
    shape = Task(counted, counted, counted, "single_label_classification", 2, {})
    plan = Plan(shape, None, ModelSettings(), MethodSettings("full"), train, ())  # type: ignore[arg-type]
    arguments = training_arguments(plan, seed, folder)
    arguments.set_save(strategy=arguments.save_strategy, steps=int(arguments.save_steps), total_limit=1)
    collator = build_collator(settings, task, train, seed)
    return BindingTrainer(
        build_collator(settings, task),
        schedule=train.schedule,
        schedule_options=train.schedule_options,
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=task.train,
        eval_dataset=task.dev,
        callbacks=[TellEpoch(collator), *callbacks],
    )


class BindingTrainer(ScheduledTrainer):
    """Evaluates pairs, on the forward strand; the stock loop counts windows and would cut the last batch.

    Args:
        eval_collator: of evaluation.
        options: of the Trainer.
    """

    def __init__(self, eval_collator: BindingCollator, **options: Any) -> None:
        super().__init__(**options)
        self._eval_collator = eval_collator

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics over the pairs of the rows, logged as the stock Trainer does."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        scores = predict(self.model, rows, self._eval_collator, self.args.per_device_eval_batch_size)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in pair_metrics(rows, scores).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore
        return metrics


def build_collator(
    settings: BindingSettings,
    task: BindingTask,
    train: TrainSettings | None = None,
    seed: int = 0,
    exchanged: bool = False,
) -> BindingCollator:
    """Makes pairs; with `train` windows are augmented, `exchanged` gives each factor the vectors of another one."""
    names = list(task.factors)
    states = {
        name: task.factors[names[(at + len(names) // 2) % len(names)] if exchanged else name]
        for at, name in enumerate(names)
    }
    return BindingCollator(
        NucleotideTokenizer(preset=settings.dna_tokens),
        states.__getitem__,
        training=train is not None and train.augment_reverse_complement,
        max_shift=0,
        seed=seed,
    )


@torch.no_grad()
def predict(model: PreTrainedModel, rows: list[Row], collator: BindingCollator, batch_size: int) -> np.ndarray:
    """Logits of every pair, in the order of rows and of their factors."""
    model.eval()
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=collator)  # type: ignore[arg-type]
    logits = [model(**{name: one.to(model.device) for name, one in batch.items()}).logits for batch in loader]
    return torch.cat(logits).reshape(-1).float().cpu().numpy()


def pair_metrics(rows: Sequence[Row], scores: np.ndarray) -> dict[str, float]:
    """Metrics over all pairs of window and factor."""
    return classification_metrics(np.concatenate([row["label"] for row in rows]).astype(int), scores, kind="logits")


def measure(part: str, rows: Sequence[Row], scores: np.ndarray) -> dict[str, dict[str, float]]:
    """Metrics over all pairs, the mean of those of each factor and, where every window has exactly one bound factor of
    the same two, of the difference of their logits: which of the two is it?"""
    found = {part: pair_metrics(rows, scores)}
    labels = np.concatenate([row["label"] for row in rows]).astype(int)
    factors = np.array([factor for row in rows for factor in row["factors"]])
    both = [name for name in np.unique(factors) if len(set(labels[factors == name].tolist())) == 2]
    single = [classification_metrics(labels[factors == name], scores[factors == name], kind="logits") for name in both]
    found[f"{part}, mean of factors"] = {name: float(np.mean([one[name] for one in single])) for name in single[0]}
    if len({tuple(row["factors"]) for row in rows}) == 1 and len(rows[0]["factors"]) == 2:
        pairs = scores.reshape(-1, 2)
        found[f"{part}, {rows[0]['factors'][0]} or {rows[0]['factors'][1]}"] = classification_metrics(
            labels.reshape(-1, 2)[:, 0], pairs[:, 0] - pairs[:, 1], kind="logits"
        )
    return found


def baselines(task: BindingTask, motifs: Sequence[Motif]) -> dict[str, dict[str, float]]:
    """Without proteins: k-mers on the same split. For planted sites: the best site of the factor's own matrix."""
    if task.classes is not None:
        return run_baselines(*task.classes)
    named = {motif.factor: motif for motif in motifs}
    found = {}
    for part, rows in task.test.items():
        labels = np.concatenate([row["label"] for row in rows]).astype(int)
        scores = best_site_scores(rows, named)
        # A cut at the share of positives, for log-odds have no zero of their own.
        cut = np.quantile(scores, 1 - labels.mean())
        found[f"best site of the matrix, {part}"] = classification_metrics(labels, scores - cut, kind="logits")
    return found


if __name__ == "__main__":
    run_command(main)
