"""Which gene of a vocabulary does a name mean? Exact names, aliases, symbols and Ensembl ids, with a report."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np

from genesplice_hf.errors import DataError

# Ensembl stable ids, any species, with an optional version: ENSG00000141510.12, ENSMUSG00000059552.
_ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d{11})(\.\d+)?$")
_FEW = 0.5
_SHOWN = 5


class GeneMatchWarning(UserWarning):
    """Many genes of the data are not in the vocabulary."""


@dataclass(frozen=True)
class GeneMatch:
    """What became of a list of gene names.

    Attributes:
        ids: (n,) int64 id of each name, -1 where the vocabulary has none.
        unmatched: the names without an id, in order.
        aliases: name -> token, where they differ (an alias, an Ensembl version or another naming system).
        duplicates: token -> the names that mean it, where there are two or more.
    """

    ids: np.ndarray
    unmatched: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    duplicates: dict[str, list[str]] = field(default_factory=dict)

    @property
    def is_matched(self) -> np.ndarray:
        """(n,) bool."""
        return self.ids >= 0

    @property
    def fraction(self) -> float:
        """Share of the names that have an id; 0 for no names."""
        return float(self.is_matched.mean()) if len(self.ids) else 0.0

    def summary(self) -> str:
        """One line for a log."""
        first = ", ".join(self.unmatched[:_SHOWN]) + (", ..." if len(self.unmatched) > _SHOWN else "")
        missing = f"; not in the vocabulary: {first}" if self.unmatched else ""
        return (
            f"{int(self.is_matched.sum())} of {len(self.ids)} genes matched ({self.fraction:.1%}), "
            f"{len(self.aliases)} by another name, {len(self.duplicates)} named more than once{missing}"
        )

    def check(self, min_match: float = 0.0) -> None:
        """Raises where nothing, or less than asked for, was matched; warns where less than half was.

        Raises:
            DataError: no name is in the vocabulary, or fewer than the share `min_match`.
        """
        if not self.is_matched.any():
            raise DataError(
                f"`genes` must name genes of the vocabulary, but none of {len(self.ids)} does (the first are "
                f"{self.unmatched[:_SHOWN]}); choose the column that holds the symbols or Ensembl ids the vocabulary "
                "uses, or give a map between the two."
            )
        if self.fraction < min_match:
            raise DataError(f"`min_match` is {min_match}, but only {self.summary()}.")
        if self.fraction < _FEW:
            warnings.warn(f"only {self.summary()}.", GeneMatchWarning, stacklevel=3)


class GeneNames:
    """Resolves names in this order: exact, alias, Ensembl id without version, the other naming system.

    Args:
        tokens: name -> id of the vocabulary's genes.
        aliases: old name -> present name.
        ensembl: symbol -> Ensembl id, used in both directions.
    """

    def __init__(
        self,
        tokens: Mapping[str, int],
        aliases: Mapping[str, str] | None = None,
        ensembl: Mapping[str, str] | None = None,
    ) -> None:
        self.tokens = tokens
        self.aliases = dict(aliases or {})
        self.ensembl = {symbol: without_version(gene) for symbol, gene in (ensembl or {}).items()}
        self.symbols = {gene: symbol for symbol, gene in self.ensembl.items()}

    def token(self, name: str) -> str | None:
        """The token that `name` means, None where there is none."""
        return next((other for other in self._readings(str(name).strip()) if other in self.tokens), None)

    def _readings(self, name: str) -> list[str]:
        plain = without_version(name)
        readings = [name, plain]
        for known in (name, plain):
            readings += [other for table in (self.aliases, self.symbols, self.ensembl) if (other := table.get(known))]
        # An alias may stand for a symbol where the vocabulary holds Ensembl ids, and the other way round.
        return readings + [
            other for known in readings[2:] for table in (self.ensembl, self.symbols) if (other := table.get(known))
        ]

    def match(self, names: Sequence[str]) -> GeneMatch:
        """Ids of `names` with the report of what was not found, found under another name, or found twice."""
        found = [self.token(name) for name in names]
        ids = np.array([-1 if token is None else self.tokens[token] for token in found], dtype=np.int64)
        by_token: dict[str, list[str]] = {}
        for name, token in zip(names, found, strict=True):
            if token is not None:
                by_token.setdefault(token, []).append(str(name))
        return GeneMatch(
            ids,
            [str(name) for name, token in zip(names, found, strict=True) if token is None],
            {str(name): token for name, token in zip(names, found, strict=True) if token not in (None, str(name))},
            {token: given for token, given in by_token.items() if len(given) > 1},
        )


def without_version(name: str) -> str:
    """An Ensembl gene id without its version; any other name as it is."""
    found = _ENSEMBL.match(name)
    return found.group(1) if found else name


def read_pairs(path: str | PathLike[str], columns: tuple[str, str]) -> dict[str, str]:
    """Reads a table of two columns split by tabs, first -> second; `#` begins a comment, and a header is known.

    Raises:
        DataError: a line without two columns, or a name with two meanings.
    """
    pairs: dict[str, str] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        cells = [cell.strip() for cell in line.split("\t")]
        if not line.strip() or line.startswith("#") or tuple(cells[:2]) == columns:
            continue
        if len(cells) < 2 or not cells[0] or not cells[1]:
            raise DataError(f"`{path}` must hold {columns[0]} TAB {columns[1]}, line {number} is {line!r}.")
        if pairs.setdefault(cells[0], cells[1]) != cells[1]:
            raise DataError(f"`{path}` gives {cells[0]!r} two meanings, the second in line {number}; keep one.")
    return pairs


def write_pairs(path: Path, columns: tuple[str, str], pairs: Mapping[str, str]) -> None:
    """Writes what `read_pairs` reads."""
    lines: Iterable[str] = ("\t".join(pair) for pair in [columns, *pairs.items()])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
