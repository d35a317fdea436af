"""Splits: parts share nothing, no row is lost without being counted, and worked examples."""

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from genesplice_hf.data.splits import (
    SplitReport,
    check_overlap,
    deduplicate,
    random_split,
    remove_overlap,
    split_by_chromosome,
)
from genesplice_hf.errors import DataError
from genesplice_hf.genome.alphabet import reverse_complement

# Few short sequences, so that equal ones and opposite strands are common.
sequences = st.lists(st.text("ACac", min_size=1, max_size=2), min_size=1, max_size=30)
labelled = st.lists(st.tuples(st.text("ACGT", min_size=1, max_size=2), st.integers(0, 1)), max_size=30)
quick = settings(max_examples=60, deadline=None)


def rows(*pairs):
    return Dataset.from_dict(
        {"sequence": [pair[0] for pair in pairs], "label": [pair[1] for pair in pairs], "row": list(range(len(pairs)))}
    )


def plain(texts):
    return Dataset.from_dict({"sequence": texts, "row": list(range(len(texts)))})


def forms(sequence, both_strands):
    upper = sequence.upper()
    return {upper, reverse_complement(upper)} if both_strands else {upper}


def balance(report):
    lost = report.duplicates + report.conflicts + report.overlaps + report.unlabelled + report.unused
    return report.rows_in - lost == sum(report.rows_out.values())


TABLE = (("AC", 0), ("GT", 1), ("ac", 0), ("TT", 0), ("TT", 1), ("AC", 0), ("TT", 0))


@pytest.mark.parametrize(
    ("options", "kept", "duplicates", "conflicts"),
    [
        ({}, [0, 1], 2, 3),
        ({"conflicting_labels": "keep_first"}, [0, 1, 3], 3, 1),
        # AC and GT are opposite strands of one sequence, with labels 0 and 1.
        ({"both_strands": True}, [], 0, 7),
        ({"both_strands": True, "conflicting_labels": "keep_first"}, [0, 3], 3, 2),
        ({"label_column": "absent"}, [0, 1, 3], 4, 0),
    ],
)
def test_deduplicate_worked_example(options, kept, duplicates, conflicts):
    dataset, report = deduplicate(rows(*TABLE), **options)
    assert dataset["row"] == kept
    assert (report.duplicates, report.conflicts) == (duplicates, conflicts)
    assert balance(report)


def test_conflicts_can_be_an_error():
    with pytest.raises(DataError, match=r"1 sequences.*first in row 4"):
        deduplicate(rows(*TABLE), conflicting_labels="error")
    assert len(deduplicate(rows(*TABLE[:4]), conflicting_labels="error").dataset) == 3


@quick
@given(labelled.filter(bool), st.booleans())
def test_deduplicate_equals_the_slow_twin(pairs, both_strands):
    dataset, report = deduplicate(rows(*pairs), both_strands=both_strands)
    groups = [
        [row for row, (other, _) in enumerate(pairs) if forms(other, both_strands) == forms(sequence, both_strands)]
        for sequence, _ in pairs
    ]
    expected = [
        row for row, group in enumerate(groups) if row == group[0] and len({pairs[other][1] for other in group}) == 1
    ]
    assert dataset["row"] == expected and balance(report)


def test_list_labels_are_compared():
    pairs = [("AC", [0, 1]), ("AC", [0, 1]), ("GG", [1, 1]), ("GG", [0, 1])]
    dataset, report = deduplicate(rows(*pairs))
    assert dataset["row"] == [0] and (report.duplicates, report.conflicts) == (1, 2)


@quick
@given(sequences, sequences, sequences, st.booleans())
def test_nothing_overlaps_after_removal(train, dev, test, both_strands):
    cleaned, report = remove_overlap(plain(train), plain(dev), plain(test), both_strands=both_strands)
    taken = set().union(*(forms(sequence, both_strands) for sequence in dev + test))
    assert cleaned["row"] == [row for row, bases in enumerate(train) if not forms(bases, both_strands) & taken]
    assert report.overlaps == len(train) - len(cleaned) and balance(report)
    for other in (dev, test):
        check_overlap(cleaned, plain(other), both_strands=both_strands)


def test_check_overlap_says_how_many_and_what_to_do():
    train, test = plain(["AC", "GG"]), plain(["TT", "ac", "GG", "GT"])
    with pytest.raises(DataError, match=r"2 of 4 test rows.*test row 2; call `remove_overlap"):
        check_overlap(train, test)
    with pytest.raises(DataError, match="3 of 4 test rows"):
        check_overlap(train, test, both_strands=True)


def test_remove_overlap_needs_something_to_compare_with():
    with pytest.raises(DataError, match="`others`"):
        remove_overlap(plain(["A"]))


CHROMS = Dataset.from_dict({"chrom": ["chr1", "chr2", "chr1", "chr3", "chr8"], "row": list(range(5))})


def test_split_by_chromosome():
    parts, report = split_by_chromosome(CHROMS, ["chr1", "chr3"])
    assert {name: part["row"] for name, part in parts.items()} == {"train": [1, 4], "test": [0, 2, 3]}
    assert report.rows_out == {"train": 2, "test": 3} and balance(report)


def test_split_by_chromosome_into_named_parts():
    parts, _ = split_by_chromosome(CHROMS, {"dev": ["chr8"], "test": ["chr2"]})
    assert {name: part["row"] for name, part in parts.items()} == {"train": [0, 2, 3], "dev": [4], "test": [1]}


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (["chr88"], "'chr88'.*nearest is 'chr8'"),
        ({"dev": ["chr1"], "test": ["chr1"]}, "choose one"),
        (["chr1", "chr2", "chr3", "chr8"], "'train' would be empty"),
        ([], "'test' would be empty"),
        ("chr1", "must be a list"),
    ],
)
def test_split_by_chromosome_complaints(held_out, message):
    with pytest.raises(DataError, match=message):
        split_by_chromosome(CHROMS, held_out)


FRACTIONS = {"train": 0.8, "dev": 0.1, "test": 0.1}


def test_random_split_of_distinct_sequences_has_the_exact_sizes():
    dataset = plain([f"{'ACGT'[n % 4]}{'A' * n}" for n in range(100)])
    parts, report = random_split(dataset, FRACTIONS, seed=3)
    assert report.rows_out == {"train": 80, "dev": 10, "test": 10}
    assert sorted(row for part in parts.values() for row in part["row"]) == list(range(100))
    assert all(part["row"] == sorted(part["row"]) for part in parts.values())


def test_random_split_follows_the_seed():
    dataset = plain(["A" * n for n in range(1, 101)])
    first, again, other = (random_split(dataset, FRACTIONS, seed)[0]["train"]["row"] for seed in (1, 1, 2))
    assert first == again != other


@quick
@given(st.lists(st.text("ACGTacgt", min_size=1, max_size=3), max_size=18), st.booleans(), st.integers(0, 5))
def test_random_split_shares_no_sequence(texts, both_strands, seed):
    # With more distinct rows than equal ones, neither half can come out empty.
    dataset = plain(texts + ["N" * length for length in range(10, 30)])
    parts, report = random_split(dataset, {"a": 0.5, "b": 0.5}, seed, both_strands=both_strands)
    check_overlap(parts["a"], parts["b"], both_strands=both_strands)
    assert sorted([*parts["a"]["row"], *parts["b"]["row"]]) == dataset["row"] and balance(report)


@pytest.mark.parametrize("fractions", [{}, {"a": 0.5, "b": 0.6}, {"a": 1.5, "b": -0.5}, {"a": 0.9}])
def test_fractions_must_sum_to_one(fractions):
    with pytest.raises(DataError, match="`fractions`"):
        random_split(plain(["A", "C"]), fractions, seed=0)


def test_a_part_that_would_be_empty():
    with pytest.raises(DataError, match="would be empty"):
        random_split(plain(["A", "a", "A"]), {"a": 0.5, "b": 0.5}, seed=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda data: deduplicate(data, column="seq"),
        lambda data: remove_overlap(data, data, column="seq"),
        lambda data: random_split(data, {"a": 1.0}, 0, column="seq"),
        lambda data: check_overlap(data, data, column="seq"),
        lambda data: split_by_chromosome(data, ["chr1"], column="seq"),
    ],
)
def test_unknown_column(call):
    with pytest.raises(DataError, match=r"'seq'; it has \['sequence', 'row'\]"):
        call(plain(["A"]))


def test_unknown_choice():
    with pytest.raises(DataError, match="`conflicting_labels`"):
        deduplicate(plain(["A"]), conflicting_labels="keep_last")


def test_the_report_can_be_read():
    report = SplitReport(5000, {"train": 4000, "test": 900}, duplicates=98, conflicts=2)
    assert str(report) == "5,000 rows: kept train 4,000, test 900; left out 98 duplicates, 2 conflicting labels"
    assert str(SplitReport(1, {"train": 1})) == "1 rows: kept train 1; left out none"
