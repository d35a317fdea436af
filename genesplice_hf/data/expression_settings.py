"""The steps from a matrix of counts to the tokens of a cell, as one object that is saved with the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from genesplice_hf.errors import DataError
from genesplice_hf.tokenization.value_binning import MIN_BINS, TIE_BREAKS, TieBreak


@dataclass(frozen=True)
class ExpressionSettings:
    """The steps from a matrix to tokens, in their order.

    Attributes:
        layer, gene_column: which matrix, and which column of `var` names its genes; see `open_cells`.
        batch_key, label_key: columns of `obs` that become `batch_labels` and `cell_type_labels`.
        obs_columns: further columns of `obs` that are handed on as they are.
        check_counts: warn where counts are expected and the values are none.
        min_match: smallest share of genes that the vocabulary must know.
        min_gene_counts: genes with fewer counts in all training cells are left out; 0 = keep all.
        min_cell_genes: cells with fewer expressed genes are left out; 0 = keep all.
        num_variable_genes: keep so many most variable genes of the training cells; None = all.
        variable_genes_flavor: scanpy's rule for them: "seurat_v3" on counts (needs scikit-misc), "seurat" on logs, or
            "auto": the former where scikit-misc is installed. The fitted state says which was taken.
        target_sum: every cell is scaled to so many counts; None = not at all.
        size_factor_key: column of `obs` with each cell's counts, for panels that hold a part of them; None = the
            counts in the matrix, of all its genes.
        log1p: take log(1 + x).
        value: "bin" (quantile digits), "log1p" (the values of the step before), "rank" (average rank / number of
            expressed genes, in (0, 1]), or "counts" (as they stand in the matrix).
        n_bins, tie_break, seed: see `bin_values`.
        mask_value, pad_value: what collators write; kept here so that model and data agree.
        include_zero_genes: genes with value 0 are tokens as well.
        append_cls: every cell begins with `<cls>`, whose value is 0.
        store_bin_edges: adds `bin_edges`, which lead back from digits to values.
    """

    layer: str = "X"
    gene_column: str | None = None
    batch_key: str | None = None
    label_key: str | None = None
    obs_columns: Sequence[str] = ()
    check_counts: bool = True
    min_match: float = 0.0
    min_gene_counts: int = 3
    min_cell_genes: int = 0
    num_variable_genes: int | None = None
    variable_genes_flavor: Literal["auto", "seurat", "seurat_v3"] = "auto"
    target_sum: float | None = 1e4
    size_factor_key: str | None = None
    log1p: bool = True
    value: Literal["bin", "log1p", "rank", "counts"] = "bin"
    n_bins: int = 51
    tie_break: TieBreak = "mid"
    seed: int = 0
    mask_value: float = -1
    pad_value: float = -2
    include_zero_genes: bool = False
    append_cls: bool = True
    store_bin_edges: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "obs_columns", tuple(self.obs_columns))
        if self.value not in ("bin", "log1p", "rank", "counts"):
            raise DataError(f"`value` must be 'bin', 'log1p', 'rank' or 'counts', got {self.value!r}.")
        if self.variable_genes_flavor not in ("auto", "seurat", "seurat_v3"):
            raise DataError(
                f"`variable_genes_flavor` must be 'auto', 'seurat' or 'seurat_v3', got {self.variable_genes_flavor!r}."
            )
        if self.tie_break not in TIE_BREAKS:
            raise DataError(f"`tie_break` must be one of {', '.join(TIE_BREAKS)}, got {self.tie_break!r}.")
        if self.n_bins < MIN_BINS:
            raise DataError(f"`n_bins` must be {MIN_BINS} or more, got {self.n_bins}.")
        if self.target_sum is not None and self.target_sum <= 0:
            raise DataError(f"`target_sum` must be above 0, or None for none, got {self.target_sum}.")
        if self.size_factor_key is not None and self.target_sum is None:
            raise DataError("`size_factor_key` needs `target_sum`; set it, or leave the key out.")
        if self.num_variable_genes is not None and self.num_variable_genes < 1:
            raise DataError(f"`num_variable_genes` must be 1 or more, or None for all, got {self.num_variable_genes}.")
        if self.store_bin_edges and self.value != "bin":
            raise DataError(f"`store_bin_edges` needs `value='bin'`, got {self.value!r}.")

    @property
    def expects_counts(self) -> bool:
        return self.check_counts and (self.log1p or self.target_sum is not None)
