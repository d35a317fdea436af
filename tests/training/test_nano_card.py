"""The card of the embedded checkpoint says what the stored measurements say."""

import json
from pathlib import Path

from training.nano_card import CARDS, card_of, condensed, rows_of


def test_card_on_disk_holds_the_measured_numbers() -> None:
    measured = json.loads((CARDS / "genesplice-nano.json").read_text(encoding="utf-8"))
    card = (CARDS / "genesplice-nano.md").read_text(encoding="utf-8")
    for row in card_of(measured).results:
        assert f"{row.value:.4g}" in card, row


def test_model_beats_every_markov_chain_on_every_held_out_genome() -> None:
    measured = json.loads((CARDS / "genesplice-nano.json").read_text(encoding="utf-8"))
    for genome, methods in measured["pretraining"]["held_out"].items():
        others = [values for name, values in methods.items() if name != "model"]
        assert methods["model"]["loss"] < min(values["loss"] for values in others), genome
        assert methods["model"]["accuracy"] > max(values["accuracy"] for values in others), genome


def test_rows_of_a_task_hold_ours_bars_and_published_figures() -> None:
    summary = {"auroc": {"mean": 0.9, "sd": 0.01, "n": 3}, "mcc": {"mean": 0.6, "sd": 0.02, "n": 3}}
    report = {
        "results": {"test": summary},
        "baselines": {"majority": {"auroc": 0.5, "mcc": 0.0}},
        "task": {"rows": {"test": 8}},
        "per_seed": [],
    }
    rows = rows_of("GUE tf/0, LoRA", condensed(report))
    assert [(row.metric, row.value, row.is_baseline) for row in rows[:2]] == [
        ("auroc", 0.9, False),
        ("mcc", 0.6, False),
    ]
    assert {row.model for row in rows if row.is_baseline} >= {"majority", "DNABERT-2, mean of 5 human TF sets"}


def test_embedded_checkpoint_is_small_and_in_bfloat16() -> None:
    folder = Path(__file__).parents[2] / "genesplice_hf" / "checkpoints" / "genesplice-nano"
    assert (folder / "model.safetensors").stat().st_size <= 5 * 2**20
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
