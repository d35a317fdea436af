"""Table, plot and text of the planted-dependency experiment, every number taken from its report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from training.reports import write_json

NAME = "planted_dependency"
SOLVED = 0.95
# Folders of one machine say nothing to a reader.
_LOCAL = ("output_dir", "cards_dir")


def write_card(report: Mapping[str, Any], folder: Path) -> None:
    """`planted_dependency.json`, `.png` and `.md` in `folder`."""
    settings = {key: value for key, value in report["settings"].items() if key not in _LOCAL}
    write_json(folder / f"{NAME}.json", {**report, "settings": settings})
    plot(report, folder / f"{NAME}.png")
    (folder / f"{NAME}.md").write_text(card_text(report), encoding="utf-8")


def accuracies(report: Mapping[str, Any], network: str, when: str = "accuracy") -> np.ndarray:
    """(seeds, lengths) shares of right answers, seeds and lengths in the order of the report."""
    return np.array([list(run[when].values()) for run in report["runs"] if run["network"] == network])


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Share of right answers over window length; every seed is a thin line, their mean a thick one."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    lengths = _lengths(report)
    for color, network in enumerate(_networks(report)):
        found = accuracies(report, network)
        axes.plot(lengths, found.T, color=f"C{color}", linewidth=0.6)
        axes.plot(lengths, found.mean(0), color=f"C{color}", linewidth=2, marker="o", label=network)
    axes.axhline(0.5, color="grey", linestyle=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{length:,}" for length in lengths], rotation=45)
    axes.set(
        xlabel="window (bp), the repeats at its ends, as its stage ends",
        ylabel="share of right answers",
        ylim=(0, 1.03),
    )
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def card_text(report: Mapping[str, Any]) -> str:
    """The page: question, table, what it shows, what it cannot."""
    settings, runs = report["settings"], report["runs"]
    seeds, longest = settings["seeds"], _lengths(report)[-1]
    seconds = [run["cpu_seconds"] for run in runs if run["network"] == _networks(report)[0]]
    parts = [
        "# Can GeneSplice see across 20 kb?",
        f"Two repeats of {settings['repeat_bp']} bp, each (CG)n or (TA)n, are planted near the ends of a window of "
        "random bases; the label says whether they are of the same kind. Either one alone says nothing about it. "
        f"GeneSplice nano with {_fields(settings['model_config'])} is trained on windows that grow from "
        f"{_lengths(report)[0]:,} to {longest:,} bp ({sum(settings['steps'])} steps, "
        f"{_bases(settings):,} bases), seeds "
        f"{', '.join(map(str, seeds))}; once as it is ({_parameters(runs, 0)} parameters), once without the layers of "
        f"its tower ({_parameters(runs, 1)}), in the same way. Training with the tower took "
        f"{min(seconds):.0f} to {max(seconds):.0f} s of CPU time.",
        _table(report),
        f"Share of right answers among {settings['test_windows']} unseen windows, mean over seeds (range), as "
        "the training on windows of this length ends.",
        f"![Right answers over window length]({NAME}.png)",
        "## What it shows",
        "\n".join(
            f"- {network.capitalize()}: {_range(accuracies(report, network)[:, -1])} at {longest:,} bp; every seed is "
            f"right in at least {SOLVED:.0%} of the windows of {_solved(report, network)} bp."
            for network in _networks(report)
        ),
        "A network that only adds up what it sees at either end is right in at most three of four windows, and may be "
        "wrong in as many: the share may lie far from a half without an answer behind it.",
        "What is learned belongs to its length. After the last stage, share of right answers (mean over seeds):",
        _table(report, "accuracy_at_the_end"),
        "## What it cannot show",
        "The repeats are long and of one composition, so that they are easy to find in random bases; real elements "
        "are not. Training on long windows from the start was not tried with these settings. The normalised queries "
        "and keys, the larger initial weights and the stages were chosen in trials with seeds 0 and 1; with default "
        "weights (0.02), without the normalisation, repeats of 128 bp in 512 bp were not learned in 300 steps.",
        "## Again",
        f"```bash\npython -m training.experiments.{NAME}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _networks(report: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["network"] for run in report["runs"]))


def _lengths(report: Mapping[str, Any]) -> list[int]:
    return [int(length) for length in report["runs"][0]["accuracy"]]


def _bases(settings: Mapping[str, Any]) -> int:
    stages = zip(settings["window_bp"], settings["steps"], settings["batch_sizes"], strict=True)
    return sum(length * steps * count for length, steps, count in stages)


def _solved(report: Mapping[str, Any], network: str) -> str:
    """The lengths at which every seed solves the task."""
    solved = (accuracies(report, network) >= SOLVED).all(axis=0)
    return ", ".join(f"{length:,}" for length, good in zip(_lengths(report), solved, strict=True) if good) or "no"


def _fields(config: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in config.items())


def _parameters(runs: Sequence[Mapping[str, Any]], at: int) -> str:
    return f"{runs[at]['parameters']:,}"


def _table(report: Mapping[str, Any], when: str = "accuracy") -> str:
    networks = _networks(report)
    lines = [f"| window (bp) | {' | '.join(networks)} |", "|-:" * (len(networks) + 1) + "|"]
    columns = [accuracies(report, network, when) for network in networks]
    for row, length in enumerate(_lengths(report)):
        lines.append(f"| {length:,} | {' | '.join(_range(column[:, row]) for column in columns)} |")
    return "\n".join(lines)


def _range(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"
