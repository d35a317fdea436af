"""Can it see 20 kb? `python -m training.experiments.planted_dependency --key value`.

Two repeats are planted near the ends of a random window, each of one of two kinds; the label says whether they are of
the same kind. Neither alone says anything about it, and no local pattern does: only what reads both can answer.
GeneSplice nano learns it on growing windows, once as it is and once without its tower. Both are measured on windows of
every length, when the training has got there and when it is over. `output_dir` then holds `metrics.json`, `cards_dir`
table and plot (`planted_dependency.json`, `.md`, `.png`).
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from genesplice_hf.errors import DataError
from genesplice_hf.models.genesplice.configuration_genesplice import GeneSpliceConfig
from genesplice_hf.models.genesplice.modeling_genesplice import GeneSpliceForSequenceClassification
from training.checkpoints import prepare_folder, stored_result
from training.command import run_command
from training.experiments.planted_dependency_card import write_card
from training.pretrain import environment
from training.reports import write_json
from training.settings import parse_settings, settings_as_dict

logger = logging.getLogger(__name__)

# Ids of the two kinds of repeat, (CG)n and (TA)n, and of the bases around them.
UNITS = ((6, 7), (8, 5))
BASES = (5, 9)
# The repeats stand anywhere within so many bases of either end, or within a quarter of a short window.
END_BP = 400
WITH, WITHOUT = "with tower", "without tower"


class Stage(NamedTuple):
    """A part of the training: windows of one length."""

    window_bp: int
    steps: int
    batch_size: int


class FinishedStage(NamedTuple):
    """A stage that is over, and the CPU time that its steps took."""

    window_bp: int
    cpu_seconds: float


@dataclass
class PlantedSettings:
    """The task, and how the model is trained."""

    window_bp: list[int] = field(
        default_factory=lambda: [512, 1_024, 2_048, 3_072, 4_096, 6_144, 8_192, 12_288, 16_384, 20_480],
        metadata={"help": "Bases per window, stage after stage."},
    )
    steps: list[int] = field(
        default_factory=lambda: [40, 20, 20, 15, 15, 15, 15, 12, 12, 12], metadata={"help": "Of every stage."}
    )
    batch_sizes: list[int] = field(
        default_factory=lambda: [32, 16, 8, 4, 4, 4, 4, 4, 4, 4], metadata={"help": "Windows per step of every stage."}
    )
    repeat_bp: int = field(default=256, metadata={"help": "Length of a planted repeat."})
    test_windows: int = field(default=64, metadata={"help": "Windows that are measured at every length."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run per seed and network."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak rate; falls to a tenth in a straight line."})
    model_config: dict = field(
        default_factory=lambda: {
            "qk_norm": True, "initializer_range": 0.08, "classifier_pooling": "bin_mean", "use_decoder": False,
        },
        metadata={"help": "Fields of GeneSpliceConfig, as JSON."},
    )  # fmt: skip
    output_dir: str = field(default="runs/planted_dependency", metadata={"help": "Folder of the runs."})
    cards_dir: str = field(default="model_cards", metadata={"help": "Folder of table, plot and text."})

    def __post_init__(self) -> None:
        if not len(self.window_bp) == len(self.steps) == len(self.batch_sizes):
            raise DataError("`window_bp`, `steps` and `batch_sizes` must have one entry per stage.")
        if min(self.window_bp, default=0) < 2 * self.repeat_bp or self.repeat_bp < 2:
            raise DataError(
                f"`window_bp` must hold windows of two repeats ({2 * self.repeat_bp} bp) or more: {self.window_bp}."
            )
        if not self.seeds or self.test_windows < 1:
            raise DataError("`seeds` must hold at least one, and `test_windows` be 1 or more.")

    @property
    def plan(self) -> list[Stage]:
        return [Stage(*stage) for stage in zip(self.window_bp, self.steps, self.batch_sizes, strict=True)]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Reads the settings, runs what is not there yet, and reports; returns the content of `metrics.json`."""
    (settings,) = parse_settings((PlantedSettings,), argv)
    return run_experiment(settings)


def run_experiment(settings: PlantedSettings) -> dict[str, Any]:
    """Trains and measures both networks for every seed; the door for use from Python.

    Raises:
        DataError: other settings than those of the runs that the folder already holds.
    """
    folder, stored = Path(settings.output_dir), settings_as_dict(settings)
    going_on = (folder / "settings.json").is_file()
    prepare_folder(folder, stored, resume=going_on, overwrite=False, free=("output_dir", "cards_dir", "seeds"))
    runs = [run(settings, network, seed) for seed in settings.seeds for network in (WITH, WITHOUT)]
    report = {"runs": runs, "settings": stored, "environment": environment()}
    write_json(folder / "metrics.json", report)
    write_card(report, Path(settings.cards_dir))
    return report


def run(settings: PlantedSettings, network: str, seed: int) -> dict[str, Any]:
    """One network and seed: parameters, CPU seconds of the training, shares of right answers.

    `accuracy` is measured on windows of a stage as the stage ends, `accuracy_at_the_end` after the last one.
    """
    finished = Path(settings.output_dir) / f"{network.replace(' ', '-')}-{seed}" / "result.json"
    if (found := stored_result(finished, resume=True)) is not None:
        return found
    torch.manual_seed(seed)
    fields = settings.model_config | ({} if network == WITH else {"num_tower_layers": 0})
    model = GeneSpliceForSequenceClassification(GeneSpliceConfig(num_labels=2, **fields))
    accuracy, seconds = {}, 0.0
    for stage in train(model, settings, torch.Generator().manual_seed(seed)):
        seconds += stage.cpu_seconds
        right = right_answers(model, settings, stage.window_bp)
        logger.info("%s, seed %d, %s bp: %.3f right", network, seed, f"{stage.window_bp:,}", right)
        accuracy[str(stage.window_bp)] = right
    result = {
        "network": network,
        "seed": seed,
        "parameters": model.num_parameters(),
        "cpu_seconds": seconds,
        "accuracy": accuracy,
        "accuracy_at_the_end": {length: right_answers(model, settings, int(length)) for length in accuracy},
    }
    write_json(finished, result)
    return result


def windows(
    count: int, window_bp: int, repeat_bp: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, window_bp) token ids, and (count,) labels: 1 where both repeats are of the same kind."""
    ids = torch.randint(*BASES, (count, window_bp), generator=generator)
    kinds = torch.randint(0, 2, (count, 2), generator=generator)
    places = max(1, min(window_bp // 4, END_BP) - repeat_bp)
    starts = torch.randint(0, places, (count, 2), generator=generator)
    repeats = torch.tensor([unit * repeat_bp for unit in UNITS])[:, :repeat_bp]
    for row, (first, last) in enumerate(starts.tolist()):
        ids[row, first : first + repeat_bp] = repeats[kinds[row, 0]]
        end = window_bp - last
        ids[row, end - repeat_bp : end] = repeats[kinds[row, 1]]
    return ids, (kinds[:, 0] == kinds[:, 1]).long()


def train(model: PreTrainedModel, settings: PlantedSettings, generator: torch.Generator) -> Iterator[FinishedStage]:
    """AdamW over the stages, one after the other; yields as each ends."""
    total = sum(stage.steps for stage in settings.plan)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * max(0.1, 1 - step / total)
    )
    for stage in settings.plan:
        started = time.process_time()
        model.train()
        for _ in range(stage.steps):
            ids, labels = windows(stage.batch_size, stage.window_bp, settings.repeat_bp, generator)
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        yield FinishedStage(stage.window_bp, time.process_time() - started)


@torch.no_grad()
def right_answers(model: PreTrainedModel, settings: PlantedSettings, window_bp: int, batch_size: int = 8) -> float:
    """Share of windows whose label the model gives; no training sees them, and they are the same for every run."""
    generator = torch.Generator().manual_seed(2**31)
    model.eval()
    right = 0
    for first in range(0, settings.test_windows, batch_size):
        count = min(batch_size, settings.test_windows - first)
        ids, labels = windows(count, window_bp, settings.repeat_bp, generator)
        right += int((model(input_ids=ids).logits.argmax(-1) == labels).sum())
    return right / settings.test_windows


if __name__ == "__main__":
    run_command(main)
