"""Tables, plot and text of the BioFormer experiments, every number taken from their report."""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.experiments.bioformer_data import DEFAULT_DATA
from training.experiments.paired import Difference, adjusted, interval, paired_difference
from training.reports import metrics_table, print_table, write_json

Report = Mapping[str, Any]
CARD = "bioformer.md"
# Shares of the row mean's validation error whose first crossing is reported.
LEVELS = (1.0, 0.9, 0.8)
_BEFORE = "## Licence"
_SHARE = 0.05
# Folders of one machine say nothing to a reader.
_LOCAL = ("out", "cards_dir")


def runs_of(report: Report, model: str) -> list[Mapping[str, Any]]:
    """The runs of a model, by seed."""
    return [run for run in report["runs"] if run["model"] == model]


def rows_of(report: Report, models: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One line per model: means over seeds, and what it costs."""
    for model in models:
        runs = runs_of(report, model)
        mse = [run["test"]["mse_bin"] for run in runs]
        yield {
            "model": model,
            "parameters": runs[0]["parameters"]["all"],
            **{f"of them {part}": number for part, number in runs[0]["parameters"].items() if part != "all"},
            "learning_rate": runs[0]["learning_rate"],
            "valid_mse": float(np.mean([run["valid_mse"] for run in runs])),
            "test_mse": float(np.mean(mse)),
            "test_mse_ci95": interval(mse),
            "r2_row_mean": float(np.mean([run["test"]["r2_row_mean"] for run in runs])),
            "mre": float(np.mean([run["test"]["mre"] for run in runs])),
            "pearson_cell": float(np.mean([run["test"]["pearson_cell"] for run in runs])),
            **{
                f"steps_to_{level:g}": steps_to(runs, level * report["baselines"]["row mean"]["valid_mse"])
                for level in LEVELS
            },
            "cpu_seconds": float(np.mean([run["cpu_seconds"] for run in runs])),
            "saved_mib": runs[0]["saved_mib"],
            "seeds": len(runs),
        }


def steps_to(runs: Sequence[Mapping[str, Any]], level: float) -> float:
    """Median over seeds of the first measured step with a validation error at or below `level`; infinite where most
    seeds never reach it."""
    first = [next((step for step, error in run["history"] if error <= level), math.inf) for run in runs]
    return float(np.median(first))


def differences(report: Report, name: str) -> list[tuple[str, str, Difference, float]]:
    """(model, reference, difference, false discovery rate) of every comparison of an experiment."""
    found = []
    for model, reference in report["experiments"][name]["comparisons"]:
        squares, others = ([run["cell_squares"] for run in runs_of(report, each)] for each in (model, reference))
        counts = np.array(runs_of(report, model)[0]["cell_counts"])
        found.append((model, reference, paired_difference(np.array(squares), np.array(others), counts)))
    rates = adjusted([difference.p for _, _, difference in found])
    return [(*pair, rate) for pair, rate in zip(found, rates, strict=True)]


def all_models(report: Report) -> list[str]:
    """Every model once, in the order of the experiments."""
    return list(dict.fromkeys(model for each in report["experiments"].values() for model in each["models"]))


def write_table(report: Report, path: Path) -> None:
    """Every model with every number, as CSV."""
    rows = list(rows_of(report, all_models(report)))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def print_report(report: Report) -> None:
    """One table on the console."""
    shown = ("test_mse", "r2_row_mean", "mre", "pearson_cell", "cpu_seconds")
    rows: dict[str, Any] = {
        row["model"]: {name: row[name] for name in shown} for row in rows_of(report, all_models(report))
    }
    rows |= {
        name: {"test_mse": of["test"]["mse_bin"], **{key: of["test"][key] for key in shown[1:4]}}
        for name, of in report["baselines"].items()
    }
    print_table(metrics_table(f"{report['data']['name']}: squared error of hidden digits", rows))


def write_card(report: Report, folder: Path) -> None:
    """`bioformer-NAME.json`, `.png`, and the page: a section of `bioformer.md`, or `bioformer-NAME.md`."""
    label = report["data"]["name"]
    name = f"bioformer-{label}"
    settings = {key: value for key, value in report["settings"].items() if key not in _LOCAL}
    write_json(folder / f"{name}.json", without_cells(report) | {"settings": settings})
    plot(report, folder / f"{name}.png")
    if label != DEFAULT_DATA:
        (folder / f"{name}.md").write_text(f"# BioFormer: {label}\n\n{section(report)}\n", encoding="utf-8")
        return
    place = folder / CARD
    text = place.read_text(encoding="utf-8") if place.is_file() else f"# bioformer\n\n{_BEFORE}\n"
    place.write_text(with_section(text, label, section(report)), encoding="utf-8")


def without_cells(report: Report) -> dict[str, Any]:
    """The report with the differences that were found, in place of every cell's errors."""

    def shortened(run: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in run.items() if not key.startswith("cell_")}

    found = {
        name: [
            {"model": model, "reference": reference, **difference._asdict(), "false_discovery_rate": rate}
            for model, reference, difference, rate in differences(report, name)
        ]
        for name in report["experiments"]
    }
    return {
        **report,
        "runs": [shortened(run) for run in report["runs"]],
        "baselines": {name: shortened(run) for name, run in report["baselines"].items()},
        "differences": found,
    }


def with_section(card: str, name: str, text: str) -> str:
    """The card with `text` in the place of this name's section, or as a new one before the licence."""
    first, last = f"<!-- experiments: {name} -->", f"<!-- end of experiments: {name} -->"
    block = f"{first}\n\n{text}\n\n{last}"
    if first in card:
        return card[: card.index(first)] + block + card[card.index(last) + len(last) :]
    place = card.index(_BEFORE)
    return f"{card[:place]}{block}\n\n{card[place:]}"


def plot(report: Report, path: Path) -> None:
    """Test error of every seed (dots) and mean with 95 % interval, one panel per question; baselines as lines."""
    named = report["experiments"]
    heights = [len(each["models"]) + 1.5 for each in named.values()]
    figure = Figure(figsize=(8, 0.27 * sum(heights) + 1), layout="constrained")
    panels = figure.subplots(len(named), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, each) in zip(panels, named.items(), strict=True):
        _panel(axes, report, each["models"])
        axes.set_title(name, fontsize="small", loc="left")
    panels[-1].set_xlabel("test error (mean square of digits)")
    panels[0].legend(fontsize="x-small", loc="upper right")
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, report: Report, models: Sequence[str]) -> None:
    for height, model in enumerate(models):
        errors = [run["test"]["mse_bin"] for run in runs_of(report, model)]
        half = interval(errors)
        axes.errorbar(
            np.mean(errors), height, xerr=None if math.isnan(half) else half, fmt="|", color="black", capsize=3
        )
        axes.plot(errors, [height] * len(errors), ".", color="C0", alpha=0.6)
    for number, (name, of) in enumerate(report["baselines"].items(), 1):
        axes.axvline(of["test"]["mse_bin"], linestyle=":", color=f"C{number}", label=name)
    axes.set_yticks(range(len(models)), models, fontsize="x-small")
    axes.invert_yaxis()


def section(report: Report) -> str:
    """What was done, the tables, and what they show."""
    name = report["data"]["name"]
    parts = [_set_up(report), _baseline_table(report), _against_baselines(report)]
    for key, each in report["experiments"].items():
        parts += [f"**{each['question']}** (`{key}`)", _table(report, each["models"]), _reading(report, key)]
    parts += [f"![Test errors](bioformer-{name}.png)", _cannot(report)]
    return "\n\n".join(parts)


def _set_up(report: Report) -> str:
    data, settings = report["data"], report["settings"]
    rates = ", ".join(f"{rate:g}" for rate in settings["learning_rates"])
    told = f"{data['edges']} edges ({data['edges_from']})"
    told += f", {data['pathways']} gene sets ({data['pathways_from']})" if data["pathways"] else ""
    return (
        f"{data['cells']['train']} training, {data['cells']['valid']} validation and {data['cells']['test']} test "
        f"cells ({data['left_out']} with fewer than two of the genes left out), {data['genes']} most variable genes "
        f"of the training cells, of which the median cell expresses {data['genes_per_cell']:g}; 51 bins, ties in the "
        f"middle; 15 % of a cell's genes hidden, always the same in validation and test. {settings['epochs']} epochs "
        f"of AdamW with batches of {settings['batch_size']}, warm-up over 5 % and cosine; learning rate ({rates}) per "
        f"model by validation with the first seed, epoch by validation, test once; {settings['seeds']} seeds. "
        f"Knowledge: {told}. Error is the mean square of (predicted - true digit); ± is the 95 % interval over seeds "
        "(t). Differences: bootstrap over cells and seeds, rates of false discovery within each question."
    )


def _baseline_table(report: Report) -> str:
    lines = ["| baseline | error | R² against row mean | MRE | Pearson in cells |", "|-|-:|-:|-:|-:|"]
    for name, of in report["baselines"].items():
        test = of["test"]
        lines.append(
            f"| {name} | {test['mse_bin']:.1f} | {test['r2_row_mean']:.3f} | {test['mre']:.2f} | "
            f"{_number(test['pearson_cell'], 3)} |"
        )
    return "\n".join(lines)


def _against_baselines(report: Report) -> str:
    """Which models are better or worse than which baseline, beyond chance."""
    lines = ["Of all models (rates of false discovery over all models of a line):", ""]
    for name, of in report["baselines"].items():
        found = {}
        for model in all_models(report):
            runs = runs_of(report, model)
            squares = np.array([run["cell_squares"] for run in runs])
            if runs[0]["ties"] == "mid":
                found[model] = paired_difference(squares, np.array(of["cell_squares"]), np.array(of["cell_counts"]))
        rates = dict(zip(found, adjusted([difference.p for difference in found.values()]), strict=True))
        lower, higher = ([model for model, gap in found.items() if rates[model] <= _SHARE and sign * gap.mean > 0]
                         for sign in (-1, 1))  # fmt: skip
        lines.append(
            f"- lower error than the {name}: {_listed(lower, list(found))}; higher: {_listed(higher, list(found))}"
        )
    return "\n".join(lines)


def _listed(models: Sequence[str], of: Sequence[str]) -> str:
    """Names, or the few that are missing."""
    others = [model for model in of if model not in models]
    if not models or len(others) > len(models):
        return ", ".join(models) or "none"
    return "all" + (f" but {', '.join(others)}" if others else f" {len(of)}")


def _table(report: Report, models: Sequence[str]) -> str:
    levels = " / ".join(f"{level:g}" for level in LEVELS)
    lines = [
        "| model | parameters (attention, MLP, pair) | rate | error | R² | MRE | Pearson | steps to "
        f"{levels} of row mean | CPU s | kept MiB |",
        "|-|-:|-:|-:|-:|-:|-:|-:|-:|-:|",
    ]
    for row in rows_of(report, models):
        parts = ", ".join(f"{row.get(f'of them {part}', 0):,}" for part in ("attention", "mlp", "pair"))
        steps = " / ".join(_steps(row[f"steps_to_{level:g}"]) for level in LEVELS)
        lines.append(
            f"| {row['model']} | {row['parameters']:,} ({parts}) | {row['learning_rate']:g} | {row['test_mse']:.1f} ± "
            f"{row['test_mse_ci95']:.1f} | {row['r2_row_mean']:.3f} | {row['mre']:.2f} | {row['pearson_cell']:.3f} | "
            f"{steps} | {row['cpu_seconds']:.0f} | {row['saved_mib']:.1f} |"
        )
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _steps(value: float) -> str:
    return "-" if math.isinf(value) else f"{value:.0f}"


def _reading(report: Report, name: str) -> str:
    lines = []
    for model, reference, gap, rate in differences(report, name):
        lines.append(
            f"- {model} against {reference}: {gap.mean:+.1f} ({gap.low:+.1f} to {gap.high:+.1f}), rate {rate:.3f}: "
            f"{verdict(gap, rate)}."
        )
    return "\n".join(lines)


def verdict(difference: Difference, rate: float) -> str:
    """One clause."""
    if difference.mean == difference.low == difference.high == 0:
        return "the same numbers to the last digit"
    if rate > _SHARE:
        return "no difference beyond cells and seeds"
    return "a lower error" if difference.mean < 0 else "a higher error"


def _cannot(report: Report) -> str:
    return (
        f"What this cannot show: models of this size, {report['data']['cells']['train']} cells and "
        f"{report['settings']['epochs']} epochs say nothing about pre-training on millions of cells. Validation and "
        "test cells come from the same experiment as the training cells. The kept memory is that of one training "
        "step's saved tensors at the size of the first test batch. MRE rewards predicting too little and chose "
        "nothing."
    )
