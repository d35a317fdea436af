"""The ARS1 data: the real files of `logomaker`, and toy files for what must not pass."""

import gzip

import pytest

from genesplice_hf.data import samples
from genesplice_hf.data.samples import load_ars1
from genesplice_hf.data.splits import check_overlap
from genesplice_hf.errors import DataError
from genesplice_hf.genome.alphabet import reverse_complement

SIZES = {"num_train": 300, "num_dev": 40, "num_test": 60}
WILD_TYPE = "ATCTTGTTATTT"


@pytest.fixture(scope="module")
def ars1():
    return load_ars1(**SIZES)


def test_sizes_columns_and_report(ars1):
    assert [len(part) for part in (ars1.train, ars1.dev, ars1.test)] == [300, 40, 60]
    assert ars1.train.column_names == ["sequence", "label"]
    report = ars1.report
    assert report.rows_in == 603_569
    assert report.rows_in == sum(report.rows_out.values()) + report.unlabelled + report.unused


def test_parts_share_nothing_and_both_labels_occur(ars1):
    check_overlap(ars1.train, ars1.test)
    check_overlap(ars1.train, ars1.dev)
    check_overlap(ars1.dev, ars1.test)
    assert 0.45 < sum(ars1.train["label"]) / 300 < 0.65


def test_wild_type_is_on_the_strand_of_the_rows(ars1):
    opposite = reverse_complement(ars1.wild_type)

    def mean_identity(wild_type):
        pairs = [pair for bases in ars1.train["sequence"] for pair in zip(bases, wild_type, strict=True)]
        return sum(left == right for left, right in pairs) / len(pairs)

    assert mean_identity(ars1.wild_type) > 0.8 > 0.4 > mean_identity(opposite)
    # The published file is the other strand; these are its first bases.
    assert opposite.startswith("ATCTTGTTATTTTACAGATT") and len(opposite) == 150


def toy(folder, monkeypatch, table_rows, wild_type=WILD_TYPE, header="library_ct\tselected_ct\tsequence"):
    lines = ["# a comment", header, *("\t".join(map(str, row)) for row in table_rows)]
    (folder / "ars_sequences.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "ars_wt_sequence.txt").write_text(f"# a comment\n{wild_type}\n")
    monkeypatch.setattr(samples, "_logomaker_folder", lambda: folder)


def variant(number):
    letters = list(reverse_complement(WILD_TYPE))
    letters[number % 12] = "ACGT"[("ACGT".index(letters[number % 12]) + 1) % 4]
    return "".join(letters)


COUNTS = [(2, 0), (0, 2), (1, 0), (0, 1), (0, 0), (5, 5), (9, 0), (0, 9)]
TOY = [(library, selected, variant(row)) for row, (library, selected) in enumerate(COUNTS)]


def test_labels_of_a_toy_table(tmp_path, monkeypatch):
    toy(tmp_path, monkeypatch, TOY)
    data = load_ars1(2, 1, 1)
    found = {row["sequence"]: row["label"] for part in (data.train, data.dev, data.test) for row in part}
    assert found == {variant(0): 0, variant(1): 1, variant(6): 0, variant(7): 1}
    assert (data.report.unlabelled, data.report.unused) == (4, 0)


def test_the_seed_decides(tmp_path, monkeypatch):
    toy(tmp_path, monkeypatch, [(2, 0, variant(row)) for row in range(12)])
    first, again, other = (load_ars1(9, 1, 1, seed=seed).train["sequence"] for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wild_type": reverse_complement(WILD_TYPE)}, "another strand"),
        ({"wild_type": WILD_TYPE + "A"}, "as long as"),
        ({"header": "a\tb\tc"}, "must hold the columns"),
        ({"table_rows": [*TOY, TOY[0]]}, "each sequence once"),
    ],
)
def test_other_files_are_refused(tmp_path, monkeypatch, changes, message):
    toy(tmp_path, monkeypatch, **({"table_rows": TOY} | changes))
    with pytest.raises(DataError, match=message):
        load_ars1(2, 1, 1)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (0, 1, 1)])
def test_more_rows_than_there_are(tmp_path, monkeypatch, sizes):
    toy(tmp_path, monkeypatch, TOY)
    with pytest.raises(DataError, match="at most 4 together"):
        load_ars1(*sizes)


def test_truncated_table(tmp_path, monkeypatch):
    toy(tmp_path, monkeypatch, TOY)
    path = tmp_path / "ars_sequences.txt.gz"
    path.write_bytes(path.read_bytes()[:-15])
    with pytest.raises(DataError, match="install `logomaker` again"):
        load_ars1(2, 1, 1)


def test_without_logomaker(monkeypatch):
    monkeypatch.setattr(samples.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install logomaker"):
        load_ars1()
