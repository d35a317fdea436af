"""Streaming metrics against numpy and scipy on all pairs at once, in any chunking, merged and across processes."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy import stats
from scoring_torchrun import GENES, feed, metrics
from sklearn.metrics import r2_score

from genesplice_hf.errors import DataError
from genesplice_hf.scoring.gene_expression import GeneExpressionCorrelation, tss_bins
from genesplice_hf.scoring.streaming import (
    StreamingPearson,
    StreamingPoisson,
    StreamingR2,
    per_sequence_pearson,
)
from genesplice_hf.scoring.streaming_ranks import StreamingSpearman
from genesplice_hf.scoring.track_report import TrackReport, assay_of

ROOT = Path(__file__).resolve().parents[2]
WINDOWS, BINS, TRACKS = 7, 40, 3


def far_from_zero(seed: int = 0, mean: float = 1e5, sd: float = 3e2) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated pairs whose mean is large against their spread, in float32 as a model gives them."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(WINDOWS, BINS, TRACKS))
    x = y + rng.normal(size=y.shape) * np.array([0.1, 0.5, 2.0])
    return torch.from_numpy(mean + sd * x).float(), torch.from_numpy(mean + sd * y).float()


def columns(x: torch.Tensor, y: torch.Tensor):
    """The pairs of each track that have a target, in float64."""
    for track in range(x.shape[-1]):
        known = ~y[..., track].isnan()
        yield x[..., track][known].double().numpy(), y[..., track][known].double().numpy()


def poisson(x: np.ndarray, y: np.ndarray) -> float:
    return float((x - y * np.log(np.maximum(x, 1e-7))).mean())


DIRECT = {
    StreamingPearson: lambda x, y: np.corrcoef(x, y)[0, 1],
    StreamingR2: lambda x, y: r2_score(y, x),
    StreamingSpearman: lambda x, y: stats.spearmanr(x, y).statistic,
    StreamingPoisson: poisson,
}
EVERY_METRIC = pytest.mark.parametrize("kind", DIRECT, ids=lambda kind: kind.__name__)


def direct(kind: type, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    return [float(DIRECT[kind](*pair)) for pair in columns(x, y)]


@EVERY_METRIC
@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, WINDOWS), max_size=4), parts=st.integers(1, 3), missing=st.booleans())
def test_any_chunking_and_merging_gives_the_direct_figure(kind: type, cuts: list[int], parts: int, missing: bool):
    x, y = far_from_zero()
    if missing:
        y[torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = torch.nan
    bounds = [0, *sorted(cuts), WINDOWS]
    metrics_of_parts = [kind(TRACKS) for _ in range(parts)]
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        metrics_of_parts[number % parts].update(x[first:last], y[first:last])
    total = metrics_of_parts[0]
    for other in metrics_of_parts[1:]:
        assert total.merge(other) is total
    expected = direct(kind, x, y)
    np.testing.assert_allclose(total.compute().numpy(), expected, rtol=1e-10, atol=1e-10)
    assert total.mean() == pytest.approx(np.mean(expected), rel=1e-10)
    assert total.undefined == 0


def test_float32_sums_would_fail_here():
    """What the metric is for: the same pairs by raw sums in float32 miss by far more than 1e-10."""
    x, y = far_from_zero()
    sums = [value.sum(dtype=torch.float32) for value in (x, y, x * x, y * y, x * y)]
    n = torch.tensor(float(x.numel()))
    top = sums[4] - sums[0] * sums[1] / n
    raw = top / ((sums[2] - sums[0] ** 2 / n) * (sums[3] - sums[1] ** 2 / n)).sqrt()
    exact = np.corrcoef(x.double().ravel(), y.double().ravel())[0, 1]
    assert not abs(raw.item() - exact) < 1e-4
    assert StreamingPearson(1).update(x[..., None].flatten(1, 2), y[..., None].flatten(1, 2)).mean() == pytest.approx(
        exact, abs=1e-12
    )


def test_bins_apart_and_along_a_window():
    x, y = far_from_zero(3)
    per_bin = StreamingPearson(TRACKS, over=("batch",)).update(x[:3], y[:3]).update(x[3:], y[3:]).compute()
    along = per_sequence_pearson(x, y)
    assert per_bin.shape == (BINS, TRACKS) and along.shape == (WINDOWS, TRACKS)
    for m, t in ((0, 0), (17, 2)):
        assert per_bin[m, t].item() == pytest.approx(np.corrcoef(x[:, m, t], y[:, m, t])[0, 1], abs=1e-10)
    for b, t in ((0, 0), (6, 1)):
        expected = stats.pearsonr(x[b, :, t].double(), y[b, :, t].double()).statistic
        assert along[b, t].item() == pytest.approx(expected, abs=1e-10)
    with pytest.raises(DataError, match="40 bins"):
        StreamingPearson(TRACKS, over=("batch",)).update(x, y).update(x[:, 1:], y[:, 1:])
    with pytest.raises(DataError, match="per_sequence_pearson"):
        StreamingPearson(TRACKS, over=("bin",))


@EVERY_METRIC
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_is_widened_before_anything_is_added(kind: type, dtype: torch.dtype):
    x, y = (value.to(dtype) for value in far_from_zero(4, mean=30.0, sd=3.0))
    np.testing.assert_allclose(kind(TRACKS).update(x, y).compute(), direct(kind, x, y), rtol=1e-10, atol=1e-10)
    plain = kind(TRACKS).update(x.float().numpy(), y.float().numpy()).compute()
    np.testing.assert_allclose(plain, direct(kind, x, y), rtol=1e-10, atol=1e-10)


def test_what_is_constant_is_counted_and_left_out_of_the_mean():
    """0.1 has no exact float: its centred squares are not all 0, and must not make a correlation."""
    x, y = far_from_zero(5, mean=1.0, sd=1.0)
    x[..., 0] = 0.1
    y[..., 1] = 0.1
    for kind in (StreamingPearson, StreamingSpearman):
        metric = kind(TRACKS)
        for window in range(WINDOWS):
            metric.update(x[window], y[window])
        assert metric.compute().isnan().tolist() == [True, True, False]
        assert metric.undefined == 2
        assert metric.mean() == pytest.approx(metric.compute()[2].item())
    r2 = StreamingR2(TRACKS).update(x, y)
    assert r2.compute().isnan().tolist() == [False, True, False]
    assert r2.compute()[0].item() == pytest.approx(
        r2_score(y[..., 0].double().ravel(), x[..., 0].double().ravel()), abs=1e-10
    )
    empty = StreamingPearson(TRACKS)
    assert empty.undefined == TRACKS and math.isnan(empty.mean())
    assert StreamingSpearman(TRACKS).undefined == TRACKS
    hidden = StreamingPearson(1).update(torch.ones(1, 4, 1), torch.full((1, 4, 1), torch.nan))
    assert hidden.undefined == 1


def test_a_prediction_does_not_count_where_the_target_is_unknown():
    x, y = far_from_zero(6)
    y[:, :5] = torch.nan
    expected = StreamingPearson(TRACKS).update(x, y).compute()
    x[:, :5] = torch.inf
    assert torch.equal(StreamingPearson(TRACKS).update(x, y).compute(), expected)


def test_a_sample_of_bins_is_near_the_whole_and_does_not_depend_on_the_batches():
    rng = np.random.default_rng(0)
    y = np.round(rng.exponential(size=(20, 1000, 2)))
    x = y + rng.normal(size=y.shape)
    whole = StreamingSpearman(2).update(x, y)
    by_one, by_many = (StreamingSpearman(2, capacity=4000, seed=1) for _ in range(2))
    by_many.update(x, y)
    for window in range(20):
        by_one.update(x[window], y[window])
    assert whole.is_exact and not by_one.is_exact
    assert torch.equal(by_one.compute(), by_many.compute())
    # The sd of a correlation from 4,000 pairs is below 0.016.
    np.testing.assert_allclose(by_one.compute(), whole.compute(), atol=0.05)
    joined = StreamingSpearman(2, 4000, seed=1).update(x[:5], y[:5])
    joined.merge(StreamingSpearman(2, 4000, seed=2).update(x[5:], y[5:]))
    assert len(joined._parts[0][0]) == 4000 and joined.seen == 20_000
    np.testing.assert_allclose(joined.compute(), whole.compute(), atol=0.05)
    # Every bin has the same chance: the mean position of those that stay is the middle.
    positions = np.arange(20_000.0).reshape(20, 1000, 1)
    kept = StreamingSpearman(1, 4000).update(positions, positions)
    kept.compute()
    assert abs(kept._parts[0][1].mean() - 10_000) < 4 * 20_000 / np.sqrt(12 * 4000)


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (lambda x, y: (x[..., :2], y[..., :2]), r"`num_tracks` \(3\)"),
        (lambda x, y: (x, y[:, 1:]), "must both be"),
        (lambda x, y: (x[0, 0], y[0, 0]), "must both be"),
        (lambda x, y: (x * torch.nan, y), "`predictions` must be finite"),
        (lambda x, y: (x, y / 0), "must not be infinite"),
    ],
)
def test_pairs_that_do_not_fit(change: Callable, advice: str):
    with pytest.raises(DataError, match=advice):
        StreamingPearson(TRACKS).update(*change(*far_from_zero()))


def test_merging_unlike_metrics():
    for other in (StreamingPearson(2), StreamingPearson(TRACKS, over=("batch",)), StreamingR2(TRACKS)):
        with pytest.raises(DataError, match="`other` must be a StreamingPearson"):
            StreamingPearson(TRACKS).merge(other)
    with pytest.raises(DataError, match="`capacity` must be at least 2"):
        StreamingSpearman(TRACKS, capacity=1)
    with pytest.raises(DataError, match="`num_tracks` must be at least 1"):
        StreamingPearson(0)


def test_expression_of_genes_by_hand():
    """Three genes of one track; the second has two starts, in two windows, and the third is unknown there."""
    x, y = torch.arange(12.0).reshape(2, 6, 1), torch.arange(12.0).flip(0).reshape(2, 6, 1)
    x, y = x.repeat(1, 1, 2), y.repeat(1, 1, 2)
    y[1, 5, 1] = torch.nan
    metric = GeneExpressionCorrelation(2)
    metric.update(x[0], y[0], {"a": [0, 1, 1], "b": [3]})
    metric.update(x[1], y[1], {"b": [1, 2], "c": [5], "d": []})
    assert metric.num_genes == 3
    predicted, measured = [0 + 1, 3 + 7 + 8, 11], [11 + 10, 8 + 4 + 3, 0]
    assert metric.compute()[0].item() == pytest.approx(np.corrcoef(np.log1p(predicted), np.log1p(measured))[0, 1])
    assert metric.compute()[1].item() == pytest.approx(-1.0)  # two genes are left
    with pytest.raises(DataError, match=r"0\.\.5"):
        metric.update(x[0], y[0], {"a": [6]})
    assert GeneExpressionCorrelation(2).undefined == 2


def test_bins_at_a_start():
    assert tss_bins(1000 + 3 * 32, 1000, 32, 10) == [2, 3, 4]
    assert tss_bins(1000 + 3 * 32 + 31, 1000, 32, 10, flank_bins=0) == [3]
    assert tss_bins(1000, 1000, 32, 10) == [] == tss_bins(1000 + 319, 1000, 32, 10)
    assert tss_bins(999, 1000, 32, 10, flank_bins=0) == []


def test_two_processes_are_one(run_python: Callable[..., str], tmp_path: Path):
    """The script asserts the world size, and that a second `all_reduce` adds nothing."""
    x, y = far_from_zero(7, mean=20.0, sd=3.0)
    y[2, 3, 1] = torch.nan
    save_file({"x": x, "y": y}, tmp_path / "pairs.safetensors")
    script = str(ROOT / "tests/scoring_torchrun.py")
    arguments = ["--standalone", "--nproc_per_node", "2", script, str(tmp_path)]
    code = f"from torch.distributed.run import main; main({arguments!r})"
    run_python(code, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1")
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0]["windows"] == WINDOWS
    for name, metric in metrics(TRACKS).items():
        alone = feed(metric, x, y).compute().nan_to_num(nan=-9.0)
        np.testing.assert_allclose(found[0][name], alone, rtol=1e-10, atol=1e-10, err_msg=name)
    assert found[0]["report"] == pytest.approx(np.mean(found[0]["pearson"]))
    assert len(GENES) == 3


def test_nothing_is_added_after_the_sum_over_processes():
    x, y = far_from_zero()
    metric = StreamingPearson(TRACKS).update(x, y).all_reduce()  # no process group: nothing happens
    metric.update(x, y)
    metric._is_reduced = True
    for call in (lambda: metric.update(x, y), lambda: metric.merge(StreamingPearson(TRACKS))):
        with pytest.raises(DataError, match="start a new StreamingPearson"):
            call()


def test_report_has_a_line_per_track_and_means_per_assay():
    x, y = far_from_zero(8, mean=20.0, sd=3.0)
    x[..., 1] = 2.0
    tracks = ["CAGE:one, cells", "CAGE:two", "DNASE:three"]
    halves = [TrackReport(tracks).update(x[part], y[part]) for part in (slice(3), slice(3, None))]
    report = halves[0].merge(halves[1]).as_dict()
    assert report["windows"] == WINDOWS and report["bins_per_track"] == WINDOWS * BINS and report["spearman_is_exact"]
    assert [row["assay"] for row in report["tracks"]] == ["CAGE", "CAGE", "DNASE"]
    kinds = {"pearson": StreamingPearson, "spearman": StreamingSpearman, "r2": StreamingR2}
    expected = {name: direct(kind, x[..., [0, 2]], y[..., [0, 2]]) for name, kind in kinds.items()}
    for place, track in enumerate((0, 2)):
        row = report["tracks"][track]
        for name, values in expected.items():
            assert row[name] == pytest.approx(values[place], abs=1e-9)
        assert row["window_pearson"] == pytest.approx(per_sequence_pearson(x, y)[:, track].mean().item())
        assert row["mean_measured"] == pytest.approx(y[..., track].double().mean().item())
        assert row["mean_predicted"] == pytest.approx(x[..., track].double().mean().item())
    assert math.isnan(report["tracks"][1]["pearson"]) and math.isnan(report["tracks"][1]["window_pearson"])
    groups = report["by_assay"]
    assert list(groups) == ["all", "CAGE", "DNASE"]
    assert groups["CAGE"]["pearson"] == pytest.approx(expected["pearson"][0], abs=1e-9)
    assert groups["all"]["pearson"] == pytest.approx(np.mean(expected["pearson"]), abs=1e-9)
    assert (groups["all"]["undefined"], groups["CAGE"]["undefined"], groups["DNASE"]["undefined"]) == (1, 1, 0)
    assert assay_of("no colon") == "no colon"
    with pytest.raises(DataError, match="`tracks` must hold"):
        TrackReport([])
