"""Which windows every optimiser step sees, on every process: a plan that can be read from any step on.

Windows are visited in a shuffled order, each exactly once per pass; passes follow each other without a gap, so that
every batch is full. The plan is a function of (seed, step, process): nothing is carried along, so a run that goes on
in the middle of a pass, or of a stage of the length curriculum, neither loses nor repeats a window.

Trainer's own sampler will not do: it lists a permutation of all windows, some 40 bytes each, and Accelerate fills the
last batch of every pass with windows that were seen already.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

from genesplice_hf.objectives.schedules import ScheduleTrainerMixin
from training.streaming import Permutation


class Stage(NamedTuple):
    """A part of the run with windows of one length.

    Attributes:
        first_step, until_step: optimiser steps, counted from 0, the last one excluded.
        windows: rows by number (`StreamedWindows` or a `datasets.Dataset`).
        window_bp: bases of each.
        batch_size: windows per process and forward.
    """

    first_step: int
    until_step: int
    windows: Any
    window_bp: int
    batch_size: int

    def passes_done(self, step: int, forwards_per_step: int) -> float:
        """Passes over the windows that lie before `step`."""
        steps = min(max(step - self.first_step, 0), self.until_step - self.first_step)
        return steps * forwards_per_step * self.batch_size / len(self.windows)


class Forwards(Dataset):
    """Every item is the batch of one forward of this process: a list of window rows.

    Forward a of step s of process r takes the places from `(a * processes + r) * batch_size` on of the step's part of
    the pass, so that processes x batch size x accumulation may be split otherwise and every step still sees the same
    windows. From the second pass on `example_id` ends in `#1`, `#2`, ...: collators draw masks, strands and views by
    that name, so every pass draws others.

    Args:
        stages: they follow each other without a gap.
        accumulation: forwards per optimiser step.
        rank, world_size: number of this process, and of all.
        seed: of the order.
    """

    def __init__(self, stages: Sequence[Stage], accumulation: int, rank: int, world_size: int, seed: int) -> None:
        self.stages = list(stages)
        self.accumulation, self.rank, self.world_size, self.seed = accumulation, rank, world_size, seed

    def __len__(self) -> int:
        return self.stages[-1].until_step * self.accumulation

    def __getitem__(self, forward: int) -> list[dict[str, Any]]:
        step, part = divmod(forward, self.accumulation)
        number = next(i for i, stage in enumerate(self.stages) if step < stage.until_step)
        stage = self.stages[number]
        batches = ((step - stage.first_step) * self.accumulation + part) * self.world_size + self.rank
        places = np.arange(batches * stage.batch_size, (batches + 1) * stage.batch_size)
        passes = places // len(stage.windows)
        rows = []
        for pass_number in np.unique(passes).tolist():
            order = Permutation(len(stage.windows), self.seed, number, pass_number)
            inside = places[passes == pass_number] - pass_number * len(stage.windows)
            rows += [_named(stage.windows[window], pass_number) for window in order(inside).tolist()]
        return rows


def _named(row: dict[str, Any], pass_number: int) -> dict[str, Any]:
    return row | {"example_id": f"{row['example_id']}#{pass_number}"} if pass_number else row


class PlannedTrainer(ScheduleTrainerMixin, Trainer):
    """The stock Trainer over a plan of forwards, with the choice of schedules.

    Args:
        stages: what is seen when; takes the place of `train_dataset`.
        schedule, schedule_options: as `ScheduleTrainerMixin`.
    """

    def __init__(self, *args: Any, stages: Sequence[Stage], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stages = list(stages)

    def get_train_dataloader(self) -> DataLoader:
        """One item per forward; Trainer skips items, not windows, when it goes on from a checkpoint."""
        args = self.args
        forwards = Forwards(
            self.stages, args.gradient_accumulation_steps, args.process_index, args.world_size, args.data_seed
        )
        # Accelerate would share the items among the processes a second time, so that it does not prepare them.
        return DataLoader(
            forwards,
            batch_size=1,
            collate_fn=_Only(self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )


class _Only:
    """Collates the one item of a batch; a class, so that a spawned worker can be given it."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, items: list[list[dict[str, Any]]]) -> dict[str, Any]:
        return self.collator(items[0])
