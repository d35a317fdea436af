"""The choice of a schedule in fine-tuning."""

import json

import pytest
import torch

from genesplice_hf.errors import DataError, GeneSpliceError
from genesplice_hf.objectives.schedules import build_scheduler
from training import finetune


def run(folder, model, data, *more) -> dict:
    argv = [
        "--output_dir",
        str(folder),
        "--model",
        model,
        "--data_dir",
        data,
        "--max_steps",
        "10",
        "--batch_size",
        "8",
    ]
    argv += ["--run_baselines", "false", "--early_stopping_patience", "none", "--precision", "fp32"]
    return finetune.main([*argv, "--warmup_fraction", "0.2", "--learning_rate", "1e-3", *more])


def test_a_cyclical_schedule_is_the_one_that_trains(tmp_path, tiny_folder, motif_folder) -> None:
    options = ["--schedule", "triangular", '--schedule_options={"half_cycle_steps": 3}']
    run(tmp_path, tiny_folder, motif_folder, *options)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = build_scheduler("triangular", optimizer, 10, 2, half_cycle_steps=3)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    state = next(tmp_path.glob("seed-0/checkpoint-10/trainer_state.json")).read_text()
    history = [entry for entry in json.loads(state)["log_history"] if "learning_rate" in entry]
    assert history and all(entry["learning_rate"] == expected[entry["step"] - 1] for entry in history)


def test_other_ways_to_name_a_schedule_are_advice(tmp_path, tiny_folder, motif_folder) -> None:
    with pytest.raises(DataError, match=r"`trainer_options` holds \['lr_scheduler_kwargs'\]; use `schedule`"):
        run(tmp_path / "a", tiny_folder, motif_folder, '--trainer_options={"lr_scheduler_kwargs": {"num_cycles": 2}}')
    with pytest.raises(GeneSpliceError, match=r"was 'triangle'; did you mean 'triangular'"):
        run(tmp_path / "b", tiny_folder, motif_folder, "--schedule", "triangle")
