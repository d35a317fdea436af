"""The planted dependency: what the task asks, and a run of two short stages from settings to card."""

import json
from pathlib import Path

import pytest
import torch

from genesplice_hf.errors import DataError
from training.experiments.planted_dependency import UNITS, PlantedSettings, main, windows
from training.experiments.planted_dependency_card import card_text
from training.settings import settings_as_dict

REPEAT = 24


def kind_at(row: torch.Tensor, start: int) -> int | None:
    found = row[start : start + REPEAT].tolist()
    return next((kind for kind, unit in enumerate(UNITS) if found == list(unit) * (REPEAT // 2)), None)


@pytest.mark.parametrize("window_bp", [2 * REPEAT, 200, 2_000])
def test_the_label_says_whether_both_ends_hold_the_same_repeat(window_bp: int) -> None:
    ids, labels = windows(64, window_bp, REPEAT, torch.Generator().manual_seed(0))
    assert ids.shape == (64, window_bp) and ids.min() >= 5 and ids.max() <= 8
    firsts = []
    for row, label in zip(ids, labels, strict=True):
        half = window_bp // 2
        first = [kind for start in range(half - REPEAT + 1) if (kind := kind_at(row, start)) is not None]
        last = [kind for start in range(half, window_bp - REPEAT + 1) if (kind := kind_at(row, start)) is not None]
        assert first and last and (first[0] == last[0]) == bool(label)
        firsts.append(first[0])
    # Half of the labels, and one repeat says nothing about them.
    assert 16 < labels.sum() < 48
    agreeing = labels[torch.tensor(firsts) == 0].float().mean()
    assert 0.25 < agreeing < 0.75


def test_a_run_leaves_a_card_and_is_not_repeated(tmp_path: Path) -> None:
    config = {
        "hidden_sizes": [8, 8, 16], "num_attention_heads": [1, 1, 2], "head_dims": [8, 8, 8],
        "intermediate_sizes": [16, 16, 16], "num_tower_layers": 1, "classifier_pooling": "bin_mean",
    }  # fmt: skip
    words = [
        "--window_bp", "64", "256", "--steps", "3", "2", "--batch_sizes", "4", "2", "--repeat_bp", "16",
        "--test_windows", "9", "--model_config", json.dumps(config),
        "--output_dir", str(tmp_path / "run"), "--cards_dir", str(tmp_path / "cards"),
    ]  # fmt: skip
    report = main([*words, "--seeds", "0"])
    assert [(run["network"], list(run["accuracy"])) for run in report["runs"]] == [
        ("with tower", ["64", "256"]),
        ("without tower", ["64", "256"]),
    ]
    assert report["runs"][0]["parameters"] > report["runs"][1]["parameters"]
    assert all(
        9 * share == pytest.approx(round(9 * share)) for run in report["runs"] for share in run["accuracy"].values()
    )
    again = main([*words, "--seeds", "0", "1"])
    assert again["runs"][:2] == report["runs"] and [run["seed"] for run in again["runs"]] == [0, 0, 1, 1]
    stored = json.loads((tmp_path / "cards/planted_dependency.json").read_text())
    assert (tmp_path / "cards/planted_dependency.md").read_text() == card_text(stored)
    assert (tmp_path / "cards/planted_dependency.png").stat().st_size > 1000
    with pytest.raises(DataError, match="repeat_bp was 16"):
        main([*words, "--repeat_bp", "18"])


def test_the_card_names_the_reach_of_every_seed() -> None:
    shares = {"with tower": [[1.0, 0.96, 0.97], [1.0, 1.0, 0.9]], "without tower": [[1.0, 0.5, 1.0], [0.94, 0.5, 0.5]]}
    runs = [
        {"network": network, "seed": seed, "parameters": 10, "cpu_seconds": 2.0,
         "accuracy": dict(zip(("512", "1024", "2048"), row, strict=True)),
         "accuracy_at_the_end": {"512": 0.5, "1024": 0.5 * seed, "2048": 1.0}}
        for network, rows in shares.items() for seed, row in enumerate(rows)
    ]  # fmt: skip
    settings = {
        "repeat_bp": 256, "seeds": [0, 1], "window_bp": [512, 1024, 2048], "steps": [1, 2, 3],
        "batch_sizes": [4, 2, 1], "test_windows": 50, "model_config": {"qk_norm": True},
    }  # fmt: skip
    text = card_text({"runs": runs, "settings": settings})
    assert (
        "With tower: 0.935 (0.900 to 0.970) at 2,048 bp; every seed is right in at least 95% of the windows of 512, "
        "1,024 bp." in text
    )
    assert "| 1,024 | 0.250 (0.000 to 0.500) |" in text
    assert (
        "Without tower: 0.750 (0.500 to 1.000) at 2,048 bp; every seed is right in at least 95% of the windows of no "
        "bp." in text
    )
    assert "(6 steps, 12,288 bases)" in text and "| 2,048 | 0.935 (0.900 to 0.970) | 0.750 (0.500 to 1.000) |" in text


def test_the_stored_card_is_the_text_of_its_numbers() -> None:
    cards = Path(__file__).resolve().parents[2] / "model_cards"
    stored = json.loads((cards / "planted_dependency.json").read_text())
    assert (cards / "planted_dependency.md").read_text() == card_text(stored)
    assert settings_as_dict(PlantedSettings()).items() >= stored["settings"].items()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": [1]}, "one entry per stage"),
        ({"repeat_bp": 300}, "two repeats"),
        ({"repeat_bp": 1}, "two repeats"),
        ({"seeds": []}, "`seeds`"),
        ({"test_windows": 0}, "`test_windows`"),
    ],
)
def test_settings_that_cannot_be(changed: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PlantedSettings(**changed)
