"""Schedules against torch's own cyclical and one-cycle schedulers, transformers' by name, and resumed runs."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR, ReduceLROnPlateau
from transformers import SchedulerType, Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.optimization import GreedyLR

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.objectives.schedules import (
    SCHEDULES,
    CyclicTrainerMixin,
    ScheduleTrainerMixin,
    build_scheduler,
    exp_range,
    triangular,
    triangular2,
)

PEAK, STEPS = 0.3, 200
NEEDED = {"cosine_with_min_lr": {"min_lr": 0.01}, "cosine_warmup_with_min_lr": {"min_lr": 0.01}}


def make_optimizer(kind=torch.optim.AdamW, lr: float = PEAK, **options) -> torch.optim.Optimizer:
    return kind([{"params": [torch.nn.Parameter(torch.ones(1))]}], lr=lr, **options)


def rates(optimizer, scheduler, steps: int = STEPS) -> list[float]:
    """The rate of each of `steps` optimiser steps."""
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("name", "gamma", "options"),
    [
        ("triangular", 1.0, {}),
        ("triangular2", 1.0, {}),
        ("exp_range", 0.99, {"gamma": 0.99}),
    ],
)
@pytest.mark.parametrize("half_cycle_steps", [1, 7, 20, 150])
def test_cyclical_schedules_are_torchs(name, gamma, options, half_cycle_steps) -> None:
    optimizer, theirs = make_optimizer(), make_optimizer()
    oracle = CyclicLR(theirs, 0.02, PEAK, half_cycle_steps, mode=name, gamma=gamma, cycle_momentum=False)
    ours = build_scheduler(
        name, optimizer, STEPS, half_cycle_steps=half_cycle_steps, base_factor=0.02 / PEAK, **options
    )
    assert isinstance(ours, LambdaLR)
    torch.testing.assert_close(rates(optimizer, ours), rates(theirs, oracle), rtol=0, atol=1e-12)


@pytest.mark.parametrize("fall", ["cosine", "linear"])
@pytest.mark.parametrize(
    "shape", [{}, {"rise_share": 0.45, "start_divisor": 10.0, "end_divisor": 50.0}, {"rise_share": 0.5}]
)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_one_cycle_and_its_momentum_are_torchs(fall, shape, kind) -> None:
    names = {"rise_share": "pct_start", "start_divisor": "div_factor", "end_divisor": "final_div_factor"}
    momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer, theirs = make_optimizer(kind, **momentum), make_optimizer(kind, **momentum)
    renamed = {names[key]: value for key, value in shape.items()}
    oracle = OneCycleLR(theirs, PEAK, total_steps=STEPS, anneal_strategy={"cosine": "cos"}.get(fall, fall), **renamed)
    ours = build_scheduler("one_cycle", optimizer, STEPS, fall=fall, cycle_momentum=True, **shape)
    for step in range(STEPS):
        mine, other = optimizer.param_groups[0], theirs.param_groups[0]
        assert mine["lr"] == pytest.approx(other["lr"], rel=0, abs=1e-12), step
        key = "momentum" if kind is torch.optim.SGD else "betas"
        assert mine[key] == pytest.approx(other[key], rel=0, abs=1e-12), step
        optimizer.step(), theirs.step()
        ours.step()
        if step < STEPS - 1:
            oracle.step()


def test_one_cycle_stays_where_it_ends() -> None:
    optimizer = make_optimizer()
    found = rates(optimizer, build_scheduler("one_cycle", optimizer, 10), 14)
    assert found[9:] == pytest.approx([PEAK / 25 / 1e4] * 5, rel=1e-9)
    assert max(found) == found[2] == PEAK


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_schedule_of_transformers_goes_by_its_name(name) -> None:
    optimizer, theirs = make_optimizer(), make_optimizer()
    options = NEEDED.get(name, {})
    ours = build_scheduler(name, optimizer, STEPS, 20, **options)
    if name == "warmup_stable_decay":
        options = {"num_decay_steps": 20}
    oracle = get_scheduler(name, theirs, 20, STEPS, options or None)
    assert type(ours) is type(oracle)
    if not isinstance(ours, (ReduceLROnPlateau, GreedyLR)):
        assert rates(optimizer, ours) == rates(theirs, oracle)


@pytest.mark.parametrize("name", ["triangular", "triangular2", "exp_range", "one_cycle"])
def test_warm_up_climbs_evenly_to_the_first_rate_and_then_the_schedule_counts_from_zero(name) -> None:
    plain, warm = make_optimizer(), make_optimizer()
    unwarmed = rates(plain, build_scheduler(name, plain, STEPS - 40), STEPS - 40)
    found = rates(warm, build_scheduler(name, warm, STEPS, 40))
    assert found[:40] == pytest.approx([unwarmed[0] * step / 40 for step in range(40)], abs=1e-15)
    assert found[40:] == unwarmed


def test_defaults_make_four_cycles_and_exp_range_ends_at_a_tenth_of_its_height() -> None:
    peaks = {}
    for name in ("triangular", "triangular2", "exp_range"):
        optimizer = make_optimizer()
        found = rates(optimizer, build_scheduler(name, optimizer, STEPS))
        peaks[name] = [
            round(found[i] / PEAK, 4) for i in range(1, STEPS - 1) if found[i - 1] < found[i] > found[i + 1]
        ]
    assert peaks["triangular"] == [1] * 4
    assert peaks["triangular2"] == [1, 0.55, 0.325, 0.2125]
    assert peaks["exp_range"] == [round(0.1 + 0.9 * 10 ** -(i / 8), 4) for i in (1, 3, 5, 7)]


def test_a_factor_is_a_function_of_the_step_alone() -> None:
    steps = [5, 0, 17, 5, 3]
    assert [triangular(s, half_cycle_steps=4, base_factor=0.0) for s in steps] == [0.75, 0, 0.25, 0.75, 0.75]
    assert [triangular2(s, half_cycle_steps=4, base_factor=0.0) for s in (4, 12, 20)] == [1, 0.5, 0.25]
    assert exp_range(4, half_cycle_steps=4, gamma=0.5, base_factor=0.0) == 0.5**4


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("reduce_lr_on_plateau", "greedy")])
def test_a_scheduler_goes_on_from_its_state(name) -> None:
    options = NEEDED.get(name, {"cycle_momentum": True} if name == "one_cycle" else {})
    whole, cut, later = make_optimizer(), make_optimizer(), make_optimizer()
    expected = rates(whole, build_scheduler(name, whole, STEPS, 10, **options))
    first = build_scheduler(name, cut, STEPS, 10, **options)
    found = rates(cut, first, 73)
    second = build_scheduler(name, later, STEPS, 10, **options)
    second.load_state_dict(first.state_dict())
    later.load_state_dict(cut.state_dict())
    assert found + rates(later, second, STEPS - 73) == expected
    assert later.param_groups[0]["betas"] == whole.param_groups[0]["betas"]


@pytest.mark.parametrize(
    ("name", "steps", "warmup", "options", "advice"),
    [
        ("cosin", 10, 0, {}, r"`schedule` must be one of triangular, .*was 'cosin'; did you mean 'cosine'\?"),
        ("triangular", 10, 0, {"gamma": 0.9}, r"`gamma` is no option of the schedule 'triangular'; it has"),
        ("one_cycle", 10, 0, {"num_steps": 5}, r"`num_steps` is no option"),
        ("one_cycle", 10, 0, {"fall": "cubic"}, r"`fall` must be 'cosine' or 'linear', was 'cubic'"),
        ("one_cycle", 10, 0, {"highest": 0.9}, r"give `cycle_momentum=True`"),
        ("triangular", 10, 0, {"half_cycle_steps": 0}, r"`half_cycle_steps` must be above 0, was 0"),
        ("triangular", 10, 0, {"base_factor": 1.5}, r"`base_factor` must lie between 0 and 1"),
        ("one_cycle", 10, 10, {}, r"`num_warmup_steps` 0 or more and smaller, they are 10 and 10"),
        ("cosine", 10, 0, {"gamma": 1}, r"'cosine' cannot be made from .*gamma"),
        ("cosine_with_min_lr", 10, 0, {}, r"'cosine_with_min_lr' cannot be made.*min_lr"),
        ("constant", 10, 0, {"gamma": 1}, r"has no options"),
    ],
)
def test_faults_are_advice(name, steps, warmup, options, advice) -> None:
    with pytest.raises(GeneSpliceError, match=advice):
        build_scheduler(name, make_optimizer(), steps, warmup, **options)


def test_an_optimiser_without_momentum_cannot_cycle_it() -> None:
    with pytest.raises(GeneSpliceError, match="Adagrad has none"):
        build_scheduler("one_cycle", make_optimizer(torch.optim.Adagrad), 10, cycle_momentum=True)


class ScheduledTrainer(ScheduleTrainerMixin, Trainer):
    """A stock trainer with the choice."""


class CyclicTrainer(CyclicTrainerMixin, Trainer):
    """A stock trainer that cycles."""


class Line(torch.nn.Module):
    """y = w x, least squares."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.w * x - labels) ** 2).mean()}


class StopAt(TrainerCallback):
    """Ends the training early, after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop |= state.global_step == self.step


def trained(folder, kind, resume: str | None = None, stop: int = 0, **options) -> tuple[list[float], torch.Tensor]:
    args = TrainingArguments(
        str(folder), max_steps=12, learning_rate=0.1, warmup_steps=2, save_steps=4, logging_steps=1, report_to=[],
        per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, save_only_model=False, seed=1,
    )  # fmt: skip
    rows = [{"x": torch.tensor([float(i)]), "labels": torch.tensor([2.0 * i])} for i in range(10)]
    trainer = kind(Line(), args, train_dataset=rows, callbacks=[StopAt(stop)], **options)
    trainer.train(resume_from_checkpoint=resume)
    history = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    return history, trainer.model.w.detach()


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        (CyclicTrainer, None, {}),
        (ScheduledTrainer, "exp_range", {"half_cycle_steps": 3}),
        (ScheduledTrainer, "one_cycle", {"cycle_momentum": True}),
        (ScheduledTrainer, "inverse_sqrt", {"timescale": 4}),
    ],
)
def test_a_trainer_that_goes_on_equals_one_that_was_not_interrupted(kind, name, options, tmp_path) -> None:
    chosen = {"schedule": name, "schedule_options": options}
    whole, weight = trained(tmp_path / "whole", kind, **chosen)
    trained(tmp_path / "cut", kind, stop=6, **chosen)
    again, resumed = trained(tmp_path / "cut", kind, resume=str(tmp_path / "cut" / "checkpoint-4"), **chosen)
    optimizer = make_optimizer(lr=0.1)
    expected = rates(optimizer, build_scheduler(name or "triangular", optimizer, 12, 2, **options), 12)
    assert whole == again == pytest.approx(expected, rel=1e-12)
    assert torch.equal(weight, resumed) and math.isfinite(weight)
