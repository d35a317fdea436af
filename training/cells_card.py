"""Write the card of the cell-type models from finished runs: `python -m training.cells_card --runs FOLDER FOLDER`.

Reads the output folders of `training.cells` for cell types, and writes `cell-types.json` (all figures),
`cell-types.md` and a UMAP and a confusion matrix per run to `cards_dir`. Every number of the text is of the runs.
"""

import json
import math
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from genesplice_hf.errors import DataError
from training import reports
from training.cells_baselines import MAJORITY
from training.command import run_command
from training.settings import parse_settings

NAME = "cell-types"
_WIDTH = 119
PLOTS = ("umap", "confusion")
METRICS = {"accuracy": "accuracy", "f1": "macro-F1", "mcc": "MCC"}
# Folders of one machine say nothing to a reader.
_LOCAL = ("data", "resume", "overwrite")
# What a reader of the processor's settings wants to know; the rest stands in the JSON.
_STEPS = ("gene_column", "size_factor_key", "min_gene_counts", "target_sum", "log1p", "value", "n_bins", "tie_break",
          "include_zero_genes", "append_cls")  # fmt: skip


@dataclass
class CardSettings:
    """Where the runs are."""

    runs: list[str] = field(
        default_factory=lambda: ["runs/pbmc68k_cell_types_lora", "runs/pbmc_facs_cell_types_lora"],
        metadata={"help": "Output folders of `training.cells --task cell_type`."},
    )
    cards_dir: str = field(default="model_cards", metadata={"help": "Folder for the card."})


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the runs and writes the card."""
    (settings,) = parse_settings([CardSettings], argv)
    write_card([Path(folder) for folder in settings.runs], Path(settings.cards_dir))


def write_card(folders: Sequence[Path], cards: Path) -> None:
    """The text, its figures and the plots.

    Raises:
        DataError: a folder holds no finished run for cell types with baselines and plots.
    """
    reports_of = {stem(report): _portable(report) for report in map(read_run, folders)}
    if len(reports_of) < len(folders):
        raise DataError("`runs` must be of different data; two of them read the same file.")
    cards.mkdir(parents=True, exist_ok=True)
    for name, folder in zip(reports_of, folders, strict=True):
        for plot in PLOTS:
            shutil.copyfile(folder / f"{plot}.png", cards / f"{NAME}_{name}_{plot}.png")
    reports.write_json(cards / f"{NAME}.json", reports_of)
    (cards / f"{NAME}.md").write_text(card_text(reports_of), encoding="utf-8")


def read_run(folder: Path) -> dict[str, Any]:
    """`metrics.json` of a run."""
    missing = [name for name in ("metrics.json", *(f"{plot}.png" for plot in PLOTS)) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"`runs`: {folder} lacks {', '.join(missing)}; finish `python -m training.cells` first.")
    report = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    if report["task"]["task"] != "cell_type" or not report["comparison"]:
        raise DataError(f"`runs`: {folder} must be a run of `--task cell_type` with its baselines.")
    return report


def stem(report: Mapping[str, Any]) -> str:
    """Short name of a run's data."""
    return Path(report["task"]["data"]).stem


def card_text(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The page.

    Args:
        runs: name of the data -> what `metrics.json` holds.
    """
    first = next(iter(runs.values()))
    parts = [
        "---\nlibrary_name: transformers\nlicense: apache-2.0\ntags:\n- genomics\n- single cell\n- gene expression\n"
        "- genesplice-hf\n- biology\n---",
        f"# {NAME}",
        "Small expression models (see `scgpt.md`) that label cells: trained from random weights on the training cells "
        "by masked expression, then adapted to cell types. Does that beat logistic regression on the same split? The "
        "weights are made by the commands below and are not part of the package. All figures stand in "
        f"`{NAME}.json`; this page is written from them by `python -m training.cells_card`.",
        "## In short",
        "\n".join(_verdict(name, report) for name, report in runs.items()),
        *(section for name, report in runs.items() for section in _sections(name, report)),
        "## Limits",
        _limits(runs),
        "## Environment",
        _environment(first),
    ]
    return "\n".join(_wrapped(line) for line in "\n\n".join(parts).split("\n")) + "\n"


def _wrapped(line: str) -> str:
    """A long line of text in lines of 119 letters; tables, code and pictures as they are."""
    if len(line) <= _WIDTH or line.startswith(("|", "!", "python", "#")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def strongest(report: Mapping[str, Any]) -> str:
    """Name of the logistic regression with the largest MCC on valid, where test has no say."""
    names = [name for name in report["baselines"] if name != MAJORITY]
    return max(names, key=lambda name: report["baselines"][name]["valid"]["mcc"])


def _verdict(name: str, report: Mapping[str, Any]) -> str:
    rival = strongest(report)
    gap = report["comparison"][rival]
    word = {True: "beats", False: "does not beat"}[gap["mcc"]["mean"] > 0]
    shown = ", ".join(f"{label} {_signed(gap[metric])}" for metric, label in METRICS.items())
    cells = report["task"]["cells"]["test"]
    return (
        f"- **{name}** ({len(report['task']['labels'])} types, {cells} test cells): {_method(report)} {word} {rival} "
        f"(C {report['baseline_settings'][rival]['C']:g}), the regression that is best on valid. Model minus "
        f"regression, mean ± sd of {gap['mcc']['n']} seeds: {shown}. Of the {cells} cells "
        f"{gap['only_model_right']['mean']:.1f} are right in the model alone, "
        f"{gap['only_baseline_right']['mean']:.1f} in the regression alone (means over seeds). One cell is "
        f"{1 / cells:.4f} of accuracy." + _same_genes(report, rival)
    )


def _same_genes(report: Mapping[str, Any], rival: str) -> str:
    """Against the regression that reads what the model reads, unless that is the rival already."""
    names = [name for name in report["baselines"] if "the model's" in name and name != rival]
    return "".join(f" Against {name}: MCC {_signed(report['comparison'][name]['mcc'])}." for name in names)


def _sections(name: str, report: Mapping[str, Any]) -> list[str]:
    return [
        f"## {name}",
        f"```bash\n{_command(report)}\n```",
        _set_up(report),
        _table(report),
        _processor(report),
        f"![UMAP of valid and test cells, first seed, before and after]({NAME}_{name}_umap.png)",
        f"![Confusion matrix of the test cells, mean of the seeds]({NAME}_{name}_confusion.png)",
    ]


def _set_up(report: Mapping[str, Any]) -> str:
    task, settings, seeds = report["task"], report["settings"], report["per_seed"]
    cells, model = task["cells"], settings["model_config"]
    parts = " / ".join(f"{number:,}" for number in cells.values())
    median = f"{task['genes_per_training_cell']['median']:.0f}"
    steps = [
        f"- Data: {task['data_source'] or task['data']}. {sum(cells.values()):,} cells, {task['genes_of_the_file']:,} "
        f"genes, labels `obs.{settings['label_key']}`.",
        f"- Split: {parts} cells for train, valid and test, drawn once within each type (seed "
        f"{settings['split_seed']}). Genes, their choice and every fit use train alone.",
        f"- Cells per type (train / valid / test): {_types(task['labels'])}.",
        f"- Model: `{model['model_type']}`, width {model['hidden_size']}, {model['num_hidden_layers']} layers, "
        f"{task['genes']} genes of largest {settings['choose_genes_by']} ({median} of them expressed in the median "
        f"cell), {seeds[0]['total_parameters']:,} parameters.",
        *_pretraining(report),
        f"- Adaptation: {_method(report)}, {seeds[0]['trainable_parameters']:,} trainable parameters (the head among "
        f"them), peak learning rate {settings['learning_rate']:g}, at most {settings['epochs']:g} passes, batches of "
        f"{settings['batch_size']}. The MCC on valid picked the checkpoint (at steps "
        f"{', '.join(str(seed['best_step']) for seed in seeds)}); test was measured once per seed.",
        f"- Cost: {np.mean([seed['cpu_seconds'] for seed in seeds]) / 60:.1f} CPU minutes per seed, "
        f"{report['environment']['threads']} thread(s).",
    ]
    return "\n".join(steps)


def _pretraining(report: Mapping[str, Any]) -> list[str]:
    stages = [seed["pretraining"] for seed in report["per_seed"] if seed["pretraining"]]
    if not stages:
        return []
    metric = next(name for name in stages[0]["valid"] if name.startswith("mse_"))
    errors = [stage["valid"][metric] for stage in stages]
    settings = report["settings"]
    return [
        f"- Before: {settings['pretrain_epochs']:g} passes of masked expression ({settings['mask_ratio']:.0%} of a "
        f"cell's genes hidden) over the training cells without their types, anew for every seed; `{metric}` on valid "
        f"{', '.join(f'{error:.3f}' for error in errors)}."
    ]


def _table(report: Mapping[str, Any]) -> str:
    lines = [f"| test, {report['task']['cells']['test']:,} cells | {' | '.join(METRICS.values())} |", "|-|-:|-:|-:|"]
    ours = [_pm(report["results"]["test"][metric]) for metric in METRICS]
    lines.append(f"| **{_method(report)}**, mean ± sd of {len(report['per_seed'])} seeds | {' | '.join(ours)} |")
    lines += [f"| seed {seed['seed']} | {_figures(seed['test'])} |" for seed in report["per_seed"]]
    for name, splits in report["baselines"].items():
        chosen = report["baseline_settings"].get(name)
        shown = name.replace("C by valid", f"C {chosen['C']:g} by valid") if chosen else name
        lines.append(f"| {shown} | {_figures(splits['test'])} |")
    return "\n".join(lines)


def _figures(metrics: Mapping[str, float]) -> str:
    return " | ".join(f"{metrics[name]:.3f}" for name in METRICS)


def _processor(report: Mapping[str, Any]) -> str:
    steps = report["task"]["processor"]
    shown = ", ".join(f"`{name}` {steps[name]}" for name in _STEPS)
    return (
        f"Processor: {shown}. Vocabulary: SHA-256 `{report['task']['vocabulary_sha256']}`. The regressions read the "
        "standardised values before binning (log1p): the most variable genes of train, up to 1,000, or the model's."
    )


def _limits(runs: Mapping[str, Mapping[str, Any]]) -> str:
    sizes = " and ".join(str(report["task"]["cells"]["test"]) for report in runs.values())
    return (
        f"- One split each, with {sizes} test cells: the sd is over seeds of the model, not over cells or splits, and "
        "a difference of a few cells is chance.\n"
        "- The models are small and saw the training cells alone; nothing is said here of models pretrained on "
        "millions of cells.\n"
        "- Sizes, rates and passes were set by hand by the MCC on valid of a few runs of one seed (which printed test "
        "as well), not searched; the regressions choose C on valid.\n"
        "- The types are those of the files: sorted cells, or labels by likeness to sorted cells, so that their own "
        "errors are in every row of the tables.\n"
        "- Cells of one study: neither batches nor other laboratories were tried."
    )


def _environment(report: Mapping[str, Any]) -> str:
    said = ("world_size", "threads", "device")
    found = report["environment"]
    versions = ", ".join(f"{name} {value}" for name, value in found.items() if name not in said)
    return f"{versions}; {found['device']}, float32.\n\nCode: Apache-2.0. The data are not part of the package."


def _command(report: Mapping[str, Any]) -> str:
    config = report["settings"]["output_dir"]
    given = " --data FILE" if Path(report["task"]["data"]).suffix else ""
    return f"python -m training.cells --config training/configs/{config}.yaml{given}"


def _method(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    names = {
        "lora": f"LoRA (rank {settings['lora_rank']})",
        "ia3": "IA3",
        "layer_norm": "LayerNorm tuning",
        "linear_probe": "a linear probe",
        "full": "training of all weights",
    }
    return names[settings["method"]]


def _types(labels: Mapping[str, Mapping[str, int]]) -> str:
    return ", ".join(f"{name} {n['train']} / {n['valid']} / {n['test']}" for name, n in labels.items())


def _portable(report: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in report["settings"].items() if key not in _LOCAL}
    return {**report, "settings": settings | {"output_dir": Path(settings["output_dir"]).name}}


def _pm(value: Mapping[str, float | None]) -> str:
    return f"{value['mean']:.3f}" + _spread(value)


def _signed(value: Mapping[str, float | None]) -> str:
    return f"{value['mean']:+.3f}" + _spread(value)


def _spread(value: Mapping[str, float | None]) -> str:
    sd = value["sd"]
    return "" if sd is None or math.isnan(sd) else f" ± {sd:.3f}"


if __name__ == "__main__":
    run_command(main)
