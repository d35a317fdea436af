"""Names of factors in binding data: which proteins stand behind `SMAD2-3`, `MAX-MYC` or `ESR1_phospho`?

A hyphen joins the subunits of a complex, an underscore starts a modification, and some genes carry a hyphen in
their own name. The rules are fixed and need no table of genes, but a store of proteins settles doubtful names.
"""

from collections.abc import Callable, Collection, Mapping

from genesplice_hf.errors import DataError

# Genes whose own name holds a hyphen, and names under which data sets file another gene.
WHOLE_NAMES = frozenset({"NKX2-1", "NKX2-5", "NKX3-1", "SS18-SSX"})
ALIASES = {"RXR": "RXRA", "SS18-SSX": "Q8IZH1"}


def parse_factor(
    name: str,
    known: Callable[[str], bool] = lambda _: False,
    whole: Collection[str] = (),
    aliases: Mapping[str, str] = ALIASES,
) -> tuple[str, ...]:
    """Splits the name of a factor into the names of its subunits.

    In this order: a name that is `known` as it stands is one protein; what follows the first `_` is a
    modification and goes; a name that is then known, in `whole` or in `WHOLE_NAMES` is one protein; every other
    name is split at its hyphens, where a part of one letter replaces the last letter of the first part
    (`SMAD2-3` is SMAD2 and SMAD3). Aliases are applied to what is not known itself.

    Args:
        name: target as a data set writes it.
        known: whether a gene or accession exists in the user's proteins.
        whole: further names with a hyphen of their own.
        aliases: other name -> gene or accession.

    Raises:
        DataError: the name, or a part of it, is empty.

    Example:
        >>> parse_factor("SMAD2-3"), parse_factor("MAX-MYC_x")
        (('SMAD2', 'SMAD3'), ('MAX', 'MYC'))
    """
    if known(name):
        return (name,)
    base = name.partition("_")[0].strip()
    is_whole = known(base) or base.upper() in WHOLE_NAMES or base in whole
    parts = [base] if is_whole else base.split("-")
    if not all(parts):
        raise DataError(f"The factor name {name!r} has an empty part; write it as GENE, A-B for complexes, GENE_mod.")
    full = [parts[0], *(parts[0][:-1] + part if len(part) == 1 else part for part in parts[1:])]
    return tuple(part if known(part) else aliases.get(part.upper(), part) for part in full)
