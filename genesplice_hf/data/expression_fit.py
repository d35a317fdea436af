"""What a processor learns from training cells: which genes are worth keeping, and how much they vary.

C cells of a chunk, G genes of the data, M genes after columns of one gene were added up, K kept ones.
"""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import sparse

from genesplice_hf.data.cell_matrix import CellMatrix
from genesplice_hf.data.expression_settings import ExpressionSettings
from genesplice_hf.errors import DataError


@dataclass(frozen=True)
class FitReport:
    """What became of the genes and cells that a processor was fitted on.

    Attributes:
        num_cells, num_empty_cells: training cells, and those of them without any count.
        num_genes, num_matched: columns of the data, and those that the vocabulary knows.
        num_silent_genes, num_rare_genes: matched genes without a count, and with fewer than `min_gene_counts`.
        variable_genes_flavor: how `num_variable_genes` were chosen, "seurat_v3" or "seurat" (see `variable_genes`);
            None where all genes are kept.
        unmatched, aliases, duplicates: see `GeneMatch`; counts of duplicates are added up.
    """

    num_cells: int
    num_empty_cells: int
    num_genes: int
    num_matched: int
    num_silent_genes: int
    num_rare_genes: int
    variable_genes_flavor: str | None = None
    unmatched: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    duplicates: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class FittedGenes:
    """What `fit` found.

    Attributes:
        genes: tokens that are kept, by id.
        variances: of their final values over the training cells, zeros included.
        labels, batches: names of the classes and batches; the place of a name is its number. None without a column.
        report: see there.
    """

    genes: list[str]
    variances: list[float]
    labels: list[str] | None
    batches: list[str] | None
    report: FitReport


@dataclass(frozen=True)
class ExpressedGenes:
    """Which genes (among M) have enough counts in the training cells."""

    kept: np.ndarray
    num_silent: int
    num_rare: int
    num_empty_cells: int


def expressed_genes(
    matrix: CellMatrix, cells: np.ndarray, merge: sparse.csr_matrix, min_counts: int
) -> ExpressedGenes:
    """Genes with at least `min_counts` in all training cells, as `scanpy.pp.filter_genes(min_counts=...)` counts.

    Raises:
        DataError: no gene is left.
    """
    sums, empty = np.zeros(merge.shape[1]), 0
    for _, counts in matrix.chunks(cells):
        found = sparse.csr_matrix(counts @ merge)
        sums += np.asarray(found.sum(axis=0)).ravel()
        empty += int((np.asarray(found.sum(axis=1)).ravel() == 0).sum())
    kept = np.flatnonzero(sums >= min_counts) if min_counts else np.arange(len(sums))
    if not kept.size or not sums.any():
        raise DataError(
            f"`min_gene_counts` ({min_counts}) leaves none of {len(sums)} matched genes: the largest count of a gene "
            f"over {len(cells)} cells is {sums.max(initial=0):g}; lower it, or choose another `layer`."
        )
    silent = int((sums == 0).sum())
    return ExpressedGenes(kept, silent, len(sums) - len(kept) - (silent if min_counts else 0), empty)


def normalized(
    matrix: CellMatrix, rows: np.ndarray, counts: sparse.csr_matrix, settings: ExpressionSettings
) -> sparse.csr_matrix:
    """Counts (C, G) scaled to `target_sum` per cell, by all counts of the cell or by a column of `obs`.

    Raises:
        DataError: a size factor that is not above 0.
    """
    if settings.target_sum is None:
        return counts
    if settings.size_factor_key is not None:
        sizes = matrix.column(settings.size_factor_key, "size_factor_key")[rows].astype(np.float64)
        if not np.isfinite(sizes).all() or (sizes <= 0).any():
            raise DataError(f"`size_factor_key` {settings.size_factor_key!r} must hold numbers above 0 in every cell.")
        return sparse.csr_matrix(counts.multiply(settings.target_sum / sizes[:, None]))
    return _scaled(counts, settings.target_sum)


def final_values(
    matrix: CellMatrix,
    rows: np.ndarray,
    counts: sparse.csr_matrix,
    merge: sparse.csr_matrix,
    settings: ExpressionSettings,
) -> sparse.csr_matrix:
    """(C, K) values before binning or ranking: scaled, added up per gene, log(1 + x), as the settings say."""
    if settings.value == "counts":
        values = sparse.csr_matrix(counts @ merge)
    else:
        values = sparse.csr_matrix(normalized(matrix, rows, counts, settings) @ merge)
        if settings.log1p:
            values.data = np.log1p(values.data)
    values.eliminate_zeros()
    values.sort_indices()
    return values


def variable_genes(
    matrix: CellMatrix, cells: np.ndarray, merge: sparse.csr_matrix, kept: np.ndarray, settings: ExpressionSettings
) -> tuple[np.ndarray, str]:
    """The most variable of the kept genes (places among M), by scanpy, and the flavour that chose them.

    "seurat_v3" reads counts, "seurat" logs; see `ExpressionSettings.variable_genes_flavor`.

    Raises:
        DataError: the trend of so few genes cannot be fitted, or scikit-misc is asked for and absent.
    """
    import anndata
    import scanpy

    wanted = min(settings.num_variable_genes or 0, len(kept))
    flavor = _flavor(settings)
    parts = [
        sparse.csr_matrix(counts @ merge[:, kept])
        if flavor == "seurat_v3"
        else _logs(matrix, rows, counts, merge[:, kept], settings)
        for rows, counts in matrix.chunks(cells)
    ]
    training = anndata.AnnData(sparse.vstack(parts, format="csr"))
    if flavor == "seurat":
        # This flavour reads from the note that logs are natural ones.
        training.uns["log1p"] = {"base": None}
    try:
        with _threads_of_torch_kept():
            scanpy.pp.highly_variable_genes(training, n_top_genes=wanted, flavor=flavor)
    except ValueError as error:
        raise DataError(
            f"`num_variable_genes` ({settings.num_variable_genes}) cannot be chosen from {len(kept)} genes in "
            f"{len(cells)} cells by scanpy's flavour {flavor!r}: {error}; keep all of them (None)."
        ) from error
    chosen = np.flatnonzero(training.var["highly_variable"].to_numpy())
    if len(chosen) > wanted:
        # A tie at the end of the list takes all that share it.
        scores = np.nan_to_num(training.var["dispersions_norm"].to_numpy()[chosen], nan=-np.inf)
        chosen = np.sort(chosen[np.argsort(-scores, kind="stable")[:wanted]])
    return kept[chosen], flavor


def gene_variances(
    matrix: CellMatrix, cells: np.ndarray, merge: sparse.csr_matrix, settings: ExpressionSettings
) -> np.ndarray:
    """(K,) population variance of the final values over the training cells, zeros included."""
    total, squares = np.zeros(merge.shape[1]), np.zeros(merge.shape[1])
    for rows, counts in matrix.chunks(cells):
        values = final_values(matrix, rows, counts, merge, settings)
        total += np.asarray(values.sum(axis=0)).ravel()
        squares += np.asarray(values.multiply(values).sum(axis=0)).ravel()
    return np.maximum(squares / len(cells) - (total / len(cells)) ** 2, 0.0)


def _flavor(settings: ExpressionSettings) -> str:
    """The flavour that was asked for; "auto" takes the one that counts allow, where its trend can be fitted."""
    asked = settings.variable_genes_flavor
    if asked == "seurat" or (asked == "auto" and not _fits_trends()):
        return "seurat"
    if not _fits_trends():
        raise DataError("`variable_genes_flavor` 'seurat_v3' needs scikit-misc; install it, or take 'seurat'.")
    return "seurat_v3"


def _fits_trends() -> bool:
    """Whether scikit-misc is there: an installed one that does not load counts as none."""
    try:
        importlib.import_module("skmisc.loess")
    except ImportError:
        return False
    return True


def _logs(
    matrix: CellMatrix,
    rows: np.ndarray,
    counts: sparse.csr_matrix,
    merge: sparse.csr_matrix,
    settings: ExpressionSettings,
) -> sparse.csr_matrix:
    """(C, K) log(1 + scaled counts), whatever the final values are; a matrix that is neither scaled nor logged by the
    settings is taken for logs."""
    values = sparse.csr_matrix(normalized(matrix, rows, counts, settings) @ merge)
    if settings.log1p or settings.target_sum is not None:
        values.data = np.log1p(values.data)
    return values


def _scaled(counts: sparse.csr_matrix, target_sum: float) -> sparse.csr_matrix:
    import anndata
    import scanpy

    with warnings.catch_warnings():
        # Empty cells stay empty, and are reported once for the whole data.
        warnings.filterwarnings("ignore", message=".*zero counts.*")
        cells = anndata.AnnData(counts)
        with _threads_of_torch_kept():
            scanpy.pp.normalize_total(cells, target_sum=target_sum)
    return sparse.csr_matrix(cells.X)


@contextmanager
def _threads_of_torch_kept() -> Iterator[None]:
    """numba, which scanpy runs on, sets the number of OpenMP threads of the process to its own; this sets it back."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
