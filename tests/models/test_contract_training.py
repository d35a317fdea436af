"""The contract of every head under `Trainer`: two steps are the same however the batch is cut and spread.

The rows have different numbers of labels, so that a loss divided by the wrong number shows; `Trainer` is compared
with two steps of plain gradient descent written here.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from contract_cases import CASES, Batch, Case, cases_without, no_label, train_two_steps
from safetensors.torch import load_model, save_file
from transformers import PreTrainedModel

cases = cases_without("both_strands")

ROOT = Path(__file__).resolve().parents[2]
LEARNING_RATE = 0.1


def has_loss(case: Case) -> bool:
    return case.has_loss


def plain_descent(model: PreTrainedModel, batch: Batch) -> PreTrainedModel:
    """The slow twin: the whole batch at once, twice."""
    model.train()
    for _ in range(2):
        model.zero_grad()
        model(**batch).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
    return model


def assert_same_parameters(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, atol=1e-5, rtol=0)


@cases("test_however_the_batch_is_cut", has_loss)
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_however_the_batch_is_cut(case: Case, batch_size: int, accumulation: int, tmp_path: Path) -> None:
    batch = case.batch(labels=True)
    expected = plain_descent(case.model(), batch)
    assert (
        max((p - q).abs().max() for p, q in zip(expected.parameters(), case.model().parameters(), strict=True)) > 1e-2
    )
    trainer = train_two_steps(case.model(), batch, tmp_path, batch_size, accumulation)
    assert trainer.state.global_step == 2
    assert_same_parameters(trainer.model, expected)


PROBLEMS = {
    "one_value": ({"num_labels": 1}, lambda rows: torch.linspace(-1, 1, rows)),
    "three_values": ({"problem_type": "regression"}, lambda rows: torch.linspace(-1, 1, 3 * rows).view(rows, 3)),
    "label_sets": (
        {"problem_type": "multi_label_classification"},
        lambda rows: (torch.arange(3 * rows) % 2).view(rows, 3).float(),
    ),
}


@cases("test_every_problem_of_a_sequence", lambda case: case.auto_class == "AutoModelForSequenceClassification")
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_problem_of_a_sequence(case: Case, problem: str, tmp_path: Path) -> None:
    fields, labels = PROBLEMS[problem]
    batch = case.batch()
    batch["labels"] = labels(len(batch["input_ids"]))
    expected = plain_descent(case.model(**fields), batch)
    trainer = train_two_steps(case.model(**fields), batch, tmp_path, 1, 4)
    assert_same_parameters(trainer.model, expected)


@cases("test_an_ignored_row_counts_for_nothing", has_loss)
def test_an_ignored_row_counts_for_nothing(case: Case) -> None:
    """-100 leaves a row out of the sum and out of the number of labels."""
    model, batch = case.model(), case.batch(labels=True)
    expected = model(**{name: values[:3] for name, values in batch.items()}).loss
    batch["labels"][3:] = no_label(batch["labels"])
    torch.testing.assert_close(model(**batch).loss, expected)


@cases("test_the_logged_loss_is_the_models_loss", has_loss)
def test_the_logged_loss_is_the_models_loss(case: Case, tmp_path: Path) -> None:
    batch = case.batch(labels=True)
    with torch.no_grad():
        expected = case.model()(**batch).loss.item()
    trainer = train_two_steps(case.model(), batch, tmp_path, 2, 2)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def two_processes(run_python: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All heads of a family train in one torchrun of two processes, which itself asserts the world size."""
    folder = tmp_path_factory.mktemp("torchrun")
    for case in (case for case in CASES if has_loss(case) and case.form != "both_strands"):
        case.model().save_pretrained(folder / case.name)
        save_file(case.batch(labels=True), folder / case.name / "batch.safetensors")
    arguments = ["--standalone", "--nproc_per_node", "2", str(ROOT / "tests/contract_torchrun.py"), str(folder)]
    code = f"from torch.distributed.run import main; main({arguments!r})"
    run_python(code, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1")
    return folder


@cases("test_two_processes_are_one", has_loss)
def test_two_processes_are_one(case: Case, two_processes: Path) -> None:
    found = case.model()
    load_model(found, two_processes / case.name / "trained.safetensors")
    assert_same_parameters(found, plain_descent(case.model(), case.batch(labels=True)))
