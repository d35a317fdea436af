"""Baselines: counting against a slow twin, and regressions that find what was planted."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genesplice_hf.errors import DataError
from training import baselines
from training.baselines import LabelledSequences


def slow_frequencies(sequence: str, k: int) -> np.ndarray:
    words = [sequence[i : i + k].upper().replace("U", "T") for i in range(len(sequence) - k + 1)]
    counts = Counter(word for word in words if set(word) <= set("ACGT"))
    total = max(1, sum(counts.values()))
    return np.array([counts["".join(word)] / total for word in product("ACGT", repeat=k)])


@given(st.lists(st.text("ACGTNacgtuR", max_size=12), min_size=1, max_size=5), st.integers(1, 4))
def test_kmer_frequencies_equal_the_slow_twin(sequences, k):
    expected = np.array([slow_frequencies(sequence, k) for sequence in sequences])
    np.testing.assert_allclose(baselines.kmer_frequencies(sequences, k), expected, atol=1e-7)


def test_rows_do_not_depend_on_the_chunk(monkeypatch):
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACGTN"), rng.integers(1, 30))) for _ in range(20)]
    whole = baselines.kmer_frequencies(sequences, 3)
    monkeypatch.setattr(baselines, "_ROWS_AT_ONCE", 7)
    np.testing.assert_array_equal(baselines.kmer_frequencies(sequences, 3), whole)


def test_onehot_by_hand():
    code = baselines.onehot(["ACN", "tGA"])
    np.testing.assert_array_equal(code[0].reshape(3, 4), [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(code[1].reshape(3, 4), [[0, 0, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0]])


def toy(num_rows, seed, length=30):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACGT"), length)) for _ in range(num_rows)]


def test_onehot_finds_position_and_kmers_find_content():
    train, test = toy(600, 0), toy(300, 1)
    at_five = [np.array([int(s[5] in "AG") for s in part]) for part in (train, test)]
    results = baselines.run_baselines(LabelledSequences(train, at_five[0]), LabelledSequences(test, at_five[1]), k=2)
    assert results["one-hot logistic regression"]["auroc"] > 0.99
    assert results["2-mer logistic regression"]["auroc"] < 0.75
    rich = [np.array([int(s.count("GC") > 1) for s in part]) for part in (train, test)]
    results = baselines.run_baselines(LabelledSequences(train, rich[0]), LabelledSequences(test, rich[1]), k=2)
    assert results["2-mer logistic regression"]["auroc"] > 0.97
    assert results["one-hot logistic regression"]["auroc"] < 0.75


def test_majority_scores_the_commonest_class():
    train = LabelledSequences(["A"] * 4, np.array([0, 1, 1, 1]))
    test = LabelledSequences(["A"] * 5, np.array([0, 0, 1, 1, 1]))
    metrics = baselines.majority(train, test)
    assert metrics["accuracy"] == pytest.approx(0.6)
    assert metrics["mcc"] == 0
    assert metrics["auroc"] == pytest.approx(0.5)


def test_three_classes_and_a_class_that_train_lacks():
    sequences = ["AAAA", "CCCC", "GGGG"] * 10
    classes = np.array([0, 1, 2] * 10)
    table = LabelledSequences(sequences, classes)
    assert baselines.kmer_logistic_regression(table, table, k=1)["accuracy"] == 1
    part = LabelledSequences(sequences[:2], classes[:2])
    assert baselines.kmer_logistic_regression(part, table, k=1)["accuracy"] == pytest.approx(2 / 3)


def test_multi_label_and_regression():
    train, test = toy(400, 2), toy(200, 3)

    def labels(part):
        return np.array([[int(s[0] == "A"), int(s[1] in "CG")] for s in part])

    results = baselines.run_baselines(LabelledSequences(train, labels(train)), LabelledSequences(test, labels(test)))
    assert results["one-hot logistic regression"]["auroc"] > 0.99

    def content(part):
        return np.array([s.count("G") + s.count("C") for s in part], dtype=float)

    values = [LabelledSequences(part, content(part)) for part in (train, test)]
    results = baselines.run_baselines(*values, regression=True, k=1)
    assert results["1-mer ridge regression"]["pearson"] > 0.99
    assert results["mean value"]["r2"] == pytest.approx(0, abs=0.05)
    assert np.isnan(results["mean value"]["pearson"])


def test_unequal_lengths_have_no_onehot_baseline(caplog):
    table = LabelledSequences(["ACGT", "ACGTA"] * 5, np.array([0, 1] * 5))
    with caplog.at_level("INFO", logger="training.baselines"):
        results = baselines.run_baselines(table, table, k=1)
    assert list(results) == ["majority", "1-mer logistic regression"]
    assert "No one-hot baseline" in caplog.text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: baselines.kmer_frequencies(["A"], 0), r"1\.\.8"),
        (lambda: baselines.kmer_frequencies([]), "at least one"),
        (lambda: baselines.kmer_frequencies(["AÄ"]), "ASCII"),
        (lambda: baselines.onehot(["A", "AC"]), "one length"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(DataError, match=message):
        call()
