"""Training on tracks, on windows of a few hundred bases whose signal is a planted word.

The tracks: two strands of one CAGE experiment (a word and its reverse complement), and a DNase track of either word.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from transformers import AutoConfig

import genesplice_hf.models.enformer  # noqa: F401, registers the model
from genesplice_hf.data.track_augment import reverse_complement_ids
from genesplice_hf.errors import DataError
from training import evaluate_tracks, track_baselines, track_card, tracks
from training.settings import parse_settings
from training.track_task import (
    TrackDataSettings,
    TrackModelSettings,
    bin_size,
    build_track_model,
    id_map_of,
    load_track_task,
    read_windows,
    start_at_means,
    tokenizer_of,
)

ROOT = Path(__file__).resolve().parents[2]
BP, BIN_BP, BINS = 512, 32, 8
WORD = np.array([0, 0, 1, 1, 2, 0, 0, 1], dtype=np.uint8)  # AACCGAAC
HEADER = "\tidentifier\tstrand_pair\tdescription"
TRACKS = ["0\tplus\t1\tCAGE:cells", "1\tminus\t0\tCAGE:cells", "2\topen\t2\tDNASE:cells"]
GENESPLICE: dict[str, Any] = {
    "model_type": "genesplice",
    "hidden_sizes": [16, 32],
    "pool_sizes": [32],
    "num_attention_heads": [2, 2],
    "head_dims": [8, 16],
    "intermediate_sizes": [16, 32],
    "num_encoder_layers": [1],
    "num_tower_layers": 1,
    "num_decoder_layers": [1],
    "local_windows": [8],
    "stem_kernel_size": 9,
    "use_decoder": False,
    "track_bin_size": BIN_BP,
    "initializer_range": 0.1,
}
ENFORMER: dict[str, Any] = {
    "model_type": "genesplice_enformer",
    "dim": 48,
    "depth": 1,
    "heads": 2,
    "attn_dim_key": 8,
    "dim_divisible_by": 12,
    "num_downsamples": 5,
    "dropout_rate": 0.0,
}


def windows(number: int, seed: int) -> dict[str, np.ndarray]:
    """Random bases; in the centre some bins hold the word on either strand, and with it 6 in its tracks."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 4, (number, BP), dtype=np.uint8)
    target = np.full((number, BINS, 3), 0.1)
    first = (BP - BINS * BIN_BP) // 2
    for window in range(number):
        for m in rng.permutation(BINS)[:3]:
            minus = int(rng.integers(2))
            place = first + m * BIN_BP + 12
            ids[window, place : place + 8] = 3 - WORD[::-1] if minus else WORD
            target[window, m, minus] += 6
            target[window, m, 2] += 6
    places = {"chrom": np.array(["chr1"] * number), "start": np.arange(number) * BP}
    return {"sequence": ids, "target": target.astype(np.float16), **places, "end": places["start"] + BP}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracks")
    for seed, (name, number) in enumerate({"train": 96, "valid": 16, "test": 16}.items()):
        np.savez(folder / f"{name}.npz", **windows(number, seed))
    (folder / "targets.txt").write_text("\n".join([HEADER, *TRACKS]) + "\n")
    return folder


def options(folder: Path, output: Path, model: dict[str, Any], *more: str) -> list[str]:
    return [
        "--data_dir", str(folder), "--bin_bp", str(BIN_BP), "--output_dir", str(output), "--precision", "fp32",
        f"--model_config={json.dumps(model)}", "--batch_size", "8", "--eval_batch_size", "8", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """GeneSplice after 8 passes of 12 steps."""
    output = tmp_path_factory.mktemp("run")
    arguments = options(folder, output, GENESPLICE, "--epochs", "8", "--learning_rate", "1e-2", "--max_grad_norm", "1")
    return output, tracks.main(arguments)


def test_a_run_learns_the_word_and_beats_what_it_has_to_beat(run):
    output, report = run
    ours, mean = report["results"]["test"], report["baselines"][tracks.MEAN]["test"]
    assert ours["all"]["poisson"]["mean"] < mean["all"]["poisson"]
    assert ours["all"]["pearson"]["mean"] > 0.5
    assert list(ours) == ["all", "CAGE", "DNASE"]
    assert mean["all"]["undefined"] == 3 and np.isnan(mean["all"]["pearson"])
    assert mean["all"]["r2"] == pytest.approx(0, abs=0.02)
    stored = json.loads((output / "metrics.json").read_text())
    assert stored["results"]["test"]["all"]["pearson"] == pytest.approx(ours["all"]["pearson"] | {"sd": None})
    assert stored["task"] == {
        "windows": {"train": 96, "valid": 16, "test": 16}, "bins": BINS, "bin_bp": 32, "read_bp": BP, "tracks": 3,
    }  # fmt: skip
    for name in ("learning_curve", "tracks", "seed-0/test/tracks", "seed-0/test/scatter", "seed-0/test/profiles"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_tracks_holds_what_the_predictions_say(run, folder):
    output, report = run
    predictions = np.load(output / "seed-0" / "test_predictions.npy").astype(np.float64)
    truth = np.load(folder / "test.npz")["target"].astype(np.float64)
    with (output / "seed-0" / "test" / "tracks.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["description"] for row in rows] == ["CAGE:cells", "CAGE:cells", "DNASE:cells"]
    for track, row in enumerate(rows):
        expected = stats.pearsonr(predictions[..., track].ravel(), truth[..., track].ravel()).statistic
        assert float(row["pearson"]) == pytest.approx(expected, abs=1e-3)
    pearson = [float(row["pearson"]) for row in rows]
    assert report["per_seed"][0]["test"]["all"]["pearson"] == pytest.approx(np.mean(pearson), abs=1e-5)
    assert report["per_seed"][0]["test"]["CAGE"]["pearson"] == pytest.approx(np.mean(pearson[:2]), abs=1e-5)


def test_the_saved_model_is_measured_again_by_the_command(run, folder, tmp_path):
    """And its predictions turn with the sequence: bins are flipped, strands swapped."""
    output, report = run
    bed = tmp_path / "genes.bed"
    bed.write_text(
        "chr1\t200\t300\tone\t0\t+\nchr1\t700\t760\ttwo\t0\t-\nchr1\t1250\t1300\tthree\t0\t+\nchr1\t5\t9\tno\t0\t+\n"
    )
    found = evaluate_tracks.main(
        ["--model", str(output / "seed-0" / "model"), "--windows", str(folder / "test.npz"), "--targets",
         str(folder / "targets.txt"), "--output_dir", str(tmp_path / "out"), "--batch_size", "5", "--genes", str(bed),
         "--precision", "fp32"]
    )  # fmt: skip
    for assay, figures in report["per_seed"][0]["test"].items():
        assert found["by_assay"][assay] == pytest.approx(figures, abs=1e-5), assay
    assert found["genes"]["genes"] == 3
    assert json.loads((tmp_path / "out" / "tracks.json").read_text())["genes"]["genes"] == 3


def test_genes_stand_at_the_start_of_their_strand(folder):
    """Window 1 spans 512 to 1024, its bins 640 to 896."""
    table = tracks.TrackDataSettings(data_dir=str(folder), bin_bp=BIN_BP)
    dataset = read_windows(folder / "test.npz", folder / "targets.txt", table)
    bed = folder / "two.bed"
    bed.write_text("chr1\t700\t760\ta\t0\t+\nchr1\t690\t760\tb\t0\t-\n")
    found = evaluate_tracks.genes_of_windows(evaluate_tracks.read_bed(bed), dataset, BIN_BP)
    assert found[0] == {} and found[2] == {}
    assert found[1] == {"a": [0, 1, 2], "b": [2, 3, 4]}


def test_enformer_takes_the_same_way(folder, tmp_path):
    """Two passes lower the loss that the Trainer reports; a second start reads the finished seed back."""
    more = ("--epochs", "2", "--learning_rate", "5e-3", "--max_grad_norm", "1")
    report = tracks.main(options(folder, tmp_path, ENFORMER, *more, "--run_baselines", "false"))
    history = json.loads((tmp_path / "seed-0" / "result.json").read_text())["history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]
    watched = [entry["eval_poisson"] for entry in history if "eval_poisson" in entry]
    assert watched == pytest.approx(losses, abs=1e-5)
    again = tracks.main(options(folder, tmp_path, ENFORMER, *more, "--run_baselines", "false", "--resume", "true"))
    assert again["results"]["test"]["all"]["poisson"] == pytest.approx(
        report["results"]["test"]["all"]["poisson"], nan_ok=True
    )


def test_the_card_says_what_the_runs_measured(run, folder, tmp_path):
    """The same run stands in for both networks, so that neither wins."""
    output, report = run
    card = tmp_path / "cards"
    argv = ["--data_dir", str(folder), "--enformer_run", str(output), "--genesplice_run", str(output)]
    track_card.main([*argv, "--cards_dir", str(card)])
    text = (card / "tracks.md").read_text()
    for split in ("valid", "test"):
        assert f"{report['results'][split]['all']['pearson']['mean']:.4f}" in text
        assert f"{report['baselines'][tracks.MEAN][split]['all']['poisson']:.4f}" in text
    assert "Enformer against GeneSplice, first seeds: higher on 0 of 3 test tracks." in text
    assert str(tmp_path) not in text + (card / "tracks.json").read_text()
    assert json.loads((card / "tracks.json").read_text())["Enformer"]["results"]["test"]["all"]["pearson"]["n"] == 1
    assert {path.name for path in card.iterdir()} == {"tracks.md", "tracks.json", "tracks.png", "tracks_profiles.png"}
    with pytest.raises(DataError, match="finish the run of Enformer"):
        track_card.main([*argv, "--enformer_run", str(tmp_path)])


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (["--bin_bp", "64"], "bins of 32 bp"),
        (["--context_bp", "128"], "must hold the 8 bins"),
        (["--best_metric", "accuracy"], "`best_metric` must be one of loss"),
        (["--data_dir", "nowhere"], "nowhere"),
        (['--model_config={"model_type": "bert"}'], "has no track head"),
    ],
)
def test_settings_that_do_not_fit(folder, tmp_path, change, advice):
    with pytest.raises(DataError, match=advice):
        tracks.main([*options(folder, tmp_path, GENESPLICE), *change])


def test_kmers_are_counted_where_their_bin_stands():
    ids = np.zeros(BP, dtype=np.uint8)
    ids[300:304] = 1
    ids[10] = 4
    found = track_baselines.kmer_features(ids, BINS, BIN_BP)
    scales, classes = len(track_baselines.SCALES_BP), 136
    assert found.shape == (BINS, scales * classes)
    np.testing.assert_allclose(found.reshape(BINS, scales, classes).sum(axis=2), 1, atol=1e-6)
    cccc = track_baselines._canonical(4)[0][0b01010101]
    # Base 300 stands in bin (300 - 128) // 32 = 5; a bin of 32 bases holds 32 starts.
    assert np.flatnonzero(found[:, cccc]).tolist() == [5]
    assert found[5, cccc] == pytest.approx(1 / 32)
    turned = reverse_complement_ids(torch.from_numpy(ids)).numpy()
    near = track_baselines.kmer_features(turned, BINS, BIN_BP)[::-1]
    # Starts of the other strand are 3 bases on, so that two counts at a bin's ends may differ.
    assert np.abs(near - found).max() <= 3 / 32 + 1e-6


def test_the_ridge_is_the_textbook_one(folder):
    """Against scikit-learn on all bins at once, at the penalty that it chose."""
    task = load_track_task(TrackDataSettings(data_dir=str(folder), bin_bp=BIN_BP))
    ridge = track_baselines.fit_ridge(task.train, task.valid, BIN_BP)
    features, labels = (
        np.concatenate(parts) for parts in zip(*track_baselines._features(task.train, BIN_BP), strict=True)
    )
    scaler = StandardScaler().fit(features)
    model = Ridge(alpha=ridge.alpha).fit(scaler.transform(features), labels)
    test = [pair[0] for pair in track_baselines._features(task.test, BIN_BP)]
    expected = np.maximum(model.predict(scaler.transform(np.concatenate(test))), ridge.floor_T)
    np.testing.assert_allclose(np.concatenate([ridge(part) for part in test]), expected, atol=2e-3)
    np.testing.assert_allclose(track_baselines.track_means(task.train), labels.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("name", ["enformer_tracks", "genesplice_tracks"])
def test_the_shipped_configs_are_of_one_recipe(name: str):
    """Same windows, augmentation, clipping and seeds; each network has bins of the data's size and its own ids."""
    data, model, train = parse_settings(tracks.SETTINGS, ["--config", str(ROOT / f"training/configs/{name}.yaml")])
    assert (data.bin_bp, data.context_bp, data.max_shift_bp) == (32, 73_728, 3)
    assert (train.max_grad_norm, train.epochs, train.seeds, train.weight_decay) == (0.2, 8, [0, 1, 2], 0)
    assert train.augment_reverse_complement and train.average_reverse_complement and not train.freeze_batch_norms
    config = AutoConfig.for_model(**model.model_config)
    assert bin_size(config) == 32
    assert id_map_of(tokenizer_of(config)) == ([0, 1, 2, 3, 4, 5] if name.startswith("enf") else [5, 6, 7, 8, 9, 0])


@pytest.mark.parametrize(("metric", "greater"), [("loss", False), ("poisson", False), ("pearson", True), ("r2", True)])
def test_the_checkpoint_is_the_best_and_not_the_worst(tmp_path: Path, metric: str, greater: bool):
    train = tracks.TrackTrainSettings(best_metric=metric)
    arguments = tracks.trainer_arguments(train, 10, train.learning_rate, metric, 0, tmp_path)
    assert (arguments.metric_for_best_model, arguments.greater_is_better) == (metric, greater)
    assert (arguments.max_grad_norm, arguments.per_device_train_batch_size, arguments.eval_steps) == (0.2, 1, 10)


@pytest.mark.parametrize("fields", [GENESPLICE, ENFORMER], ids=["genesplice", "enformer"])
def test_a_fresh_head_begins_near_the_means(folder: Path, fields: dict[str, Any]):
    task = load_track_task(TrackDataSettings(data_dir=str(folder), bin_bp=BIN_BP))
    model = build_track_model(TrackModelSettings(model_config=fields), task, BIN_BP, seed=0)
    means = track_baselines.track_means(task.train)
    start_at_means(model, means)
    layer = [part for part in model.classifier.modules() if isinstance(part, torch.nn.Linear)][-1]
    np.testing.assert_allclose(torch.nn.functional.softplus(layer.bias).detach(), means, rtol=1e-5)
