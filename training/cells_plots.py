"""Plots of classified cells: their vectors by UMAP through scanpy, and which type is taken for which.

N cells, E vector size.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

_KEY = "X_genesplice"
# Of scanpy's default; smaller sets take fewer.
_NEIGHBORS = 15


def plot_umap(path: Path, panels: Mapping[str, np.ndarray], labels: np.ndarray, label_key: str) -> None:
    """One UMAP per set of vectors, coloured by cell type.

    Args:
        path: PNG file to write.
        panels: title -> vectors (N, E) of the same cells.
        labels: (N,) names of their types.
        label_key: title of the legend's column in `obs`.
    """
    import anndata
    import pandas
    import scanpy

    figure = Figure(figsize=(5.4 * len(panels) + 1.6, 4.6), layout="constrained")
    kinds = pandas.Categorical(labels)
    for place, (title, vectors) in enumerate(panels.items()):
        cells = anndata.AnnData(
            obs=pandas.DataFrame({label_key: kinds}, index=[str(row) for row in range(len(labels))]),
            obsm={_KEY: vectors},
        )
        with warnings.catch_warnings():
            # umap says that a fixed seed costs it its parallelism, which is what is wanted.
            warnings.simplefilter("ignore")
            neighbors = min(_NEIGHBORS, len(labels) - 1)
            scanpy.pp.neighbors(cells, n_neighbors=neighbors, use_rep=_KEY, random_state=0)
            scanpy.tl.umap(cells, random_state=0)
            axes = figure.add_subplot(1, len(panels), place + 1)
            legend = "right margin" if place == len(panels) - 1 else None
            scanpy.pl.umap(cells, color=label_key, ax=axes, title=title, legend_loc=legend, show=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def plot_confusion(
    path: Path, classes: np.ndarray, predicted_of_runs: Sequence[np.ndarray], labels: list[str]
) -> None:
    """Cells per pair of true (row) and predicted type, averaged over runs; colours are shares of the row.

    Args:
        path: PNG file to write.
        classes: (N,) numbers of the true types.
        predicted_of_runs: (N,) predicted ones of every run.
        labels: names of the types by number.
    """
    numbers = range(len(labels))
    counts = np.mean([confusion_matrix(classes, found, labels=numbers) for found in predicted_of_runs], axis=0)
    side = 2.6 + 0.42 * len(labels)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    display = ConfusionMatrixDisplay(shares, display_labels=labels)
    display.plot(ax=axes, include_values=False, cmap="Blues", xticks_rotation="vertical", im_kw={"vmin": 0, "vmax": 1})
    for row, column in np.argwhere(counts > 0):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{counts[row, column]:.3g}", ha="center", va="center", fontsize=8, color=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
