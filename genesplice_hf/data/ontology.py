"""Gene Ontology: OBO terms, GAF annotations, and the true-path rule: a gene of a term is of its ancestors too."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from genesplice_hf.data.files import open_binary
from genesplice_hf.errors import DataError

_PARENTS = ("is_a", "part_of")
_GAF_COLUMNS = 15


@dataclass(frozen=True)
class Ontology:
    """Terms and their parents.

    Attributes:
        names: term id -> name.
        parents: term id -> ids one step up (`is_a` and `part_of`).
        alternatives: outdated id -> present id.
    """

    names: dict[str, str]
    parents: dict[str, tuple[str, ...]]
    alternatives: dict[str, str]

    def ancestors(self, term: str) -> set[str]:
        """The term and everything above it; an unknown term has none."""
        found: set[str] = set()
        waiting = [self.alternatives.get(term, term)]
        while waiting:
            term = waiting.pop()
            if term in self.names and term not in found:
                found.add(term)
                waiting += self.parents[term]
        return found


def read_obo(path: str | PathLike[str]) -> Ontology:
    """Reads the terms of an OBO file (plain or gzip); obsolete terms are left out.

    Raises:
        DataError: no term.
    """
    names: dict[str, str] = {}
    parents: dict[str, tuple[str, ...]] = {}
    alternatives: dict[str, str] = {}
    for stanza in _stanzas(path):
        if stanza.get("is_obsolete") == ["true"] or "id" not in stanza:
            continue
        term = stanza["id"][0]
        names[term] = stanza.get("name", [term])[0]
        up = [value.split()[0] for value in stanza.get("is_a", [])]
        relations = (value.split() for value in stanza.get("relationship", []))
        up += [words[1] for words in relations if len(words) > 1 and words[0] in _PARENTS]
        parents[term] = tuple(up)
        alternatives |= dict.fromkeys(stanza.get("alt_id", []), term)
    if not names:
        raise DataError(f"`path` ({Path(path).name}) holds no [Term]; give an OBO file.")
    return Ontology(names, parents, alternatives)


def read_gaf(
    path: str | PathLike[str], evidence: Collection[str] | None = None, aspect: str | None = None
) -> dict[str, set[str]]:
    """Reads a GAF 2 file (plain or gzip): symbol -> annotated terms.

    Args:
        path: the file.
        evidence: codes to take ("EXP", "IDA", ...); None = all.
        aspect: "P", "F" or "C"; None = all.

    Raises:
        DataError: a line with too few columns, or nothing annotated. Annotations with NOT are skipped.
    """
    found: dict[str, set[str]] = {}
    for number, line in enumerate(_lines(path), 1):
        if line.startswith("!") or not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) < _GAF_COLUMNS:
            raise DataError(
                f"`path` ({Path(path).name}) must have {_GAF_COLUMNS} or more columns split by tabs (GAF 2), line "
                f"{number} has {len(cells)}."
            )
        symbol, qualifier, term, code, kind = cells[2], cells[3], cells[4], cells[6], cells[8]
        is_wanted = (evidence is None or code in evidence) and (aspect is None or kind == aspect)
        if is_wanted and "NOT" not in qualifier.split("|") and symbol:
            found.setdefault(symbol, set()).add(term)
    if not found:
        raise DataError(f"`path` ({Path(path).name}) annotates no gene with this `evidence` and `aspect`.")
    return found


def propagated(annotations: Mapping[str, Collection[str]], ontology: Ontology) -> dict[str, set[str]]:
    """Gene -> its terms and all their ancestors; terms that the ontology lacks are dropped."""
    above: dict[str, set[str]] = {}
    found = {}
    for gene, terms in annotations.items():
        for term in terms:
            if term not in above:
                above[term] = ontology.ancestors(term)
        found[gene] = set().union(*(above[term] for term in terms))
    return found


def _stanzas(path: str | PathLike[str]) -> Iterator[dict[str, list[str]]]:
    """The [Term] blocks as tag -> values, without comments after `!`."""
    current: dict[str, list[str]] | None = None
    for line in _lines(path):
        text = line.split(" ! ")[0].strip()
        if text.startswith("["):
            if current:
                yield current
            current = {} if text == "[Term]" else None
        elif current is not None and ": " in text:
            tag, value = text.split(": ", 1)
            current.setdefault(tag, []).append(value.strip())
    if current:
        yield current


def _lines(path: str | PathLike[str]) -> list[str]:
    with open_binary(path) as stream:
        return stream.read().decode("utf-8").splitlines()
