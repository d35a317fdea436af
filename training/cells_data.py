"""Cells as a task: an `.h5ad` (or the sample that scanpy installs), one fixed split, and rows for models.

Everything that is learned from data is learned from the training cells: which genes, and the names of cell types.
N cells, V tokens of the vocabulary.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from datasets import Dataset
from scipy import sparse

from genesplice_hf.data.cell_matrix import demand_rna, open_cells
from genesplice_hf.data.expression_settings import ExpressionSettings
from genesplice_hf.data.h5ad import GeneExpressionProcessor
from genesplice_hf.errors import DataError
from genesplice_hf.tokenization.gene_names import GeneMatchWarning
from genesplice_hf.tokenization.tokenization_gene import GeneTokenizer

if TYPE_CHECKING:
    from anndata import AnnData

SPLITS = ("train", "valid", "test")
PBMC68K = "pbmc68k_reduced"
# Of the settings below, those that a processor knows under the same name.
_OF_THE_FILE = ("layer", "gene_column", "size_factor_key")
_HELD_OUT_SHARE = 0.1
_LABELS = "cell_type_labels"


@dataclass
class CellDataSettings:
    """Which cells, which genes, and how they are split."""

    data: str = field(
        default=PBMC68K, metadata={"help": f"An .h5ad file with raw counts, or {PBMC68K}: the sample in scanpy."}
    )
    layer: str = field(default="X", metadata={"help": "Matrix of the file: X, raw or the name of a layer."})
    gene_column: str | None = field(default=None, metadata={"help": "Column of var with gene names; none: its index."})
    size_factor_key: str | None = field(
        default=None, metadata={"help": "Column of obs with the counts of each cell, for panels of genes."}
    )
    label_key: str | None = field(
        default=None, metadata={"help": "Column of obs with cell types; where there is one, the split keeps shares."}
    )
    split_key: str | None = field(
        default=None, metadata={"help": "Column of obs that says train, valid or test; none: 80/10/10 at random."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the split and of the masks of valid and test."})
    num_genes: int | None = field(
        default=None, metadata={"help": "Most variable genes of the training cells; none: all that are expressed."}
    )
    choose_genes_by: Literal["dispersion", "variance"] = field(
        default="dispersion", metadata={"help": "scanpy's variable genes, or the variance of the log1p values."}
    )
    mask_ratio: float = field(default=0.15, metadata={"help": "Share of a cell's genes whose value is hidden."})
    processor_options: dict = field(
        default_factory=dict, metadata={"help": "Further fields of ExpressionSettings, as JSON."}
    )
    data_source: str | None = field(default=None, metadata={"help": "Origin and licence of the data, for the card."})

    def __post_init__(self) -> None:
        if self.num_genes is not None and self.num_genes < 1:
            raise DataError(f"`num_genes` must be 1 or more, or none for all, got {self.num_genes}.")
        ours = {*_OF_THE_FILE, "label_key", "num_variable_genes"}
        known = [one.name for one in fields(ExpressionSettings) if one.name not in ours]
        if unknown := sorted(set(self.processor_options) - set(known)):
            raise DataError(f"`processor_options` may hold {', '.join(known)}; got {unknown}.")


class CellTask(NamedTuple):
    """Cells to learn from, to choose by and to report on.

    Attributes:
        adata: the cells with their counts.
        processor: fitted on the training cells.
        rows: train, valid, test -> what the processor makes of them, as numpy arrays.
        labels: names of the cell types by number; empty for masked expression.
        report: counts, genes, settings and hashes, for `metrics.json`.
    """

    adata: "AnnData"
    processor: GeneExpressionProcessor
    rows: dict[str, Dataset]
    labels: list[str]
    report: dict[str, Any]

    def masked(self, split: str) -> Dataset:
        """Rows without cell types, for masked expression."""
        rows = self.rows[split]
        return rows.remove_columns(_LABELS) if _LABELS in rows.column_names else rows

    def labelled(self, split: str) -> Dataset:
        """Rows whose cell types are `labels`, for a classifier."""
        return self.rows[split].rename_column(_LABELS, "labels")

    def classes(self, split: str) -> np.ndarray:
        """(N,) numbers of the cell types."""
        return np.asarray(self.rows[split][_LABELS])


def load_cell_task(
    settings: CellDataSettings, config: Any, *, with_labels: bool, pretrained: str | None = None
) -> CellTask:
    """Reads, splits and tokenises the cells.

    Args:
        settings: which ones.
        config: of the model that reads them: bins, and what stands for hidden values and padding.
        with_labels: cell types are wanted; cells without one are left out.
        pretrained: folder whose vocabulary and genes are used instead of fitting them.

    Raises:
        DataError: a missing file or column, values that are no expression, fewer than two cell types, a cell type
            that no training cell has.
    """
    if with_labels and settings.label_key is None:
        raise DataError("`label_key` must name the column of `obs` that holds cell types, got none.")
    adata = read_cells(settings)
    if settings.data == PBMC68K and settings.size_factor_key is None:
        # The panel holds a fifth of a cell's counts.
        settings = replace(settings, size_factor_key="n_counts")
    strata, is_labelled, given = _columns(adata, settings)
    usable = is_labelled if with_labels else np.ones(adata.n_obs, dtype=bool)
    parts = split_cells(strata, usable, settings.split_seed) if given is None else given_split(given, usable)
    names = sorted(set(strata[parts["train"]].tolist())) if with_labels else []
    if with_labels and len(names) < 2:
        raise DataError(f"`label_key` {settings.label_key!r} must hold two cell types or more, got {names}.")
    if pretrained is None:
        processor = fit_processor(adata, parts["train"], settings, config, with_labels)
    else:
        processor = pretrained_processor(pretrained, settings, names)
    rows = tokenized(adata, parts, processor, may_miss_genes=pretrained is None)
    report = _report(settings, processor, rows, names, int((~usable).sum()))
    return CellTask(adata, processor, rows, names, report)


def read_cells(settings: CellDataSettings) -> "AnnData":
    """The file that `settings` name, or scanpy's sample.

    Raises:
        DataError: no such file, layer or column; a file that is no AnnData; anndata or scanpy is not installed.
    """
    if settings.data == PBMC68K:
        return pbmc68k_counts()
    with open_cells(Path(settings.data).expanduser(), settings.layer, settings.gene_column) as matrix:
        return matrix.adata


def pbmc68k_counts() -> "AnnData":
    """700 blood cells x 765 genes of the sample that scanpy installs, with counts: round(expm1(raw) n_counts / 1e4).

    Raises:
        DataError: the installed sample does not give whole numbers back.
    """
    demand_rna()
    import anndata
    import scanpy

    with warnings.catch_warnings():
        # The file is older than the library's present rules for its fields.
        warnings.simplefilter("ignore")
        sample = scanpy.datasets.pbmc68k_reduced()
    counts = np.expm1(sample.raw.X.toarray()) * sample.obs["n_counts"].to_numpy()[:, None] / 1e4
    whole = np.round(counts)
    if (np.abs(counts - whole) / np.maximum(counts, 1)).max() > 1e-3:
        raise DataError(f"`data` {PBMC68K!r}: the installed sample holds no logs of counts; use another scanpy.")
    return anndata.AnnData(sparse.csr_matrix(whole), obs=sample.obs, var=sample.raw.var)


def split_cells(strata: np.ndarray, usable: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Row numbers of train, valid and test: 80/10/10 within every stratum.

    Args:
        strata: (N,) names; three cells of one name or more are in all three parts, fewer in train alone.
        usable: (N,) bool; other cells are in no part.
        seed: of the choice.

    Raises:
        DataError: too few cells for three parts.
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for stratum in np.unique(strata[usable]):
        cells = rng.permutation(np.flatnonzero((strata == stratum) & usable))
        held_out = max(1, round(len(cells) * _HELD_OUT_SHARE)) if len(cells) >= len(SPLITS) else 0
        chunks = np.split(cells, [len(cells) - 2 * held_out, len(cells) - held_out])
        for name, chunk in zip(SPLITS, chunks, strict=True):
            parts[name].append(chunk)
    return _demand_cells({name: np.sort(np.concatenate(chunks)) for name, chunks in parts.items()})


def given_split(values: np.ndarray, usable: np.ndarray) -> dict[str, np.ndarray]:
    """Row numbers by a column that says train, valid or test.

    Raises:
        DataError: another word, or a part without cells.
    """
    words = np.array([str(value) for value in values.tolist()])
    if others := sorted(set(words.tolist()) - set(SPLITS)):
        raise DataError(f"`split_key` must hold train, valid and test alone, got {others[:5]} as well.")
    return _demand_cells({name: np.flatnonzero((words == name) & usable) for name in SPLITS})


def fit_processor(
    adata: "AnnData", train_cells: np.ndarray, settings: CellDataSettings, config: Any, with_labels: bool
) -> GeneExpressionProcessor:
    """A processor whose vocabulary is the genes that the training cells choose."""
    with open_cells(adata, settings.layer, settings.gene_column) as matrix:
        tokenizer = GeneTokenizer(genes=list(dict.fromkeys(matrix.gene_names)))
    # Named, so that the genes do not hang on what is installed.
    steps: dict[str, Any] = {"variable_genes_flavor": "seurat"}
    steps |= {name: getattr(settings, name) for name in _OF_THE_FILE} | settings.processor_options
    steps["label_key"] = settings.label_key if with_labels else None
    steps["num_variable_genes"] = settings.num_genes if settings.choose_genes_by == "dispersion" else None
    processor = GeneExpressionProcessor.for_model(config, tokenizer, **steps)
    return with_own_vocabulary(processor.fit(adata, train_cells), settings.num_genes)


def with_own_vocabulary(processor: GeneExpressionProcessor, num_genes: int | None) -> GeneExpressionProcessor:
    """The same processor with the `num_genes` fitted genes of largest variance as its whole vocabulary."""
    fitted = processor.fitted
    assert fitted is not None
    variances = np.array(fitted.variances)
    kept = np.sort(np.argsort(-variances, kind="stable")[:num_genes])
    genes = [fitted.genes[place] for place in kept]
    chosen = replace(fitted, genes=genes, variances=variances[kept].tolist())
    return GeneExpressionProcessor(GeneTokenizer(genes=genes), processor.settings, chosen)


def pretrained_processor(folder: str, settings: CellDataSettings, labels: Sequence[str]) -> GeneExpressionProcessor:
    """The processor of a pretrained model, which reads this file and knows these cell types."""
    processor = GeneExpressionProcessor.from_pretrained(folder)
    if processor.fitted is None:
        raise DataError(f"`model` {folder} must hold a fitted processor; save the one that its training used.")
    changes = {name: getattr(settings, name) for name in _OF_THE_FILE}
    label_key = settings.label_key if labels else None
    steps = replace(processor.settings, label_key=label_key, batch_key=None, obs_columns=(), **changes)
    fitted = replace(processor.fitted, labels=list(labels) or None)
    return GeneExpressionProcessor(processor.tokenizer, steps, fitted)


def tokenized(
    adata: "AnnData", parts: Mapping[str, np.ndarray], processor: GeneExpressionProcessor, may_miss_genes: bool
) -> dict[str, Dataset]:
    """Rows of every part as numpy arrays.

    Args:
        may_miss_genes: the vocabulary was cut to some of the file's genes on purpose; no warning then.
    """
    with warnings.catch_warnings():
        if may_miss_genes:
            warnings.simplefilter("ignore", GeneMatchWarning)
        return {name: processor(adata, cells).with_format("numpy") for name, cells in parts.items()}


def gene_means(rows: Dataset, vocab_size: int) -> np.ndarray:
    """(V,) mean of each gene's values in these rows, over the cells that list it; the mean of all for the others."""
    ids = np.concatenate(list(rows["input_ids"]))
    values = np.concatenate(list(rows["values"])).astype(np.float64)
    counts = np.bincount(ids, minlength=vocab_size)
    sums = np.bincount(ids, weights=values, minlength=vocab_size)
    return np.where(counts > 0, sums / np.maximum(counts, 1), values.mean())


def vocabulary_sha256(tokenizer: GeneTokenizer) -> str:
    """Hash of all names in the order of their ids."""
    names = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _columns(adata: "AnnData", settings: CellDataSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(N,) strata, (N,) whether a cell has a label, and the column that splits where there is one."""
    strata, is_labelled, given = np.full(adata.n_obs, "", dtype=object), np.ones(adata.n_obs, dtype=bool), None
    with open_cells(adata, settings.layer, settings.gene_column) as matrix:
        if settings.label_key is not None:
            values = matrix.column(settings.label_key, "label_key").tolist()
            is_labelled = np.array([value == value and value is not None for value in values])
            strata = np.array([str(value) if real else "" for value, real in zip(values, is_labelled, strict=True)])
        if settings.split_key is not None:
            given = matrix.column(settings.split_key, "split_key")
    return strata, is_labelled, given


def _demand_cells(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if empty := [name for name, cells in parts.items() if not len(cells)]:
        raise DataError(f"`data` must hold cells for train, valid and test, but none are left for {empty}.")
    return parts


def _report(
    settings: CellDataSettings,
    processor: GeneExpressionProcessor,
    rows: Mapping[str, Dataset],
    labels: Sequence[str],
    num_unlabelled: int,
) -> dict[str, Any]:
    fitted = processor.fitted
    assert fitted is not None
    lengths = np.asarray(rows["train"]["length"]) - int(processor.settings.append_cls)
    counts = {}
    for number, name in enumerate(labels):
        counts[name] = {part: int((np.asarray(rows[part][_LABELS]) == number).sum()) for part in SPLITS}
    return {
        "data": Path(settings.data).name,
        "data_source": settings.data_source,
        "cells": {name: len(part) for name, part in rows.items()},
        "cells_without_label": num_unlabelled,
        "labels": counts,
        "genes_of_the_file": fitted.report.num_genes,
        "genes": len(fitted.genes),
        "genes_per_training_cell": {"median": float(np.median(lengths)), "max": int(lengths.max())},
        "vocabulary_sha256": vocabulary_sha256(processor.tokenizer),
        "processor": asdict(processor.settings),
    }
