"""Run by torchrun: one step of pretraining under DDP on a batch that is spread over two processes.

Arguments: a folder with a saved `GeneSpliceForPreTraining` in `model/` and the whole batch in `batch.safetensors`.
Writes `<case>-<rank>.safetensors` with the losses that a process sees and the gradients after DDP's average.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from genesplice_hf.heads.contrast import gather_rows, info_nce
from genesplice_hf.models.genesplice.modeling_genesplice_pretraining import GeneSpliceForPreTraining
from training.command import run_command

WORLD_SIZE = 2
# Case -> rows of the first process, the second has the rest; and whether blocks are computed twice.
CASES = {"halves": (3, None), "uneven": (5, None), "one_pair": (1, None), "checkpointed": (3, True)}
LOSSES = ("loss", "mlm_loss", "contrastive_loss", "next_segment_loss")


def own_rows(batch: dict[str, torch.Tensor], first: int) -> dict[str, torch.Tensor]:
    rows = slice(first) if dist.get_rank() == 0 else slice(first, None)
    return {name: values[rows].clone() for name, values in batch.items()}


def step(folder: Path, first: int, reentrant: bool | None) -> dict[str, torch.Tensor]:
    model = GeneSpliceForPreTraining.from_pretrained(folder / "model").train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    spread = DistributedDataParallel(model)
    outputs = spread(**own_rows(load_file(folder / "batch.safetensors"), first))
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: outputs[name].detach().clone() for name in LOSSES} | gradients


def contrast_alone() -> dict[str, torch.Tensor]:
    """`info_nce` in float64 on embeddings that both processes know; and what `gather_rows` brings together."""
    pairs = torch.nn.functional.normalize(
        torch.randn(7, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1
    )
    own = own_rows({"pairs": pairs}, 4)["pairs"].requires_grad_()
    loss = info_nce(own[:, 0], own[:, 1], temperature=0.2, gather=True)
    loss.backward()
    together, start = gather_rows(own.detach())
    assert torch.equal(together, pairs) and start == (0, 4)[dist.get_rank()]
    return {"pairs": pairs, "loss": loss.detach(), "gradient": own.grad.clone()}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == WORLD_SIZE, f"torchrun gave {dist.get_world_size()} processes"
    for case, (first, reentrant) in CASES.items():
        save_file(step(folder, first, reentrant), folder / f"{case}-{dist.get_rank()}.safetensors")
    save_file(contrast_alone(), folder / f"contrast-{dist.get_rank()}.safetensors")


if __name__ == "__main__":
    run_command(partial(main, Path(sys.argv[1])))
