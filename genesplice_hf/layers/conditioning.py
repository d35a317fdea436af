"""Ways in which a vector changes the states of a set, or the weights of a layer, each the identity at first.

FiLM (Perez et al., arXiv 1709.07871), squeeze-and-excitation with the vector beside the mean (Hu et al., arXiv
1709.01507), adaptive layer norm (Peebles and Xie, arXiv 2212.09748, adaLN-Zero), HyperGrid (Tay et al., arXiv
2007.05891): the vector gates the weights of a projection.

Shapes: B batch, L tokens, E width of the states, C width of the vector, I and O width before and after a projection.
"""

import torch
from torch import nn
from transformers import initialization as init


class FiLM(nn.Module):
    """x * (1 + gamma(c)) + beta(c), or x * gamma(c) + beta(c) without the residual."""

    def __init__(self, size: int, condition_size: int, residual: bool = True) -> None:
        super().__init__()
        self.residual = residual
        self.gamma = nn.Linear(condition_size, size)
        self.beta = nn.Linear(condition_size, size)

    def initialize(self) -> None:
        """The identity, with the residual and without."""
        for layer in (self.gamma, self.beta):
            init.zeros_(layer.weight)
            init.zeros_(layer.bias)
        if not self.residual:
            init.ones_(self.gamma.bias)

    def forward(self, x_BLE: torch.Tensor, condition_BC: torch.Tensor) -> torch.Tensor:
        """(B, L, E); either batch may be 1."""
        gamma, beta = self.gamma(condition_BC)[:, None], self.beta(condition_BC)[:, None]
        return x_BLE * (1 + gamma if self.residual else gamma) + beta


class SqueezeExcite(nn.Module):
    """x * scale * sigmoid(gate([c; mean of x])), the mean over real tokens; the identity at first where scale is 2."""

    def __init__(self, size: int, condition_size: int, scale: float = 2.0) -> None:
        super().__init__()
        self.scale = scale
        self.gate = nn.Linear(condition_size + size, size)

    def initialize(self) -> None:
        """Every gate starts half open."""
        init.zeros_(self.gate.weight)
        init.zeros_(self.gate.bias)

    def forward(
        self, x_BLE: torch.Tensor, condition_BC: torch.Tensor, mask_BL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, L, E); `mask_BL` bool, True = real; either batch may be 1."""
        if mask_BL is None:
            mean = x_BLE.mean(1)
        else:
            weight = mask_BL[..., None].to(x_BLE.dtype)
            mean = (x_BLE * weight).sum(1) / weight.sum(1).clamp(min=1)
        batch = max(len(mean), len(condition_BC))
        both = torch.cat([condition_BC.expand(batch, -1), mean.expand(batch, -1)], dim=-1)
        return x_BLE * (self.scale * self.gate(both).sigmoid())[:, None]


class AdaptiveLayerNorm(nn.Module):
    """x + gate(c) * (LN(x) * (1 + scale(c)) + shift(c)), LN without parameters of its own."""

    def __init__(self, size: int, condition_size: int) -> None:
        super().__init__()
        self.size = size
        self.modulation = nn.Linear(condition_size, 3 * size)

    def initialize(self) -> None:
        """The identity."""
        init.zeros_(self.modulation.weight)
        init.zeros_(self.modulation.bias)

    def forward(self, x_BLE: torch.Tensor, condition_BC: torch.Tensor) -> torch.Tensor:
        """(B, L, E); either batch may be 1."""
        scale, shift, gate = self.modulation(condition_BC)[:, None].chunk(3, dim=-1)
        normed = nn.functional.layer_norm(x_BLE, (self.size,))
        return x_BLE + gate * (normed * (1 + scale) + shift)


class HyperGrid(nn.Module):
    """y = x @ (W * G(c)), a projection whose weights are gated anew for every vector.

    Args:
        in_size, out_size: I and O.
        condition_size: C.
        grid: None = G is sigmoid(gate(c)), one number for each weight; g = the outer product of two vectors
            sigmoid(row(c)) and sigmoid(column(c)) of g numbers, each repeated over I / g and O / g weights (equation
            5 of the paper).
    """

    def __init__(self, in_size: int, out_size: int, condition_size: int, grid: int | None = None) -> None:
        super().__init__()
        self.in_size, self.out_size, self.grid = in_size, out_size, grid
        self.weight = nn.Parameter(torch.empty(in_size, out_size))
        self.gate = nn.Linear(condition_size, in_size * out_size if grid is None else 2 * grid)

    def initialize(self) -> None:
        """Weights that make up for gates of 1/2 (of 1/4, where two are multiplied)."""
        gates = 2 if self.grid is None else 4
        init.trunc_normal_(self.weight, std=gates * self.in_size**-0.5)

    def gates(self, condition_BC: torch.Tensor) -> torch.Tensor:
        """G (B, I, O)."""
        gates = self.gate(condition_BC).sigmoid()
        if self.grid is None:
            return gates.unflatten(-1, (self.in_size, self.out_size))
        row, column = gates.chunk(2, dim=-1)
        row = row.repeat_interleave(self.in_size // self.grid, dim=-1)
        column = column.repeat_interleave(self.out_size // self.grid, dim=-1)
        return row[:, :, None] * column[:, None, :]

    def forward(self, x_BLI: torch.Tensor, condition_BC: torch.Tensor) -> torch.Tensor:
        """(B, L, O); either batch may be 1."""
        return x_BLI @ (self.weight * self.gates(condition_BC))
