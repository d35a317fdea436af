"""Learning rates over the optimiser steps: cyclical and one-cycle schedules, and those of transformers by name.

Every schedule of ours is a pure function of the step that returns a factor of the optimiser's own learning rate,
the *peak*, as `torch.optim.lr_scheduler.LambdaLR` takes it. A resumed run needs nothing but the number of the step,
so that its rates are those of an uninterrupted one.

`build_scheduler` makes a scheduler from a name, `ScheduleTrainerMixin` gives any `Trainer` the choice:

    class ScheduledTrainer(ScheduleTrainerMixin, Trainer): ...
    ScheduledTrainer(model, args, schedule="one_cycle", schedule_options={"fall": "linear"}, ...)
"""

import difflib
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import SchedulerType, get_scheduler

from genesplice_hf.errors import GeneSpliceError

Factor = Callable[[int], float]


def triangular(step: int, *, half_cycle_steps: int, base_factor: float = 0.1) -> float:
    """Factor that climbs from `base_factor` to 1 and back, each way in `half_cycle_steps`.

    Smith, "Cyclical learning rates for training neural networks", WACV 2017, arXiv 1506.01186, section 3.

    Args:
        step: optimiser steps done, 0 at the first.
        half_cycle_steps: steps from the lowest to the highest rate.
        base_factor: the lowest rate divided by the peak.
    """
    return base_factor + (1 - base_factor) * _triangle(step, half_cycle_steps)


def triangular2(step: int, *, half_cycle_steps: int, base_factor: float = 0.1) -> float:
    """As `triangular`, with half the height in every further cycle."""
    height = 0.5 ** (step // (2 * half_cycle_steps))
    return base_factor + (1 - base_factor) * height * _triangle(step, half_cycle_steps)


def exp_range(step: int, *, half_cycle_steps: int, gamma: float, base_factor: float = 0.1) -> float:
    """As `triangular`, with the height multiplied by `gamma` at every step."""
    return base_factor + (1 - base_factor) * gamma**step * _triangle(step, half_cycle_steps)


def one_cycle(
    step: int,
    *,
    num_steps: int,
    rise_share: float = 0.3,
    start_divisor: float = 25.0,
    end_divisor: float = 1e4,
    fall: Literal["cosine", "linear"] = "cosine",
) -> float:
    """Factor that climbs once from 1 / `start_divisor` to 1 and falls to 1 / `start_divisor` / `end_divisor`.

    Smith and Topin, "Super-convergence", arXiv 1708.07120; the break points are those of torch's `OneCycleLR`.

    Args:
        step: optimiser steps done; from `num_steps - 1` on the factor stays.
        num_steps: steps of the whole run.
        rise_share: share of the steps until the peak.
        start_divisor, end_divisor: peak / first rate, and first rate / last rate.
        fall: the shape of both ways.
    """
    low, last = 1 / start_divisor, 1 / start_divisor / end_divisor
    return _rise_and_fall(step, num_steps, rise_share, (low, 1.0, last), fall)


def one_cycle_momentum(
    step: int,
    *,
    num_steps: int,
    rise_share: float = 0.3,
    highest: float = 0.95,
    lowest: float = 0.85,
    fall: Literal["cosine", "linear"] = "cosine",
) -> float:
    """Momentum (AdamW: beta 1) opposite to `one_cycle`: `highest`, `lowest` at the peak rate, `highest` again."""
    return _rise_and_fall(step, num_steps, rise_share, (highest, lowest, highest), fall)


class OneCycle(LambdaLR):
    """`one_cycle` for the rate, and its inverse for the momentum of SGD or beta 1 of Adam.

    Args:
        optimizer: one with `momentum` or `betas` in every group.
        rate: factor of the rate by step.
        momentum: the momentum itself by step.

    Raises:
        GeneSpliceError: the optimiser has neither.
    """

    def __init__(self, optimizer: Optimizer, rate: Factor, momentum: Factor) -> None:
        if not all("betas" in group or "momentum" in group for group in optimizer.param_groups):
            raise GeneSpliceError(
                f"`cycle_momentum` needs an optimiser with momentum or betas, {type(optimizer).__name__} has none; "
                "leave the option out."
            )
        self.momentum = momentum
        super().__init__(optimizer, rate)

    def get_lr(self) -> list[float]:
        """The rates of this step; the momentum is set beside them."""
        momentum = self.momentum(self.last_epoch)
        for group in self.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            else:
                group["momentum"] = momentum
        return super().get_lr()

    def state_dict(self) -> dict[str, Any]:
        """Without the momentum function, which is made from the settings as the factors are."""
        return {key: value for key, value in super().state_dict().items() if key != "momentum"}


def build_scheduler(
    name: str, optimizer: Optimizer, num_training_steps: int, num_warmup_steps: int = 0, **options: Any
) -> LRScheduler:
    """Makes the scheduler that `name` stands for.

    Args:
        name: one of `SCHEDULES`: `triangular`, `triangular2`, `exp_range`, `one_cycle`, or a schedule of
            transformers (`linear`, `cosine`, `inverse_sqrt`, `warmup_stable_decay`, ...).
        optimizer: its learning rate is the peak.
        num_training_steps: optimiser steps of the whole run, warm-up included.
        num_warmup_steps: steps in which the rate climbs evenly from 0 to the schedule's first rate; a schedule
            of ours then counts from 0.
        options: the keyword arguments of the function of that name here, or of the schedule in transformers.
            By default the cyclical ones make four cycles, `exp_range` ends at a tenth of its height, and
            `warmup_stable_decay` falls in the last tenth. `one_cycle` also takes `cycle_momentum=True`, and then
            `highest` and `lowest`.

    Raises:
        GeneSpliceError: an unknown name, steps that do not fit, or an option that the schedule does not have.
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise GeneSpliceError(f"`schedule` must be one of {', '.join(SCHEDULES)}, was {name!r}{hint}")
    if name in _OURS:
        return _our_scheduler(name, optimizer, num_training_steps, num_warmup_steps, options)
    return _stock_scheduler(name, optimizer, num_training_steps, num_warmup_steps, options)


class ScheduleTrainerMixin:
    """Lets a `Trainer` take any schedule of `build_scheduler`; put it before `Trainer` in the list of bases.

    Args:
        schedule: its name.
        schedule_options: its options.

    The peak is `args.learning_rate` and the warm-up `args.warmup_steps`; `args.lr_scheduler_type` is not read.
    """

    schedule = "linear"

    def __init__(
        self, *args: Any, schedule: str | None = None, schedule_options: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.schedule = schedule or type(self).schedule
        self.schedule_options = dict(schedule_options or {})
        super().__init__(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """As `Trainer.create_scheduler`: makes it once, for the trainer's optimiser by default."""
        trainer: Any = self
        if trainer.lr_scheduler is None:
            warmup = trainer.args.get_warmup_steps(num_training_steps)
            trainer.lr_scheduler = build_scheduler(
                self.schedule, optimizer or trainer.optimizer, num_training_steps, warmup, **self.schedule_options
            )
            # Trainer makes a new one for a second `train()` only of those that it counts as its own.
            trainer._created_lr_scheduler = True
        return trainer.lr_scheduler


class CyclicTrainerMixin(ScheduleTrainerMixin):
    """`ScheduleTrainerMixin` whose schedule is `triangular` unless another is named."""

    schedule = "triangular"


def warmed_up(step: int, *, factor: Factor, num_warmup_steps: int) -> float:
    """Factor that climbs evenly from 0 to `factor(0)` and then follows `factor`, counted from the warm-up's end."""
    if step < num_warmup_steps:
        return factor(0) * step / num_warmup_steps
    return factor(step - num_warmup_steps)


def _triangle(step: int, half_cycle_steps: int) -> float:
    cycle = math.floor(1 + step / (2 * half_cycle_steps))
    return max(0.0, 1 - abs(step / half_cycle_steps - 2 * cycle + 1))


def _rise_and_fall(
    step: int, num_steps: int, rise_share: float, values: tuple[float, float, float], shape: str
) -> float:
    """From the first of `values` to the second at `rise_share * num_steps - 1`, then to the third."""
    peak, end = rise_share * num_steps - 1, num_steps - 1
    if step <= peak:
        return _between(values[0], values[1], step / peak if peak > 0 else 1.0, shape)
    done = (min(step, end) - peak) / (end - peak) if end > peak else 1.0
    return _between(values[1], values[2], done, shape)


def _between(first: float, last: float, done: float, shape: str) -> float:
    share = (1 - math.cos(math.pi * done)) / 2 if shape == "cosine" else done
    return first + (last - first) * share


_OURS: dict[str, Callable[..., float]] = {
    function.__name__: function for function in (triangular, triangular2, exp_range, one_cycle)
}
STOCK_SCHEDULES = tuple(kind.value for kind in SchedulerType)
SCHEDULES = (*_OURS, *STOCK_SCHEDULES)
_MOMENTUM_OPTIONS = ("cycle_momentum", "highest", "lowest")
# Schedules of transformers that take no options, and would drop them silently.
_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")


def _our_scheduler(
    name: str, optimizer: Optimizer, num_training_steps: int, num_warmup_steps: int, options: dict[str, Any]
) -> LRScheduler:
    if num_training_steps < 1 or not 0 <= num_warmup_steps < num_training_steps:
        raise GeneSpliceError(
            "`num_training_steps` must be 1 or more and `num_warmup_steps` 0 or more and smaller, they are "
            f"{num_training_steps} and {num_warmup_steps}."
        )
    known = set(inspect.signature(_OURS[name]).parameters) - {"step", "num_steps"}
    _check_options(name, options, known | (set(_MOMENTUM_OPTIONS) if name == "one_cycle" else set()))
    num_steps = num_training_steps - num_warmup_steps
    chosen = {key: value for key, value in options.items() if key not in _MOMENTUM_OPTIONS}
    factor = partial(_OURS[name], **(_defaults(name, num_steps) | chosen))
    rate = partial(warmed_up, factor=factor, num_warmup_steps=num_warmup_steps)
    if not options.get("cycle_momentum"):
        return LambdaLR(optimizer, rate)
    shared = {key: options[key] for key in ("highest", "lowest", "rise_share", "fall") if key in options}

    def momentum(step: int) -> float:
        return one_cycle_momentum(max(0, step - num_warmup_steps), num_steps=num_steps, **shared)

    return OneCycle(optimizer, rate, momentum)


def _defaults(name: str, num_steps: int) -> dict[str, Any]:
    """What a schedule of ours takes from the length of the run."""
    if name == "one_cycle":
        return {"num_steps": num_steps}
    defaults: dict[str, Any] = {"half_cycle_steps": max(1, num_steps // 8)}
    return defaults | ({"gamma": 0.1 ** (1 / num_steps)} if name == "exp_range" else {})


def _check_options(name: str, options: dict[str, Any], known: set[str]) -> None:
    for key, value in options.items():
        if key not in known:
            raise GeneSpliceError(f"`{key}` is no option of the schedule {name!r}; it has {sorted(known)}.")
        if key == "fall" and value not in ("cosine", "linear"):
            raise GeneSpliceError(f"`fall` must be 'cosine' or 'linear', was {value!r}.")
        if key in ("base_factor", "rise_share", "highest", "lowest") and not 0 <= value <= 1:
            raise GeneSpliceError(f"`{key}` must lie between 0 and 1, was {value!r}.")
        if key in ("half_cycle_steps", "gamma", "start_divisor", "end_divisor") and not value > 0:
            raise GeneSpliceError(f"`{key}` must be above 0, was {value!r}.")
    if not options.get("cycle_momentum") and {"highest", "lowest"} & set(options):
        raise GeneSpliceError("`highest` and `lowest` are momenta; give `cycle_momentum=True` with them.")


def _stock_scheduler(
    name: str, optimizer: Optimizer, num_training_steps: int, num_warmup_steps: int, options: dict[str, Any]
) -> LRScheduler:
    if options and name in _WITHOUT_OPTIONS:
        raise GeneSpliceError(f"The schedule {name!r} has no options, was given {sorted(options)}; leave them out.")
    if name == "warmup_stable_decay":
        options = {"num_decay_steps": max(1, num_training_steps // 10)} | options
    try:
        return get_scheduler(name, optimizer, num_warmup_steps, num_training_steps, options or None)
    except (TypeError, ValueError) as error:
        raise GeneSpliceError(f"The schedule {name!r} cannot be made from {options}: {error}.") from error
