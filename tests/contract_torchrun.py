"""Run by torchrun: trains the saved models of a folder on two processes and saves what they have become.

Arguments: a folder that holds, for every head, `<row>/<Auto class>/` with a saved model and `batch.safetensors`.
"""

import sys
from functools import partial
from pathlib import Path

from contract_cases import CASES, stay_in_eval, train_two_steps
from safetensors.torch import load_file, save_model
from transformers import PreTrainedModel

import genesplice_hf  # noqa: F401, registers the models
from training.command import run_command

WORLD_SIZE = 2


def train(folder: Path, model_class: type[PreTrainedModel]) -> None:
    model = stay_in_eval(model_class.from_pretrained(folder))
    trainer = train_two_steps(model, load_file(folder / "batch.safetensors"), folder / "trainer", 2, 1)
    assert trainer.args.world_size == WORLD_SIZE, f"torchrun gave {trainer.args.world_size} processes"
    if trainer.is_world_process_zero():
        save_model(trainer.accelerator.unwrap_model(trainer.model), folder / "trained.safetensors")


def main(folder: Path) -> None:
    for case in CASES:
        if (folder / case.name).is_dir():
            train(folder / case.name, case.model_class)


if __name__ == "__main__":
    run_command(partial(main, Path(sys.argv[1])))
