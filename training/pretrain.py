"""Pretrain a language model on genomes: `python -m training.pretrain --config FILE.yaml --key value`.

Cuts the genomes into windows, keeps the held-out regions for the end, trains with the stock `Trainer` (masked or
causal), and measures held-out loss and accuracy beside Markov chains that were counted on the same bases.
`output_dir` then holds `model/` (weights in bfloat16, tokenizer), `metrics.json`, `learning_curve.png`,
`settings.json` and the checkpoints. `--resume true` goes on after an interruption. Works under `torchrun`.
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
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from genesplice_hf.data.fasta import Genome
from genesplice_hf.data.windows import windows_dataset
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval
from genesplice_hf.objectives.causal import CLMCollator
from genesplice_hf.objectives.masked import DnaMLMCollator
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer
from genesplice_hf.version import __version__
from training.checkpoints import last_complete_checkpoint, prepare_folder
from training.heldout import Corpus, measure_heldout
from training.reports import metrics_table, plot_learning_curve, print_table, write_json
from training.settings import is_main_process, parse_settings, settings_as_dict, use_bf16

logger = logging.getLogger(__name__)


@dataclass
class CorpusSettings:
    """Which bases are trained on, and which are only measured."""

    data_dir: str = field(default=".", metadata={"help": "Folder that the genome files lie in."})
    genomes: list[str] = field(default_factory=list, metadata={"help": "FASTA files, plain, gzip or bgzip."})
    held_out: list[str] = field(
        default_factory=list, metadata={"help": "Contigs, or regions as chrom:first-last, kept out of training."}
    )
    window_bp: int = field(default=256, metadata={"help": "Bases per example."})
    step_bp: int = field(default=64, metadata={"help": "Distance between the starts of training windows."})
    max_heldout_windows: int = field(default=4000, metadata={"help": "Held-out windows that are measured, at most."})


@dataclass
class LanguageModelSettings:
    """Which network and which objective."""

    objective: Literal["masked", "causal"] = field(default="masked", metadata={"help": "What is predicted."})
    model_config: dict = field(default_factory=dict, metadata={"help": "`model_type` and fields of its config."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of bases to predict (masked)."})
    rc_probability: float = field(default=0.5, metadata={"help": "Share of windows read from the other strand."})
    soft_mask_weight: float = field(default=1.0, metadata={"help": "Loss weight of lower-case bases."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2 or flex."})


@dataclass
class PretrainSettings:
    """How it is trained and stored."""

    output_dir: str = field(default="runs/pretrain", metadata={"help": "Folder for everything that is written."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, order and masks."})
    max_steps: int = field(default=1000, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=64, metadata={"help": "Windows per process and forward."})
    gradient_accumulation: int = field(default=1, metadata={"help": "Forwards per optimiser step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay."})
    warmup_steps: int = field(default=200, metadata={"help": "Steps with a rising rate."})
    schedule: str = field(default="cosine", metadata={"help": "Any schedule name of transformers."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints and dev losses."})
    precision: Literal["auto", "fp32", "bf16"] = field(default="auto", metadata={"help": "As in finetune."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last complete checkpoint."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier run in output_dir."})


SETTINGS = (CorpusSettings, LanguageModelSettings, PretrainSettings)
# A restarted run may find its files elsewhere and measure more; nothing that the weights depend on may change.
_FREE_ON_RESUME = ("output_dir", "data_dir", "resume", "overwrite", "max_heldout_windows")


class EpochMasks(TrainerCallback):
    """Tells the collator the epoch, so that every pass over the data draws other masks and strands."""

    def __init__(self, collator: DnaMLMCollator | CLMCollator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.set_epoch(int(state.epoch or 0))


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Reads the settings and runs; returns the content of `metrics.json`."""
    return pretrain(*parse_settings(SETTINGS, argv), callbacks=callbacks)


def pretrain(
    corpus_settings: CorpusSettings,
    model_settings: LanguageModelSettings,
    settings: PretrainSettings,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Trains, measures the held-out regions and writes the model; the door for use from Python.

    Raises:
        DataError: no genome, a held-out region that no genome has, nothing left to train on.
    """
    folder, stored = Path(settings.output_dir), settings_as_dict(corpus_settings, model_settings, settings)
    if is_main_process():
        options = {"resume": settings.resume, "overwrite": settings.overwrite, "free": _FREE_ON_RESUME}
        prepare_folder(folder, stored, **options)
    corpus = build_corpus(corpus_settings)
    tokenizer = NucleotideTokenizer(preset="genesplice")
    trainer = build_trainer(corpus, tokenizer, model_settings, settings, callbacks)
    start = time.perf_counter()
    run_or_resume(trainer, last_complete_checkpoint(folder) if settings.resume else None)
    seconds = time.perf_counter() - start
    if not is_main_process():
        return {}
    # Without the mixed precision of training, so that whoever loads the file measures the same.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    save_model(model, tokenizer, folder / "model")
    report = {
        "held_out": measure_heldout(model, tokenizer, corpus, model_settings, settings.seed),
        "training": training_facts(trainer, corpus, corpus_settings, settings) | {"seconds": seconds},
        "settings": stored,
        "environment": environment(),
    }
    write_report(folder, report, trainer.state.log_history)
    return report


def build_trainer(
    corpus: Corpus,
    tokenizer: NucleotideTokenizer,
    model_settings: LanguageModelSettings,
    settings: PretrainSettings,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """The stock Trainer around a fresh model."""
    collator = build_collator(tokenizer, model_settings, settings.seed)
    return Trainer(
        model=build_model(model_settings, settings.seed),
        args=training_arguments(settings, Path(settings.output_dir)),
        data_collator=collator,
        train_dataset=corpus.train,
        callbacks=[EpochMasks(collator), *callbacks],
    )


def run_or_resume(trainer: Trainer, checkpoint: str | None) -> None:
    """Trains from `checkpoint` on; a run that had ended is only loaded, for the Trainer would take one step more."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")) if checkpoint else None
    if checkpoint is None or state is None or state.global_step < trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=checkpoint)
        return
    load_model(trainer.model, Path(checkpoint) / "model.safetensors")
    trainer.state = state


def training_facts(
    trainer: Trainer, corpus: Corpus, corpus_settings: CorpusSettings, settings: PretrainSettings
) -> dict[str, Any]:
    """What the card says of the run."""
    steps = trainer.state.global_step
    return {
        "parameters": trainer.model.num_parameters(),
        "steps": steps,
        "bases_seen": steps * bases_per_step(corpus_settings, settings, trainer),
        "train_windows": len(corpus.train),
    }


def write_report(folder: Path, report: dict[str, Any], history: list[dict[str, float]]) -> None:
    """`metrics.json`, the learning curve, and the tables on the console."""
    write_json(folder / "metrics.json", report)
    plot_learning_curve(folder / "learning_curve.png", {"pretraining": history}, "loss")
    for region, rows in report["held_out"].items():
        print_table(metrics_table(f"Held out: {region} (nats per base, share of bases)", rows))


def build_corpus(settings: CorpusSettings) -> Corpus:
    """Windows of all genomes outside the held-out regions, and the held-out windows by region."""
    if not settings.genomes:
        raise DataError("`genomes` must name at least one FASTA file; give it in the config or by `--genomes`.")
    train: list[Dataset] = []
    held_out: dict[str, list[dict[str, Any]]] = {}
    missing = set(settings.held_out)
    for name in settings.genomes:
        genome = Genome(Path(settings.data_dir) / name)
        # Every genome that has the region keeps it out, or two files of one genome would leak into each other.
        regions = {text: region for text in settings.held_out if (region := region_of(genome, text)) is not None}
        missing -= set(regions)
        label = name.split(".")[0]
        cut = {"window_bp": settings.window_bp, "max_n_fraction": 0.1, "last": "drop", "name": label}
        if set(regions) < set(genome.contigs) or any(text not in genome.contigs for text in regions):
            train.append(windows_dataset(genome, step_bp=settings.step_bp, exclude=list(regions.values()), **cut))
        for region in regions.values():
            held_out.setdefault(label, []).extend(windows_dataset(genome, regions=[region], **cut))
    if missing:
        raise DataError(f"`held_out` names {sorted(missing)}, which no genome in `genomes` has; correct the names.")
    if not train:
        raise DataError("`held_out` names every contig of `genomes`; leave some to train on.")
    return Corpus(concatenate_datasets(train), {label: thin(rows, settings) for label, rows in held_out.items()})


def region_of(genome: Genome, text: str) -> Interval | None:
    """The contig or region that `text` names in this genome, or None when the genome does not have it."""
    if text in genome.contigs:
        return Interval(text, 0, genome.contigs[text])
    if ":" not in text:
        return None
    region = Interval.parse(text)
    return region if region.chrom in genome.contigs else None


def thin(rows: list[dict[str, Any]], settings: CorpusSettings) -> list[dict[str, Any]]:
    """Every n-th held-out window, so that at most `max_heldout_windows` of a genome are measured."""
    return rows[:: max(1, math.ceil(len(rows) / settings.max_heldout_windows))]


def build_collator(
    tokenizer: NucleotideTokenizer, settings: LanguageModelSettings, seed: int
) -> DnaMLMCollator | CLMCollator:
    """The objective as a collator of raw windows."""
    shared = {
        "rc_probability": settings.rc_probability,
        "soft_mask_weight": settings.soft_mask_weight,
        "seed": seed,
    }
    if settings.objective == "causal":
        return CLMCollator(tokenizer, **shared)
    return DnaMLMCollator(tokenizer, mlm_probability=settings.mlm_probability, **shared)


def build_model(settings: LanguageModelSettings, seed: int) -> PreTrainedModel:
    """A model with fresh weights, drawn from `seed`."""
    set_seed(seed)
    fields = dict(settings.model_config)
    config = AutoConfig.for_model(fields.pop("model_type", "genesplice"), **fields)
    auto = AutoModelForCausalLM if settings.objective == "causal" else AutoModelForMaskedLM
    return auto.from_config(config, attn_implementation=settings.attn_implementation)


def training_arguments(settings: PretrainSettings, folder: Path) -> TrainingArguments:
    """Our settings in transformers' words."""
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
        lr_scheduler_type=settings.schedule,
        bf16=use_bf16(settings.precision),
        use_cpu=not torch.cuda.is_available(),
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=max(1, settings.save_steps // 10),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not is_main_process(),
        report_to=[],
    )


def bases_per_step(corpus: CorpusSettings, settings: PretrainSettings, trainer: Trainer) -> int:
    """Bases that one optimiser step sees, over all processes."""
    windows = settings.batch_size * settings.gradient_accumulation * trainer.args.world_size
    return windows * corpus.window_bp


def save_model(model: PreTrainedModel, tokenizer: NucleotideTokenizer, folder: Path) -> None:
    """Weights in bfloat16, config and tokenizer; the model in memory gets the rounded weights too."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.to(torch.float32)


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
    main()
