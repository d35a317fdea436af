"""Evaluation of saved folders: every row in order, the same numbers as the run, tables without labels."""

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import matthews_corrcoef

from genesplice_hf.errors import CheckpointError, DataError
from training import evaluate, finetune


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_folder, motif_folder):
    folder = tmp_path_factory.mktemp("trained")
    report = finetune.main(
        ["--model", tiny_folder, "--data_dir", motif_folder, "--output_dir", str(folder), "--epochs", "2",
         "--learning_rate", "1e-2", "--run_baselines", "false"]
    )  # fmt: skip
    return str(folder / "seed-0" / "model"), report


def read_tsv(path):
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_the_run_is_measured_again_row_by_row(trained, motif_folder, tmp_path):
    model, report = trained
    table = Path(motif_folder) / "test.csv"
    measured = evaluate.main(["--model", model, "--table", str(table), "--output_dir", str(tmp_path)])
    assert measured["metrics"] == pytest.approx(report["per_seed"][0]["test"], abs=1e-6)
    assert json.loads((tmp_path / "metrics.json").read_text())["rows"] == 96
    rows, truth = read_tsv(tmp_path / "predictions.tsv"), pd.read_csv(table)
    assert [row["row"] for row in rows] == [str(i) for i in range(96)]
    assert [row["sequence"] for row in rows] == truth.sequence.tolist()
    assert [int(row["label"]) for row in rows] == truth.label.tolist()
    columns = [name for name in rows[0] if name.startswith("probability_")]
    chances = np.array([[float(row[name]) for name in columns] for row in rows])
    np.testing.assert_allclose(chances.sum(axis=1), 1, atol=1e-5)
    predicted = [int(row["prediction"]) for row in rows]
    assert predicted == chances.argmax(axis=1).tolist()
    assert matthews_corrcoef(truth.label, predicted) == pytest.approx(measured["metrics"]["mcc"])


def test_ragged_duplicated_unlabelled_rows_stay_in_order(trained, tmp_path):
    sequences = ["ACGTACGTAA", "GG", "ACGTACGTAA", "ttttacg", "NNA", "GG"]
    pd.DataFrame({"dna": sequences}).to_csv(tmp_path / "table.csv", index=False)
    argv = ["--model", trained[0], "--table", str(tmp_path / "table.csv"), "--sequence_column", "dna",
            "--predict_only", "true", "--batch_size", "2"]  # fmt: skip
    report = evaluate.main([*argv, "--output_dir", str(tmp_path / "one")])
    assert "metrics" not in report
    rows = read_tsv(tmp_path / "one" / "predictions.tsv")
    assert [row["sequence"] for row in rows] == sequences
    assert "label" not in rows[0]
    chances = [float(row["probability_LABEL_1"]) for row in rows]
    assert chances[0] == chances[2]
    assert chances[1] == chances[5]
    # The mean over strands is the same for a sequence and its reverse complement.
    pd.DataFrame({"dna": ["ACCTGA", "TCAGGT"]}).to_csv(tmp_path / "table.csv", index=False)
    evaluate.main([*argv, "--output_dir", str(tmp_path / "two"), "--average_reverse_complement", "true"])
    first, second = read_tsv(tmp_path / "two" / "predictions.tsv")
    assert float(first["probability_LABEL_1"]) == pytest.approx(float(second["probability_LABEL_1"]), abs=1e-5)


def test_labels_that_the_model_does_not_know(trained, tmp_path):
    pd.DataFrame({"sequence": ["ACGT", "AC"], "label": [0, 2]}).to_csv(tmp_path / "table.csv", index=False)
    argv = ["--model", trained[0], "--table", str(tmp_path / "table.csv"), "--output_dir", str(tmp_path)]
    with pytest.raises(DataError, match=r"0\.\.1"):
        evaluate.main(argv)
    with pytest.raises(DataError, match="name one column per"):
        evaluate.main([*argv, "--label_columns", "label", "other"])


def test_an_adapter_without_its_base_says_so(trained, tmp_path, motif_folder):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in Path(trained[0]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    info = json.loads((folder / "adapter_info.json").read_text())
    base, info["base_model_name"] = info["base_model_name"], None
    (folder / "adapter_info.json").write_text(json.dumps(info))
    argv = ["--model", str(folder), "--table", str(Path(motif_folder) / "test.csv"), "--output_dir", str(tmp_path)]
    with pytest.raises(CheckpointError, match="--base_model"):
        evaluate.main(argv)
    assert evaluate.main([*argv, "--base_model", base])["metrics"] == pytest.approx(trained[1]["per_seed"][0]["test"])
