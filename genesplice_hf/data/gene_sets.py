"""Gene sets: GMT files, and the choice of sets that become a model's pathways."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np

from genesplice_hf.data.files import open_binary
from genesplice_hf.errors import DataError
from genesplice_hf.tokenization.tokenization_gene import GeneTokenizer

PATHWAYS_FILE = "pathways.json"


def read_gmt(path: str | PathLike[str]) -> dict[str, list[str]]:
    """Reads a GMT file (plain or gzip): one set a line, name TAB description TAB gene TAB gene ...

    Fields are split at tabs only, for names hold spaces and brackets; empty fields are dropped, the description may be
    empty, and a gene stands once in its set.

    Returns:
        {name: genes}, in the order of the file.

    Raises:
        DataError: a line with fewer than two tabs, a name that is empty or comes twice, or no set at all.
    """
    sets: dict[str, list[str]] = {}
    with open_binary(path) as stream:
        for number, line in enumerate(stream.read().decode("utf-8").splitlines(), 1):
            if not line.strip():
                continue
            name, *rest = line.split("\t")
            if not name.strip() or not rest:
                raise DataError(
                    f"`path` ({Path(path).name}) must hold name TAB description TAB genes, but line {number} is "
                    f"{line[:60]!r}."
                )
            if name in sets:
                raise DataError(f"`path` ({Path(path).name}) names the set {name!r} twice, again in line {number}.")
            sets[name] = list(dict.fromkeys(gene.strip() for gene in rest[1:] if gene.strip()))
    if not sets:
        raise DataError(f"`path` ({Path(path).name}) holds no gene set.")
    return sets


@dataclass(frozen=True)
class Pathways:
    """Chosen gene sets with their genes as ids.

    Attributes:
        names: of P sets, by name.
        genes: (nnz,) ids of members, set after set.
        pathways: (nnz,) number of the set of each member.
        matched: name -> how many of its genes the vocabulary has, of the chosen sets.
        dropped: name -> why it was left out.
    """

    names: list[str]
    genes: np.ndarray
    pathways: np.ndarray
    matched: dict[str, int]
    dropped: dict[str, str] = field(default_factory=dict)

    def save(self, folder: str | PathLike[str]) -> None:
        """Writes `pathways.json`: the names with matched counts, and the sets that were left out."""
        content = {"names": self.names, "matched": self.matched, "dropped": self.dropped}
        (Path(folder) / PATHWAYS_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def select_pathways(
    sets: Mapping[str, Sequence[str]],
    tokenizer: GeneTokenizer,
    min_genes: int = 5,
    max_genes: int = 300,
    max_pathways: int = 300,
) -> Pathways:
    """Chooses the sets that a model can use.

    Kept are sets with `min_genes` to `max_genes` genes of the vocabulary, of these the `max_pathways` largest (ties by
    name), in the order of their names.

    Raises:
        DataError: no set is left.
    """
    if not 1 <= min_genes <= max_genes or max_pathways < 1:
        raise DataError(
            f"`min_genes` ({min_genes}) must lie in 1..`max_genes` ({max_genes}), and `max_pathways` ({max_pathways}) "
            "be at least 1."
        )
    names, dropped = tokenizer.names, {}
    members: dict[str, np.ndarray] = {}
    for name, genes in sets.items():
        ids = names.match(genes).ids
        found = np.unique(ids[ids >= 0])
        if not min_genes <= len(found) <= max_genes:
            dropped[name] = f"{len(found)} of {len(genes)} genes in the vocabulary, outside {min_genes}..{max_genes}"
        else:
            members[name] = found
    chosen = sorted(sorted(members, key=lambda name: (-len(members[name]), name))[:max_pathways])
    dropped |= dict.fromkeys(members.keys() - set(chosen), f"not among the {max_pathways} largest")
    if not chosen:
        raise DataError(
            f"`sets` must hold a set with {min_genes} to {max_genes} genes of the vocabulary, but none of {len(sets)} "
            "has; lower `min_genes`, or check that names and vocabulary are of one kind."
        )
    sizes = [len(members[name]) for name in chosen]
    return Pathways(
        chosen,
        np.concatenate([members[name] for name in chosen]),
        np.repeat(np.arange(len(chosen)), sizes),
        dict(zip(chosen, sizes, strict=True)),
        dropped,
    )


def gene_annotations(
    annotations: Mapping[str, Iterable[str]], tokenizer: GeneTokenizer, min_genes: int = 5, max_share: float = 0.2
) -> Pathways:
    """Terms as a gene x term table: term -> genes, with terms of too few or too many genes dropped.

    Args:
        annotations: gene -> terms, as `ontology.propagated` gives them.
        tokenizer: the vocabulary.
        min_genes, max_share: a term needs so many genes, and at most this share of the annotated ones.

    Returns:
        The terms in the manner of pathways: `genes` and `pathways` are the pairs of the table.
    """
    by_term: dict[str, list[str]] = {}
    for gene, terms in annotations.items():
        for term in terms:
            by_term.setdefault(term, []).append(gene)
    most = max(int(max_share * len(annotations)), min_genes)
    return select_pathways(by_term, tokenizer, min_genes, most, max_pathways=max(len(by_term), 1))
