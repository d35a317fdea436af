"""Protein sequences by gene or accession, and the subunits of a complex: `ProteinStore`.

Reads one multi-FASTA, or a folder of `GENE.ACCESSION_SPECIES.fasta` files. Nothing here touches the network;
`data/uniprot.py` writes such a FASTA once.
"""

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from genesplice_hf.data.fasta import FastaRecord, iter_fasta
from genesplice_hf.data.files import nearest
from genesplice_hf.data.gene_names import ALIASES, parse_factor
from genesplice_hf.errors import DataError

logger = logging.getLogger(__name__)

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
# Selenocysteine, pyrrolysine and the ambiguity codes: legal letters that encoders were not trained on.
_TO_UNKNOWN = str.maketrans("UZOBJ", "XXXXX")
_LEGAL = frozenset(AMINO_ACIDS + "X")
_SUFFIXES = (".fasta", ".fa", ".faa", ".fasta.gz", ".fa.gz", ".faa.gz")
# sp|P49711|CTCF_HUMAN, and our folder layout CTCF.P49711_HUMAN.
_UNIPROT = re.compile(r"(?P<base>sp|tr)\|(?P<accession>[^|]+)\|(?P<entry>\S*)")
_FOLDER_NAME = re.compile(r"(?P<gene>.+)\.(?P<accession>[^._]+)_(?P<species>[^._]+)")
_GENE_FIELD = re.compile(r"(?:^|\s)GN=(\S+)")
PROTEIN_PAD_ID, PROTEIN_UNKNOWN_ID = 20, 21
_RESIDUE_IDS = np.full(256, PROTEIN_UNKNOWN_ID, dtype=np.int64)
_RESIDUE_IDS[np.frombuffer(AMINO_ACIDS.encode("ascii"), dtype=np.uint8)] = np.arange(len(AMINO_ACIDS))
Choice = Literal["reviewed", "longest", "first"]


class Protein(NamedTuple):
    """One sequence; `species` is lower case (`"human"`, `"mouse"`, ..., `"unknown"`), `reviewed` is Swiss-Prot."""

    accession: str
    gene: str
    species: str
    sequence: str
    reviewed: bool


class Complex(NamedTuple):
    """What a factor name stands for: its subunits in order, and the names that were not found."""

    name: str
    subunits: tuple[Protein, ...]
    missing: tuple[str, ...]


def clean_protein(sequence: str, name: str = "protein") -> str:
    """Returns `sequence` in the 20 letters and X: upper case, U, Z, O, B and J as X, one `*` at the end removed.

    Raises:
        DataError: it is empty, or holds another letter; the position counts from 1.
    """
    cleaned = sequence.strip().upper().removesuffix("*").translate(_TO_UNKNOWN)
    if not cleaned:
        raise DataError(f"The sequence of {name!r} is empty; remove the record, or give its residues.")
    if not _LEGAL.issuperset(cleaned):
        position, letter = next((at, one) for at, one in enumerate(cleaned, start=1) if one not in _LEGAL)
        raise DataError(
            f"The sequence of {name!r} holds {letter!r} at residue {position}; legal are the 20 amino acids, "
            "X for an unknown one (U, Z, O, B and J are read as X) and one `*` at the end; remove gaps and stops."
        )
    return cleaned


def residue_ids(sequence: str) -> np.ndarray:
    """(R,) int64 ids of a cleaned sequence: the 20 amino acids in alphabetical order are 0 to 19, X is 21.

    20 is the padding of a batch.
    """
    return _RESIDUE_IDS[np.frombuffer(sequence.encode("ascii"), dtype=np.uint8)]


class ProteinStore:
    """Proteins by gene (any case) or accession.

    A gene with several entries gives one of the most preferred species: by default the reviewed and canonical
    one, then the longest, the same in every run.

    Args:
        path: a FASTA file, or a folder of them. Headers `sp|P49711|CTCF_HUMAN ... GN=CTCF` (UniProt) and
            `CTCF.P49711_HUMAN` are understood, file names of the latter form too; of any other header the first
            word is gene and accession, and the species is unknown.
        species: preference, most wanted first; other species come after them.
        choose: `"reviewed"`, `"longest"` or `"first"` (in the file).
        sample_isoform: let `get` draw among all entries of the species when a generator is given (training).
        whole, aliases: see `parse_factor`.

    Raises:
        DataError: no such path, an accession with two sequences, illegal residues.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        species: Sequence[str] = ("human", "mouse", "unknown"),
        choose: Choice = "reviewed",
        sample_isoform: bool = False,
        whole: Collection[str] = (),
        aliases: Mapping[str, str] = ALIASES,
    ) -> None:
        if choose not in _ORDERS:
            raise DataError(f"`choose` must be one of {', '.join(_ORDERS)}, was {choose!r}.")
        self.path = Path(path).expanduser()
        self.sample_isoform = sample_isoform
        self._whole, self._aliases = frozenset(whole), dict(aliases)
        self._by_accession: dict[str, Protein] = {}
        genes: dict[str, list[Protein]] = {}
        for protein in _read(self.path):
            self._add(protein)
            genes.setdefault(protein.gene.upper(), []).append(protein)
        rank = {name.lower(): place for place, name in enumerate(species)}
        order = _ORDERS[choose]
        self._by_gene = {
            gene: sorted(entries, key=lambda entry: (rank.get(entry.species, len(rank)), *order(entry)))
            for gene, entries in genes.items()
        }

    def _add(self, protein: Protein) -> None:
        other = self._by_accession.setdefault(protein.accession.upper(), protein)
        if other.sequence != protein.sequence:
            raise DataError(f"{self.path} holds the accession {protein.accession!r} with two sequences; keep one.")

    def __len__(self) -> int:
        return len(self._by_accession)

    def __iter__(self) -> Iterator[Protein]:
        return iter(self._by_accession.values())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name.upper() in self._by_gene or name.upper() in self._by_accession)

    def get(self, name: str, rng: np.random.Generator | None = None) -> Protein:
        """The protein of a gene or an accession.

        Args:
            name: gene or accession, any case.
            rng: with `sample_isoform`, draws among the entries of the preferred species; leave it out in
                evaluation, where the answer must not vary.

        Raises:
            DataError: there is none; the nearest name is told.
        """
        if (found := self._by_accession.get(name.upper())) is not None and name.upper() not in self._by_gene:
            return found
        entries = self._by_gene.get(name.upper())
        if entries is None:
            raise DataError(
                f"No protein is named {name!r} in {self.path}; the nearest gene is "
                f"{nearest(name.upper(), self._by_gene)!r}. Add its sequence to the FASTA, or leave the factor out."
            )
        if rng is None or not self.sample_isoform:
            return entries[0]
        same_species = [entry for entry in entries if entry.species == entries[0].species]
        return same_species[int(rng.integers(len(same_species)))]

    def has(self, factor: str, allow_partial: bool = False) -> bool:
        """Whether `complex(factor)` would find all of its subunits (with `allow_partial`, at least one)."""
        found = [part in self for part in self.names(factor)]
        return any(found) if allow_partial else all(found)

    def names(self, factor: str) -> tuple[str, ...]:
        """The subunits of a factor by name, whether or not they are in the store."""
        return parse_factor(factor, self.__contains__, self._whole, self._aliases)

    def complex(self, factor: str, allow_partial: bool = False, rng: np.random.Generator | None = None) -> Complex:
        """The proteins of a factor, one per subunit.

        Raises:
            DataError: a subunit is not in the store (with `allow_partial`, none is).
        """
        names = self.names(factor)
        missing = tuple(name for name in names if name not in self)
        if len(missing) == len(names) or (missing and not allow_partial):
            raise DataError(
                f"The factor {factor!r} needs {', '.join(names)}, but {self.path} has no {', '.join(missing)}; "
                "add the sequence, leave the factor out, or pass `allow_partial=True` for a part of a complex."
            )
        if missing:
            logger.info("Factor %r goes without %s.", factor, ", ".join(missing))
        return Complex(factor, tuple(self.get(name, rng) for name in names if name not in missing), missing)


def _canonical(protein: Protein) -> bool:
    """UniProt numbers isoforms `P49711-2`; the canonical sequence has no number."""
    return "-" not in protein.accession


_ORDERS: dict[str, Callable[[Protein], tuple]] = {
    "reviewed": lambda one: (not one.reviewed, not _canonical(one), -len(one.sequence), one.accession),
    "longest": lambda one: (-len(one.sequence), one.accession),
    "first": lambda one: (),
}


def _read(path: Path) -> Iterator[Protein]:
    if not path.is_dir():
        yield from (_protein(record, "") for record in iter_fasta(path, letters=None))
        return
    files = sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES))
    if not files:
        raise DataError(f"The folder {path} holds no FASTA file; name them GENE.ACCESSION_SPECIES.fasta.")
    for file in files:
        stem = next(file.name.removesuffix(suffix) for suffix in reversed(_SUFFIXES) if file.name.endswith(suffix))
        records = list(iter_fasta(file, letters=None))
        # The name of a file speaks for its first record only; further ones must name themselves.
        yield from (_protein(record, stem if at == 0 else "") for at, record in enumerate(records))


def _protein(record: FastaRecord, file_stem: str) -> Protein:
    sequence = clean_protein(record.sequence, record.id)
    by_name = _FOLDER_NAME.fullmatch(file_stem) or _FOLDER_NAME.fullmatch(record.id)
    if found := _UNIPROT.fullmatch(record.id):
        gene, _, species = found["entry"].rpartition("_")
        field = _GENE_FIELD.search(record.description)
        gene = by_name["gene"] if by_name else field[1] if field else gene
        return Protein(found["accession"], gene, species.lower() or "unknown", sequence, found["base"] == "sp")
    if by_name:
        return Protein(by_name["accession"], by_name["gene"], by_name["species"].lower(), sequence, False)
    return Protein(record.id, record.id, "unknown", sequence, False)
