"""A small Akita for tests, and its slow twin: the published layers written down one after the other.

Shapes: B batch, L bases, N bins of the map, P pairs.
"""

from typing import Any

import torch
from torch.nn.functional import batch_norm, conv1d, conv2d, linear, max_pool1d, one_hot, relu
from torch.nn.modules.batchnorm import _BatchNorm

from genesplice_hf.models.akita.modeling_akita import AkitaForContactPrediction
from genesplice_hf.models.tiny_configs import tiny_akita

SMALL = {
    "seq_length": 256, "tower_repeat": 2, "dilated_repeat": 3, "dilated2d_repeat": 3, "target_crop": 2,
    "diagonal_offset": 2,
}  # fmt: skip


def small(seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any) -> AkitaForContactPrediction:
    """Bins of 8 bases, every parameter and statistic off its initial value, in eval mode."""
    torch.manual_seed(seed)
    model = AkitaForContactPrediction(tiny_akita(**(SMALL | fields)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model.to(dtype).eval()


def bases(rows: int = 2, length: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 5, (rows, length), generator=torch.Generator().manual_seed(seed))


def normed(tensors: dict[str, torch.Tensor], name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    keys = ("running_mean", "running_var", "weight", "bias")
    return batch_norm(x, *(tensors[f"{name}.{key}"] for key in keys), False, 0.0, eps)


def twin(model: AkitaForContactPrediction, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(states, logits) by the published layers, one after the other: every map whole, nothing folded, no tiles."""
    c, t = model.config, model.state_dict()

    def block(name: str, x: torch.Tensor, pool: int) -> torch.Tensor:
        kernel = t[f"{name}.conv.weight"]
        x = normed(t, f"{name}.norm", conv1d(relu(x), kernel, padding=kernel.shape[-1] // 2), c.batch_norm_eps)
        return max_pool1d(x, pool, pool, ceil_mode=True) if pool > 1 else x

    def residual(name: str, x: torch.Tensor, rate: int) -> torch.Tensor:
        convolve = conv1d if x.dim() == 3 else conv2d
        kernel = t[f"{name}.conv1.weight"]
        inner = convolve(relu(x), kernel, padding=rate * (kernel.shape[-1] // 2), dilation=rate)
        inner = convolve(relu(normed(t, f"{name}.norm1", inner, c.batch_norm_eps)), t[f"{name}.conv2.weight"])
        return x + normed(t, f"{name}.norm2", inner, c.batch_norm_eps)

    x = one_hot(ids, 5)[..., :4].transpose(1, 2).to(model.dtype)
    x = block("akita.stem", x, c.stem_pool_size)
    for i in range(c.tower_repeat):
        x = block(f"akita.conv_tower.{i}", x, c.tower_pool_size)
    for i, rate in enumerate(c.dilations):
        x = residual(f"akita.dilated.{i}", x, rate)
    x = relu(block("akita.trunk_out", x, 1))
    steps = (torch.arange(x.shape[-1])[:, None] - torch.arange(x.shape[-1])).abs().to(x)
    maps = torch.cat([(x[..., :, None] + x[..., None, :]) / 2, steps.expand(len(x), 1, -1, -1)], dim=1)
    maps = normed(t, "classifier.norm", conv2d(relu(maps), t["classifier.conv.weight"], padding=1), c.batch_norm_eps)
    maps = (maps + maps.transpose(2, 3)) / 2
    for i, rate in enumerate(c.dilations2d):
        maps = residual(f"classifier.dilated.{i}", maps, rate)
        maps = (maps + maps.transpose(2, 3)) / 2 if c.dilated2d_symmetric else maps
    size = maps.shape[-1] - 2 * c.target_crop
    maps = maps[..., c.target_crop : c.target_crop + size, c.target_crop : c.target_crop + size]
    rows, columns = torch.triu_indices(size, size, c.diagonal_offset)
    pairs = maps[:, :, columns, rows].transpose(1, 2)
    return x.transpose(1, 2), linear(pairs, t["classifier.final.weight"], t["classifier.final.bias"])
