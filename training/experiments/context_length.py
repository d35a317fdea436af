"""Does a longer context help? `python -m training.experiments.context_length --config FILE.yaml --key value`.

Trains one model per context length and seed, with the same number of parameters, the same steps and the same bases in
every step (only cut into windows of another length), and measures all of them on the same held-out bases: at the
context they were trained with, and at the longest one. `output_dir` then holds `metrics.json`, one folder per run, and
the blocks; `cards_dir` holds the table, the plot and what they mean (`context_length.json`, `.png`, `.md`).
A run that was interrupted goes on, finished ones are not repeated: give the same command again.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from genesplice_hf.errors import DataError
from genesplice_hf.scoring.metrics import summarize
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer
from training.checkpoints import prepare_folder
from training.command import run_command
from training.corpus import CorpusSettings
from training.experiments.blocks import Block, Question, ask, cut_blocks, markov_losses, measure, write_blocks
from training.experiments.context_length_card import print_report, write_card
from training.objectives import LanguageModelSettings
from training.pretrain import PretrainSettings, environment, pretrain
from training.reports import write_json
from training.settings import parse_settings, settings_as_dict

TRAIN_FILE = "train.fa"


@dataclass
class ContextSettings:
    """What is compared, on which bases, and how each model is trained."""

    data_dir: str = field(default=".", metadata={"help": "Folder that the genome files lie in."})
    genomes: list[str] = field(default_factory=list, metadata={"help": "FASTA files, plain, gzip or bgzip."})
    held_out: list[str] = field(
        default_factory=list, metadata={"help": "Contigs, or regions as chrom:first-last, kept out of training."}
    )
    contexts: list[int] = field(
        default_factory=lambda: [512, 4_096, 32_768, 131_072],
        metadata={"help": "Bases per window; each divides the longest, which is also the size of a block."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run per context and seed."})
    passes: float = field(default=1.0, metadata={"help": "How often every training block is seen."})
    blocks_per_step: int = field(default=1, metadata={"help": "Bases per optimiser step, in blocks."})
    objective: Literal["masked", "causal"] = field(default="masked", metadata={"help": "What is predicted."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of bases to predict (masked)."})
    rc_probability: float = field(default=0.5, metadata={"help": "Share of windows read from the other strand."})
    model_config: dict = field(default_factory=dict, metadata={"help": "`model_type` and fields of its config."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay."})
    warmup_steps: int = field(default=10, metadata={"help": "Steps with a rising rate."})
    save_steps: int = field(default=25, metadata={"help": "Steps between checkpoints."})
    precision: Literal["auto", "fp32", "bf16"] = field(default="auto", metadata={"help": "As in pretrain."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "As in pretrain."})
    output_dir: str = field(default="runs/context_length", metadata={"help": "Folder of the runs."})
    cards_dir: str = field(default="model_cards", metadata={"help": "Folder of table, plot and text."})

    def __post_init__(self) -> None:
        longest = max(self.contexts, default=0)
        if any(context < 2 or longest % context for context in self.contexts) or not self.contexts:
            raise DataError(f"`contexts` must be 2 or more each and divide the longest, got {self.contexts}.")
        if len(set(self.contexts)) < len(self.contexts) or len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise DataError(f"`contexts` and `seeds` must not repeat, got {self.contexts} and {self.seeds}.")

    @property
    def is_causal(self) -> bool:
        return self.objective == "causal"

    @property
    def block_bp(self) -> int:
        """The longest context."""
        return max(self.contexts)


# None of these changes a weight.
_FREE = ("data_dir", "cards_dir", "output_dir", "contexts", "seeds", "save_steps")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Reads the settings, runs what is not there yet, and reports; returns the content of `metrics.json`."""
    (settings,) = parse_settings((ContextSettings,), argv)
    return compare_contexts(settings)


def compare_contexts(settings: ContextSettings) -> dict[str, Any]:
    """Trains and measures every (context, seed); the door for use from Python.

    Raises:
        DataError: no genome or no block, a held-out region that no genome has, other settings than those of the runs
            that the folder already holds.
    """
    folder = Path(settings.output_dir)
    # Contexts and seeds may be added later; what every model is asked must stay.
    stored = settings_as_dict(settings) | {"longest": settings.block_bp, "shortest": min(settings.contexts)}
    prepare_folder(folder, stored, resume=(folder / "settings.json").is_file(), overwrite=False, free=_FREE)
    train, held_out = cut_blocks(settings.data_dir, settings.genomes, settings.held_out, settings.block_bp)
    write_blocks(folder / "blocks" / TRAIN_FILE, train)
    tokenizer = NucleotideTokenizer(preset="genesplice")
    share = None if settings.is_causal else settings.mlm_probability
    questions = ask(held_out, tokenizer, share, min(settings.contexts))
    rows = [
        run(settings, context, seed, len(train), tokenizer, questions)
        for seed in settings.seeds
        for context in settings.contexts
    ]
    report = build_report(settings, rows, train, questions)
    write_json(folder / "metrics.json", report)
    print_report(report)
    write_card(report, Path(settings.cards_dir))
    return report


def run(
    settings: ContextSettings,
    context_bp: int,
    seed: int,
    num_blocks: int,
    tokenizer: NucleotideTokenizer,
    questions: Sequence[Question],
) -> dict[str, Any]:
    """One context and seed: trains, or goes on, and measures; a finished run is read back."""
    folder = Path(settings.output_dir) / f"context-{context_bp}" / f"seed-{seed}"
    finished = folder / "result.json"
    if finished.is_file():
        return json.loads(finished.read_text(encoding="utf-8"))
    facts = pretrain(*pretrain_settings(settings, context_bp, seed, num_blocks, folder))["training"]
    model = load(settings, folder / "model")
    started = time.perf_counter()
    measured = {
        name: measure(model, tokenizer, questions, length, settings.is_causal)
        for name, length in {"own": context_bp, "longest": settings.block_bp}.items()
    }
    facts = {key: facts[key] for key in ("parameters", "steps", "bases_seen", "seconds")}
    row = {"context_bp": context_bp, "seed": seed, **facts, "measuring_seconds": time.perf_counter() - started}
    write_json(finished, row | measured)
    return row | measured


def pretrain_settings(
    settings: ContextSettings, context_bp: int, seed: int, num_blocks: int, folder: Path
) -> tuple[CorpusSettings, LanguageModelSettings, PretrainSettings]:
    """The run in the words of `training.pretrain`: equal bases per step, nothing held out of the training blocks."""
    corpus = CorpusSettings(
        data_dir=str(Path(settings.output_dir) / "blocks"),
        genomes=[TRAIN_FILE],
        window_bp=context_bp,
        step_bp=context_bp,
        max_markov_order=-1,
    )
    language = LanguageModelSettings(
        objective=settings.objective,
        model_config=settings.model_config,
        mlm_probability=settings.mlm_probability,
        rc_probability=settings.rc_probability,
    )
    how = PretrainSettings(
        output_dir=str(folder),
        seed=seed,
        max_steps=max(1, round(settings.passes * num_blocks / settings.blocks_per_step)),
        batch_bp=settings.block_bp,
        gradient_accumulation=settings.blocks_per_step,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        save_steps=settings.save_steps,
        precision=settings.precision,
        gradient_checkpointing=settings.gradient_checkpointing,
        resume=(folder / "settings.json").is_file(),
    )
    return corpus, language, how


def load(settings: ContextSettings, folder: Path) -> PreTrainedModel:
    """The saved model, in float32."""
    auto = AutoModelForCausalLM if settings.is_causal else AutoModelForMaskedLM
    return auto.from_pretrained(folder, dtype="float32", attn_implementation="sdpa")


def build_report(
    settings: ContextSettings, rows: list[dict[str, Any]], train: Sequence[Block], questions: Sequence[Question]
) -> dict[str, Any]:
    """Content of `metrics.json`: mean, sd and n over seeds by context, and everything they depend on."""
    genomes = ["all", *dict.fromkeys(question.block.genome for question in questions)]
    by_context = {
        context: {
            at: {
                genome: _summary([row[at][genome] for row in rows if row["context_bp"] == context])
                for genome in genomes
            }
            for at in ("own", "longest")
        }
        for context in settings.contexts
    }
    data = {
        "train_blocks": _by_genome(train),
        "held_out_blocks": _by_genome([question.block for question in questions]),
        "asked_bases": sum(len(question.base) for question in questions),
    }
    return {
        "results": by_context,
        "baselines": markov_losses(train, questions),
        "data": data,
        "runs": rows,
        "settings": settings_as_dict(settings),
        "environment": environment(),
    }


def _summary(values: Sequence[dict[str, float]]) -> dict[str, Any]:
    return summarize([{key: row[key] for key in ("loss", "accuracy")} for row in values])


def _by_genome(blocks: Sequence[Block]) -> dict[str, int]:
    genomes = [block.genome for block in blocks]
    return {genome: genomes.count(genome) for genome in dict.fromkeys(genomes)}


if __name__ == "__main__":
    run_command(main)
