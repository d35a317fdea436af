"""What `benchmarks.enformer` measures of either implementation. It needs torch alone, for the peer has its own world.

Shapes: L bases, T bins, the batch is 1.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measuring import measure

# Constructor arguments of the peer.
SIZES: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {"dim": 192, "depth": 2, "dim_divisible_by": 32},
    "toy": {"dim": 72, "depth": 1, "heads": 4, "dim_divisible_by": 12, "output_heads": {"human": 7}},
}
SPECIES = "human"
# Enough to load every kernel.
WARM_UP_LENGTH = 1_024
SEED = 0

Call = Callable[[torch.Tensor], torch.Tensor]


def bases(length: int) -> torch.Tensor:
    """(1, L) ids of A, C, G and T, the same in every process."""
    return torch.randint(0, 4, (1, length), generator=torch.Generator().manual_seed(length))


def off_initial(model: nn.Module) -> nn.Module:
    """The model with statistics and parameters of norms, and outputs of attention, that hide no mistake."""
    generator = torch.Generator().manual_seed(SEED)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model


def forward(predict: Call, length: int, repeats: int, output: str) -> dict[str, Any]:
    """Time and memory of `predict`, whose result (1, T, tracks) is written to `output`."""
    found: list[torch.Tensor] = []

    def call() -> None:
        found.clear()
        found.append(predict(bases(length)))

    with torch.inference_mode():
        figures = measure(call, lambda: predict(bases(WARM_UP_LENGTH)), repeats)
    torch.save(found[0].float().clone(), output)
    return figures


def train_step(model: nn.Module, loss_of: Call, length: int) -> dict[str, Any]:
    """Time and memory of one forward and backward pass in training mode; room for gradients is there before."""
    model.train()

    def step(number: int) -> None:
        model.zero_grad(set_to_none=False)
        loss_of(bases(number)).backward()

    return measure(lambda: step(length), lambda: step(WARM_UP_LENGTH), repeats=1)


def difference(one: str, other: str) -> dict[str, float]:
    """Largest difference and correlation of two written results."""
    a, b = (torch.load(Path(path), weights_only=True).double() for path in (one, other))
    flat = torch.stack([a.flatten(), b.flatten()])
    return {"difference": (a - b).abs().max().item(), "correlation": torch.corrcoef(flat)[0, 1].item()}
