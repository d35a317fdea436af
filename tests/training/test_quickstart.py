"""The quickstart end to end on a few rows, and the parts whose answer can be worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from genesplice_hf.interpretation.mutagenesis import MutagenesisResult
from training.quickstart import CONFIG, CONSENSUS, OURS, TWIN, consensus_rank, main


def _result(importance: np.ndarray) -> MutagenesisResult:
    scores = np.repeat(-importance[:, None].astype(np.float32), 4, axis=1)
    scores[:, 0] = 0  # the reference is A everywhere
    return MutagenesisResult("A" * len(importance), scores, 0.0, 0, len(importance), "functional", "logit")


def test_consensus_counts_only_where_a_strong_window_touches_it() -> None:
    importance = np.zeros(90)
    importance[40:51] = 1.0
    importance[0:11] = 2.0
    found = consensus_rank(_result(importance), [(42, 53)])
    assert found["consensus_rank"] == 2
    missed = consensus_rank(_result(importance), [(70, 81)])
    assert missed["consensus_rank"] is None or missed["consensus_rank"] == 3
    assert len(CONSENSUS) == 11


@pytest.mark.slow
def test_quickstart_leaves_everything_that_it_promises(tmp_path: Path) -> None:
    settings = yaml.safe_load(Path(CONFIG).read_text(encoding="utf-8"))
    small = {"max_train_rows": 160, "max_dev_rows": 32, "max_test_rows": 64, "precision": "fp32"}
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(settings | small), encoding="utf-8")
    folder = tmp_path / "out"
    summary = main(["--config", str(config), "--output_dir", str(folder)])
    expected = ["majority", "5-mer logistic regression", "one-hot logistic regression", TWIN, OURS]
    assert list(summary["metrics"]) == expected
    assert summary["loaded_back"]["identical_without_package"]
    files = "logo.png mutagenesis.png variants.tsv lora/roc.png lora/learning_curve.png published/model.safetensors"
    for name in files.split():
        assert (folder / name).stat().st_size > 0, name
    card = (folder / "published" / "README.md").read_text(encoding="utf-8")
    assert f"{summary['metrics'][OURS]['auroc']:.4g}" in card
    table = [line for line in (folder / "variants.tsv").read_text().splitlines() if not line.startswith("#")]
    assert len(table) == 1 + 3 * 150
    config_json = json.loads((folder / "published" / "config.json").read_text(encoding="utf-8"))
    assert config_json["id2label"] == {"0": "broken", "1": "functional"}
