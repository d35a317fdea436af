"""Metrics of contact maps against direct formulas, insulation by hand, and scores of variants."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from genesplice_hf.data.contacts import map_to_vector, rc_permutation
from genesplice_hf.errors import DataError
from genesplice_hf.models.akita.modeling_akita import AkitaForContactPrediction
from genesplice_hf.models.tiny_configs import tiny_akita
from genesplice_hf.scoring.contacts import (
    ContactMetrics,
    distance_strata,
    insulation_scores,
    predict_contacts,
    scd,
    spearman,
    ssd,
)

NUM_BINS, OFFSET = 14, 2


def maps(num_maps: int = 5, level: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(M, P, 2) targets and predictions that follow them."""
    rng = np.random.default_rng(seed)
    targets = rng.normal(size=(num_maps, 78, 2))
    return targets + level, targets + rng.normal(size=targets.shape) * [0.5, 2.0] + level


@pytest.mark.parametrize("chunks", [[5], [1, 4], [2, 2, 1]])
@pytest.mark.parametrize("level", [0.0, 1e5])
def test_pooled_metrics_are_direct_ones_in_any_chunking(chunks: list[int], level: float) -> None:
    targets, predictions = maps(level=level)
    metrics = ContactMetrics(OFFSET)
    start = 0
    for size in chunks:
        metrics.update(targets[start : start + size], predictions[start : start + size])
        start += size
    found = metrics.compute()
    for column in range(2):
        y, p = targets[..., column].ravel(), predictions[..., column].ravel()
        assert found["pearson"][column] == pytest.approx(pearsonr(y, p).statistic, abs=1e-10)
        assert found["mse"][column] == pytest.approx(((y - p) ** 2).mean(), rel=1e-9)
        per_map = [pearsonr(targets[m, :, column], predictions[m, :, column]).statistic for m in range(5)]
        assert found["pearson_per_map"][column] == pytest.approx(np.mean(per_map), abs=1e-10)
        if not level:
            assert found["spearman"][column] == pytest.approx(spearmanr(y, p).statistic, abs=1e-10)
            ranks = [spearmanr(targets[m, :, column], predictions[m, :, column]).statistic for m in range(5)]
            assert found["spearman_per_map"][column] == pytest.approx(np.mean(ranks), abs=1e-10)


def test_strata_tile_the_pairs() -> None:
    groups = distance_strata(NUM_BINS, OFFSET, 4)
    assert sorted(np.concatenate(groups).tolist()) == list(range(78))
    rows, columns = np.triu_indices(NUM_BINS, OFFSET)
    targets, predictions = maps()
    metrics = ContactMetrics(OFFSET, num_strata=4)
    metrics.update(targets[:2], predictions[:2])
    metrics.update(targets[2:], predictions[2:])
    strata = metrics.compute()["strata"]
    assert strata[0]["first_bin"] == 2 and strata[-1]["last_bin"] == NUM_BINS - 1
    for stratum in strata:
        inside = (columns - rows >= stratum["first_bin"]) & (columns - rows <= stratum["last_bin"])
        direct = pearsonr(targets[:, inside, 0].ravel(), predictions[:, inside, 0].ravel()).statistic
        assert stratum["pearson"][0] == pytest.approx(direct, abs=1e-10)


def test_unknown_targets_do_not_count() -> None:
    targets, predictions = maps()
    known, unknown = ContactMetrics(OFFSET), ContactMetrics(OFFSET)
    spoilt = targets.copy()
    spoilt[:, ::3] = np.nan
    wild = predictions.copy()
    wild[:, ::3] = 1e6
    known.update(spoilt, predictions)
    unknown.update(spoilt, wild)
    one, other = known.compute(), unknown.compute()
    for name in ("mse", "pearson", "spearman", "pearson_per_map", "spearman_per_map"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-12)
        assert np.isfinite(one[name]).all()


def test_a_constant_prediction_has_no_correlation() -> None:
    targets, _ = maps()
    metrics = ContactMetrics(OFFSET)
    metrics.update(torch.tensor(targets), torch.zeros(5, 78, 2))
    found = metrics.compute()
    assert np.isnan(found["pearson"]).all() and np.isnan(found["spearman"]).all()
    np.testing.assert_allclose(found["mse"], (targets**2).mean((0, 1)))


def test_insulation_by_hand() -> None:
    contact_map = np.arange(64.0).reshape(8, 8)
    found = insulation_scores(contact_map, 2)
    assert np.isnan(found[[0, 1, 6, 7]]).all()
    assert found[3] == contact_map[1:3, 4:6].mean()
    contact_map[1, 4] = np.nan
    assert insulation_scores(contact_map, 2)[3] == np.mean([contact_map[1, 5], contact_map[2, 4], contact_map[2, 5]])


def test_a_boundary_is_the_lowest_insulation() -> None:
    blocks = np.kron(np.eye(2), np.ones((8, 8))) * 2 - 1
    score = insulation_scores(blocks, 3)
    assert set(np.flatnonzero(score == np.nanmin(score))) <= {7, 8}
    vector = map_to_vector(blocks[..., None], 2)[None]
    metrics = ContactMetrics(OFFSET)
    metrics.update(vector, vector * 0.5 + 1)
    assert metrics.compute()["insulation_pearson"][0] == pytest.approx(1)


def test_spearman_with_ties() -> None:
    y, p = np.array([1.0, 2, 2, 3, np.nan])[:, None], np.array([0.0, 5, 1, 1, 9])[:, None]
    assert spearman(y, p)[0] == pytest.approx(spearmanr(y[:4, 0], p[:4, 0]).statistic)


def test_scores_of_variants() -> None:
    ref, alt = np.array([[[3.0, 0.0], [4.0, 0.0]]]), np.array([[[0.0, 0.0], [0.0, 2.0]]])
    assert scd(ref, alt).tolist() == [[5.0, 2.0]]
    assert ssd(ref, alt).tolist() == [[-5.0, 2.0]]
    assert np.array_equal(scd(alt, ref), scd(ref, alt)) and np.array_equal(ssd(alt, ref), -ssd(ref, alt))
    assert not scd(ref, ref).any() and not ssd(ref, ref).any()
    assert scd(torch.tensor(ref), torch.tensor(alt)).tolist() == [[5.0, 2.0]]
    with pytest.raises(DataError, match="realign"):
        scd(ref, alt[:, :1])


def test_bad_maps_are_refused() -> None:
    targets, predictions = maps()
    for y, p, message in ((targets, predictions[:, :-1], "predictions"), (targets[:, :-1], predictions[:, :-1], "n")):
        with pytest.raises(DataError, match=message):
            ContactMetrics(OFFSET).update(y, p)
    with pytest.raises(DataError, match="at least one"):
        ContactMetrics().compute()
    with pytest.raises(DataError, match="num_strata"):
        ContactMetrics(num_strata=0)


def test_the_mean_over_strands_is_equivariant() -> None:
    """Predictions of the reverse complement are those of the window with both axes flipped."""
    torch.manual_seed(0)
    model = AkitaForContactPrediction(tiny_akita(diagonal_offset=2, target_crop=1))
    ids = np.random.default_rng(0).integers(0, 4, (2, 64)).astype(np.uint8)
    complement = 3 - ids[:, ::-1]
    permutation = rc_permutation(14, 2)
    found = predict_contacts(model, ids, shifts=(0,))
    assert found.shape == (2, 78, 3)
    np.testing.assert_allclose(predict_contacts(model, complement)[:, permutation], found, atol=1e-5)
    plain = predict_contacts(model, ids, rc=False)
    with torch.no_grad():
        np.testing.assert_allclose(plain, model(torch.from_numpy(ids)).logits.numpy(), atol=1e-6)
    several = predict_contacts(model, ids, rc=False, shifts=(-1, 0, 1))
    assert not np.allclose(several, plain)
