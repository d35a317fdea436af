"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467, eq. 4)."""

import torch
from torch import nn


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension; computed in float32, cast back."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        working = x.dtype if x.dtype == torch.float64 else torch.float32
        wide = x.to(working)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.to(working)).to(x.dtype)
