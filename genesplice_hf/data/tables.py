"""Labelled tables (csv, tsv, parquet; plain, gzip or bgzip) as rows with the columns `sequence` and `label`.

Row numbers in messages count from 1, after the header, blank lines left out.
"""

import csv
import io
import logging
from os import PathLike
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from datasets import Dataset

from genesplice_hf.data.files import nearest, open_binary
from genesplice_hf.errors import DataError

logger = logging.getLogger(__name__)

ProblemType = Literal["single_label_classification", "regression"]
_PARQUET_MAGIC = b"PAR1"
# pyarrow wants a whole row in one block; this leaves room for windows of megabases.
_BLOCK_BYTES = 1 << 26


def read_table(
    path: str | PathLike[str],
    sequence_column: str = "sequence",
    label_column: str | None = "label",
    problem_type: ProblemType | None = None,
    num_labels: int | None = None,
) -> Dataset:
    """Reads a table of sequences and labels into memory, checks it, and gives its columns their usual names.

    What the file is, is told by its content: gzip and parquet by their first bytes, a tab by the header.

    Args:
        path: csv, tsv or parquet file.
        sequence_column: the column that becomes `sequence` (text, kept as it stands).
        label_column: the column that becomes `label`; `None` reads sequences alone.
        problem_type: `"single_label_classification"` (labels become int64, counted from 0) or
            `"regression"` (float64). Default: classification if every label is a whole number (and
            `num_labels` is not 1), regression otherwise.
        num_labels: number of classes; labels must be smaller.

    Returns:
        A dataset with `sequence`, `label` and the other columns of the table unchanged.

    Raises:
        DataError: the file is damaged or holds no row, a column is missing, or a row has an empty sequence, a
            missing label, or a label that does not fit; the message names the rows.
    """
    if problem_type not in (None, "single_label_classification", "regression"):
        raise DataError(
            f"`problem_type` must be None, 'single_label_classification' or 'regression', was {problem_type!r}."
        )
    chosen = {"sequence": sequence_column} | ({} if label_column is None else {"label": label_column})
    table = _read(path, list(chosen.values()))
    columns = {"sequence": _sequences(table[sequence_column], sequence_column)}
    if label_column is not None:
        columns["label"] = pa.array(_labels(table[label_column], label_column, problem_type, num_labels))
    return Dataset(pa.table(columns | _other_columns(table, chosen, str(path))))


def _read(path: str | PathLike[str], wanted: list[str]) -> pa.Table:
    with open_binary(path) as stream:
        content = stream.read()
    if not content.strip():
        raise DataError(f"{path} is empty; a table needs a header and rows.")
    try:
        is_parquet = content[:4] == _PARQUET_MAGIC
        table = pa.parquet.read_table(pa.BufferReader(content)) if is_parquet else _read_text(content, wanted)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a whole csv, tsv or parquet table: {error}.") from error
    for name in wanted:
        _check_column(table.column_names, name, str(path))
    if not table.num_rows:
        raise DataError(f"{path} holds no row after its header.")
    return table


def _read_text(content: bytes, text_columns: list[str]) -> pa.Table:
    """Reads csv or tsv; `text_columns` stay text, so that the sequence `NA` is not taken for missing."""
    line = io.BytesIO(content).readline().decode("utf-8-sig")
    delimiter = "\t" if "\t" in line else ","
    header = next(csv.reader([line.strip("\r\n")], delimiter=delimiter), [""])
    if len(set(header)) < len(header):
        raise DataError(f"The header of a table must name each column once, was {line!r}.")
    types = {name: pa.large_string() for name in text_columns if name in header}
    return pa.csv.read_csv(
        pa.BufferReader(content),
        read_options=pa.csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
        parse_options=pa.csv.ParseOptions(delimiter=delimiter),
        convert_options=pa.csv.ConvertOptions(column_types=types, strings_can_be_null=False),
    )


def _check_column(present: list[str], name: str, where: str) -> None:
    if present.count(name) != 1:
        raise DataError(
            f"{where} must hold one column {name!r}, but its columns are {present}; "
            f"the nearest name is {nearest(name, present)!r}: pass it as `sequence_column` or `label_column`."
        )


def _other_columns(table: pa.Table, chosen: dict[str, str], where: str) -> dict[str, pa.ChunkedArray]:
    others = [name for name in table.column_names if name not in chosen.values()]
    hidden = [name for name in others if name in chosen]
    if hidden:
        logger.warning("%s: the columns %s are left out, since others take their names.", where, hidden)
    return {name: table[name] for name in others if name not in hidden}


def _sequences(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise DataError(f"The column {name!r} must hold text, but holds {column.type}.")
    empty = np.array([not (text and text.strip()) for text in column.to_pylist()])
    if empty.any():
        raise DataError(f"The column {name!r} is empty in {_rows(empty)}; remove these rows.")
    return column


def _labels(
    column: pa.ChunkedArray, name: str, problem_type: ProblemType | None, num_labels: int | None
) -> np.ndarray:
    cells = column.to_pylist()
    values = pd.to_numeric(pd.Series(cells, dtype=object), errors="coerce").to_numpy(dtype=np.float64)
    unusable = ~np.isfinite(values)
    if unusable.any():
        raise DataError(
            f"The label in column {name!r} is missing or not a number in {_rows(unusable)} "
            f"(the first is {cells[int(unusable.argmax())]!r}); remove the rows, or number classes from 0."
        )
    broken = values != np.round(values)
    if problem_type is None:
        problem_type = "regression" if num_labels == 1 or broken.any() else "single_label_classification"
        logger.info("Column %r is read as %s.", name, problem_type)
    return values if problem_type == "regression" else _classes(values, broken, name, num_labels)


def _classes(values: np.ndarray, broken: np.ndarray, name: str, num_labels: int | None) -> np.ndarray:
    if broken.any():
        raise DataError(
            f"Class labels must be whole numbers, but column {name!r} holds {values[broken][0]:g} in "
            f"{_rows(broken)}; pass `problem_type='regression'` for measured values."
        )
    outside = (values < 0) | (values >= (np.inf if num_labels is None else num_labels))
    if outside.any():
        limit = "0 or more" if num_labels is None else f"0 to {num_labels - 1} (`num_labels` is {num_labels})"
        raise DataError(
            f"Class labels must be {limit}, but column {name!r} holds {values[outside][0]:g} in "
            f"{_rows(outside)}; number the classes from 0."
        )
    return values.astype(np.int64)


def _rows(mask: np.ndarray, shown: int = 5) -> str:
    """Says which rows `mask` marks, the first ones by number."""
    numbers = (np.flatnonzero(mask) + 1).tolist()
    listed = ", ".join(map(str, numbers[:shown]))
    return (
        f"row {listed}"
        if len(numbers) == 1
        else f"rows {listed}{', ...' * (len(numbers) > shown)} ({len(numbers)} in all)"
    )
