"""How well are hidden expression values predicted? Sums that add up over batches, and what they mean.

M hidden positions of all cells; never `<cls>`, never padding. B cells, r positions. The sums of two batches are those
of both together, so that a metric does not depend on how cells were batched, and no prediction has to be kept.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import numpy as np
from scipy import stats
from sklearn import metrics as sk

from genesplice_hf.errors import DataError
from genesplice_hf.tokenization.value_binning import bin_edges, digit_range, unbin_values

IGNORED = -100
# Fewer points have no correlation worth the name.
_MIN_POINTS = 3


@dataclass(frozen=True)
class ExpressionSums:
    """Sufficient sums over hidden positions.

    Attributes:
        count, squares: positions, and sum of (p - t)^2.
        positive_count, relative: positions with t > 0, and their sum of |p - t| / |t|.
        cells_pearson, pearson, cells_spearman, spearman: cells with a correlation, and its sum.
        row_mean_squares, gene_mean_squares: sum of squares if the mean of the cell's visible values above 0, or the
            gene's mean in the training cells, were predicted.
        tie_squares: sum of (n^2 - 1) / 12, n = digits that the value could have had.
    """

    count: float = 0.0
    squares: float = 0.0
    positive_count: float = 0.0
    relative: float = 0.0
    cells_pearson: float = 0.0
    pearson: float = 0.0
    cells_spearman: float = 0.0
    spearman: float = 0.0
    row_mean_squares: float = 0.0
    gene_mean_squares: float = 0.0
    tie_squares: float = 0.0

    def __add__(self, other: "ExpressionSums") -> "ExpressionSums":
        return ExpressionSums(*(getattr(self, name) + getattr(other, name) for name in SUM_NAMES))

    def as_row(self) -> np.ndarray:
        """(11,) float64, for `preprocess_logits_for_metrics`: rows of batches are added up by `from_rows`."""
        return np.array([getattr(self, name) for name in SUM_NAMES])

    @classmethod
    def from_rows(cls, rows: np.ndarray) -> "ExpressionSums":
        """Adds up rows (batches, 11) of `as_row`."""
        return cls(*np.asarray(rows, dtype=np.float64).reshape(-1, len(SUM_NAMES)).sum(0).tolist())

    def metrics(self, unit: str = "bin") -> dict[str, float]:
        """The metrics; NaN where the data do not define one.

        | key | meaning |
        |---|---|
        | `mse_<unit>` | mean of (p - t)^2 over positions, in target units |
        | `mre` | mean of \\|p - t\\| / \\|t\\| where t > 0; rewards predicting too little: never choose by it |
        | `pearson_cell`, `spearman_cell` | mean over cells with 3 or more positions |
        | `mse_row_mean`, `r2_row_mean` | of the mean of the cell's visible values above 0; 1 - mse / that |
        | `mse_gene_mean`, `r2_gene_mean` | the same with the gene's training mean |
        | `mse_tie_floor` | the part of the error that random ties make unavoidable |
        """
        mse, row, gene = (
            _ratio(total, self.count) for total in (self.squares, self.row_mean_squares, self.gene_mean_squares)
        )
        return {
            f"mse_{unit}": mse,
            "mre": _ratio(self.relative, self.positive_count),
            "pearson_cell": _ratio(self.pearson, self.cells_pearson),
            "spearman_cell": _ratio(self.spearman, self.cells_spearman),
            "mse_row_mean": row,
            "r2_row_mean": 1 - _ratio(mse, row),
            "mse_gene_mean": gene,
            "r2_gene_mean": 1 - _ratio(mse, gene),
            "mse_tie_floor": _ratio(self.tie_squares, self.count),
        }


SUM_NAMES = tuple(found.name for found in fields(ExpressionSums))


def expression_sums(
    predictions: np.ndarray,
    labels: np.ndarray,
    values: np.ndarray | None = None,
    gene_means: np.ndarray | None = None,
    tie_widths: np.ndarray | None = None,
) -> ExpressionSums:
    """Sums of one batch.

    Args:
        predictions: (B, r) in the units of the labels.
        labels: (B, r) hidden values, -100 where nothing was asked: `<cls>`, padding and visible genes.
        values: (B, r) what the model saw; visible values above 0 make the row mean. None = NaN for it.
        gene_means: (B, r) training mean of each position's gene. None = NaN for it.
        tie_widths: (B, r) from `value_binning.tie_widths`. None = NaN for it.

    Raises:
        DataError: arrays of other shapes, predictions that are not finite where something is asked.
    """
    predictions, labels = np.asarray(predictions, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    given = {"labels": labels, "values": values, "gene_means": gene_means, "tie_widths": tie_widths}
    for name, array in given.items():
        if array is not None and np.shape(array) != predictions.shape:
            raise DataError(
                f"`{name}` must have the shape of `predictions` {predictions.shape}, got {np.shape(array)}."
            )
    asked = labels != IGNORED
    p, t = predictions[asked], labels[asked]
    if not np.isfinite(p).all():
        raise DataError("`predictions` must be finite, but hold NaN or infinity where values are asked for.")
    above = t > 0
    row_means = None if values is None else _row_means(np.asarray(values, dtype=np.float64), asked)
    pearson, spearman = (
        _correlations(predictions, labels, asked, _pearson),
        _correlations(predictions, labels, asked, _spearman),
    )
    return ExpressionSums(
        count=float(len(t)),
        squares=float(np.square(p - t).sum()),
        positive_count=float(above.sum()),
        relative=float((np.abs(p - t)[above] / t[above]).sum()),
        cells_pearson=float(len(pearson)),
        pearson=float(sum(pearson)),
        cells_spearman=float(len(spearman)),
        spearman=float(sum(spearman)),
        row_mean_squares=_squares(row_means, asked, t),
        gene_mean_squares=_squares(gene_means, asked, t),
        tie_squares=math.nan if tie_widths is None else float(_tie_variance(np.asarray(tie_widths)[asked]).sum()),
    )


def tie_floor(cells: Iterable[np.ndarray], n_bins: int) -> float:
    """Mean over the non-zero values of all cells of (n^2 - 1) / 12: the variance of a digit drawn among n ties.

    Args:
        cells: values before binning, one array per cell.
        n_bins: see `bin_values`.
    """
    total = count = 0.0
    for values in cells:
        expressed = np.asarray(values)[np.asarray(values) != 0]
        left, right = digit_range(expressed, bin_edges(expressed, n_bins))
        total += float(_tie_variance(np.maximum(left - right, 1)).sum())
        count += len(expressed)
    return _ratio(total, count)


def mse_log1p(predictions: np.ndarray, targets: np.ndarray, edges: np.ndarray, counts: np.ndarray) -> float:
    """Error in log1p units of digits: both are led back through each cell's edges.

    Args:
        predictions, targets: (M,) digits, cell after cell.
        edges: (B, n_bins - 1) of the cells.
        counts: (B,) positions of each cell.
    """
    total, start = 0.0, 0
    for cell, count in enumerate(np.asarray(counts).tolist()):
        span = slice(start, start + count)
        start += count
        gap = unbin_values(np.asarray(predictions)[span], edges[cell]) - unbin_values(
            np.asarray(targets)[span], edges[cell]
        )
        total += float(np.square(gap).sum())
    return _ratio(total, start)


def zero_metrics(zero_logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`zero_auroc` and `zero_bce` (nats) of logits that a value is above 0, where `labels` are not -100."""
    labels = np.asarray(labels, dtype=np.float64)
    asked = labels != IGNORED
    logits, truth = np.asarray(zero_logits, dtype=np.float64)[asked], labels[asked] > 0
    losses = np.logaddexp(0, logits) - logits * truth
    both = 0 < truth.sum() < len(truth)
    auroc = float(sk.roc_auc_score(truth, logits)) if both else math.nan
    return {"zero_auroc": auroc, "zero_bce": float(losses.mean()) if len(losses) else math.nan}


def edge_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`edge_auroc`, `edge_auprc` and `edge_auprc_ratio` (AUPRC / prevalence) where `labels` are not -100."""
    labels = np.asarray(labels, dtype=np.float64)
    asked = labels != IGNORED
    scores, truth = np.asarray(logits, dtype=np.float64)[asked], labels[asked] > 0
    if not 0 < truth.sum() < len(truth):
        return dict.fromkeys(("edge_auroc", "edge_auprc", "edge_auprc_ratio"), math.nan)
    auprc = float(sk.average_precision_score(truth, scores))
    return {
        "edge_auroc": float(sk.roc_auc_score(truth, scores)),
        "edge_auprc": auprc,
        "edge_auprc_ratio": auprc / float(truth.mean()),
    }


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


def _row_means(values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """(B, r) mean of each row's visible values above 0; 0 in a row without one. Mask and pad values lie below 0."""
    visible = (values > 0) & ~asked
    sums, counts = (values * visible).sum(1), visible.sum(1)
    return np.repeat((sums / np.maximum(counts, 1))[:, None], values.shape[1], axis=1)


def _squares(guess: np.ndarray | None, asked: np.ndarray, targets: np.ndarray) -> float:
    return math.nan if guess is None else float(np.square(np.asarray(guess)[asked] - targets).sum())


def _tie_variance(widths: np.ndarray) -> np.ndarray:
    return (np.square(widths.astype(np.float64)) - 1) / 12


def _correlations(
    predictions: np.ndarray, labels: np.ndarray, asked: np.ndarray, correlate: Callable[..., float]
) -> list[float]:
    """Of every cell with enough positions and some variation on both sides."""
    found = []
    for p, t, mask in zip(predictions, labels, asked, strict=True):
        p, t = p[mask], t[mask]
        if len(t) >= _MIN_POINTS and np.ptp(p) > 0 and np.ptp(t) > 0:
            found.append(correlate(p, t))
    return found


def _pearson(p: np.ndarray, t: np.ndarray) -> float:
    return float(np.corrcoef(p, t)[0, 1])


def _spearman(p: np.ndarray, t: np.ndarray) -> float:
    return _pearson(stats.rankdata(p), stats.rankdata(t))
