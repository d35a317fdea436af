"""Pictures of what a model reads in a sequence: logos and heat maps, wrapped so that letters stay legible.

The only file of this room that needs matplotlib and logomaker (``pip install genesplice-hf[plots]``).

Shapes: L bases; columns of (L, 4) stand for A, C, G, T.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import logomaker
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.genome.alphabet import BASES
from genesplice_hf.interpretation.mutagenesis import MutagenesisResult

Highlight = tuple[int, int, str]

ROW_BP = 75
WIDTH_INCH = 15.0
BASE_COLORS = {"A": "#1a9850", "C": "#2166ac", "G": "#e08214", "T": "#c0272d"}
HIGHLIGHT_COLOR = "#fde725"
LABEL_COLOR = "#555500"
UNSCORED_COLOR = "#d9d9d9"
MUTED = "#555555"
# Width of a label's letter on the axis of a full row.
LABEL_BP_PER_LETTER = 0.62


class _Row(NamedTuple):
    """One line of a wrapped picture: its bases [start, end) of the sequence."""

    start: int
    end: int


def plot_logo(
    values: np.ndarray,
    path: str | Path | None = None,
    title: str = "",
    highlights: Sequence[Highlight] = (),
    *,
    ylabel: str = "importance",
    first_position: int = 1,
    row_bp: int = ROW_BP,
) -> Figure:
    """Draws letters as tall as their values: up for positive, down and pale for negative.

    Args:
        values: (L, 4), for example `reference_letters(sequence, importance)`; rows of NaN are
            shown as grey gaps.
        path: where to save (.png, .svg, .pdf); None saves nothing.
        title: first line of the picture.
        highlights: (start, end, label) spans to shade, 0-based and half-open, within the sequence.
        ylabel: what the height means, with its unit.
        first_position: number of the first base on the axis.
        row_bp: bases per row.

    Returns:
        The figure, not attached to any window.

    Raises:
        GeneSpliceError: `values` is not (L, 4), or a highlight lies outside the sequence.
    """
    values = _check_values(values)
    _check_highlights(highlights, len(values))
    rows = _wrap(len(values), row_bp)
    figure = _figure(len(rows), 1.75)
    limits = _value_limits(values)
    for index, row in enumerate(rows):
        axes = figure.add_subplot(len(rows), 1, index + 1)
        _draw_letters(axes, values, row, limits)
        _finish_row(axes, row, row_bp, highlights, first_position)
        axes.set_ylabel(ylabel, fontsize=10)
        _spell_sequence(axes, values, row)
    note = "up: the base supports the target, down and pale: it works against it"
    return _finish_figure(figure, title, note, path)


def plot_mutagenesis_map(
    result: MutagenesisResult,
    path: str | Path | None = None,
    title: str = "",
    highlights: Sequence[Highlight] = (),
    *,
    first_position: int = 1,
    row_bp: int = ROW_BP,
) -> Figure:
    """Draws every substitution as a cell: blue lowers the score, red raises it, a dot is the reference.

    Arguments and errors as for `plot_logo`; unscored bases are grey.
    """
    _check_highlights(highlights, len(result.sequence))
    rows = _wrap(len(result.sequence), row_bp)
    figure = _figure(len(rows), 1.65)
    limit = max(float(np.nanmax(np.abs(result.scores))), 1e-12)
    norm = TwoSlopeNorm(vcenter=0.0, vmin=-limit, vmax=limit)
    for index, row in enumerate(rows):
        axes = figure.add_subplot(len(rows), 1, index + 1)
        _draw_cells(axes, result, row, norm)
        _finish_row(axes, row, row_bp, highlights, first_position)
    bar = figure.colorbar(
        ScalarMappable(norm, "RdBu_r"), ax=figure.axes, fraction=0.02, pad=0.01, aspect=14 * len(rows)
    )
    bar.set_label(f"change of {result.score_name.replace('_', ' ')} ({result.target_label})", fontsize=10)
    note = "blue: the substitution lowers the score, red: raises it, dot: reference base"
    return _finish_figure(figure, title, note, path)


def plot_contact_maps(
    maps: Mapping[str, np.ndarray], path: str | Path | None = None, title: str = "", *, bin_bp: int | None = None
) -> Figure:
    """Draws contact maps side by side on one colour scale: blue = fewer contacts than expected, red = more.

    Args:
        maps: heading -> (N, N) log(observed / expected), NaN (grey) = unknown.
        path: where to save (.png, .svg, .pdf); None saves nothing.
        title: first line of the picture.
        bin_bp: bases per bin; the axes then count kilobases, otherwise bins.

    Returns:
        The figure, not attached to any window.

    Raises:
        GeneSpliceError: there is no map, or one that is not square.
    """
    if not maps or any(np.ndim(values) != 2 or np.shape(values)[0] != np.shape(values)[1] for values in maps.values()):
        shapes = {name: np.shape(values) for name, values in maps.items()}
        raise GeneSpliceError(f"`maps` must hold (N, N) arrays, at least one, got {shapes}.")
    known = [np.abs(values)[np.isfinite(values)] for values in maps.values()]
    limit = max(*(float(values.max(initial=0.0)) for values in known), 1e-12)
    norm = TwoSlopeNorm(vcenter=0.0, vmin=-limit, vmax=limit)
    figure = Figure(figsize=(0.6 + 3.6 * len(maps), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, values) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        size = len(values) * (1.0 if bin_bp is None else bin_bp / 1000)
        axes.set_facecolor(UNSCORED_COLOR)
        axes.imshow(np.ma.masked_invalid(values), cmap="RdBu_r", norm=norm, extent=(0, size, size, 0))
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("bin" if bin_bp is None else "position (kb)", fontsize=9)
        axes.tick_params(labelsize=8, color=MUTED)
    bar = figure.colorbar(ScalarMappable(norm, "RdBu_r"), ax=figure.axes, fraction=0.05, pad=0.01)
    bar.set_label("log(observed / expected)", fontsize=9)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    if path is not None:
        figure.savefig(path, dpi=180)
    return figure


def _check_values(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != 4 or len(values) == 0:
        raise GeneSpliceError(f"`values` must have shape (L, 4) in A, C, G, T order, was {values.shape}")
    return values


def _check_highlights(highlights: Sequence[Highlight], length: int) -> None:
    for start, end, label in highlights:
        if not 0 <= start < end <= length:
            raise GeneSpliceError(
                f"`highlights` holds {label!r} at [{start}, {end}), outside the sequence of {length} bases"
            )


def _wrap(length: int, row_bp: int) -> list[_Row]:
    if row_bp < 1:
        raise GeneSpliceError(f"`row_bp` must be at least 1, was {row_bp}")
    return [_Row(start, min(start + row_bp, length)) for start in range(0, length, row_bp)]


def _figure(num_rows: int, row_inch: float) -> Figure:
    # A bare Figure: no pyplot state, no display, nothing to close.
    figure = Figure(figsize=(WIDTH_INCH, 1.1 + row_inch * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _value_limits(values: np.ndarray) -> tuple[float, float]:
    filled = np.nan_to_num(values)
    top = filled.clip(min=0).sum(axis=1).max()
    bottom = filled.clip(max=0).sum(axis=1).min()
    margin = 0.06 * max(top - bottom, 1e-12)
    return bottom - margin, top + margin


def _draw_letters(axes: Axes, values: np.ndarray, row: _Row, limits: tuple[float, float]) -> None:
    part = pd.DataFrame(np.nan_to_num(values[row.start : row.end]), columns=list(BASES))
    part.index = range(row.start, row.end)
    logo = logomaker.Logo(
        part, ax=axes, color_scheme=BASE_COLORS, flip_below=False, fade_below=0.55, show_spines=False
    )
    logo.style_spines(spines=["left"], visible=True, color=MUTED)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_ylim(limits)
    axes.tick_params(axis="y", labelsize=9)
    _shade_unscored(axes, values, row)


def _spell_sequence(axes: Axes, values: np.ndarray, row: _Row) -> None:
    """Writes the bases below a logo of one letter per position, where small values leave unreadable letters."""
    if ((np.nan_to_num(values) != 0).sum(axis=1) > 1).any():
        return
    axes.tick_params(axis="x", pad=13)
    for position in range(row.start, row.end):
        if values[position].any() and not np.isnan(values[position]).any():
            base = BASES[int(np.abs(values[position]).argmax())]
            _write_base(axes, position, base)


def _write_base(axes: Axes, position: int, base: str) -> None:
    axes.annotate(
        base,
        xy=(position, 0.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=8,
        family="monospace",
        color=BASE_COLORS[base],
    )


def _shade_unscored(axes: Axes, values: np.ndarray, row: _Row) -> None:
    for position in range(row.start, row.end):
        if np.isnan(values[position]).any():
            axes.axvspan(position - 0.5, position + 0.5, color=UNSCORED_COLOR, linewidth=0)


def _draw_cells(axes: Axes, result: MutagenesisResult, row: _Row, norm: TwoSlopeNorm) -> None:
    axes.set_facecolor(UNSCORED_COLOR)
    cells = np.ma.masked_invalid(result.scores[row.start : row.end].T)
    extent = (row.start - 0.5, row.end - 0.5, 3.5, -0.5)
    axes.imshow(cells, cmap="RdBu_r", norm=norm, aspect="auto", extent=extent, interpolation="nearest")
    for position in range(row.start, row.end):
        base = result.sequence[position]
        if base in BASES:
            axes.plot(position, BASES.index(base), ".", color="black", markersize=4)
    axes.set_yticks(range(4), list(BASES), fontsize=9, family="monospace")
    axes.set_ylim(3.5, -0.5)


def _finish_row(axes: Axes, row: _Row, row_bp: int, highlights: Sequence[Highlight], first_position: int) -> None:
    # Rows share one width, so that a short last row keeps the letters' size.
    axes.set_xlim(row.start - 0.5, row.start + row_bp - 0.5)
    ticks = [p for p in range(row.start, row.end) if (p + first_position) % 10 == 0 or p == row.start]
    axes.set_xticks(ticks, [str(p + first_position) for p in ticks], fontsize=9)
    axes.tick_params(axis="both", color=MUTED, length=3)
    _shade_highlights(axes, row, highlights)


def _shade_highlights(axes: Axes, row: _Row, highlights: Sequence[Highlight]) -> None:
    label_ends = [-np.inf, -np.inf]
    for start, end, label in sorted(highlights):
        left, right = max(start, row.start), min(end, row.end)
        if left >= right:
            continue
        axes.axvspan(left - 0.5, right - 0.5, facecolor=HIGHLIGHT_COLOR, alpha=0.3, zorder=-1, linewidth=0)
        axes.axvspan(left - 0.5, right - 0.5, fill=False, edgecolor=LABEL_COLOR, linewidth=1.1, zorder=3)
        if start >= row.start:
            _label_highlight(axes, (left - 0.5, right - 0.5), label, label_ends)


def _label_highlight(axes: Axes, span: tuple[float, float], label: str, label_ends: list[float]) -> None:
    """Writes `label` above its span, on the second line where it would run into its neighbour's."""
    width = LABEL_BP_PER_LETTER * len(label)
    # A label that would leave the picture ends with its span instead of beginning with it.
    at_right = span[0] + width > axes.get_xlim()[1]
    begin = span[1] - width if at_right else span[0]
    level = 0 if begin >= label_ends[0] else 1
    label_ends[level] = begin + width + 1
    axes.annotate(
        label,
        xy=(span[1] if at_right else span[0], 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-1 if at_right else 1, 3 + 12 * level),
        textcoords="offset points",
        ha="right" if at_right else "left",
        fontsize=9,
        fontweight="bold",
        color=LABEL_COLOR,
    )


def _finish_figure(figure: Figure, title: str, note: str, path: str | Path | None) -> Figure:
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(f"position (bp)   \N{MIDDLE DOT}   {note}", fontsize=10, color=MUTED)
    if path is not None:
        figure.savefig(path, dpi=180)
    return figure
