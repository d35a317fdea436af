"""Windows with a deletion or an inversion keep their length, and their maps come back to the reference's bins."""

from pathlib import Path

import numpy as np
import pytest

from genesplice_hf.data.fasta import Genome
from genesplice_hf.data.structural_windows import deletion_window, inversion_window, realigned, reference_bins
from genesplice_hf.errors import DataError
from genesplice_hf.genome.alphabet import reverse_complement
from genesplice_hf.genome.interval import Interval

SEQUENCE = "ACGTTGCAAGCTTACGGATCCATTGACCTAGGCATGTTAA"


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    (tmp_path / "toy.fa").write_text(f">one\n{SEQUENCE}\n")
    return Genome(tmp_path / "toy.fa")


WINDOW = Interval("one", 8, 24)


@pytest.mark.parametrize(("extend", "expected"), [("right", SEQUENCE[8:12] + SEQUENCE[16:28]),
                                                  ("symmetric", SEQUENCE[6:12] + SEQUENCE[16:26])])  # fmt: skip
def test_a_deletion_keeps_the_length(genome: Genome, extend: str, expected: str) -> None:
    found = deletion_window(genome, WINDOW, Interval("one", 12, 16), extend)
    assert found.reference == SEQUENCE[8:24]
    assert found.alternative == expected and len(expected) == 16
    assert "".join(SEQUENCE[place] for place in found.source) == expected


def test_an_inversion_is_the_reverse_complement_in_its_place(genome: Genome) -> None:
    found = inversion_window(genome, WINDOW, Interval("one", 12, 20))
    assert found.alternative == SEQUENCE[8:12] + reverse_complement(SEQUENCE[12:20]) + SEQUENCE[20:24]
    assert found.source.tolist() == [*range(8, 12), *range(19, 11, -1), *range(20, 24)]


def test_maps_come_back(genome: Genome) -> None:
    """A map that only names positions is the reference's where the alternative shows a bin."""
    names = np.arange(4.0)
    reference = np.add.outer(names, names)
    gone = reference_bins(deletion_window(genome, WINDOW, Interval("one", 12, 16)), 4)
    assert gone.tolist() == [0, 2, 3, -1]
    shown = np.array([0.0, 2, 3, 9])
    found = realigned(np.add.outer(shown, shown), gone)
    kept = np.ix_([0, 2, 3], [0, 2, 3])
    assert np.array_equal(found[kept], reference[kept])
    assert np.isnan(found[1]).all() and np.isnan(found[:, 1]).all()
    turned = reference_bins(inversion_window(genome, WINDOW, Interval("one", 12, 20)), 4)
    assert turned.tolist() == [0, 2, 1, 3]
    shown = np.array([0.0, 2, 1, 3])
    assert np.array_equal(realigned(np.add.outer(shown, shown), turned), reference)


def test_cropped_maps(genome: Genome) -> None:
    found = reference_bins(deletion_window(genome, WINDOW, Interval("one", 12, 16)), 2, crop=1)
    # Bins 1 .. 6 of 8: bases 8 + 2i; bin i >= 2 of the alternative is bin i + 2 of the reference.
    assert found.tolist() == [0, 3, 4, 5, -1, -1]


def test_bad_windows_are_refused(genome: Genome) -> None:
    with pytest.raises(DataError, match="inside"):
        deletion_window(genome, WINDOW, Interval("one", 4, 10))
    with pytest.raises(DataError, match="inside"):
        inversion_window(genome, WINDOW, Interval("two", 10, 12))
    with pytest.raises(DataError, match="length"):
        deletion_window(genome, Interval("one", 20, 40), Interval("one", 24, 30))
    with pytest.raises(DataError, match="extend='right'"):
        deletion_window(genome, Interval("one", 1, 17), Interval("one", 4, 10), "symmetric")
    with pytest.raises(DataError, match="extend"):
        deletion_window(genome, WINDOW, Interval("one", 12, 16), "left")
    with pytest.raises(DataError, match="bin_bp"):
        reference_bins(inversion_window(genome, WINDOW, Interval("one", 12, 16)), 5)
    with pytest.raises(DataError, match="contact_map"):
        realigned(np.zeros((3, 3)), np.arange(4))
