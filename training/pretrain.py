"""Pretrain on genomes: `python -m training.pretrain --config FILE.yaml --key value`.

Cuts the genomes into windows, keeps the held-out regions for the end, trains with the stock `Trainer` (masked or
causal bases, contrast of views, next segments, or a sum of these), and measures the held-out windows, language models
beside Markov chains that were counted on the same bases. `output_dir` then holds `model/` (weights in bfloat16,
tokenizer), `metrics.json`, `learning_curve.png`, `settings.json`, `corpus.json` (which files these were) and the
checkpoints. `--resume true` goes on after an interruption, in the middle of a pass. Works under `torchrun`.
"""

import logging
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from safetensors.torch import load_model
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from genesplice_hf.errors import DataError
from genesplice_hf.objectives.schedules import SCHEDULES, STOCK_SCHEDULES, build_scheduler
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer
from genesplice_hf.version import __version__
from training.batches import PlannedTrainer, Stage
from training.checkpoints import last_complete_checkpoint, prepare_folder
from training.command import run_command
from training.corpus import CorpusSettings, build_corpus, check_unchanged, lengths
from training.heldout import MARKOV_ORDERS, Corpus, measure_heldout, measure_objectives
from training.objectives import LanguageModelSettings, build_collator, build_model, save_model
from training.reports import metrics_table, plot_learning_curve, print_table, write_json
from training.settings import is_main_process, parse_settings, settings_as_dict, use_bf16

logger = logging.getLogger(__name__)


@dataclass
class PretrainSettings:
    """How it is trained and stored."""

    output_dir: str = field(default="runs/pretrain", metadata={"help": "Folder for everything that is written."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, order and masks."})
    max_steps: int = field(default=1000, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=64, metadata={"help": "Windows per process and forward."})
    batch_bp: int | None = field(
        default=None, metadata={"help": "Bases per process and forward instead, the same for windows of any length."}
    )
    gradient_accumulation: int = field(default=1, metadata={"help": "Forwards per optimiser step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay."})
    warmup_steps: int = field(default=200, metadata={"help": "Steps with a rising rate."})
    schedule: str = field(default="cosine", metadata={"help": f"One of {', '.join(SCHEDULES)}."})
    schedule_options: dict = field(
        default_factory=dict, metadata={"help": "Its options, as JSON; see `objectives/schedules.py`."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations twice instead of keeping them."}
    )
    dataloader_workers: int = field(default=0, metadata={"help": "Processes that read windows ahead."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})
    precision: Literal["auto", "fp32", "bf16"] = field(default="auto", metadata={"help": "As in finetune."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last complete checkpoint."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier run in output_dir."})


SETTINGS = (CorpusSettings, LanguageModelSettings, PretrainSettings)
# A restarted run may find its files elsewhere and measure more; nothing that the weights depend on may change.
_FREE_ON_RESUME = (
    "output_dir", "data_dir", "resume", "overwrite", "streaming", "dataloader_workers",
    "heldout_window_bp", "max_heldout_windows", "max_markov_order",
)  # fmt: skip


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C ends the run after the present step, with a checkpoint; a second Ctrl-C ends it at once.

    Processes that train together would stop at different steps, so that there Ctrl-C stays what it is.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.interrupted = True
        self._restore()
        logger.warning("Interrupted: the run stops after this step, with a checkpoint; `--resume true` goes on.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Reads the settings and runs; returns the content of `metrics.json`."""
    return pretrain(*parse_settings(SETTINGS, argv), callbacks=callbacks)


def pretrain(
    corpus_settings: CorpusSettings,
    model_settings: LanguageModelSettings,
    settings: PretrainSettings,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Trains, measures the held-out windows and writes the model; the door for use from Python.

    Returns:
        What `metrics.json` holds: `held_out`, `training`, `settings`, `environment`; nothing in further processes.

    Raises:
        DataError: no genome, a held-out region that no genome has, nothing left to train on, a genome file that
            changed since the run began, settings that do not fit each other.
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is written.
    """
    check_schedule(settings)
    folder, stored = Path(settings.output_dir), settings_as_dict(corpus_settings, model_settings, settings)
    if is_main_process():
        options = {"resume": settings.resume, "overwrite": settings.overwrite, "free": _FREE_ON_RESUME}
        prepare_folder(folder, stored, **options)
        check_unchanged(folder, corpus_settings)
    corpus = build_corpus(corpus_settings)
    tokenizer = NucleotideTokenizer(preset="genesplice")
    trainer = build_trainer(corpus, tokenizer, corpus_settings, model_settings, settings, callbacks)
    start = time.perf_counter()
    run_or_resume(trainer, last_complete_checkpoint(folder) if settings.resume else None)
    seconds = time.perf_counter() - start
    if not is_main_process():
        return {}
    # Without the mixed precision of training, so that whoever loads the file measures the same.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    save_model(model, tokenizer, folder / "model")
    report = {
        "held_out": held_out_report(model, tokenizer, corpus, corpus_settings, model_settings, settings.seed),
        "training": training_facts(trainer, corpus) | {"seconds": seconds},
        "settings": stored,
        "environment": environment(),
    }
    write_report(folder, report, trainer.state.log_history)
    return report


def check_schedule(settings: PretrainSettings) -> None:
    """Raises before the genomes are read what would otherwise be raised when training begins."""
    if settings.schedule in ("reduce_lr_on_plateau", "greedy"):
        raise DataError(
            f"`schedule` {settings.schedule!r} follows evaluations during training, and pretraining has none; choose "
            "another, such as 'cosine'."
        )
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    build_scheduler(
        settings.schedule, optimizer, settings.max_steps, settings.warmup_steps, **settings.schedule_options
    )


def build_trainer(
    corpus: Corpus,
    tokenizer: NucleotideTokenizer,
    corpus_settings: CorpusSettings,
    model_settings: LanguageModelSettings,
    settings: PretrainSettings,
    callbacks: Sequence[TrainerCallback],
) -> PlannedTrainer:
    """The stock Trainer around a fresh model, over the planned windows."""
    stages = plan_stages(corpus, corpus_settings, settings)
    model = build_model(model_settings, settings.seed)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    # The longest windows can stand in for a half of any other.
    partners = max(stages, key=lambda stage: stage.window_bp).windows
    rc_equivariant = bool(getattr(model.config, "rc_equivariant", False))
    return PlannedTrainer(
        model=model,
        args=training_arguments(settings, Path(settings.output_dir)),
        data_collator=build_collator(tokenizer, model_settings, settings.seed, partners, rc_equivariant),
        callbacks=[SaveOnInterrupt(), *callbacks],
        stages=stages,
        schedule=settings.schedule,
        schedule_options=settings.schedule_options,
    )


def plan_stages(corpus: Corpus, corpus_settings: CorpusSettings, settings: PretrainSettings) -> list[Stage]:
    """The length curriculum, or a single stage, with batch sizes; stages after `max_steps` are left out.

    Raises:
        DataError: the curriculum ends before the run does, or `batch_bp` is no multiple of a window.
    """
    wanted = lengths(corpus_settings)
    last = wanted[-1].until_step
    if last is not None and last < settings.max_steps:
        raise DataError(
            f"`length_curriculum` ends at step {last}, before `max_steps` ({settings.max_steps}); leave the last "
            "`until_step` out, or raise it."
        )
    stages: list[Stage] = []
    for length, windows in zip(wanted, corpus.by_stage, strict=True):
        first = stages[-1].until_step if stages else 0
        until = min(length.until_step or settings.max_steps, settings.max_steps)
        size = windows_per_forward(length.window_bp, settings, length.batch_size)
        if first < until:
            stages.append(Stage(first, until, windows, length.window_bp, size))
    return stages


def windows_per_forward(window_bp: int, settings: PretrainSettings, batch_size: int | None) -> int:
    """Windows per process and forward: as the stage says, or so many bases, or `batch_size`."""
    if settings.batch_bp is None or batch_size is not None:
        return batch_size or settings.batch_size
    if settings.batch_bp < window_bp or settings.batch_bp % window_bp:
        raise DataError(
            f"`batch_bp` ({settings.batch_bp}) must be a multiple of every window, it is none of {window_bp}; change "
            "one of the two."
        )
    return settings.batch_bp // window_bp


def run_or_resume(trainer: Trainer, checkpoint: str | None) -> None:
    """Trains from `checkpoint` on; a run that had ended is only loaded, for the Trainer would take one step more."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")) if checkpoint else None
    if checkpoint is None or state is None or state.global_step < trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=checkpoint)
        watch = next(part for part in trainer.callback_handler.callbacks if isinstance(part, SaveOnInterrupt))
        if watch.interrupted and trainer.state.global_step < trainer.args.max_steps:
            raise KeyboardInterrupt
        return
    load_model(trainer.model, Path(checkpoint) / "model.safetensors")
    trainer.state = state


def held_out_report(
    model: transformers.PreTrainedModel,
    tokenizer: NucleotideTokenizer,
    corpus: Corpus,
    corpus_settings: CorpusSettings,
    model_settings: LanguageModelSettings,
    seed: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """By genome and method: bases beside Markov chains where bases are predicted, and further objectives."""
    report: dict[str, dict[str, dict[str, float]]] = {}
    if model_settings.predicts_tokens:
        orders = [order for order in MARKOV_ORDERS if order <= corpus_settings.max_markov_order]
        report = measure_heldout(model, tokenizer, corpus, model_settings, seed, orders)
    if model_settings.objective in ("masked", "causal"):
        return report
    rc_equivariant = bool(getattr(model.config, "rc_equivariant", False))

    def collator_of(rows: Any) -> Any:
        return build_collator(tokenizer, model_settings, seed + 1, rows, rc_equivariant)

    objectives = measure_objectives(model, corpus, collator_of)
    return {genome: report.get(genome, {}) | {"objectives": found} for genome, found in objectives.items()}


def training_facts(trainer: PlannedTrainer, corpus: Corpus) -> dict[str, Any]:
    """What the card says of the run."""
    steps, forwards = trainer.state.global_step, trainer.args.gradient_accumulation_steps * trainer.args.world_size
    stages = [
        {
            "steps": stage.until_step - stage.first_step,
            "window_bp": stage.window_bp,
            "windows": len(stage.windows),
            "windows_per_step": stage.batch_size * forwards,
            "passes": stage.passes_done(steps, forwards),
        }
        for stage in trainer.stages
    ]
    return {
        "parameters": trainer.model.num_parameters(),
        "steps": steps,
        "bases_seen": sum(part["steps"] * part["windows_per_step"] * part["window_bp"] for part in stages),
        "train_windows": len(corpus.train),
        "stages": stages,
    }


def write_report(folder: Path, report: dict[str, Any], history: list[dict[str, float]]) -> None:
    """`metrics.json`, the learning curve, and the tables on the console."""
    write_json(folder / "metrics.json", report)
    plot_learning_curve(folder / "learning_curve.png", {"pretraining": history}, "loss")
    for region, rows in report["held_out"].items():
        print_table(metrics_table(f"Held out: {region} (nats per base, share of bases)", rows))


def training_arguments(settings: PretrainSettings, folder: Path) -> TrainingArguments:
    """Our settings in transformers' words."""
    # Read by nobody, as `PlannedTrainer` makes the scheduler; ours are no names that Trainer knows.
    stock = settings.schedule if settings.schedule in STOCK_SCHEDULES else "constant"
    return TrainingArguments(
        output_dir=str(folder),
        seed=settings.seed,
        data_seed=settings.seed,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta2=0.98,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=stock,
        bf16=use_bf16(settings.precision),
        use_cpu=not torch.cuda.is_available(),
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=max(1, settings.save_steps // 10),
        remove_unused_columns=False,
        dataloader_num_workers=settings.dataloader_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not is_main_process(),
        report_to=[],
    )


def environment() -> dict[str, Any]:
    """Versions that a result depends on."""
    return {
        "genesplice_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


if __name__ == "__main__":
    run_command(main)
