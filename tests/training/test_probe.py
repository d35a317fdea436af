"""Probing from end to end: the planted motif is found, files exist, and the numbers follow from the features."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from genesplice_hf.adaptation.probe import LinearProbe
from genesplice_hf.errors import DataError
from training import probe
from training.settings import DataSettings, ModelSettings
from training.task import load_task


def test_probe_learns_and_leaves_every_file(tmp_path, tiny_folder, motif_folder, capsys):
    report = probe.main(
        ["--model", tiny_folder, "--data_dir", motif_folder, "--output_dir", str(tmp_path), "--seeds", "0", "1"]
    )
    assert report["results"]["test"]["auroc"]["mean"] > 0.95
    assert [scores["layer"] for scores in report["layers"]] == ["0", "1", "2"]
    assert "majority" in report["baselines"]
    assert json.loads((tmp_path / "metrics.json").read_text())["best_layer"] == report["best_layer"]
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "layers.png").stat().st_size > 2000
    assert "layer chosen by validation mcc" in capsys.readouterr().out
    # The stored probe gives the reported score.
    data = DataSettings(data_dir=motif_folder)
    test = load_task(data).test
    settings = probe.ProbeSettings(layers=[int(report["best_layer"])])
    features = probe.embed(ModelSettings(model=tiny_folder), settings, test.sequences, seed=0)
    stored = LinearProbe.load(tmp_path / "probes" / "seed_1")
    best = next(scores for scores in report["layers"] if scores["layer"] == report["best_layer"])
    score = roc_auc_score(test.labels, stored.predict_proba(features[report["best_layer"]])[:, 1])
    assert score == pytest.approx(best["test"]["auroc"]["values"][1])


def test_one_strength_equals_scikit_learn_on_the_same_rows(tmp_path, tiny_folder, motif_folder):
    task = load_task(DataSettings(data_dir=motif_folder))
    settings = probe.ProbeSettings(seeds=[0], layers=[1], strengths=[0.01])
    sequences = [*task.train.sequences, *task.dev.sequences, *task.test.sequences]
    features = probe.embed(ModelSettings(model=tiny_folder), settings, sequences, seed=0)
    train = probe._with_dev(task)
    result = probe.sweep(task, train, features, settings)
    scaler = StandardScaler().fit(features["1"][: len(train.labels)])
    model = LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000)
    model.fit(scaler.transform(features["1"][: len(train.labels)]), train.labels)
    oracle = model.decision_function(scaler.transform(features["1"][len(train.labels) :]))
    # The sweep holds validation rows back, so the fits agree in what they say, not in every digit.
    ours = result.probes[0].decision_function(features["1"][len(train.labels) :])[:, 0]
    assert np.corrcoef(ours, oracle)[0, 1] > 0.98


def test_random_weights_differ_and_repeat(tiny_folder):
    settings = probe.ProbeSettings(layers=[2])
    twin = ModelSettings(model=tiny_folder, random_weights=True)
    first, again, other = (probe.embed(twin, settings, ["ACGTAC", "GGG"], seed)["2"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_regression_and_refusal_of_multi_label(tmp_path, tiny_folder):
    rng = np.random.default_rng(0)
    for name in ("train", "dev", "test"):
        sequences = ["".join(rng.choice(list("ACGT"), 20, p=rng.dirichlet([2] * 4))) for _ in range(80)]
        share = [s.count("G") / 20 for s in sequences]
        table = pd.DataFrame({"sequence": sequences, "label": share, "other": np.round(share)})
        table.assign(first=0).to_csv(tmp_path / f"{name}.csv", index=False)
    argv = ["--model", tiny_folder, "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--seeds", "0"]
    report = probe.main([*argv, "--strengths", "1.0"])
    assert report["results"]["test"]["pearson"]["mean"] > 0.95
    with pytest.raises(DataError, match="one label column"):
        probe.main([*argv, "--label_columns", "other", "first"])
