"""From counts to what expression models read: gene ids and values per cell, the same for every batch, chunk and order.

C cells of a chunk, G genes of the data, K genes that were fitted and are in the vocabulary.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from scipy import sparse, stats
from transformers.utils.hub import cached_file

from genesplice_hf.data.cell_matrix import CellMatrix, CountsWarning, chosen_cells, open_cells
from genesplice_hf.data.expression_fit import (
    FitReport,
    FittedGenes,
    expressed_genes,
    final_values,
    gene_variances,
    variable_genes,
)
from genesplice_hf.data.expression_settings import ExpressionSettings
from genesplice_hf.errors import DataError
from genesplice_hf.tokenization.gene_names import GeneMatch
from genesplice_hf.tokenization.tokenization_gene import GeneTokenizer
from genesplice_hf.tokenization.value_binning import bin_values

if TYPE_CHECKING:
    from anndata import AnnData

FILE = "processor_config.json"
_SHOWN = 5
_NO_LABEL = -100


@dataclass
class GeneExpressionProcessor:
    """Cells of an AnnData or `.h5ad` as rows of ids and values, for any expression model.

    Whatever is learned from data (kept genes, variable genes, label names) is learned by `fit`, from training cells
    alone, and saved with the model; whatever is done to a cell depends on that cell alone.

    Attributes:
        tokenizer: vocabulary of the model.
        settings: the steps.
        fitted: what `fit` found; None before.

    Example:
        >>> processor = GeneExpressionProcessor(GeneTokenizer(genes=list(adata.var_names)))
        >>> dataset = processor.fit(adata, train_cells=train)(adata)
        >>> dataset.column_names
        ['input_ids', 'values', 'length', 'cell_id']
    """

    tokenizer: GeneTokenizer
    settings: ExpressionSettings = field(default_factory=ExpressionSettings)
    fitted: FittedGenes | None = None

    @classmethod
    def for_model(cls, config: Any, tokenizer: GeneTokenizer, **settings: Any) -> "GeneExpressionProcessor":
        """A processor whose `n_bins`, `mask_value` and `pad_value` are those of a model's config.

        A model that embeds digits as categories gets whole ones (`tie_break="mid_floor"`).
        """
        shared = {name: getattr(config, name) for name in ("n_bins", "mask_value", "pad_value")}
        if getattr(config, "input_emb_style", None) == "category":
            shared["tie_break"] = "mid_floor"
        return cls(tokenizer, ExpressionSettings(**(shared | settings)))

    def fit(
        self,
        source: "AnnData | str | PathLike[str]",
        train_cells: Sequence[Any] | np.ndarray | None = None,
        backed: bool = False,
    ) -> "GeneExpressionProcessor":
        """Learns from training cells which genes to keep, and the names of labels.

        Args:
            source: see `open_cells`.
            train_cells: bool mask, row numbers or cell ids; None = all cells.
            backed: read an `.h5ad` file by rows instead of whole.

        Returns:
            This processor, with `fitted` set; `fitted.report` says what became of genes and cells.

        Raises:
            DataError: no gene of the data is in the vocabulary, none is expressed, or values are no expression.
        """
        settings = self.settings
        with open_cells(source, settings.layer, settings.gene_column, backed) as matrix:
            cells = chosen_cells(matrix, train_cells, "train_cells")
            match = self.tokenizer.convert_genes(matrix.gene_names, settings.min_match)
            if settings.expects_counts:
                matrix.warn_unless_counts(matrix.rows(cells[: min(len(cells), 1024)]))
            merge, ids = _merging(match)
            genes = expressed_genes(matrix, cells, merge, settings.min_gene_counts)
            kept, flavor = genes.kept, None
            if settings.num_variable_genes is not None:
                kept, flavor = variable_genes(matrix, cells, merge, kept, settings)
            report = FitReport(
                num_cells=len(cells),
                num_empty_cells=genes.num_empty_cells,
                num_genes=len(matrix.gene_names),
                num_matched=int(match.is_matched.sum()),
                num_silent_genes=genes.num_silent,
                num_rare_genes=genes.num_rare,
                variable_genes_flavor=flavor,
                unmatched=match.unmatched,
                aliases=match.aliases,
                duplicates=match.duplicates,
            )
            variances = gene_variances(matrix, cells, merge[:, kept], settings)
            self.fitted = FittedGenes(
                genes=self.tokenizer.convert_ids_to_tokens(ids[kept].tolist()),
                variances=variances.tolist(),
                labels=_names(matrix, settings.label_key, "label_key", cells),
                batches=_names(matrix, settings.batch_key, "batch_key", None),
                report=report,
            )
        return self

    def __call__(
        self,
        source: "AnnData | str | PathLike[str]",
        cells: Sequence[Any] | np.ndarray | None = None,
        backed: bool = False,
    ) -> Dataset:
        """Turns cells into a dataset, in the order of the file.

        Returns:
            `input_ids` list<int32> (genes in the order of their ids, after `<cls>`), `values` list<float32>,
            `length`, `cell_id`, and by the settings `bin_edges`, `cell_type_labels`, `batch_labels` (-100 = none)
            and `obs_columns`. Cells below `min_cell_genes` are left out.

        Raises:
            DataError: `fit` was not called; the data name none of the fitted genes; values are no expression; a
                label that `fit` has not seen; a cell without tokens.
        """
        tables = list(self._tables(source, cells, backed))
        if not tables:
            raise DataError(f"`min_cell_genes` ({self.settings.min_cell_genes}) leaves no cell; lower it.")
        return Dataset(pa.concat_tables(tables))

    def stream(
        self,
        source: "AnnData | str | PathLike[str]",
        cells: Sequence[Any] | np.ndarray | None = None,
        backed: bool = True,
    ) -> IterableDataset:
        """The same rows one after another, without holding them all; for files larger than memory."""

        def generate() -> Iterator[dict[str, Any]]:
            for table in self._tables(source, cells, backed):
                yield from table.to_pylist()

        return IterableDataset.from_generator(generate)

    def gene_priority(self) -> np.ndarray:
        """(vocabulary,) variance of each fitted gene in the training cells, 0 elsewhere; see the collators."""
        fitted = self._demand_fit()
        priority = np.zeros(len(self.tokenizer))
        priority[self.tokenizer.convert_tokens_to_ids(fitted.genes)] = fitted.variances
        return priority

    def _tables(self, source: Any, cells: Any, backed: bool) -> Iterator[pa.Table]:
        settings, fitted = self.settings, self._demand_fit()
        with open_cells(source, settings.layer, settings.gene_column, backed) as matrix:
            match = self.tokenizer.convert_genes(matrix.gene_names, settings.min_match)
            merge, ids = _merging(match)
            wanted = set(self.tokenizer.convert_tokens_to_ids(fitted.genes))
            kept = np.flatnonzero([index in wanted for index in ids.tolist()])
            if not kept.size:
                raise DataError("`source` must hold genes that the processor was fitted on, got none of them.")
            empty: list[str] = []
            for rows, counts in matrix.chunks(chosen_cells(matrix, cells, "cells")):
                table = self._table(matrix, rows, counts, merge[:, kept], ids[kept], empty)
                if table.num_rows:
                    yield table
            self._report_empty(empty)

    def _demand_fit(self) -> FittedGenes:
        if self.fitted is None:
            raise DataError("`fitted` is None; call `fit` with the training cells first, or load a saved processor.")
        return self.fitted

    def _table(
        self,
        matrix: CellMatrix,
        rows: np.ndarray,
        counts: sparse.csr_matrix,
        merge: sparse.csr_matrix,
        ids: np.ndarray,
        empty: list[str],
    ) -> pa.Table:
        settings = self.settings
        expression = final_values(matrix, rows, counts, merge, settings)
        num_genes = np.diff(expression.indptr)
        stays = num_genes >= settings.min_cell_genes
        rows, expression, num_genes = rows[stays], expression[stays], num_genes[stays]
        names = [matrix.cell_ids[row] for row in rows]
        empty += [name for name, count in zip(names, num_genes, strict=True) if not count]
        columns = self._columns(expression, ids, names) | {"cell_id": pa.array(names, pa.string())}
        return pa.table(columns | self._obs(matrix, rows))

    def _columns(self, expression: sparse.csr_matrix, ids: np.ndarray, names: list[str]) -> dict[str, pa.Array]:
        """`input_ids`, `values`, `length`, and `bin_edges` of C cells (C, K)."""
        settings, edges = self.settings, []
        cells_ids, cells_values = [], []
        start = [self.tokenizer.cls_token_id] if settings.append_cls else []
        for row, name in enumerate(names):
            span = slice(expression.indptr[row], expression.indptr[row + 1])
            places, values = expression.indices[span], expression.data[span]
            if settings.value == "bin":
                cell = bin_values(values, settings.n_bins, settings.tie_break, seed=settings.seed, cell_id=name)
                values = cell.digits
                edges.append(cell.edges)
            elif settings.value == "rank":
                values = stats.rankdata(values) / max(len(values), 1)
            if settings.include_zero_genes:
                dense = np.zeros(len(ids))
                dense[places] = values
                places, values = np.arange(len(ids)), dense
            cells_ids.append(np.concatenate([start, ids[places]]))
            cells_values.append(np.concatenate([np.zeros(len(start)), values]))
        lengths = np.array([len(found) for found in cells_ids])
        columns = {
            "input_ids": _lists(cells_ids, lengths, np.int32),
            "values": _lists(cells_values, lengths, np.float32),
            "length": pa.array(lengths, pa.int32()),
        }
        if settings.store_bin_edges:
            columns["bin_edges"] = _lists(edges, np.full(len(edges), settings.n_bins - 1), np.float64)
        return columns

    def _obs(self, matrix: CellMatrix, rows: np.ndarray) -> dict[str, pa.Array]:
        settings, fitted = self.settings, self._demand_fit()
        columns: dict[str, pa.Array] = {}
        for column, key, argument, known in (
            ("cell_type_labels", settings.label_key, "label_key", fitted.labels),
            ("batch_labels", settings.batch_key, "batch_key", fitted.batches),
        ):
            if key is not None:
                columns[column] = _numbered(matrix.column(key, argument)[rows], known or [], key, argument)
        for name in settings.obs_columns:
            columns[name] = pa.array(matrix.column(name, "obs_columns")[rows].tolist())
        return columns

    def _report_empty(self, names: list[str]) -> None:
        if not names:
            return
        shown = f"{len(names)} cells (the first are {names[:_SHOWN]}) express none of the fitted genes"
        if not self.settings.append_cls and not self.settings.include_zero_genes:
            raise DataError(f"{shown}, and `append_cls` is False: nothing is left of them; set `min_cell_genes=1`.")
        warnings.warn(f"{shown}; `min_cell_genes=1` leaves them out.", CountsWarning, stacklevel=4)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Writes `processor_config.json` and the tokenizer's files, beside the model's."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        fitted = None if self.fitted is None else asdict(self.fitted)
        content = {"processor_class": type(self).__name__, "settings": asdict(self.settings), "fitted": fitted}
        (path / FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        self.tokenizer.save_pretrained(path)

    @classmethod
    def from_pretrained(cls, name_or_path: str | PathLike[str], **loading: Any) -> "GeneExpressionProcessor":
        """Loads a saved processor from a folder or a Hub repository.

        Raises:
            DataError: the file is not one of this class, or holds settings that this version does not know.
        """
        path = cached_file(str(name_or_path), FILE, **loading)
        content = json.loads(Path(str(path)).read_text(encoding="utf-8"))
        if content.get("processor_class") != cls.__name__:
            raise DataError(f"`{path}` must be a saved {cls.__name__}, but holds {content.get('processor_class')!r}.")
        try:
            settings, fitted = ExpressionSettings(**content["settings"]), content["fitted"]
            found = None if fitted is None else FittedGenes(**(fitted | {"report": FitReport(**fitted["report"])}))
        except TypeError as error:
            raise DataError(f"`{path}` was written by another version: {error}.") from error
        return cls(GeneTokenizer.from_pretrained(name_or_path, **loading), settings, found)


def _merging(match: GeneMatch) -> tuple[sparse.csr_matrix, np.ndarray]:
    """(G, M) zeros and ones that add up columns of one gene, and (M,) the genes' ids, increasing."""
    ids, place = np.unique(match.ids[match.is_matched], return_inverse=True)
    shape = (len(match.ids), len(ids))
    entries = (np.ones(len(place)), (np.flatnonzero(match.is_matched), place))
    return sparse.csr_matrix(entries, shape=shape), ids


def _lists(parts: list[np.ndarray], lengths: np.ndarray, dtype: type) -> pa.ListArray:
    flat: np.ndarray = np.concatenate([np.zeros(0), *parts]).astype(dtype)
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), pa.array(flat))


def _names(matrix: CellMatrix, key: str | None, argument: str, cells: np.ndarray | None) -> list[str] | None:
    """The different labels of a column, sorted; None without a column."""
    if key is None:
        return None
    values = matrix.column(key, argument)
    values = values if cells is None else values[cells]
    return sorted({str(value) for value in values if value == value and value is not None})


def _numbered(values: np.ndarray, known: list[str], key: str, argument: str) -> pa.Array:
    place = {name: index for index, name in enumerate(known)}
    texts = [None if value is None or value != value else str(value) for value in values.tolist()]
    unknown = sorted({text for text in texts if text is not None and text not in place})
    if unknown:
        raise DataError(
            f"`{argument}` {key!r} holds {unknown[:_SHOWN]}, which the cells that were fitted on do not have; fit on "
            "cells of every kind, or leave these out."
        )
    return pa.array([_NO_LABEL if text is None else place[text] for text in texts], pa.int64())
