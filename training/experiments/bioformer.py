"""What is the pair path of BioFormer worth? `python -m training.experiments.bioformer --experiment all`.

Five questions, each a handful of small models that are trained on the same cells, genes, masks and steps: at equal
parameters, at equal attention, ablated, with more layers, and with knowledge of genes against shuffled controls.
`out` then holds `runs.jsonl` (one line per model and seed), `models.csv`, `metrics.json`; `cards_dir` holds
`bioformer-NAME.json` and `.png`, and says what came out: of the default data in `bioformer.md`, else in
`bioformer-NAME.md`.
A run that was interrupted goes on: give the same command again.
"""

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils.logging import disable_progress_bar

from genesplice_hf.errors import DataError
from training.checkpoints import prepare_folder
from training.command import run_command
from training.experiments.bioformer_card import print_report, write_card, write_table
from training.experiments.bioformer_data import DEFAULT_DATA, ExpressionTask, load_task, read_cells
from training.experiments.bioformer_models import Candidate, Experiment, experiments
from training.experiments.bioformer_runs import Budget, baselines, run_seed
from training.pretrain import environment
from training.reports import write_json
from training.settings import parse_settings, settings_as_dict

logger = logging.getLogger(__name__)

NAMES = ("same_params", "same_attention", "ablation", "increasing_n", "priors")
RUNS = "runs.jsonl"


@dataclass
class ExperimentSettings:
    """Which questions, on which cells, with how much training."""

    experiment: Literal["same_params", "same_attention", "ablation", "increasing_n", "priors", "all"] = field(
        default="all", metadata={"help": "Which question; `all` asks every one."}
    )
    data: str = field(
        default=DEFAULT_DATA, metadata={"help": "pbmc68k_reduced, an .h5ad file, or a table of genes x cells."}
    )
    gene_column: str | None = field(default=None, metadata={"help": "Column of var with gene names; its index."})
    label_key: str | None = field(default=None, metadata={"help": "Column of obs whose shares the split keeps."})
    genes: int = field(default=100, metadata={"help": "Most variable genes of the training cells."})
    edges: str | None = field(
        default=None, metadata={"help": "Edge list; without one, co-expression in the training cells."}
    )
    only_genes_with_edges: bool = field(default=False, metadata={"help": "Choose genes that `edges` names."})
    pathways: str | None = field(default=None, metadata={"help": "GMT file of gene sets."})
    hidden_size: int = field(
        default=64, metadata={"help": "Width; half of it where layers or knowledge vary, four times for one model."}
    )
    seeds: int = field(default=3, metadata={"help": "Runs per model."})
    epochs: int = field(default=12, metadata={"help": "Passes over the training cells."})
    batch_size: int = field(default=32, metadata={"help": "Cells per step."})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata={"help": "Tried for every model with its first seed."}
    )
    device: Literal["auto", "cpu"] = field(default="auto", metadata={"help": "auto: an accelerator where one is."})
    name: str | None = field(default=None, metadata={"help": "Name in the cards; that of the data."})
    out: str = field(default="runs/bioformer", metadata={"help": "Folder of the runs."})
    cards_dir: str = field(default="model_cards", metadata={"help": "Folder of table, plot and text."})

    def __post_init__(self) -> None:
        for name in ("genes", "seeds", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise DataError(f"`{name}` must be 1 or more, got {getattr(self, name)}.")
        if self.hidden_size < 16 or self.hidden_size % 8:
            raise DataError(f"`hidden_size` must be a multiple of 8, 16 or more, got {self.hidden_size}.")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise DataError(f"`learning_rates` must be numbers above 0, got {self.learning_rates}.")

    @property
    def asked(self) -> tuple[str, ...]:
        """The experiments, by name."""
        return NAMES if self.experiment == "all" else (self.experiment,)

    @property
    def budget(self) -> Budget:
        use_cpu = self.device == "cpu" or not torch.accelerator.is_available()
        return Budget(self.epochs, self.batch_size, tuple(self.learning_rates), use_cpu)

    @property
    def label(self) -> str:
        """Short name of the run, for files."""
        return self.name or re.sub(r"(\.h5ad|\.txt|\.tsv|\.csv|\.gz)+$", "", Path(self.data).name)


# Seeds and questions may be added later; none of these changes a number that is there.
_FREE = ("experiment", "seeds", "device", "name", "out", "cards_dir")
_FILES = ("data", "edges", "pathways")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Reads the settings, runs what is not there yet, and reports; returns the content of `metrics.json`."""
    (settings,) = parse_settings((ExperimentSettings,), argv)
    return run_experiments(settings)


def run_experiments(settings: ExperimentSettings) -> dict[str, Any]:
    """Trains every model and seed that is missing; the door for use from Python.

    Raises:
        DataError: no such data, no edge between the chosen genes, or a folder that holds runs of other settings.
    """
    folder = Path(settings.out)
    stored = settings_as_dict(settings) | {name: _file_name(getattr(settings, name)) for name in _FILES}
    prepare_folder(folder, stored, resume=(folder / "settings.json").is_file(), overwrite=False, free=_FREE)
    cells = read_cells(settings.data, settings.gene_column, settings.label_key)
    task = load_task(cells, settings.genes, settings.edges, settings.pathways, settings.only_genes_with_edges)
    asked = experiments(settings.asked, settings.hidden_size, task)
    runs = run_missing(asked, task, settings)
    report = {
        "experiments": {name: _as_json(experiment) for name, experiment in asked.items()},
        "runs": runs,
        "baselines": baselines(task),
        "data": {"name": settings.label, **task.facts},
        "settings": stored,
        "environment": environment(),
    }
    write_json(folder / "metrics.json", report)
    write_table(report, folder / "models.csv")
    print_report(report)
    write_card(report, Path(settings.cards_dir))
    return report


def _file_name(path: str | None) -> str | None:
    return None if path is None else Path(path).name


def run_missing(
    asked: Mapping[str, Experiment], task: ExpressionTask, settings: ExperimentSettings
) -> list[dict[str, Any]]:
    """Every (model, seed) once: read back where it is finished, trained where it is not."""
    file = Path(settings.out) / RUNS
    done = {(run["model"], run["seed"]): run for run in read_runs(file)}
    models = {model.name: model for experiment in asked.values() for model in experiment.candidates}
    for number, model in enumerate(models.values(), 1):
        for seed in range(settings.seeds):
            if (model.name, seed) not in done:
                done[model.name, seed] = _run(model, task, seed, done, settings.budget, file)
        logger.info("%d of %d models: %s", number, len(models), model.name)
    return [done[name, seed] for name in models for seed in range(settings.seeds)]


def _run(
    model: Candidate, task: ExpressionTask, seed: int, done: Mapping, budget: Budget, file: Path
) -> dict[str, Any]:
    started = time.perf_counter()
    rate = done[model.name, 0]["learning_rate"] if seed else None
    run = run_seed(model, task, seed, rate, budget) | {"seconds": time.perf_counter() - started}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(run) + "\n")
    return run


def read_runs(file: Path) -> list[dict[str, Any]]:
    """The finished runs; a last line that was cut short is removed from the file."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        file.write_text("".join(whole), encoding="utf-8")
    return [json.loads(line) for line in whole]


def _as_json(experiment: Experiment) -> dict[str, Any]:
    return {
        "question": experiment.question,
        "models": list(dict.fromkeys(model.name for model in experiment.candidates)),
        "comparisons": [list(pair) for pair in experiment.comparisons],
    }


if __name__ == "__main__":
    disable_progress_bar()  # of every saved checkpoint
    run_command(main)
