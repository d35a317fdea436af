"""Cells x genes as they lie in AnnData: which matrix, which gene names, which cells, and is it counts?

anndata and scanpy come with the extra `rna` and are imported when a file is opened.
"""

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from genesplice_hf.data.files import existing_file, nearest
from genesplice_hf.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData

# Log1p of counts stays below this; counts of a cell's strongest gene rarely do.
_LARGEST_LOG = 30
_CHUNK_CELLS = 1024


class CountsWarning(UserWarning):
    """The matrix can be read, but does not look like what the steps expect."""


def demand_rna() -> None:
    """Raises unless anndata and scanpy are installed.

    Raises:
        DataError: with the command that installs them.
    """
    missing = [name for name in ("anndata", "scanpy") if importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(
            f"reading expression data needs {' and '.join(missing)}; run `pip install genesplice-hf[rna]`."
        )


@dataclass(frozen=True)
class CellMatrix:
    """One matrix of an AnnData, read by rows.

    Attributes:
        adata: where it lies, in memory or backed by its file.
        layer: "X", "raw" or the name of a layer.
        gene_names: name of each column.
        cell_ids: name of each row, unique.
    """

    adata: "AnnData"
    layer: str
    gene_names: list[str]
    cell_ids: list[str]

    def __len__(self) -> int:
        return len(self.cell_ids)

    def rows(self, indices: np.ndarray) -> sparse.csr_matrix:
        """The cells `indices` (increasing) as float64, finite and not negative.

        Raises:
            DataError: NaN, infinity or a negative value, with the first cell that has one.
        """
        found = sparse.csr_matrix(_matrix(self.adata, self.layer)[indices], dtype=np.float64)
        self._check(found, indices)
        return found

    def chunks(self, indices: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """(row indices, their matrix), some cells at a time; all cells for None."""
        wanted = np.arange(len(self)) if indices is None else indices
        for start in range(0, len(wanted), _CHUNK_CELLS):
            part = wanted[start : start + _CHUNK_CELLS]
            yield part, self.rows(part)

    def column(self, key: str, argument: str) -> np.ndarray:
        """A column of `obs`.

        Raises:
            DataError: there is none of this name; `argument` is what the caller passed it as.
        """
        return _column(self.adata.obs, key, argument, "obs")

    def _check(self, counts: sparse.csr_matrix, indices: np.ndarray) -> None:
        bad = ~np.isfinite(counts.data)
        if bad.any():
            raise DataError(
                f"`layer` {self.layer!r} holds NaN or infinity, first in cell {self._cell(counts, bad, indices)!r}; "
                f"repair or drop such cells. {self._others()}"
            )
        bad = counts.data < 0
        if bad.any():
            raise DataError(
                f"`layer` {self.layer!r} holds negative values (smallest {counts.data.min():.3g}, first in cell "
                f"{self._cell(counts, bad, indices)!r}): it was scaled or centred, and is no expression any more. "
                f"{self._others()}"
            )

    def _cell(self, counts: sparse.csr_matrix, bad: np.ndarray, indices: np.ndarray) -> str:
        row = int(np.searchsorted(counts.indptr, np.flatnonzero(bad)[0], side="right")) - 1
        return self.cell_ids[int(indices[row])]

    def _others(self) -> str:
        return f"`layer` may be one of {layer_names(self.adata)}; pass the one that holds raw counts."

    def warn_unless_counts(self, counts: sparse.csr_matrix) -> None:
        """Says why a matrix is probably not raw counts; whole numbers pass."""
        values = counts.data
        broken = values[values != np.round(values)]
        if not broken.size:
            return
        if values.max() < _LARGEST_LOG:
            reason = (
                f"looks log-transformed (values like {broken[0]:.3g}, none above {values.max():.3g}); normalising and "
                "taking log1p again would squeeze it"
            )
        else:
            reason = f"holds values that are no whole numbers ({broken[0]:.5g}); counts are expected here"
        warnings.warn(
            f"`layer` {self.layer!r} {reason}. {self._others()} For values that are final, set `target_sum=None` and "
            "`log1p=False`; `check_counts=False` silences this.",
            CountsWarning,
            stacklevel=4,
        )


@contextmanager
def open_cells(
    source: "AnnData | str | PathLike[str]", layer: str = "X", gene_column: str | None = None, backed: bool = False
) -> Iterator[CellMatrix]:
    """Opens an AnnData, an `.h5ad` file or any other file that `scanpy.read` knows.

    Args:
        source: the object or the path.
        layer: "X", "raw" (`adata.raw`) or a name in `adata.layers`.
        gene_column: column of `var` with the gene names; None = the index.
        backed: leaves the matrix of an `.h5ad` file on disk and reads it by rows.

    Raises:
        DataError: no such file, layer or column; no cell; a file that is no AnnData.
    """
    demand_rna()
    adata, is_ours = _open(source, backed)
    try:
        if not adata.n_obs:
            raise DataError("`source` must hold cells, got none.")
        var = _var(adata, layer)
        names = var.index if gene_column is None else _column(var, gene_column, "gene_column", "var")
        yield CellMatrix(adata, layer, [str(name) for name in names], _unique(adata.obs_names))
    finally:
        if is_ours and adata.isbacked:
            adata.file.close()


def chosen_cells(matrix: CellMatrix, cells: Sequence[Any] | np.ndarray | None, argument: str) -> np.ndarray:
    """(n,) increasing row numbers of a selection: bool mask, row numbers or cell ids; None = all.

    Raises:
        DataError: a mask of another length, a number out of range, an unknown cell, or nothing chosen.
    """
    if cells is None:
        return np.arange(len(matrix))
    wanted = np.asarray(cells)
    if wanted.dtype.kind in "OUS":
        place = {name: index for index, name in enumerate(matrix.cell_ids)}
        unknown = [name for name in wanted.tolist() if name not in place]
        if unknown:
            raise DataError(f"`{argument}` names cells that are not in the data: {unknown[:5]}.")
        wanted = np.array([place[name] for name in wanted.tolist()])
    elif wanted.dtype == bool:
        if wanted.shape != (len(matrix),):
            raise DataError(f"`{argument}` must have one entry per cell, ({len(matrix)},), got {wanted.shape}.")
        wanted = np.flatnonzero(wanted)
    if not wanted.size or wanted.min() < 0 or wanted.max() >= len(matrix):
        raise DataError(f"`{argument}` must choose at least one of the {len(matrix)} cells, by mask, number or name.")
    return np.unique(wanted)


def layer_names(adata: "AnnData") -> list[str]:
    """What `layer` may be for this object."""
    return ["X", *(["raw"] if adata.raw is not None else []), *adata.layers]


def _open(source: Any, backed: bool) -> tuple["AnnData", bool]:
    import anndata
    import scanpy

    if isinstance(source, anndata.AnnData):
        return source, False
    if not isinstance(source, (str, PathLike)):
        raise DataError(f"`source` must be an AnnData or a path, got {type(source).__name__}.")
    path = existing_file(source)
    try:
        if path.suffix == ".h5ad":
            return anndata.read_h5ad(path, backed="r" if backed else None), True
        return scanpy.read(path, cache=False), True
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"`source` ({Path(path).name}) cannot be read as expression data: {error}") from error


def _var(adata: "AnnData", layer: str) -> Any:
    if layer not in layer_names(adata):
        names = layer_names(adata)
        raise DataError(
            f"`layer` must be one of {names}, got {layer!r}; the nearest name is {nearest(layer, names)!r}."
        )
    if layer == "X" and adata.X is None:
        raise DataError(f"`layer` 'X' is empty in this file; pass one of {layer_names(adata)[1:]}.")
    return adata.raw.var if layer == "raw" else adata.var


def _matrix(adata: "AnnData", layer: str) -> Any:
    return adata.X if layer == "X" else adata.raw.X if layer == "raw" else adata.layers[layer]


def _column(table: Any, key: str, argument: str, where: str) -> np.ndarray:
    if key not in table.columns:
        names = list(table.columns)
        hint = f"; the nearest is {nearest(key, names)!r}" if names else ""
        raise DataError(f"`{argument}` must be a column of `{where}`, {names}, got {key!r}{hint}.")
    return table[key].to_numpy()


def _unique(names: Any) -> list[str]:
    """Cell ids; repeated ones get a number, for whatever is random about a cell hangs on its id."""
    given = [str(name) for name in names]
    if len(set(given)) == len(given):
        return given
    warnings.warn("`obs_names` are not unique; repeated ones get a number.", CountsWarning, stacklevel=5)
    taken, seen, found = set(given), {}, []  # type: ignore[var-annotated]
    for name in given:
        number = seen.get(name, -1)
        fresh = name
        while number >= 0 and (fresh := f"{name}-{number + 1}") in taken:
            number += 1
        seen[name] = number + 1
        taken.add(fresh)
        found.append(fresh)
    return found
