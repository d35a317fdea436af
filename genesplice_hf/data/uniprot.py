"""Writes the protein sequences of genes from UniProt into one FASTA: the only file of this room that goes online.

`download_proteins` is run once, by hand (`genesplice proteins`); data sets read the FASTA that it wrote.
"""

import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path

from genesplice_hf.errors import DataError

# https://www.uniprot.org/help/api_queries: `stream` gives all results of one query.
_ADDRESS = "https://rest.uniprot.org/uniprotkb/stream"
_GENES_PER_QUERY = 50
_SECONDS = 120


def query_address(genes: Sequence[str], organism_id: int = 9606, reviewed: bool = True) -> str:
    """The address that returns the canonical sequences of `genes` as FASTA."""
    named = " OR ".join(f'gene_exact:"{gene}"' for gene in genes)
    query = f"({named}) AND organism_id:{organism_id}" + " AND reviewed:true" * reviewed
    return f"{_ADDRESS}?{urllib.parse.urlencode({'query': query, 'format': 'fasta'})}"


def download_proteins(
    genes: Iterable[str],
    out: str | PathLike[str],
    organism_id: int = 9606,
    reviewed: bool = True,
    fetch: Callable[[str], bytes] | None = None,
) -> int:
    """Writes the sequences of `genes` to `out` and returns how many records came.

    Args:
        genes: gene names; a name that UniProt does not know gives no record.
        out: FASTA file to write; it must not exist.
        organism_id: NCBI taxon, 9606 human, 10090 mouse.
        reviewed: Swiss-Prot only.
        fetch: address -> content, for another transport; default `urllib`.

    Raises:
        DataError: no genes, `out` exists, no record came, or UniProt cannot be reached.
    """
    names, path = sorted(set(genes)), Path(out).expanduser()
    if not names:
        raise DataError("`genes` must hold at least one name.")
    if path.exists():
        raise DataError(f"`out` must be a new file, but {path} exists; move it away.")
    parts = [names[at : at + _GENES_PER_QUERY] for at in range(0, len(names), _GENES_PER_QUERY)]
    content = b"".join((fetch or _fetch)(query_address(part, organism_id, reviewed)) for part in parts)
    if not content.startswith(b">"):
        raise DataError(f"UniProt has no sequence for {', '.join(names[:5])}; check names and `organism_id`.")
    path.write_bytes(content)
    return content.count(b"\n>") + 1


def _fetch(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS) as answer:
            return answer.read()
    except OSError as error:
        raise DataError(f"UniProt cannot be reached ({error}); try again, or download a FASTA by hand.") from error
