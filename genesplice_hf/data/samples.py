"""The embedded default data: real measurements that an installed package brings, so nothing is downloaded.

ARS1 is a yeast origin of replication. Cells kept variants of its 150 bp only where the origin still works;
reads were counted in the library before and after that selection (data of the `logomaker` package;
the assay follows Liachko et al., Genome Research 23:698, 2013).
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from datasets import Dataset

from genesplice_hf.data.files import existing_file
from genesplice_hf.data.splits import SplitReport
from genesplice_hf.errors import DataError
from genesplice_hf.genome.alphabet import reverse_complement

_FOLDER = Path("examples") / "datafiles"
_SELECTION_FILE = "ars_sequences.txt.gz"
_WILD_TYPE_FILE = "ars_wt_sequence.txt"
_COLUMNS = ["library_ct", "selected_ct", "sequence"]
# A variant agrees with the wild type in about 0.85 of its bases, with an unrelated sequence in 0.25.
_SMALLEST_IDENTITY = 0.6
_ROWS_FOR_ORIENTATION = 2000


class Ars1(NamedTuple):
    """ARS1 selection data: columns `sequence` (150 bp) and `label` (1 the origin works, 0 it does not).

    Attributes:
        train: rows to learn from; no sequence stands in two parts.
        dev: rows to choose by.
        test: rows to report on.
        wild_type: the natural origin, on the strand of the rows.
        report: what became of the rows of the file.
    """

    train: Dataset
    dev: Dataset
    test: Dataset
    wild_type: str
    report: SplitReport


def load_ars1(num_train: int = 32000, num_dev: int = 4000, num_test: int = 8000, seed: int = 0) -> Ars1:
    """Loads the ARS1 selection data that the `logomaker` package installs.

    A variant is labelled 1 if it has more than one read after selection and none in the library, 0 if it is
    the other way round; all others are left out. The natural ratio of the two is kept.

    Args:
        num_train: rows of the training part.
        num_dev: rows of the development part.
        num_test: rows of the test part.
        seed: the same seed and numbers give the same parts.

    Raises:
        DataError: `logomaker` is not installed or brings other files, or more rows are asked for than exist.
    """
    folder = _logomaker_folder()
    table = _read_selection(existing_file(folder / _SELECTION_FILE))
    wild_type = _read_wild_type(existing_file(folder / _WILD_TYPE_FILE))
    _check_orientation(table["sequence"].head(_ROWS_FOR_ORIENTATION), wild_type)
    labelled = _labelled(table)
    sizes = {"train": num_train, "dev": num_dev, "test": num_test}
    parts = _draw(labelled, sizes, seed)
    report = SplitReport(
        rows_in=len(table),
        rows_out=sizes,
        unlabelled=len(table) - len(labelled),
        unused=len(labelled) - sum(sizes.values()),
    )
    return Ars1(**parts, wild_type=wild_type, report=report)


def _logomaker_folder() -> Path:
    spec = importlib.util.find_spec("logomaker")
    if spec is None or spec.origin is None:
        raise DataError(
            "The ARS1 data come with the `logomaker` package, which is not installed; "
            "run `pip install logomaker` (or `pip install genesplice-hf[plots]`)."
        )
    return Path(spec.origin).parent / _FOLDER


def _read_selection(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, comment="#", sep=r"\s+", compression="gzip")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}); install `logomaker` again.") from error
    if list(table.columns) != _COLUMNS:
        raise DataError(f"{path} must hold the columns {_COLUMNS}, but holds {list(table.columns)}.")
    if not table["sequence"].is_unique:
        raise DataError(f"{path} must hold each sequence once; install the published version of `logomaker`.")
    return table


def _read_wild_type(path: Path) -> str:
    """Returns the wild type on the strand of the selection table, the opposite of the file's own."""
    lines = path.read_text().splitlines()
    return reverse_complement("".join(line.strip() for line in lines if not line.startswith("#")))


def _check_orientation(sequences: pd.Series, wild_type: str) -> None:
    if set(sequences.str.len()) != {len(wild_type)}:
        raise DataError(f"All ARS1 variants must be as long as the wild type ({len(wild_type)} bp).")
    letters = np.frombuffer("".join(sequences).encode(), dtype=np.uint8).reshape(len(sequences), -1)
    identity = (letters == np.frombuffer(wild_type.encode(), dtype=np.uint8)).mean()
    if identity < _SMALLEST_IDENTITY:
        raise DataError(
            f"The ARS1 variants agree with the reverse complement of {_WILD_TYPE_FILE} in only "
            f"{identity:.0%} of their bases; a file is on another strand than expected, install `logomaker` again."
        )


def _labelled(table: pd.DataFrame) -> pd.DataFrame:
    works = (table["selected_ct"] > 1) & (table["library_ct"] == 0)
    fails = (table["library_ct"] > 1) & (table["selected_ct"] == 0)
    clear = works | fails
    return pd.DataFrame({"sequence": table.loc[clear, "sequence"], "label": works[clear].astype(np.int64)})


def _draw(rows: pd.DataFrame, sizes: dict[str, int], seed: int) -> dict[str, Dataset]:
    if min(sizes.values()) < 1 or sum(sizes.values()) > len(rows):
        raise DataError(
            f"`num_train`, `num_dev` and `num_test` must be 1 or more and at most {len(rows):,} together, "
            f"were {list(sizes.values())}."
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    ends = np.cumsum(list(sizes.values()))
    picked = zip(sizes, np.split(order, ends)[: len(sizes)], strict=True)
    return {name: Dataset.from_dict(rows.iloc[part].to_dict("list")) for name, part in picked}
