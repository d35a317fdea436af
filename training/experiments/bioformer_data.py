"""Cells, genes, masks and knowledge of the BioFormer experiments, the same for every model that is compared.

Cells are split once. Genes, bins and edges are learned from the training cells alone. Validation and test cells have
fixed masks, made once: every model and every baseline is asked for the same values.

C cells, G genes that were chosen, V size of the vocabulary.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from sklearn.model_selection import KFold, StratifiedKFold

from genesplice_hf.data.cell_matrix import CountsWarning
from genesplice_hf.data.expression_settings import ExpressionSettings
from genesplice_hf.data.gene_sets import Pathways, read_gmt, select_pathways
from genesplice_hf.data.h5ad import GeneExpressionProcessor
from genesplice_hf.data.knowledge import Edges, coexpression_edges, read_edges, shuffle_graph, to_graph
from genesplice_hf.errors import DataError
from genesplice_hf.layers.gene_prior import GenePrior
from genesplice_hf.objectives.expression import DataCollatorForMaskedExpression
from genesplice_hf.tokenization.gene_names import GeneMatchWarning
from genesplice_hf.tokenization.tokenization_gene import GeneTokenizer
from training.cells_data import PBMC68K, pbmc68k_counts

DEFAULT_DATA = PBMC68K
SPLITS = ("train", "valid", "test")
TIES = ("mid", "random")
MASK_SEED = 1_000_003  # of the fixed masks; training seeds are small numbers
SPLIT_SEED = 0
SHUFFLE_SEED = 0
_FOLDS = 10
_EVALUATION_BATCH = 64
# GEARS takes 20 and 0.4; a panel of a hundred genes with few counts has hardly an edge so strong.
_COEXPRESSED, _CORRELATION = 10, 0.2


@dataclass(frozen=True)
class Cells:
    """Counts, and what the steps before the tokens need to know of them.

    Attributes:
        counts: C cells with their `obs` and `var`.
        settings: keyword arguments of `ExpressionSettings` that this source needs.
        label_key: column of `obs` that the split keeps the shares of; None = there is none.
    """

    counts: anndata.AnnData
    settings: Mapping[str, Any]
    label_key: str | None


@dataclass(frozen=True)
class Knowledge:
    """What a model may be told of genes, each beside a control of the same degrees.

    Attributes:
        edges: name -> table of edges.
        pathways: name -> chosen gene sets.
    """

    edges: Mapping[str, GenePrior]
    pathways: Mapping[str, Pathways]


@dataclass(frozen=True)
class ExpressionTask:
    """Everything that models are compared on.

    Attributes:
        tokenizer: of the chosen genes.
        rows: rule for ties -> split -> rows of cells.
        knowledge: edges and gene sets.
        facts: what a reader has to know of the data.
    """

    tokenizer: GeneTokenizer
    rows: Mapping[str, Mapping[str, Dataset]]
    knowledge: Knowledge
    facts: Mapping[str, Any]

    @cached_property
    def questions(self) -> dict[str, dict[str, list[dict[str, torch.Tensor]]]]:
        """Rule for ties -> "valid" and "test" -> batches with fixed masks."""
        collate = fixed_masks(self.tokenizer)
        return {
            ties: {name: _batches(splits[name], collate) for name in SPLITS[1:]} for ties, splits in self.rows.items()
        }

    def gene_means(self, ties: str) -> np.ndarray:
        """(V,) mean digit of every gene in the training cells that express it; their common mean elsewhere."""
        ids = np.concatenate(self.rows[ties]["train"]["input_ids"]).astype(np.int64)
        values = np.concatenate(self.rows[ties]["train"]["values"])
        ids, values = ids[values > 0], values[values > 0]
        counts = np.bincount(ids, minlength=len(self.tokenizer))
        sums = np.bincount(ids, weights=values, minlength=len(self.tokenizer))
        return np.where(counts > 0, sums / np.maximum(counts, 1), values.mean())


def fixed_masks(tokenizer: GeneTokenizer) -> DataCollatorForMaskedExpression:
    """The collator of validation and test cells."""
    return DataCollatorForMaskedExpression(tokenizer, frozen_masks=True, seed=MASK_SEED)


def read_cells(data: str, gene_column: str | None = None, label_key: str | None = None) -> Cells:
    """Counts by name or from a file.

    Args:
        data: "pbmc68k_reduced" (it comes with scanpy), an `.h5ad` file, or a text table of genes x cells with a
            header of cells, split by spaces or tabs.
        gene_column: column of `var` with the names of genes; None = its index.
        label_key: column of `obs`; see `Cells`.

    Raises:
        DataError: no such file, or no such column.
    """
    if data == DEFAULT_DATA:
        return Cells(pbmc68k_counts(), {"size_factor_key": "n_counts"}, label_key or "bulk_labels")
    if not Path(data).is_file():
        raise DataError(f"`data` must be {DEFAULT_DATA!r} or a file, but {data!r} is neither.")
    counts = anndata.read_h5ad(data) if data.endswith(".h5ad") else _from_table(data)
    if label_key is not None and label_key not in counts.obs:
        raise DataError(f"`label_key` must be a column of obs ({list(counts.obs)}), got {label_key!r}.")
    return Cells(counts, {"gene_column": gene_column}, label_key)


def _from_table(path: str) -> anndata.AnnData:
    frame = pd.read_csv(path, sep=r"\s+", quotechar='"').T
    names = [str(name) for name in frame.columns]
    obs = pd.DataFrame(index=[str(name) for name in frame.index])
    return anndata.AnnData(frame.to_numpy(np.float32), obs=obs, var=pd.DataFrame(index=names))


def load_task(
    cells: Cells,
    num_genes: int,
    edges: str | None = None,
    pathways: str | None = None,
    only_genes_with_edges: bool = False,
) -> ExpressionTask:
    """Splits the cells, chooses genes and bins on the training cells, and prepares knowledge.

    Args:
        cells: from `read_cells`.
        num_genes: most variable genes to keep.
        edges: edge list, see `read_edges`; without one the knowledge is what is expressed together in the training
            cells.
        pathways: GMT file, or None.
        only_genes_with_edges: choose among the genes that `edges` names, of which a few hundred genes hold few.

    Raises:
        DataError: no edge list to choose genes by; the complaints of the readers.
    """
    given = None if edges is None else read_edges(edges).merged("max")
    if only_genes_with_edges and given is None:
        raise DataError("`only_genes_with_edges` needs `edges`; name an edge list.")
    allowed = set(given.source) | set(given.target) if only_genes_with_edges and given is not None else None
    split = split_cells(cells)
    with warnings.catch_warnings():
        # Most genes of the data are left out on purpose, and some cells then have none.
        warnings.simplefilter("ignore", GeneMatchWarning)
        warnings.filterwarnings("ignore", message=".*express none of the fitted genes", category=CountsWarning)
        tokenizer = choose_genes(cells, split["train"], num_genes, allowed)
        rows = {ties: _rows(cells, split, tokenizer, ties) for ties in TIES}
        known = given if given is not None else _coexpressed(cells, split["train"], tokenizer)
    knowledge = _knowledge(known, None if pathways is None else read_gmt(pathways), tokenizer)
    facts = {
        "cells": {name: len(rows["mid"][name]) for name in SPLITS},
        "left_out": int(cells.counts.n_obs - sum(len(rows["mid"][name]) for name in SPLITS)),
        "genes": len(tokenizer) - len(tokenizer.all_special_ids),
        "genes_per_cell": float(np.median(rows["mid"]["train"]["length"])) - 1,
        "edges": len(knowledge.edges["edges"]),
        "edges_from": "co-expression of the training cells" if given is None else Path(str(edges)).name,
        "pathways": len(knowledge.pathways["pathways"].names) if knowledge.pathways else 0,
        "pathways_from": None if pathways is None else Path(pathways).name,
    }
    return ExpressionTask(tokenizer, rows, knowledge, facts)


def split_cells(cells: Cells) -> dict[str, np.ndarray]:
    """80, 10 and 10 of 100 cells, by row; every label keeps its share."""
    places = np.zeros(cells.counts.n_obs)
    if cells.label_key is None:
        folds = KFold(_FOLDS, shuffle=True, random_state=SPLIT_SEED).split(places)
    else:
        labels = cells.counts.obs[cells.label_key].astype(str).to_numpy()
        with warnings.catch_warnings():
            # A label with fewer cells than folds is in as many as it can be.
            warnings.filterwarnings("ignore", message="The least populated class")
            folds = list(StratifiedKFold(_FOLDS, shuffle=True, random_state=SPLIT_SEED).split(places, labels))
    test, valid, *train = (held_out for _, held_out in folds)
    return {"train": np.sort(np.concatenate(train)), "valid": valid, "test": test}


def choose_genes(cells: Cells, train: np.ndarray, num_genes: int, allowed: set[str] | None) -> GeneTokenizer:
    """A vocabulary of the most variable genes of the training cells."""
    column = cells.settings.get("gene_column")
    names = cells.counts.var_names if column is None else cells.counts.var[column]
    known = [name for name in dict.fromkeys(map(str, names)) if allowed is None or name in allowed]
    # Named, so that the genes do not hang on what is installed.
    rule = {"num_variable_genes": num_genes, "variable_genes_flavor": "seurat"}
    chosen = _processor(cells, GeneTokenizer(genes=known), **rule).fit(cells.counts, train)
    assert chosen.fitted is not None
    return GeneTokenizer(genes=chosen.fitted.genes)


def _processor(cells: Cells, tokenizer: GeneTokenizer, **settings: Any) -> GeneExpressionProcessor:
    return GeneExpressionProcessor(tokenizer, ExpressionSettings(**{**cells.settings, **settings}))


def _rows(cells: Cells, split: Mapping[str, np.ndarray], tokenizer: GeneTokenizer, ties: str) -> dict[str, Dataset]:
    """Cells with two genes or more: one to hide, one to see."""
    processor = _processor(cells, tokenizer, tie_break=ties, min_cell_genes=2).fit(cells.counts, split["train"])
    return {name: processor(cells.counts, split[name]) for name in SPLITS}


def _batches(rows: Dataset, collate: DataCollatorForMaskedExpression) -> list[dict[str, torch.Tensor]]:
    listed = list(rows)
    return [collate(listed[start : start + _EVALUATION_BATCH]) for start in range(0, len(rows), _EVALUATION_BATCH)]


def _coexpressed(cells: Cells, train: np.ndarray, tokenizer: GeneTokenizer) -> Edges:
    whole = {"value": "log1p", "include_zero_genes": True, "append_cls": False}
    rows = _processor(cells, tokenizer, **whole).fit(cells.counts, train)(cells.counts, train)
    ids = rows[0]["input_ids"]
    return coexpression_edges(
        np.array(rows["values"]), tokenizer.convert_ids_to_tokens(ids), top_k=_COEXPRESSED, threshold=_CORRELATION
    )


def _knowledge(edges: Edges, sets: Mapping[str, Sequence[str]] | None, tokenizer: GeneTokenizer) -> Knowledge:
    names = tokenizer.names
    within = edges.take(names.match(list(edges.source)).is_matched & names.match(list(edges.target)).is_matched)
    controls = {"edges": within, "shuffled edges": shuffle_graph(within, SHUFFLE_SEED)} if len(within) else {}
    if not controls:
        raise DataError("`edges` must join genes that were chosen, but none does; choose more `genes`.")
    tables = {name: _table(found, tokenizer) for name, found in controls.items()}
    if sets is None:
        return Knowledge(tables, {})
    chosen = select_pathways(sets, tokenizer)
    return Knowledge(tables, {"pathways": chosen, "shuffled pathways": shuffled_pathways(chosen)})


def _table(edges: Edges, tokenizer: GeneTokenizer) -> GenePrior:
    graph = to_graph(edges, tokenizer)
    source, target = torch.from_numpy(graph.edge_index)
    return GenePrior(source, target, torch.from_numpy(graph.features), len(tokenizer))


def shuffled_pathways(pathways: Pathways) -> Pathways:
    """Other members: every set keeps its size, and every gene the number of sets that it is in."""
    one = np.ones(len(pathways.genes))
    members = Edges(
        np.array([f"set{number}" for number in pathways.pathways], dtype=object),
        np.array([str(gene) for gene in pathways.genes], dtype=object),
        one,
        np.zeros_like(one),
        one,
    )
    genes = shuffle_graph(members, SHUFFLE_SEED).target.astype(np.int64)
    order = np.lexsort((genes, pathways.pathways))
    return Pathways(pathways.names, genes[order], pathways.pathways[order], dict(pathways.matched))
