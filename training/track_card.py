"""Write the card of the track models from finished runs: `python -m training.track_card --data_dir FOLDER`.

Reads the output folders of `training.tracks` with the two shipped configs, and writes `tracks.json` (all figures),
`tracks.md`, `tracks.png` (a dot per track) and `tracks_profiles.png` (one window) to `cards_dir`. Every number of the
text is taken from the runs.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from genesplice_hf.errors import DataError
from genesplice_hf.scoring.track_report import TrackReport
from training import reports, track_reports
from training.command import run_command
from training.settings import parse_settings
from training.track_task import TrackDataSettings, load_track_task
from training.tracks import MEAN, RIDGE

logger = logging.getLogger(__name__)

NAME = "tracks"
SHOWN = ("pearson", "poisson")
# Folders of one machine say nothing to a reader.
_LOCAL = ("data_dir", "output_dir", "resume", "overwrite")


@dataclass
class CardSettings:
    """Where the runs and the windows are."""

    data_dir: str = field(metadata={"help": "The folder that the runs were trained on."})
    enformer_run: str = field(default="runs/enformer_tracks", metadata={"help": "Output folder of the Enformer."})
    genesplice_run: str = field(default="runs/genesplice_tracks", metadata={"help": "Output folder of GeneSplice."})
    cards_dir: str = field(default="model_cards", metadata={"help": "Folder for the card."})


class Run(NamedTuple):
    """A finished run: its report, and what the first seed predicts on test (N, M, T)."""

    name: str
    report: dict[str, Any]
    test_predictions: np.ndarray

    @property
    def parameters(self) -> int:
        return self.report["per_seed"][0]["parameters"]


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the runs and writes the card."""
    (settings,) = parse_settings([CardSettings], argv)
    runs = [read_run("Enformer", settings.enformer_run), read_run("GeneSplice", settings.genesplice_run)]
    write_card(runs, settings)


def read_run(name: str, folder: str) -> Run:
    """What `training.tracks` left in `folder`.

    Raises:
        DataError: the folder holds no finished run.
    """
    metrics = Path(folder) / "metrics.json"
    if not metrics.is_file():
        raise DataError(f"{metrics} is missing; finish the run of {name} with `python -m training.tracks` first.")
    report = json.loads(metrics.read_text(encoding="utf-8"))
    seed = report["per_seed"][0]["seed"]
    return Run(name, report, np.load(Path(folder) / f"seed-{seed}" / "test_predictions.npy"))


def write_card(runs: Sequence[Run], settings: CardSettings) -> None:
    """The four files; runs of different windows are refused.

    Raises:
        DataError: the runs do not share windows, bins, tracks and baselines.
    """
    first = runs[0].report
    if any(run.report["task"] != first["task"] or _means(run.report) != _means(first) for run in runs):
        raise DataError("The runs are of different windows or tracks; train both on the same `data_dir`.")
    folder = Path(settings.cards_dir)
    task = load_track_task(TrackDataSettings(settings.data_dir, first["task"]["bin_bp"], first["task"]["read_bp"]))
    targets = np.stack([task.test[item]["labels"].numpy() for item in range(len(task.test))])
    predictions = {run.name: run.test_predictions.astype(np.float32) for run in runs}
    predictions[RIDGE] = np.load(Path(settings.genesplice_run) / "ridge_test_predictions.npy").astype(np.float32)
    rows = {name: TrackReport(task.descriptions).update(x, targets).rows() for name, x in predictions.items()}
    track_reports.plot_tracks(folder / f"{NAME}.png", rows)
    window = track_reports.busiest_window(targets)
    shown = {name: x[window] for name, x in predictions.items()}
    arguments = (targets[window], task.descriptions, first["task"]["bin_bp"], f"test window {window}")
    track_reports.plot_profiles(folder / f"{NAME}_profiles.png", shown, *arguments)
    content = {run.name: _portable(run.report) for run in runs}
    reports.write_json(folder / f"{NAME}.json", content)
    (folder / f"{NAME}.md").write_text(card_text(runs, rows), encoding="utf-8")


def card_text(runs: Sequence[Run], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The page: what was done, tables, what they show, what they cannot.

    Args:
        runs: the finished runs.
        rows: method -> a dict per track, of the first seed on test.
    """
    parts = [
        "# Tracks from sequence: a small Enformer and GeneSplice, side by side",
        _set_up(runs),
        "## Results",
        *(_table(runs, split, metric) for metric in SHOWN for split in ("valid", "test")),
        "Mean ± sd over seeds of the mean over tracks. Pearson is per track over all windows and bins (higher is "
        "better); the Poisson loss is mean(p - y log p) (lower is better). A constant prediction has no Pearson.",
        f"![Pearson of every track on test, first seed]({NAME}.png)",
        f"![Coverage of one test window, first seed]({NAME}_profiles.png)",
        "Every panel has its own scale: what is predicted is far flatter than what is measured.",
        "## What it shows",
        _shows(runs, rows),
        "## What it cannot show",
        _cannot(runs),
        "## Again",
        _commands(runs),
        "## Data and licence",
        "The windows are the test data of calico/baskerville (`tests/data/tiny/hg38`, Apache-2.0): hg38 with CAGE of "
        "FANTOM5, DNase and RNA-seq, each named in `targets.txt`. The code is Apache-2.0. No weights are part of the "
        "package.",
    ]
    return "\n\n".join(parts) + "\n"


def _set_up(runs: Sequence[Run]) -> str:
    task, settings = runs[0].report["task"], runs[0].report["settings"]
    windows = task["windows"]
    parts = [
        f"Each network is trained from random weights on {windows['train']} human windows, its checkpoint is chosen "
        f"by the loss on {windows['valid']} others, and {windows['test']} more are measured once. It reads "
        f"{task['read_bp']:,} bp and predicts {task['bins']:,} bins of {task['bin_bp']} bp of {task['tracks']} tracks "
        "(24 CAGE, 10 DNase, 40 RNA). The three sets of windows do not overlap.",
        "Both take the recipe of Enformer, smaller: Poisson loss, Adam with "
        f"{settings['warmup_fraction']:.0%} warm-up and a {settings['schedule']} decay, gradients clipped at "
        f"{settings['max_grad_norm']}, {settings['epochs']:g} passes of one window per step, a random strand and a "
        f"shift of up to {settings['max_shift_bp']} bp per window and pass (strand-paired tracks are swapped), and "
        "the mean of both strands at the end. The head begins at the mean of every track. Batch norms of the Enformer "
        "learn their statistics, from one window per step, since nothing is pretrained; GeneSplice has none.",
        "| | parameters | peak learning rate | seeds | CPU minutes per seed |\n|-|-:|-:|-|-:|",
    ]
    lines = []
    for run in runs:
        minutes = np.mean([seed["cpu_seconds"] for seed in run.report["per_seed"]]) / 60
        seeds = ", ".join(str(seed["seed"]) for seed in run.report["per_seed"])
        rate = run.report["settings"]["learning_rate"]
        lines.append(f"| {run.name} | {run.parameters:,} | {rate:g} | {seeds} | {minutes:.0f} |")
    return "\n\n".join(parts) + "\n" + "\n".join(lines)


def _table(runs: Sequence[Run], split: str, metric: str) -> str:
    baselines = runs[0].report["baselines"]
    assays = list(runs[0].report["results"][split])
    names = {"pearson": "Pearson", "poisson": "Poisson loss"}
    lines = [f"| {names[metric]}, {split} | {' | '.join(assays)} |", "|-|" + "-:|" * len(assays)]
    for run in runs:
        cells = [_pm(run.report["results"][split][assay][metric]) for assay in assays]
        lines.append(f"| **{run.name}** | {' | '.join(cells)} |")
    for name, splits in baselines.items():
        cells = [_number(splits[split][assay][metric]) for assay in assays]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shows(runs: Sequence[Run], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    sentences = []
    mean, ridge = (runs[0].report["baselines"][name] for name in (MEAN, RIDGE))
    for run in runs:
        for split in ("valid", "test"):
            ours = run.report["results"][split]["all"]
            losses = ours["poisson"]["mean"], mean[split]["all"]["poisson"]
            sentences.append(
                f"- {run.name} on {split}: loss {losses[0]:.4f} against {losses[1]:.4f} of the mean of each track "
                f"({_word(losses[0] < losses[1], 'lower', 'not lower')}); Pearson {ours['pearson']['mean']:.3f} "
                f"against {ridge[split]['all']['pearson']:.3f} of the ridge "
                f"({_word(ours['pearson']['mean'] > ridge[split]['all']['pearson'], 'higher', 'not higher')})."
            )
        wins = _wins(rows[run.name], rows[RIDGE])
        sentences.append(
            f"- {run.name}, first seed: a higher Pearson than the ridge on {wins} of {len(rows[RIDGE])} test tracks."
        )
    names = [run.name for run in runs]
    wins = _wins(rows[names[0]], rows[names[1]])
    sentences.append(
        f"- {names[0]} against {names[1]}, first seeds: higher on {wins} of {len(rows[RIDGE])} test tracks."
    )
    return "\n".join(sentences)


def _cannot(runs: Sequence[Run]) -> str:
    task, settings = runs[0].report["task"], runs[0].report["settings"]
    windows, seeds = task["windows"], min(len(run.report["per_seed"]) for run in runs)
    steps = windows["train"] * settings["epochs"]
    return (
        f"{windows['train']} training windows are about a thousandth of what Enformer was trained on, and "
        f"{steps:.0f} steps are few: these are tests of the training code, not models of gene expression, and their "
        f"correlations must not be compared with published ones. {windows['test']} test windows hold few active "
        "genes, so that a handful of peaks decides the correlation of a track; windows differ more than seeds, and no "
        "interval over windows is given. "
        + ("One seed cannot tell how much of a difference is chance. " if seeds < 2 else "")
        + "The learning rates were set beforehand, and one thing was changed after a look at valid: with the default "
        "`initializer_range` of 0.02 the states of GeneSplice begin nearly the same in all bins, and it had learned "
        "nothing of the sequence after four passes. So the order of the two may change with other rates, sizes or "
        "longer training. The "
        "ridge regression sees 4-mers within 1 kb of a bin, fits squares and not the Poisson loss, and chooses its "
        "penalty on valid, as the networks choose their checkpoint; the least that it predicts is a twentieth of the "
        "track's mean. Genes, variants and other species are not measured."
    )


def _commands(runs: Sequence[Run]) -> str:
    seeds = [" ".join(str(seed["seed"]) for seed in run.report["per_seed"]) for run in runs]
    command = "python -m training.tracks --config training/configs/{}_tracks.yaml --data_dir FOLDER --seeds {}"
    lines = [
        *(command.format(run.name.lower(), numbers) for run, numbers in zip(runs, seeds, strict=True)),
        "python -m training.track_card --data_dir FOLDER",
        "# a model on other windows",
        "python -m training.evaluate_tracks --model runs/enformer_tracks/seed-0/model --windows FILE.npz --context_bp "
        "73728 \\\n    --targets FOLDER/targets.txt",
    ]
    return "```bash\n" + "\n".join(lines) + "\n```"


def _wins(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> int:
    return sum(row["pearson"] > other["pearson"] for row, other in zip(rows, others, strict=True))


def _means(report: Mapping[str, Any]) -> Any:
    return report["baselines"].get(MEAN)


def _portable(report: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in report["settings"].items() if key not in _LOCAL}
    return {**report, "settings": settings}


def _pm(value: Mapping[str, float | None]) -> str:
    sd = value["sd"]
    return _number(value["mean"]) + ("" if sd is None or math.isnan(sd) else f" ± {sd:.4f}")


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _word(condition: bool, yes: str, no: str) -> str:
    return yes if condition else no


if __name__ == "__main__":
    run_command(main)
