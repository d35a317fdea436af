"""Targets from balanced matrices: every step by hand, unknown bins, and the optional packages."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest

from genesplice_hf.data.contact_targets import (
    TargetRules,
    contact_targets,
    distance_means,
    interpolated,
    log_observed_over_expected,
    read_cool,
    without_near_diagonals,
)
from genesplice_hf.data.contacts import map_to_vector
from genesplice_hf.errors import DataError

RULES = TargetRules(crop=1)


def matrix(num_bins: int = 8, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(0.5, 1.5, size=(num_bins, num_bins))
    distance = np.abs(np.subtract.outer(np.arange(num_bins), np.arange(num_bins)))
    return (values + values.T) / (1 + distance)


def test_a_matrix_of_distance_alone_is_zero() -> None:
    distance = np.abs(np.subtract.outer(np.arange(9), np.arange(9)))
    found = contact_targets(1 / (1.0 + distance), RULES)
    assert found.dtype == np.float16 and found.shape == (15,)
    assert not found.any()


def test_the_steps_by_hand() -> None:
    given = matrix()
    median = np.median(np.diagonal(given, 2))
    expected = np.zeros((8, 8))
    for i in range(8):
        for j in range(i + 2, 8):
            means = np.mean([min(given[k, k + j - i], median) for k in range(8 - (j - i))])
            expected[i, j] = np.clip(np.log(min(given[i, j], median) / means), -2, 2)
    found = contact_targets(given, RULES)
    np.testing.assert_allclose(found, map_to_vector(expected[1:-1, 1:-1], 2), atol=1e-3)


def test_an_expectation_from_elsewhere() -> None:
    expected = np.full(8, 0.25)
    level = np.clip(matrix(), 0, np.median(np.diagonal(matrix(), 2)))
    found = contact_targets(matrix(), RULES, expected=expected)
    np.testing.assert_allclose(found, map_to_vector(np.log(level / 0.25)[1:-1, 1:-1], 2), atol=2e-3)


def test_clipping() -> None:
    given = matrix()
    given[1, 6] = given[6, 1] = 1e-9
    assert contact_targets(given, RULES).min() == -2
    assert contact_targets(given, TargetRules(crop=1, clip=0.5)).min() == -0.5
    given[1, 6] = given[6, 1] = 0
    assert contact_targets(given, RULES).min() == -2


def test_a_blacklisted_bin_is_interpolated_along_its_diagonals() -> None:
    given = matrix()
    spoilt = given.copy()
    spoilt[3] = spoilt[:, 3] = 50.0
    one, other = contact_targets(given, RULES, [3]), contact_targets(spoilt, RULES, [3])
    assert np.array_equal(one, other) and np.isfinite(one).all()


def test_interpolation() -> None:
    values = np.full((5, 5), np.nan)
    values[np.arange(4), np.arange(1, 5)] = [1.0, np.nan, 3.0, np.nan]
    found = interpolated(values)
    assert np.diagonal(found, 1).tolist() == [1.0, 2.0, 3.0, 3.0]
    assert np.diagonal(found, -1).tolist() == [1.0, 2.0, 3.0, 3.0]
    assert not np.diagonal(found, 2).any()


def test_near_diagonals_take_the_median() -> None:
    given = matrix()
    given[0] = given[:, 0] = np.nan
    found = without_near_diagonals(given, 2)
    median = np.nanmedian(np.diagonal(given, 2))
    assert (np.diagonal(found)[1:] == median).all() and np.nanmax(found) == median
    assert np.isnan(found[0]).all()


def test_means_per_distance_leave_unknown_contacts_out() -> None:
    given = np.array([[np.nan, 2.0, np.nan], [2.0, 4.0, 6.0], [np.nan, 6.0, 8.0]])
    means = distance_means(given)
    assert means[:2].tolist() == [6.0, 4.0] and np.isnan(means[2])
    assert np.isnan(log_observed_over_expected(given, means, 2)[0, 2])


def test_smoothing_keeps_the_size_and_lowers_the_spread() -> None:
    plain, smooth = contact_targets(matrix(), RULES), contact_targets(matrix(), TargetRules(crop=1, kernel_stddev=1))
    assert smooth.shape == plain.shape and smooth.std() < plain.std()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((3, 4)), "square"),
        (np.zeros((4, 4)), "more than"),
        (np.arange(64.0).reshape(8, 8), "symmetric"),
        (-matrix(), "negative"),
        (np.full((8, 8), np.nan), "no data"),
    ],
)
def test_bad_matrices_are_refused(given: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        contact_targets(given, RULES)


def test_another_expectation_is_refused() -> None:
    with pytest.raises(DataError, match="expected"):
        contact_targets(matrix(), RULES, expected=np.ones(7))


def test_coarse_graining_is_a_function(caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    def pool(balanced: np.ndarray, counts: np.ndarray) -> np.ndarray:
        seen.append((balanced.shape, counts.sum()))
        return balanced / 2 + balanced.mean() / 2

    pooled = contact_targets(matrix(), RULES, counts=np.ones((8, 8)), coarse_grain=pool)
    assert seen == [((8, 8), 64)] and pooled.std() < contact_targets(matrix(), RULES).std()
    with caplog.at_level(logging.WARNING):
        plain = contact_targets(matrix(), RULES, counts=np.ones((8, 8)))
    assert np.array_equal(plain, contact_targets(matrix(), RULES)) and "coarse_grain" in caplog.text
    with pytest.raises(DataError, match="counts"):
        contact_targets(matrix(), RULES, coarse_grain=pool)


def write_cool(path: Path, group: str = "/") -> np.ndarray:
    """Two contigs of 5 and 3 bins of 10 bp in the cooler layout; returns the whole count matrix."""
    h5py = pytest.importorskip("h5py")
    counts = np.triu(np.random.default_rng(0).poisson(2.0, (8, 8)))
    rows, columns = np.nonzero(counts)
    starts = np.array([0, 10, 20, 30, 40, 0, 10, 20])
    with h5py.File(path, "a") as opened:
        cool = opened.require_group(group)
        cool["chroms/name"] = np.array([b"chr1", b"chr2"])
        cool["bins/start"], cool["bins/end"] = starts, starts + np.array([10, 10, 10, 10, 7, 10, 10, 4])
        cool["bins/weight"] = np.array([1.0, 0.5, np.nan, 2.0, 1.0, 1.0, 1.0, 1.0])
        cool["pixels/bin1_id"], cool["pixels/bin2_id"] = rows, columns
        cool["pixels/count"] = counts[rows, columns]
        cool["indexes/chrom_offset"] = np.array([0, 5, 8])
        cool["indexes/bin1_offset"] = np.searchsorted(rows, np.arange(9))
    return counts + np.triu(counts, 1).T


def test_cool_files_are_read(tmp_path: Path) -> None:
    whole = write_cool(tmp_path / "toy.cool")
    raw = read_cool(str(tmp_path / "toy.cool"), "chr1:11-47", balance=False)
    assert np.array_equal(raw, whole[1:5, 1:5])
    balanced = read_cool(str(tmp_path / "toy.cool"), "chr1:1-47")
    assert np.isnan(balanced[2]).all() and np.isnan(balanced[:, 2]).all()
    assert balanced[1, 3] == whole[1, 3] * 0.5 * 2.0 and np.array_equal(balanced[3:, 3:][0, :1], [whole[3, 3] * 4])
    several = write_cool(tmp_path / "toy.mcool", "resolutions/10")
    found = read_cool(f"{tmp_path / 'toy.mcool'}::resolutions/10", "chr2:10-11", balance=False)
    assert np.array_equal(found, several[5:7, 5:7])


def test_bad_cool_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cool(tmp_path / "toy.mcool", "resolutions/10")
    path = str(tmp_path / "toy.mcool")
    for name, region, message in (
        (path, "chr1:1-10", "name its group"),
        (f"{path}::resolutions/10", "chr3:1-10", "chr1, chr2"),
        (f"{path}::resolutions/10", "chr2:50-60", "beyond"),
        (str(tmp_path / "absent.cool"), "chr1:1-10", "there is no"),
    ):
        with pytest.raises(DataError, match=message):
            read_cool(name, region)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"genesplice-hf\[tracks\]"):
        read_cool(path, "chr1:1-10")
