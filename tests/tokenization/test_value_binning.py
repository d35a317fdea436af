"""Binning: scGPT's own results, the mean of the random rule, and the way back."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genesplice_hf.errors import DataError
from genesplice_hf.tokenization.value_binning import (
    TIE_BREAKS,
    bin_edges,
    bin_values,
    cell_uniforms,
    digit_range,
    tie_widths,
    unbin_values,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "scgpt_binning" / "binning.json").read_text())
CASES = [
    pytest.param(case, id=f"{case['name']}-{case['row_dtype']}-{case['n_bins']}")
    for case in GOLDEN["binning"]
    if "raises" not in case
]


def row_of(case: dict) -> np.ndarray:
    return np.array(case["row"], dtype=case["row_dtype"].removeprefix("torch."))


@pytest.mark.parametrize("case", CASES)
def test_digits_of_given_uniforms_are_scgpts(case: dict) -> None:
    row, n_bins = row_of(case), case["n_bins"]
    found = bin_values(row, n_bins, "random", uniforms=np.array(case["uniforms"]))
    assert found.digits.astype(int).tolist() == [int(digit) for digit in case["output"]]
    if case["bin_edges"]:
        np.testing.assert_allclose(found.edges, case["bin_edges"], rtol=1e-6)
        left, right = digit_range(row[row != 0], found.edges)
        assert (left.tolist(), right.tolist()) == (case["left_digits"], case["right_digits"])
        one_sided = bin_values(row, n_bins, "left").digits
        assert one_sided[row != 0].tolist() == case["side_one"]


def test_an_empty_cell_is_all_zeros_for_any_kind_of_row() -> None:
    """The reference fails on a torch row without values."""
    raising = [case for case in GOLDEN["binning"] if "raises" in case]
    assert raising
    for case in raising:
        for rule in TIE_BREAKS:
            found = bin_values(row_of(case), case["n_bins"], rule)
            assert not found.digits.any() and found.edges.tolist() == [0.0] * (case["n_bins"] - 1)


@pytest.mark.parametrize("case", GOLDEN["digitize"])
def test_digits_of_given_edges(case: dict) -> None:
    left, right = digit_range(np.array(case["x"]), np.array(case["bins"]))
    both = np.ceil(np.array(case["uniforms"]) * (right - left) + left)
    assert both.tolist() == case["side_both"] and left.tolist() == case["side_one"]


def test_a_matrix_through_the_preprocessor() -> None:
    case = GOLDEN["preprocessor"]
    stream = iter(case["uniforms"])
    for row, digits, edges in zip(case["matrix"], case["binned"], case["bin_edges"], strict=True):
        draws = np.array([next(stream) for value in row if value])
        found = bin_values(np.array(row), case["n_bins"], "random", uniforms=draws)
        assert found.digits.tolist() == digits
        np.testing.assert_allclose(np.concatenate([[0.0], found.edges]), edges, rtol=1e-6)
    assert next(stream, None) is None


def test_quantiles_are_numpys() -> None:
    random = np.random.default_rng(0)
    for size in (1, 2, 7, 400):
        values = np.round(random.gamma(1.0, 2.0, size), 1) + 0.1
        np.testing.assert_array_equal(bin_edges(values, 51), np.quantile(values, np.linspace(0, 1, 50)))


def test_mid_is_the_mean_of_random() -> None:
    values = np.random.default_rng(1).poisson(1.2, 200).astype(float)
    draws = np.stack([bin_values(values, tie_break="random", cell_id=cell).digits for cell in range(2000)])
    widths = tie_widths(values, bin_values(values).edges)
    error = np.sqrt((widths**2 - 1) / 12 / 2000)
    assert (np.abs(draws.mean(0) - bin_values(values).digits) <= 4 * error).all()
    np.testing.assert_allclose(draws.var(0)[widths > 1], ((widths**2 - 1) / 12)[widths > 1], rtol=0.15)


def test_random_digits_belong_to_the_cell() -> None:
    values = np.random.default_rng(2).poisson(1.0, 100).astype(float)
    first = bin_values(values, tie_break="random", seed=3, cell_id="a").digits
    np.random.seed(9)
    assert np.array_equal(bin_values(values, tie_break="random", seed=3, cell_id="a").digits, first)
    others = [bin_values(values, tie_break="random", seed=s, cell_id=c).digits for s, c in ((3, "b"), (4, "a"))]
    assert not any(np.array_equal(other, first) for other in others)
    assert not np.array_equal(cell_uniforms(0, "1", 5), cell_uniforms(0, 1, 5))


@given(
    st.lists(st.integers(0, 12).map(float), max_size=60), st.integers(3, 60), st.sampled_from(TIE_BREAKS)
)  # fmt: skip
def test_digits_lie_in_range_and_keep_the_order(values: list[float], n_bins: int, rule: str) -> None:
    row = np.array(values)
    digits, edges = bin_values(row, n_bins, rule)
    assert ((digits == 0) == (row == 0)).all()
    assert ((digits[row != 0] >= 1) & (digits[row != 0] <= n_bins - 1)).all()
    if rule != "mid":
        assert (digits == np.round(digits)).all()
    order = np.argsort(row, kind="stable")
    if rule != "random":
        assert (np.diff(digits[order]) >= 0).all()
    assert (np.diff(edges) >= 0).all()


def test_digits_lead_back_into_their_bin() -> None:
    values = np.log1p(np.random.default_rng(3).gamma(0.5, 20.0, 300))
    digits, edges = bin_values(values, 51, "left")
    back = unbin_values(digits, edges)
    assert np.array_equal(digit_range(back, edges)[0], digits)
    widest = np.diff(edges).max()
    assert np.abs(back - values).max() <= widest
    assert unbin_values(np.array([0.0, -1.0, 99.0]), edges).tolist() == [0.0, 0.0, values.max()]
    tied = np.array([1.0] * 30 + [2.0] * 20 + [5.0])
    digits, edges = bin_values(tied)
    np.testing.assert_allclose(unbin_values(digits, edges)[:50], tied[:50])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"values": [1.0, np.nan]}, "`values`"),
        ({"values": [1.0, np.inf]}, "`values`"),
        ({"values": [1.0, -0.5]}, r"`values` must be 0 or more.*-0.5"),
        ({"values": [1.0], "n_bins": 2}, "`n_bins`"),
        ({"values": [1.0], "n_bins": 5.0}, "`n_bins`"),
        ({"values": [1.0], "tie_break": "best"}, "`tie_break`"),
        ({"values": [1.0, 0.0], "tie_break": "random", "uniforms": [0.1, 0.2]}, "`uniforms`"),
    ],
)
def test_bad_input_is_advice(arguments: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        bin_values(**(arguments | {"values": np.array(arguments["values"])}))
