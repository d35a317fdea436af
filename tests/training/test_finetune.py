"""Fine-tuning from end to end on a planted motif: files, learning, reload, resume, cleaning, torchrun."""

import json
import os
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from interruptions import KillAt
from safetensors.torch import load_file

from genesplice_hf.errors import CheckpointError, DataError
from genesplice_hf.genome.alphabet import reverse_complement
from training import finetune, models
from training.settings import DataSettings, TrainSettings
from training.task import TokenDataset, flipped, load_task, tokenize

ROOT = Path(__file__).resolve().parents[2]
# fp32 on every machine: saved logits are compared with those of a reloaded model.
QUICK = ["--epochs", "2", "--batch_size", "32", "--run_baselines", "false", "--early_stopping_patience", "none"]
QUICK += ["--precision", "fp32"]


def run(folder, model, data, *more, callbacks=()):
    argv = ["--output_dir", str(folder), "--model", model, "--data_dir", data, *QUICK, *more]
    return finetune.main(argv, callbacks=callbacks)


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 2000


def without_times(report):
    return [{key: value for key, value in seed.items() if key != "seconds"} for seed in report["per_seed"]]


def test_full_run_learns_and_leaves_every_file(tmp_path, tiny_folder, motif_folder, capsys):
    report = run(
        tmp_path / "run", tiny_folder, motif_folder, "--method", "full", "--seeds", "0", "1", "--epochs", "4",
        "--learning_rate", "5e-3", "--run_baselines", "true",
    )  # fmt: skip
    assert report["results"]["test"]["auroc"]["mean"] > 0.95
    assert report["results"]["test"]["auroc"]["n"] == 2
    assert report["per_seed"][0]["test"] != report["per_seed"][1]["test"]
    assert list(report["baselines"]) == ["majority", "5-mer logistic regression", "one-hot logistic regression"]
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert stored["results"]["test"]["auroc"]["mean"] == report["results"]["test"]["auroc"]["mean"]
    assert stored["environment"]["world_size"] == 1
    assert all(is_png(tmp_path / "run" / f"{name}.png") for name in ("learning_curve", "roc", "confusion"))
    printed = capsys.readouterr().out
    assert "majority" in printed
    assert "±" in printed


@pytest.mark.parametrize("method", ["lora", "ia3", "layer_norm", "linear_probe"])
def test_saved_adapter_holds_no_base_and_reloads_with_equal_logits(tmp_path, tiny_folder, motif_folder, method):
    run(tmp_path, tiny_folder, motif_folder, "--method", method, "--learning_rate", "1e-2")
    saved = tmp_path / "seed-0" / "model"
    base_size = sum(t.numel() for t in load_file(Path(tiny_folder) / "model.safetensors").values())
    adapter_size = sum(t.numel() for path in saved.glob("*.safetensors") for t in load_file(path).values())
    assert 0 < adapter_size < base_size / 2
    torch.manual_seed(123)
    model, tokenizer = models.load_trained(str(saved))
    test = load_task(DataSettings(data_dir=motif_folder)).test
    logits = models.predict_logits(model, tokenize(tokenizer, test.sequences), batch_size=17)
    np.testing.assert_allclose(logits, np.load(tmp_path / "seed-0" / "test_logits.npy"), atol=1e-5)


def test_checkpoints_of_a_lora_run_hold_only_the_adapter(tmp_path, tiny_folder, motif_folder):
    run(tmp_path, tiny_folder, motif_folder, "--method", "lora", "--epochs", "1")
    (checkpoint,) = tmp_path.glob("seed-0/checkpoint-*")
    assert not (checkpoint / "model.safetensors").exists()
    names = load_file(checkpoint / "adapter_model.safetensors")
    assert any("classifier" in name for name in names)
    assert all("lora_" in name or "classifier" in name for name in names)


def test_random_twin_is_saved_whole_and_differs_per_seed(tmp_path, tiny_folder, motif_folder):
    run(tmp_path, tiny_folder, motif_folder, "--random_weights", "true", "--seeds", "0", "1", "--epochs", "1")
    loaded = [models.load_trained(str(tmp_path / f"seed-{seed}" / "model"))[0] for seed in (0, 1)]
    weights = [model.base_model.get_input_embeddings().weight for model in loaded]
    assert not torch.equal(*weights)
    tokens = tokenize(
        models.load_trained(str(tmp_path / "seed-1" / "model"))[1],
        pd.read_csv(Path(motif_folder) / "test.csv").sequence,
    )
    logits = models.predict_logits(loaded[1], tokens, 64)
    np.testing.assert_allclose(logits, np.load(tmp_path / "seed-1" / "test_logits.npy"), atol=1e-5)


# 8 steps per epoch, a checkpoint every 4: the kill falls into the second epoch, two steps after a checkpoint.
RESUMABLE = ["--epochs", "2", "--evaluations_per_epoch", "2", "--augment_reverse_complement", "true"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_resume_after_a_kill_equals_the_uninterrupted_run(tmp_path, tiny_folder, motif_folder, method):
    options = [*RESUMABLE, "--method", method]
    whole = run(tmp_path / "whole", tiny_folder, motif_folder, *options)
    arguments = (tmp_path / "cut", tiny_folder, motif_folder, *options)
    # Fresh: a fork of a process in which libraries have started threads may wait for them for ever.
    child = get_context("spawn").Process(target=run, args=arguments, kwargs={"callbacks": [KillAt(14)]})
    child.start()
    child.join(600)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "metrics.json").exists()
    # A checkpoint that the kill cut short must not be taken.
    torn = tmp_path / "cut" / "seed-0" / "checkpoint-14"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_st')
    resumed = run(*arguments, "--resume", "true")
    assert without_times(resumed) == without_times(whole)
    histories = [
        json.loads((tmp_path / name / "seed-0" / "result.json").read_text())["history"] for name in ("whole", "cut")
    ]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert losses[0] == losses[1]
    np.testing.assert_array_equal(*(np.load(tmp_path / n / "seed-0" / "test_logits.npy") for n in ("whole", "cut")))


def test_resume_keeps_finished_seeds_and_refuses_other_settings(tmp_path, tiny_folder, motif_folder):
    options = (tmp_path, tiny_folder, motif_folder, "--epochs", "1")
    first = run(*options)
    with pytest.raises(DataError, match="already holds a run; pass `--resume true`"):
        run(*options)
    with pytest.raises(DataError, match=r"`--resume` needs the settings .*lora_rank was 8, is 4"):
        run(*options, "--resume", "true", "--lora_rank", "4")
    both = run(*options, "--resume", "true", "--seeds", "0", "1")
    assert both["per_seed"][0] == first["per_seed"][0]
    assert [seed["seed"] for seed in both["per_seed"]] == [0, 1]
    again = run(*options, "--overwrite", "true", "--lora_rank", "4")
    assert again["per_seed"][0]["trainable_parameters"] < first["per_seed"][0]["trainable_parameters"]
    assert not (tmp_path / "seed-1").exists()


def test_early_stopping_ends_before_the_last_epoch(tmp_path, tiny_folder, motif_folder):
    report = run(
        tmp_path, tiny_folder, motif_folder, "--epochs", "30", "--early_stopping_patience", "1",
        "--learning_rate", "1e-9", "--method", "linear_probe",
    )  # fmt: skip
    assert report["per_seed"][0]["steps"] == 16
    assert report["per_seed"][0]["best_step"] == 8


def write_tables(folder, **tables):
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    return str(folder)


def random_rows(num_rows, seed):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACGT"), 20)) for _ in range(num_rows)]


def test_regression_and_multi_label_runs(tmp_path, tiny_folder):
    sequences = {name: random_rows(48, seed) for seed, name in enumerate(("train", "dev", "test"))}
    values = {name: [s.count("G") / 20 for s in part] for name, part in sequences.items()}
    tables = {n: pd.DataFrame({"sequence": sequences[n], "label": values[n]}) for n in sequences}
    data = write_tables(tmp_path, **tables)
    report = run(tmp_path / "values", tiny_folder, data, "--run_baselines", "true", "--epochs", "1")
    assert report["task"]["problem_type"] == "regression"
    assert set(report["results"]["test"]) == {"pearson", "spearman", "r2", "mse"}
    assert "mean value" in report["baselines"]
    assert is_png(tmp_path / "values" / "predictions.png")
    for name, table in tables.items():
        table["first_a"] = [int(s[0] == "A") for s in sequences[name]]
        table["rich"] = [int(s.count("G") > 4) for s in sequences[name]]
    data = write_tables(tmp_path, **tables)
    report = run(tmp_path / "labels", tiny_folder, data, "--label_columns", "first_a", "rich", "--epochs", "1")
    assert report["task"]["problem_type"] == "multi_label_classification"
    assert np.load(tmp_path / "labels" / "seed-0" / "test_logits.npy").shape == (48, 2)
    assert is_png(tmp_path / "labels" / "roc.png")


def test_cleaning_keeps_test_whole_and_reports(tmp_path):
    a, b, c, d, e, f = random_rows(6, 0)
    train = pd.DataFrame({"sequence": [a, a, b, c, c, d, e], "label": [0, 0, 1, 0, 1, 1, 0]})
    dev = pd.DataFrame({"sequence": [d, f], "label": [1, 0]})
    test = pd.DataFrame({"sequence": [e, e, f], "label": [0, 0, 0]})
    data = write_tables(tmp_path, train=train, dev=dev, test=test)
    task = load_task(DataSettings(data_dir=data))
    assert (task.train.sequences, task.dev.sequences, task.test.sequences) == ([a, b], [d], [e, e, f])
    assert task.report["removed"]["train"] == {"duplicates": 1, "conflicting_labels": 2, "in_a_later_split": 2}
    assert task.report["removed"]["dev"]["in_a_later_split"] == 1
    dirty = load_task(DataSettings(data_dir=data, remove_duplicates=False))
    assert dirty.report["rows"] == {"train": 7, "dev": 2, "test": 3}


def test_dev_is_drawn_from_train_without_shared_sequences(tmp_path):
    sequences = random_rows(50, 0)
    table = pd.DataFrame({"sequence": sequences, "label": [0, 1] * 25})
    data = write_tables(tmp_path, train=table.iloc[:40], test=table.iloc[40:])
    task = load_task(DataSettings(data_dir=data, dev_fraction=0.25, max_train_rows=20))
    assert (len(task.train.sequences), len(task.dev.sequences)) == (20, 10)
    assert not set(task.train.sequences) & set(task.dev.sequences)
    again = load_task(DataSettings(data_dir=data, dev_fraction=0.25, max_train_rows=20))
    assert again.train.sequences == task.train.sequences
    other = load_task(DataSettings(data_dir=data, dev_fraction=0.25, max_train_rows=20, split_seed=1))
    assert other.dev.sequences != task.dev.sequences


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "No train table"),
        ({"train_file": "train.csv"}, "No test table"),
        ({"sample": "ars1", "train_file": "train.csv"}, "exclude each other"),
    ],
)
def test_missing_sources(settings, message):
    with pytest.raises(DataError, match=message):
        load_task(DataSettings(**settings))


def test_unknown_trainer_option_and_absent_checkpoint(tmp_path, tiny_folder, motif_folder, monkeypatch):
    with pytest.raises(DataError, match="adam_betta"):
        run(tmp_path / "a", tiny_folder, motif_folder, "--trainer_options", '{"adam_betta": 1}')
    monkeypatch.setattr(models, "NANO", tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        run(tmp_path / "b", "nano", motif_folder)


def test_strands_depend_on_seed_epoch_and_row_only(tiny_folder):
    _, tokenizer = None, models.load_tokenizer(models.ModelSettings(model=tiny_folder))
    sequences = random_rows(64, 0)
    tokens = tokenize(tokenizer, [*sequences, *flipped(sequences)])
    dataset = TokenDataset(tokens, np.zeros(64, dtype=np.int64), seed=1)
    whole = dataset.__getitems__(list(range(64)))["input_ids"]
    texts = [tokenizer.decode(row).replace(" ", "") for row in whole]
    strands = [
        0 if text == s else 1 if text == reverse_complement(s) else None
        for text, s in zip(texts, sequences, strict=True)
    ]
    assert None not in strands
    assert 16 < sum(strands) < 48
    torch.testing.assert_close(torch.cat([dataset[row]["input_ids"] for row in range(64)]), whole)
    dataset.set_epoch(1)
    assert not torch.equal(dataset.__getitems__(list(range(64)))["input_ids"], whole)


def test_batches_of_ragged_rows_are_cut_to_their_longest(tiny_folder):
    tokenizer = models.load_tokenizer(models.ModelSettings(model=tiny_folder))
    tokens = tokenize(tokenizer, ["ACGTACGT", "AC", "ACG"])
    batch = tokens.batch(torch.tensor([1, 2]))
    assert batch["input_ids"].shape == (2, 3)
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    tokenizer.padding_side = "left"
    batch = tokenize(tokenizer, ["ACGTACGT", "AC", "ACG"]).batch(torch.tensor([1, 2]))
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert tokenize(tokenizer, ["ACG", "TTT"]).mask is None


def test_steps_between_evaluations_and_logs():
    settings = TrainSettings(batch_size=10, gradient_accumulation=2, evaluations_per_epoch=2)
    assert finetune.steps_between_evaluations(1001, settings) == 25
    assert finetune.steps_between_evaluations(1, settings) == 1
    settings.max_steps = 7
    assert finetune.steps_between_evaluations(1001, settings) == 7
    assert [finetune.steps_between_logs(every) for every in (1, 7, 25, 100, 47)] == [1, 1, 1, 10, 1]


@pytest.mark.slow
def test_torchrun_trains_with_two_processes(tmp_path, tiny_folder, motif_folder):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone",
        "-m", "training.finetune", "--output_dir", str(tmp_path / "two"), "--model", tiny_folder,
        "--data_dir", motif_folder, *QUICK, "--epochs", "1", "--batch_size", "16",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert report["environment"]["world_size"] == 2
    assert report["environment"]["effective_batch_size"] == 32
    assert report["per_seed"][0]["steps"] == 8
    assert done.stdout.count("test, 96 rows") == 1
