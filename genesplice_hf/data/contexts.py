"""What a cell is called, as text or as a vector: context strings, biotype tables, keys of cached embeddings."""

import csv
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import NamedTuple

from genesplice_hf.data.embedding_store import EncoderIdentity
from genesplice_hf.data.files import existing_file
from genesplice_hf.errors import DataError

logger = logging.getLogger(__name__)

_ABSENT = frozenset({"", "na", "nan", "none", "n/a", "-"})


class Cell(NamedTuple):
    """A ReMap biotype: the cell type, and what was done to it (`""` for nothing)."""

    cell: str
    modifications: str

    @classmethod
    def parse(cls, biotype: str) -> "Cell":
        """Splits `MCF-7_E2_10nM` at its first underscore; further ones become blanks."""
        cell, _, modifications = biotype.partition("_")
        return cls(cell, modifications.replace("_", " ").strip())


class ContextStrings:
    """Writes `"cell type: MCF-7 | E2 | endoderm | cancer"` for a biotype.

    Args:
        metadata: biotype -> values to append, from `read_biotypes`; looked up by the whole name, then by the cell.

    Attributes:
        unknown: biotypes that the metadata did not hold; they go without its columns.
    """

    def __init__(self, metadata: Mapping[str, Sequence[str]] | None = None) -> None:
        self._metadata = {name.lower(): tuple(values) for name, values in (metadata or {}).items()}
        self.unknown: set[str] = set()

    def __call__(self, biotype: str) -> str:
        """The context of a biotype as text."""
        cell = Cell.parse(biotype)
        values = self._metadata.get(biotype.lower(), self._metadata.get(cell.cell.lower()))
        if values is None and self._metadata:
            self.unknown.add(biotype)
        return " | ".join([f"cell type: {cell.cell}", *filter(None, (cell.modifications, *(values or ())))])


def read_biotypes(
    path: str | PathLike[str],
    columns: Sequence[str] = ("germ_layer", "cellline_cat"),
    key: str = "biotype",
) -> dict[str, tuple[str, ...]]:
    """Reads what is known of each biotype from a table with a header; comma, tab or semicolon is found out.

    Args:
        path: the table.
        columns: whose values to take, in this order; empty cells (also `NA`, `none`, `-`) are left out.
        key: column of biotypes.

    Raises:
        DataError: the file is absent or has no such column.
    """
    with existing_file(path).open(encoding="utf-8-sig", newline="") as stream:
        header = stream.readline()
        stream.seek(0)
        delimiter = max("\t,;", key=header.count)
        reader = csv.DictReader(stream, delimiter=delimiter)
        for name in (key, *columns):
            if name not in (reader.fieldnames or ()):
                raise DataError(f"{path} must have the column {name!r}; it has {reader.fieldnames}.")
        return {row[key].strip(): _filled(row, columns) for row in reader if (row[key] or "").strip()}


def _filled(row: Mapping[str, str | None], columns: Sequence[str]) -> tuple[str, ...]:
    values = ((row[column] or "").strip() for column in columns)
    return tuple(value for value in values if value.lower() not in _ABSENT)


def context_key(text: str, identity: EncoderIdentity) -> str:
    """SHA-256 of a text together with everything that decides its vector.

    Two encoders, revisions, poolings, lengths or layers never share a key.
    """
    facts = [text, identity.name, identity.revision, identity.pooling, identity.max_length, identity.layer]
    return hashlib.sha256(json.dumps(facts).encode("utf-8")).hexdigest()
