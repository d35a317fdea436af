"""Table, plot and text of the context-length experiment, every number taken from its report."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from scipy import stats

from training.reports import metrics_table, print_table, write_json

NAME = "context_length"
CURVES = {"own": "read at its own context", "longest": "read at the longest context"}
# Folders of one machine say nothing to a reader.
_LOCAL = ("data_dir", "output_dir", "cards_dir")


class Difference(NamedTuple):
    """Loss at one context minus loss at another, of the same seeds: mean, sd, n and a 95 % interval (t)."""

    mean: float
    sd: float
    n: int
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """One clause."""
        if self.n < 2:
            return "one seed cannot tell whether that is more than chance"
        if self.low <= 0 <= self.high:
            return "the interval contains zero, so that these seeds show no difference"
        return f"the interval excludes zero: a {'lower' if self.mean < 0 else 'higher'} loss that seeds do not explain"


def paired_difference(runs: Sequence[Mapping[str, Any]], context_bp: int, reference_bp: int, at: str) -> Difference:
    """Held-out loss (nats per base, all genomes) of `context_bp` minus that of `reference_bp`, seed by seed."""
    loss = {(run["context_bp"], run["seed"]): run[at]["all"]["loss"] for run in runs}
    seeds = sorted(seed for context, seed in loss if context == context_bp and (reference_bp, seed) in loss)
    values = [loss[context_bp, seed] - loss[reference_bp, seed] for seed in seeds]
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Difference(mean, math.nan, n, math.nan, math.nan)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return Difference(mean, sd, n, mean - half, mean + half)


def print_report(report: Mapping[str, Any]) -> None:
    """The table on the console."""
    rows: dict[str, Any] = {
        f"{context} bp": {f"{name}, {at}": values["all"][name] for at, values in by.items() for name in values["all"]}
        for context, by in report["results"].items()
    }
    rows |= {
        name: {"loss, own": values["all"]["loss"], "accuracy, own": values["all"]["accuracy"]}
        for name, values in report["baselines"].items()
    }
    print_table(metrics_table("Held-out bases by context (nats per base)", rows))


def write_card(report: Mapping[str, Any], folder: Path) -> None:
    """`context_length.json`, `.png` and `.md` in `folder`."""
    settings = {key: value for key, value in report["settings"].items() if key not in _LOCAL}
    write_json(folder / f"{NAME}.json", {**report, "settings": settings})
    plot(report, folder / f"{NAME}.png")
    (folder / f"{NAME}.md").write_text(card_text(report), encoding="utf-8")


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Held-out loss over context, mean and sd over seeds, with the Markov chains as lines."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    contexts = [int(context) for context in report["results"]]
    for at, label in CURVES.items():
        losses = [by[at]["all"]["loss"] for by in report["results"].values()]
        errors = [0.0 if math.isnan(loss["sd"]) else loss["sd"] for loss in losses]
        axes.errorbar(contexts, [loss["mean"] for loss in losses], yerr=errors, marker="o", capsize=3, label=label)
    for number, (name, values) in enumerate(report["baselines"].items()):
        axes.axhline(values["all"]["loss"], linestyle=":", color=f"C{number + len(CURVES)}", label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(contexts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{context:,}" for context in contexts])
    axes.set(xlabel="context in training (bp)", ylabel="held-out loss (nats per base)")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def card_text(report: Mapping[str, Any]) -> str:
    """The page: question, table, what it shows, what it cannot."""
    contexts = sorted(int(context) for context in report["results"])
    parts = [
        "# Does a longer context help?",
        _set_up(report, contexts),
        _table(report, contexts),
        "Loss in nats per held-out base, mean ± sd over seeds; the difference pairs models of the same seed (95 % "
        "interval, t).",
        f"![Held-out loss over context]({NAME}.png)",
        "## What it shows",
        _shows(report, contexts),
        "## What it cannot show",
        _cannot(report),
        "## Again",
        "```bash\npython -m training.experiments.context_length --config training/configs/context_length.yaml "
        "--data_dir GENOMES\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _set_up(report: Mapping[str, Any], contexts: Sequence[int]) -> str:
    run, settings, data = report["runs"][0], report["settings"], report["data"]
    longest = contexts[-1]
    return (
        f"One hierarchical GeneSplice of {run['parameters']:,} parameters, {settings['objective']} language "
        f"modelling, trained anew for each context and each of the seeds {', '.join(map(str, settings['seeds']))}. "
        f"Every run takes {run['steps']:,} steps of {settings['blocks_per_step'] * longest:,} bases and sees the same "
        f"{sum(data['train_blocks'].values())} blocks of {longest:,} bp ({_counts(data['train_blocks'])}), "
        f"{run['bases_seen']:,} bases in all; only the windows that the blocks are cut into differ. All models are "
        f"asked for the same {data['asked_bases']:,} bases of {sum(data['held_out_blocks'].values())} held-out blocks "
        f"({_counts(data['held_out_blocks'])})"
        + (", hidden by the same masks." if settings["objective"] == "masked" else ".")
    )


def _counts(blocks: Mapping[str, int]) -> str:
    return ", ".join(f"{genome} {number}" for genome, number in blocks.items())


def _table(report: Mapping[str, Any], contexts: Sequence[int]) -> str:
    shortest, longest = f"{contexts[0]:,} bp", f"{contexts[-1]:,} bp"
    lines = [
        f"| context (bp) | loss | accuracy | loss, read at {longest} | loss minus that of {shortest} |",
        "|-:|-:|-:|-:|-:|",
    ]
    for context in contexts:
        own, far = (_of(report, context)[at]["all"] for at in ("own", "longest"))
        against = paired_difference(report["runs"], context, contexts[0], "own")
        change = "" if context == contexts[0] else f"{against.mean:+.4f}{_interval(against)}"
        lines.append(f"| {context:,} | {_pm(own['loss'])} | {_pm(own['accuracy'])} | {_pm(far['loss'])} | {change} |")
    for name, values in report["baselines"].items():
        order = name.removeprefix("markov-")
        lines.append(
            f"| Markov chain, order {order} | {values['all']['loss']:.4f} | {values['all']['accuracy']:.4f} | | |"
        )
    return "\n".join(lines)


def _of(report: Mapping[str, Any], context: int) -> Mapping[str, Any]:
    """The results of a context; JSON has made its number a string."""
    results = report["results"]
    return results[context] if context in results else results[str(context)]


def _pm(value: Mapping[str, float | None]) -> str:
    sd = value["sd"]
    return f"{value['mean']:.4f}" + ("" if sd is None or math.isnan(sd) else f" ± {sd:.4f}")


def _interval(difference: Difference) -> str:
    return "" if difference.n < 2 else f" ({difference.low:+.4f} to {difference.high:+.4f})"


def _shows(report: Mapping[str, Any], contexts: Sequence[int]) -> str:
    means = {context: _of(report, context)["own"]["all"]["loss"]["mean"] for context in contexts}
    best = min(means, key=lambda context: means[context])
    chain = min(report["baselines"], key=lambda name: report["baselines"][name]["all"]["loss"])
    chain_loss = report["baselines"][chain]["all"]["loss"]
    better = [f"{context:,}" for context in contexts if means[context] < chain_loss]
    sentences = [f"- The lowest mean loss, {means[best]:.4f}, is that of {best:,} bp."]
    for context in contexts[1:]:
        difference = paired_difference(report["runs"], context, contexts[0], "own")
        sentences.append(
            f"- {context:,} against {contexts[0]:,} bp: {difference.mean:+.4f} nats per base{_interval(difference)}, "
            f"{difference.n} seeds; {difference.verdict}."
        )
    sentences.append(
        f"- The best Markov chain, order {chain.removeprefix('markov-')}, has {chain_loss:.4f}; "
        + (f"contexts with a lower loss: {', '.join(better)} bp." if better else "no context has a lower loss.")
    )
    return "\n".join(sentences)


def _cannot(report: Mapping[str, Any]) -> str:
    run, settings = report["runs"][0], report["settings"]
    genomes = len(report["data"]["train_blocks"])
    return (
        f"{run['steps']:,} steps of one small model on {genomes} {'file' if genomes == 1 else 'files'} of genomes, "
        f"{settings['passes']:g} pass(es), none trained to convergence: a model learns short patterns first, so that "
        "a run of this length says little about what a long context is worth to a model that has finished learning "
        "them. The same learning rate for all contexts may suit one better than another. Equal bases are not equal "
        "work: the full attention of the tower costs more in longer windows. The loss is a mean over all bases, few "
        "of which depend on anything far away; enhancers, exons and repeats are not looked at one by one, and no "
        "downstream task is measured. The interval speaks of seeds, not of other genomes: the held-out blocks are "
        "few, and come from the same files as the training blocks or from their neighbours."
    )
