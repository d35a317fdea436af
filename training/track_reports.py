"""What a measurement of tracks leaves for people: a table per track, a table per assay, and plots.

Shapes: N windows, M bins, T tracks.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from genesplice_hf.scoring.track_report import TRACK_METRICS, TrackReport, assay_of
from training import reports

_COLUMNS = ("track", "assay", "description", *TRACK_METRICS, "mean_measured", "mean_predicted")


def write_track_report(folder: Path, report: TrackReport) -> None:
    """`tracks.json` (everything) and `tracks.tsv` (a line per track) in `folder`."""
    content = report.as_dict()
    reports.write_json(folder / "tracks.json", content)
    with (folder / "tracks.tsv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, _COLUMNS, delimiter="\t", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in content["tracks"]:
            writer.writerow({key: f"{row[key]:.6g}" if isinstance(row[key], float) else row[key] for key in _COLUMNS})


def print_assays(title: str, methods: Mapping[str, Mapping[str, Mapping[str, Any]]], metric: str = "pearson") -> None:
    """One line per method, one column per assay.

    Args:
        methods: method -> assay -> metric -> value or mean, sd and n.
        metric: one of `TRACK_METRICS`.
    """
    rows = {name: {assay: figures[metric] for assay, figures in assays.items()} for name, assays in methods.items()}
    reports.print_table(reports.metrics_table(f"{title}: {metric}", rows))


def plot_tracks(path: Path, methods: Mapping[str, Sequence[Mapping[str, Any]]], metric: str = "pearson") -> None:
    """A dot per track, by assay and method; the bar is the mean of the assay.

    Args:
        path: PNG file to write.
        methods: method -> rows of `TrackReport.rows()`; undefined tracks are left out.
        metric: one of `TRACK_METRICS`.
    """
    assays = list(dict.fromkeys(row["assay"] for rows in methods.values() for row in rows))
    figure = Figure(figsize=(2.2 + 1.7 * len(assays), 3.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(methods))
    for number, (name, rows) in enumerate(methods.items()):
        for place, assay in enumerate(assays):
            values = [row[metric] for row in rows if row["assay"] == assay and _is_number(row[metric])]
            if not values:
                continue
            centre = place + (number - (len(methods) - 1) / 2) * width
            spread = centre + np.linspace(-0.35, 0.35, len(values)) * width
            label = name if place == 0 else None
            axes.plot(spread, values, ".", color=f"C{number}", alpha=0.6, markersize=5)
            axes.plot(
                [centre - 0.4 * width, centre + 0.4 * width], [np.mean(values)] * 2, color=f"C{number}", label=label
            )
    axes.axhline(0, color="grey", linewidth=0.6)
    axes.set_xticks(range(len(assays)), assays)
    axes.set_ylabel(f"{metric} of a track")
    axes.legend(fontsize="small")
    _save(figure, path)


def plot_scatter(path: Path, predictions: np.ndarray, targets: np.ndarray, descriptions: Sequence[str]) -> None:
    """Predicted against measured values of all bins, log(1 + x), one panel per assay.

    Args:
        path: PNG file to write.
        predictions, targets: (N, M, T).
        descriptions: of the tracks.
    """
    groups = _by_assay(descriptions)
    figure = Figure(figsize=(3.1 * len(groups), 3.1), layout="constrained")
    for axes, (assay, tracks) in zip(np.atleast_1d(figure.subplots(1, len(groups))), groups.items(), strict=True):
        y, x = np.log1p(targets[..., tracks].ravel()), np.log1p(np.maximum(predictions[..., tracks], 0).ravel())
        known = ~np.isnan(y)
        axes.hexbin(y[known], x[known], gridsize=45, bins="log", cmap="viridis", mincnt=1)
        top = float(max(y[known].max(initial=0.1), x[known].max(initial=0.1)))
        axes.plot([0, top], [0, top], linestyle=":", color="grey")
        axes.set(title=f"{assay}, {len(tracks)} tracks", xlabel="measured, log(1 + x)")
    figure.axes[0].set_ylabel("predicted, log(1 + x)")
    _save(figure, path)


def plot_profiles(
    path: Path,
    methods: Mapping[str, np.ndarray],
    targets: np.ndarray,
    descriptions: Sequence[str],
    bin_bp: int,
    title: str = "",
) -> None:
    """Coverage along one window: one row per assay, the track with the most measured signal there.

    Args:
        path: PNG file to write.
        methods: method -> predictions (M, T).
        targets: (M, T) measured.
        descriptions: of the tracks.
        bin_bp: bases per bin.
        title: which window it is.
    """
    tracks = [max(group, key=lambda t: np.nansum(targets[:, t])) for group in _by_assay(descriptions).values()]
    figure = Figure(figsize=(10, 1.5 * len(tracks) * (1 + len(methods)) * 0.62 + 0.6), layout="constrained")
    grid = figure.subplots(len(tracks) * (1 + len(methods)), 1, sharex=True)
    position = (np.arange(len(targets)) + 0.5) * bin_bp / 1000
    lines = iter(np.atleast_1d(grid))
    for track in tracks:
        for number, (name, values) in enumerate([("measured", targets), *methods.items()]):
            axes = next(lines)
            axes.fill_between(
                position, values[:, track], step="mid", color="black" if not number else f"C{number - 1}"
            )
            axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
            axes.margins(x=0)
            if not number:
                axes.set_title(descriptions[track], fontsize="small", loc="left")
    figure.axes[-1].set_xlabel("position in the window (kb)")
    figure.suptitle(title, fontsize="medium")
    _save(figure, path)


def busiest_window(targets: np.ndarray) -> int:
    """The window (of N) with the highest measured values, each track counted by its share of its own total."""
    totals_NT = np.nansum(targets.astype(np.float64), axis=1)
    return int((totals_NT / np.maximum(totals_NT.sum(axis=0), 1e-12)).sum(axis=1).argmax())


def _by_assay(descriptions: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for track, description in enumerate(descriptions):
        groups.setdefault(assay_of(description), []).append(track)
    return groups


def _is_number(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
