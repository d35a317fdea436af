"""Linear probes against scikit-learn, and the rules of the layer sweep: validation chooses, groups stay whole."""

import json
import os

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from genesplice_hf.adaptation.folds import check_groups_apart, draw_part, make_folds
from genesplice_hf.adaptation.layer_sweep import LayerSweep, MeanAndSd
from genesplice_hf.adaptation.probe import LinearProbe
from genesplice_hf.adaptation.probe_metrics import classification_scores, regression_scores
from genesplice_hf.errors import CheckpointError, DataError, GeneSpliceError

GRID = [1e-3, 1e-1, 1.0]


def toy(num_classes: int = 2, num_rows: int = 120, num_features: int = 5, noise: float = 1.0, seed: int = 0):
    """Features at different offsets and scales, classes shifted along the first columns, six groups."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_rows) % num_classes
    features = rng.normal(size=(num_rows, num_features)) * noise
    features[np.arange(num_rows), labels] += 1.5
    features = features * np.linspace(0.1, 30, num_features) + np.linspace(-5, 5, num_features)
    return features, labels, np.repeat([f"chr{i}" for i in range(6)], num_rows // 6)


def values(seed: int = 0, targets: int | None = None):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(90, 4)) * 3 + 1
    weights = rng.normal(size=(4, targets or 1))
    y = features @ weights + rng.normal(size=(90, targets or 1))
    return features, y if targets else y[:, 0]


@pytest.mark.parametrize("num_classes", [2, 3])
def test_one_strength_equals_sklearns_pipeline(num_classes):
    x, y, _ = toy(num_classes)
    probe = LinearProbe(grid=[0.1]).fit(x, y)
    twin = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000))
    twin.fit(x, y)
    np.testing.assert_allclose(probe.predict_proba(x), twin.predict_proba(x), atol=1e-7, rtol=0)
    assert (probe.predict(x) == twin.predict(x)).all()


@pytest.mark.parametrize("groups", [None, "chromosomes"])
def test_strength_is_chosen_as_grid_search_does(groups):
    x, y, chromosomes = toy(noise=2.0)
    groups = None if groups is None else chromosomes
    probe = LinearProbe(grid=GRID, num_folds=3, seed=4).fit(x, y, groups)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000)),
        {"logisticregression__C": GRID},
        scoring="average_precision",
        cv=make_folds(y, groups, 3, 4, True),
    ).fit(x, y)
    np.testing.assert_allclose(list(probe.cv_scores.values()), search.cv_results_["mean_test_score"], atol=1e-9)
    assert probe.strength == search.best_params_["logisticregression__C"]


@pytest.mark.parametrize("targets", [None, 2])
def test_ridge_equals_sklearn(targets):
    x, y = values(targets=targets)
    probe = LinearProbe("regression", grid=[2.0]).fit(x, y)
    twin = make_pipeline(StandardScaler(), Ridge(alpha=2.0)).fit(x, y)
    np.testing.assert_allclose(probe.predict(x), twin.predict(x), atol=1e-7, rtol=0)
    assert probe.predict(x).shape == y.shape


def test_ridge_strength_lies_where_generalised_cross_validation_puts_it():
    x, y = values()
    grid = np.logspace(-4, 6, 11)
    chosen = LinearProbe("regression").fit(x, y).strength
    exact = RidgeCV(grid).fit(StandardScaler().fit_transform(x), y).alpha_
    assert abs(np.log10(chosen) - np.log10(exact)) <= 1


@pytest.mark.parametrize("kind", ["binary", "names", "three", "ridge", "ridge2"])
def test_saved_probe_predicts_the_same(tmp_path, kind):
    if kind.startswith("ridge"):
        x, y = values(targets=2 if kind == "ridge2" else None)
        probe = LinearProbe("regression", grid=[1.0, 10.0], feature_name="mean", layer="3").fit(x, y)
    else:
        x, y, groups = toy(3 if kind == "three" else 2)
        y = np.array(["off", "on"])[y] if kind == "names" else y
        probe = LinearProbe(grid=GRID, feature_name="mean", layer="3").fit(x, y, groups)
    probe.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["probe.json", "probe.safetensors"]
    again = LinearProbe.load(tmp_path)
    if probe.is_classification:
        np.testing.assert_allclose(again.predict_proba(x), probe.predict_proba(x), atol=1e-7, rtol=0)
        assert (again.predict(x) == probe.predict(x)).all()
    else:
        np.testing.assert_allclose(again.predict(x), probe.predict(x), atol=1e-7, rtol=0)
    assert (again.layer, again.feature_name, again.cv_scores) == ("3", "mean", probe.cv_scores)
    assert again.evaluate(x, y) == probe.evaluate(x, y)


@pytest.mark.parametrize("kind", ["binary", "three", "ridge", "ridge2"])
def test_sklearn_both_ways(kind):
    if kind.startswith("ridge"):
        x, y = values(targets=2 if kind == "ridge2" else None)
        pipeline, call = make_pipeline(StandardScaler(), Ridge(3.0)).fit(x, y), "predict"
    else:
        x, y, _ = toy(3 if kind == "three" else 2)
        pipeline, call = make_pipeline(StandardScaler(), LogisticRegression(C=0.5)).fit(x, y), "predict_proba"
    probe = LinearProbe.from_sklearn(pipeline)
    expected = getattr(pipeline, call)(x)
    np.testing.assert_allclose(getattr(probe, call)(x), expected, atol=1e-7, rtol=0)
    np.testing.assert_allclose(getattr(probe.to_sklearn(), call)(x), expected, atol=1e-7, rtol=0)
    assert probe.to_sklearn().predict(x).shape == pipeline.predict(x).shape


def test_from_sklearn_refuses_other_pipelines():
    x, y, _ = toy()
    with pytest.raises(GeneSpliceError, match=r"got \['LogisticRegression'\]"):
        LinearProbe.from_sklearn(make_pipeline(LogisticRegression()).fit(x, y))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_raise(bad):
    x, y, _ = toy()
    x[3, 1] = bad
    with pytest.raises(DataError, match="1 rows hold NaN or infinity, the first is row 3"):
        LinearProbe().fit(x, y)
    probe = LinearProbe(grid=[1.0]).fit(*toy()[:2])
    with pytest.raises(DataError, match="NaN or infinity"):
        probe.predict(x)


def test_other_bad_input(tmp_path):
    x, y, groups = toy()
    with pytest.raises(DataError, match="`labels` has 119 rows"):
        LinearProbe().fit(x, y[1:])
    with pytest.raises(DataError, match="at least two classes"):
        LinearProbe().fit(x, np.zeros(120))
    with pytest.raises(DataError, match=r"`num_folds` must lie between 2 and the number of groups \(6\)"):
        LinearProbe(num_folds=7).fit(x, y, groups)
    with pytest.raises(DataError, match="holds no row of class"):
        LinearProbe(num_folds=2).fit(x, np.repeat([0, 1], 60), np.repeat(["a", "b"], 60))
    with pytest.raises(DataError, match="must have 5 columns, got 4"):
        LinearProbe(grid=[1.0]).fit(x, y).predict(x[:, :4])
    with pytest.raises(DataError, match="1 entries are NaN"):
        LinearProbe("regression").fit(x, np.where(np.arange(120) == 5, np.nan, 1.0))
    with pytest.raises(GeneSpliceError, match="not fitted"):
        LinearProbe().predict(x)
    with pytest.raises(GeneSpliceError, match="`task` must be"):
        LinearProbe("ranking")
    with pytest.raises(CheckpointError, match="does not exist"):
        LinearProbe.load(tmp_path)


def test_damaged_files_raise(tmp_path):
    x, y, _ = toy()
    LinearProbe(grid=[1.0]).fit(x, y).save(tmp_path)
    content = (tmp_path / "probe.safetensors").read_bytes()
    (tmp_path / "probe.safetensors").write_bytes(content[:50])
    with pytest.raises(CheckpointError, match="is damaged"):
        LinearProbe.load(tmp_path)


@pytest.mark.parametrize("is_classification", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_groups_never_straddle_folds(is_classification, seed):
    _, y, _ = toy()
    groups = np.random.default_rng(seed).integers(0, 9, size=len(y))
    folds = make_folds(y, groups, 3, seed, is_classification)
    for train, held_out in folds:
        assert not set(groups[train]) & set(groups[held_out])
        assert sorted([*train, *held_out]) == list(range(len(y)))
    assert sorted(np.concatenate([held_out for _, held_out in folds])) == list(range(len(y)))


def test_drawn_part_takes_whole_groups_or_equal_class_shares():
    _, y, groups = toy()
    drawn = draw_part(y, groups, 0.3, 0, True)
    assert len(set(groups[drawn])) == 2 and not set(groups[drawn]) & set(groups[~drawn])
    drawn = draw_part(y, None, 0.25, 0, True)
    assert np.bincount(y[drawn]).tolist() == [15, 15]
    assert not np.array_equal(drawn, draw_part(y, None, 0.25, 1, True))


def test_metrics_against_their_definitions():
    rng = np.random.default_rng(3)
    y, p = rng.integers(0, 3, 60), rng.dirichlet(np.ones(3), 60)
    found = classification_scores(y, p, np.arange(3))
    assert found["auroc"] == pytest.approx(roc_auc_score(y, p, multi_class="ovr", average="macro"))
    assert found["auprc"] == pytest.approx(average_precision_score(np.eye(3)[y], p, average="macro"))
    values_a, values_b = rng.integers(0, 8, 50).astype(float), rng.normal(size=50)
    found = regression_scores(values_a, values_b)
    assert found["spearman"] == pytest.approx(spearmanr(values_a, values_b).statistic)
    assert found["pearson"] == pytest.approx(np.corrcoef(values_a, values_b)[0, 1])
    with pytest.warns(UserWarning, match="constant"):
        assert regression_scores(values_a, np.ones(50))["pearson"] == 0


def layers():
    """Layer "1" tells the classes apart; "0" does not, "2" does so badly but, by luck, perfectly on the test rows."""
    x, y, groups = toy(num_rows=240, noise=0.7)
    noise = np.random.default_rng(9).normal(size=x.shape)
    split = np.where(np.isin(groups, ["chr4", "chr5"]), "test", "train")
    late = noise.copy()
    late[:, 0] += np.where(split == "test", 20, 0.8) * y
    return {"0": noise, "1": x, "2": late}, y, split, groups


@pytest.mark.parametrize("given", [False, True])
def test_validation_chooses_the_layer(given):
    features, y, split, groups = layers()
    if given:
        split = np.where(groups == "chr0", "validation", split)
    result = LayerSweep(seeds=[0, 1, 2], grid=GRID, num_folds=2).run(features, y, split, groups)
    assert result.best_layer == "1"
    assert result.curve[2].test["auprc"].mean > result.curve[1].test["auprc"].mean
    assert [scores.layer for scores in result.curve] == ["0", "1", "2"]
    assert result.best.test["auroc"].mean > 0.9 > 0.75 > result.curve[0].validation["auroc"].mean
    assert len(result.best.test["mcc"].values) == len(result.probes) == 3


def test_test_rows_never_choose():
    """Random relabelling of the test rows changes test scores and nothing else."""
    features, y, split, groups = layers()
    sweep = LayerSweep(seeds=[0, 1], grid=GRID, num_folds=2)
    shuffled = y.copy()
    rng = np.random.default_rng(0)
    shuffled[split == "test"] = rng.permutation(y[split == "test"])
    one, two = sweep.run(features, y, split, groups), sweep.run(features, shuffled, split, groups)
    assert one.best_layer == two.best_layer
    assert [s.validation for s in one.curve] == [s.validation for s in two.curve]
    assert one.best.test != two.best.test


def test_sweep_of_a_regression(tmp_path):
    x, y = values()
    split = np.where(np.arange(90) < 60, "train", "test")
    noise = np.random.default_rng(1).normal(size=x.shape)
    result = LayerSweep("regression", seeds=[0, 1], num_folds=3).run({"a": noise, "b": x}, y, split)
    assert result.best_layer == "b" and set(result.best.test) == {"r2", "pearson", "spearman"}
    result.save(tmp_path)
    facts = json.loads((tmp_path / "layer_sweep.json").read_text())
    assert facts["curve"][1]["test"]["r2"]["values"] == result.best.test["r2"].values
    again = LinearProbe.load(tmp_path / "seed_1")
    np.testing.assert_allclose(again.predict(x), result.probes[1].predict(x), atol=1e-7, rtol=0)


def test_mean_and_sd():
    found = MeanAndSd.of([1.0, 2.0, 4.0])
    assert (found.mean, found.sd) == (pytest.approx(7 / 3), pytest.approx(np.sqrt(7 / 3)))
    assert MeanAndSd.of([2.0]).sd == 0.0


def test_sweep_is_the_same_under_the_same_seeds():
    features, y, split, groups = layers()
    runs = [LayerSweep(seeds=[3], grid=GRID, num_folds=2).run(features, y, split, groups) for _ in range(2)]
    assert runs[0].curve == runs[1].curve


def test_leakage_between_parts():
    features, y, split, groups = layers()
    with pytest.raises(DataError, match=r"must not straddle the parts of `split`: chr1, chr2"):
        check_groups_apart(np.array(["train", "test", "train", "test"]), np.array(["chr1", "chr1", "chr2", "chr2"]))
    moved = split.copy()
    moved[0] = "test"
    with pytest.raises(DataError, match=r"straddle.*chr0"):
        LayerSweep(grid=GRID).run(features, y, moved, groups)
    copied = {"0": features["1"].copy()}
    copied["0"][np.flatnonzero(split == "test")[:3]] = copied["0"][:3]
    with pytest.warns(UserWarning, match="3 of 80 test rows have the features of a training row"):
        LayerSweep(seeds=[0], grid=[1.0]).run(copied, y, split, groups)


def test_bad_splits():
    features, y, split, groups = layers()
    sweep = LayerSweep(grid=[1.0])
    with pytest.raises(DataError, match="'train', 'test' and optionally 'validation'"):
        sweep.run(features, y, np.where(split == "test", "dev", split), groups)
    with pytest.raises(DataError, match="each of the 240 rows"):
        sweep.run(features, y, split[1:], groups)
    with pytest.raises(DataError, match="test part of seed 0 holds no row of class"):
        sweep.run(features, np.where(split == "test", 0, y), split, groups)
    with pytest.raises(GeneSpliceError, match="`select_by` must be one of"):
        LayerSweep(select_by="r2")
