"""A tiny SLiM Performer under `Trainer`; run by torchrun, it trains on two processes and saves what it has become.

Argument of the script: a folder with `model/`, a saved model; `trained.safetensors` is written next to it.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

from genesplice_hf.models.performer.configuration_performer import PerformerConfig
from genesplice_hf.models.performer.modeling_performer import PerformerForCausalLM
from training.command import run_command

WORLD_SIZE = 2
LENGTH, ROWS = 150, 16
IGNORED = -100


def tiny_model(seed: int = 0, **fields: Any) -> PerformerForCausalLM:
    """Two layers with weights large enough that every path shows."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return PerformerForCausalLM(PerformerConfig(**(sizes | {"initializer_range": 0.2} | fields)))


def rows_of_bases(rows: int = ROWS, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Random bases; every row has its own number of real bases, and so of labels, and pads left or right."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 9, (rows, length), generator=generator)
    position, number = torch.arange(length)[None], length - 6 * torch.arange(rows)[:, None]
    mask = torch.where(torch.arange(rows)[:, None] % 2 == 0, position < number, position >= length - number)
    return {
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~mask, IGNORED),
    }


def train(model: PreTrainedModel, folder: Path, batch_size: int, resume: bool = False, **arguments: Any) -> Trainer:
    """Four steps of AdamW on 4 rows each (over all processes), accumulation 2, clipping."""
    batch = rows_of_bases()
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**(settings | arguments)),
        train_dataset=[{key: value[row] for key, value in batch.items()} for row in range(ROWS)],
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def check_unused_parameter() -> None:
    """A parameter that the loss does not reach stays without a gradient, and does not stop the other processes."""
    model = tiny_model(slim_chunk_size=64).train()
    model.unused = nn.Parameter(torch.ones(3))
    parallel = DistributedDataParallel(model)
    batch = rows_of_bases(2)
    for _ in range(2):
        parallel(**batch).loss.backward()
    assert model.unused.grad is None or not model.unused.grad.any()
    assert model.output_logit_map.weight.grad.any()


def main(folder: Path) -> None:
    trainer = train(PerformerForCausalLM.from_pretrained(folder / "model"), folder / "trainer", batch_size=1)
    assert trainer.args.world_size == WORLD_SIZE, f"torchrun gave {trainer.args.world_size} processes"
    if trainer.is_world_process_zero():
        save_model(trainer.accelerator.unwrap_model(trainer.model), folder / "trained.safetensors")
    check_unused_parameter()


if __name__ == "__main__":
    run_command(partial(main, Path(sys.argv[1])))
