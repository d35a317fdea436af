"""Simulated contact maps by hand, and a run of the training script on a tiny set."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interruptions import PowerCut, StopAt
from safetensors.torch import load_file
from transformers import AutoConfig

from genesplice_hf.data.contacts import window_ids
from genesplice_hf.errors import DataError
from genesplice_hf.genome.alphabet import reverse_complement
from genesplice_hf.models.auto import AutoModelForContactPrediction
from training.contact_simulation import Physics, Sites, contact_matrix, find_sites, log_odds, read_motif
from training.contacts import (
    ClipEachTensor,
    ContactDataSettings,
    ContactTrainSettings,
    load_contact_task,
    main,
    read_windows,
    train_contacts,
)
from training.settings import parse_settings

CONFIGS = Path(__file__).resolve().parents[2] / "training" / "configs"
CONSENSUS = "CCACCAGGTGGCA"
BIN_BP = 32
TINY = {
    "model_type": "genesplice_akita", "seq_length": 512, "stem_filters": 8, "stem_kernel_size": 13,
    "stem_pool_size": 4, "tower_filters_init": 8, "tower_repeat": 3, "dilated_filters": 4, "dilated_repeat": 1,
    "dilated_dropout": 0.0, "trunk_out_filters": 8, "head2d_filters": 6, "dilated2d_filters": 4,
    "dilated2d_repeat": 1, "target_crop": 1, "num_targets": 1,
}  # fmt: skip


def motif_text() -> str:
    """A sharp motif beside another one, in the layout of the motif collections."""
    rows = ["\t".join("20.0" if base == letter else "1.0" for base in "ACGT") for letter in CONSENSUS]
    return "\n".join([">OTHER", "1\t1\t1\t1", ">TOY.1", *rows, ">LAST", "2\t1\t1\t1", ""])


def planted(rng: np.random.Generator, length: int) -> str:
    """Random bases with the motif on both strands in every 512."""
    letters = "".join(rng.choice(list("ACGT"), length))
    for start in range(0, length, 512):
        first, second = sorted(rng.choice(np.arange(2, 14), 2, replace=False) * BIN_BP + start)
        letters = letters[:first] + CONSENSUS + letters[first + len(CONSENSUS) :]
        letters = letters[:second] + reverse_complement(CONSENSUS) + letters[second + len(CONSENSUS) :]
    return letters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`toy.fa` with 8 training, 2 valid and 2 test windows of 512 bp, and `motifs.pfm.gz`."""
    path, rng = tmp_path_factory.mktemp("contacts"), np.random.default_rng(0)
    records = {"a train": 8, "b valid": 2, "c test": 2}
    (path / "toy.fa").write_text(
        "".join(f">{name} window\n{planted(rng, 512 * count + 30)}\n" for name, count in records.items())
    )
    with gzip.open(path / "motifs.pfm.gz", "wt") as stream:
        stream.write(motif_text())
    return path


def settings(folder: Path, **changes) -> ContactDataSettings:
    fields = {"data_dir": str(folder), "genomes": ["toy.fa"], "motif_file": "motifs.pfm.gz", "motif_name": "TOY.1"}
    return ContactDataSettings(**(fields | {"motif_threshold": 15.0, "window_bp": 512} | changes))


def test_a_motif_is_read_by_its_name(folder: Path) -> None:
    counts = read_motif(folder / "motifs.pfm.gz", "TOY.1")
    assert counts.shape == (len(CONSENSUS), 4)
    assert "".join("ACGT"[column] for column in counts.argmax(1)) == CONSENSUS
    np.testing.assert_allclose((2.0 ** log_odds(counts)).sum(1), 4)
    with pytest.raises(DataError, match="no motif 'TOY'"):
        read_motif(folder / "motifs.pfm.gz", "TOY")


def test_sites_are_where_the_motif_is_and_point_its_way(folder: Path) -> None:
    weights = log_odds(read_motif(folder / "motifs.pfm.gz", "TOY.1"))
    text = "A" * 40 + CONSENSUS + "A" * 30 + reverse_complement(CONSENSUS) + "N" * 20 + "A" * 20
    found = find_sites(window_ids(text), weights, 15.0)
    assert np.flatnonzero(found.forward > 0.5).tolist() == [40 + len(CONSENSUS) // 2]
    assert np.flatnonzero(found.reverse > 0.5).tolist() == [40 + len(CONSENSUS) + 30 + len(CONSENSUS) // 2]
    turned = find_sites(window_ids(reverse_complement(text)), weights, 15.0)
    np.testing.assert_allclose(turned.forward, found.reverse[::-1], atol=1e-12)


def matrix(sites: list[tuple[int, str]]) -> np.ndarray:
    """log enrichment of 16 bins with certain sites."""
    strands = {"+": np.zeros(16 * BIN_BP), "-": np.zeros(16 * BIN_BP)}
    for place, strand in sites:
        strands[strand][place * BIN_BP] = 1.0
    contacts = contact_matrix(Sites(strands["+"], strands["-"]), BIN_BP, Physics(blur=0.01))
    distance = np.abs(np.subtract.outer(np.arange(16), np.arange(16)))
    return np.log(contacts * (1 + distance))


def test_sites_that_point_at_each_other_make_a_dot() -> None:
    found = matrix([(4, "+"), (10, "-")])
    assert np.array_equal(found, found.T)
    assert found[4, 10] == found.max() == pytest.approx(1.5 + 1.0)
    assert found[4, 7] == pytest.approx(0.5) and found[7, 10] == pytest.approx(0.5)
    assert found[5, 8] == found[0, 3] == 0
    assert found[2, 12] == pytest.approx(-1.0) and found[2, 7] == pytest.approx(-1.0)
    apart = matrix([(4, "-"), (10, "+")])
    assert apart[4, 10] == 0 and apart.max() == pytest.approx(0.5)


def test_without_sites_there_is_nothing() -> None:
    assert np.abs(matrix([])).max() < 1e-12


def test_the_reverse_complement_of_a_window_has_the_flipped_map(folder: Path) -> None:
    weights = log_odds(read_motif(folder / "motifs.pfm.gz", "TOY.1"))
    text = planted(np.random.default_rng(5), 512)
    one, other = (
        contact_matrix(find_sites(window_ids(letters), weights, 15.0), BIN_BP)
        for letters in (text, reverse_complement(text))
    )
    np.testing.assert_allclose(other[::-1, ::-1], one, rtol=1e-6)


def test_windows_follow_the_description_or_the_seed(folder: Path) -> None:
    found = read_windows([folder / "toy.fa"], settings(folder))
    assert {name: len(part) for name, part in found.items()} == {"train": 8, "valid": 2, "test": 2}
    dense = read_windows([folder / "toy.fa"], settings(folder, train_step_bp=256))
    assert {name: len(part) for name, part in dense.items()} == {"train": 15, "valid": 2, "test": 2}
    assert np.array_equal(dense["train"][1][:256], found["train"][0][256:])
    many = folder / "many.fa"
    many.write_text("".join(f">r{n}\n{planted(np.random.default_rng(n), 512)}\n" for n in range(20)))
    drawn = read_windows([many], settings(folder, split_by="random"))
    assert {name: len(part) for name, part in drawn.items()} == {"train": 14, "valid": 3, "test": 3}
    (folder / "other.fa").write_text(">x neither\nACGT\n")
    for change, message in (
        ({"window_bp": 4096}, "no window"),
        ({"genomes": ["other.fa"]}, "one of"),
    ):
        options = settings(folder, **change)
        with pytest.raises(DataError, match=message):
            read_windows([folder / name for name in options.genomes], options)


def test_a_window_of_parts_of_bins_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="multiple of the bin"):
        load_contact_task(settings(folder, window_bp=500), AutoConfig.for_model(**TINY))


def test_expected_contacts_come_from_training_windows(folder: Path) -> None:
    task = load_contact_task(settings(folder), AutoConfig.for_model(**TINY))
    targets = task.datasets["train"].targets
    assert targets.shape == (8, task.datasets["train"].targets.shape[1], 1)
    assert abs(float(targets.mean())) < 0.2 and float(targets.std()) > 0.1
    assert task.sites["train"] == pytest.approx(2, abs=0.5)


def test_every_tensor_is_clipped_by_itself() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 2), 10.0), torch.full((2,), 0.1)
    ClipEachTensor(1.0).on_pre_optimizer_step(None, None, None, model)
    assert model.weight.grad.norm().item() == pytest.approx(1, rel=1e-4)
    assert model.bias.grad.tolist() == pytest.approx([0.1, 0.1])


def arguments(folder: Path, output_dir: Path, **changed: Any) -> list[str]:
    """Of a run on the toy windows: 4 steps, measured and saved after 2 and 4."""
    settings = {
        "data_dir": folder, "motif_file": "motifs.pfm.gz", "motif_name": "TOY.1", "window_bp": 512,
        "motif_threshold": 15, "output_dir": output_dir, "epochs": 2, "batch_size": 4, "evaluations": 2,
        "model_config": json.dumps(TINY),
    }  # fmt: skip
    return [*(f"--{name}={value}" for name, value in (settings | changed).items()), "--genomes", "toy.fa"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_leaves_metrics_model_and_maps(folder: Path, tmp_path: Path, optimizer: str) -> None:
    argv = arguments(folder, tmp_path / "run", optimizer=optimizer)
    report = main(argv)
    stored = json.loads((tmp_path / "run/metrics.json").read_text())
    assert stored["windows"] == {"train": 8, "valid": 2, "test": 2}
    assert set(stored["results"]) == {"model", "mean map", "distance only"}
    assert report["steps"] == 4 and np.isfinite(report["results"]["model"]["pearson"])
    assert (tmp_path / "run/maps.png").stat().st_size > 1000
    loaded = AutoModelForContactPrediction.from_pretrained(tmp_path / "run/model")
    assert loaded.config.num_targets == 1
    with pytest.raises(DataError, match="already holds a run"):
        main(argv)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_run_is_an_uninterrupted_one(folder: Path, tmp_path: Path, optimizer: str) -> None:
    """Cut in the second pass, after its third step of four and a checkpoint after the second.

    Dropout, shifts and strands are drawn at random.
    """
    config = json.dumps(TINY | {"dilated_dropout": 0.3})
    changed = {"optimizer": optimizer, "model_config": config, "batch_size": 2, "evaluations": 4}
    changed["early_stopping_patience"] = 3
    whole = main(arguments(folder, tmp_path / "whole", **changed))
    cut = arguments(folder, tmp_path / "cut", **changed)
    with pytest.raises(PowerCut):
        train_contacts(*parse_settings((ContactDataSettings, ContactTrainSettings), cut), callbacks=[StopAt(7)])
    assert not (tmp_path / "cut/metrics.json").exists()
    resumed = main([*cut, "--resume", "true"])
    for key in ("results", "steps", "best_step"):
        # As text, for a correlation that is not defined is not equal to itself.
        assert json.dumps(resumed[key]) == json.dumps(whole[key])
    assert [entry.get("loss") for entry in resumed["history"]] == [entry.get("loss") for entry in whole["history"]]
    weights, again = (load_file(tmp_path / run / "model/model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
    written = (tmp_path / "cut/model/model.safetensors").stat().st_mtime_ns
    assert main([*cut, "--resume", "true"])["results"]["model"]["mse"] == whole["results"]["model"]["mse"]
    assert (tmp_path / "cut/model/model.safetensors").stat().st_mtime_ns == written


def test_the_config_names_only_settings() -> None:
    data, train = parse_settings(
        (ContactDataSettings, ContactTrainSettings), ["--config", str(CONFIGS / "akita_ctcf_simulated.yaml")]
    )
    config = AutoConfig.for_model(**train.model_config)
    assert config.seq_length == data.window_bp and data.window_bp % config.pool_factor == 0
