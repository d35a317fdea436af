"""Normalisation of interaction maps; padding never enters a statistic.

Shapes: B batch, T bins, H heads, R residues (and the null key).
"""

from typing import Optional

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

# Which have a module: the others do nothing ("none") or are a way to reduce ("softmax_residue").
MODULES = ("layernorm", "rmsnorm", "batchnorm", "instancenorm", "zscore_bins")


class InteractionNorm(nn.Module):
    """Normalises (B, T, H): over heads at each bin, per head over bins of all rows, or per row and head over bins.

    Args:
        kind: one of `MODULES`.
        heads: H.
        eps: added to variances.
        affine: a learned weight and bias per head ("rmsnorm": weight alone; "zscore_bins": neither).
    """

    def __init__(self, kind: str, heads: int, eps: float, affine: bool) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        has_weight = affine and kind not in ("zscore_bins", "batchnorm")
        self.weight = nn.Parameter(torch.ones(heads)) if has_weight else None
        self.bias = nn.Parameter(torch.zeros(heads)) if has_weight and kind != "rmsnorm" else None
        self.batch = nn.BatchNorm1d(heads, eps=eps, affine=affine) if kind == "batchnorm" else None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Optional["InteractionNorm"]:
        """The norm that a config asks for."""
        if config.interaction_norm not in MODULES:
            return None
        eps, affine = config.interaction_norm_eps, config.interaction_norm_affine
        return cls(config.interaction_norm, config.latent_heads, eps, affine)

    def initialize(self) -> None:
        """No change but the normalisation."""
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x_BTH: torch.Tensor, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, H); `mask_BT` bool, True = real, None = all."""
        if self.batch is not None:
            return self._over_batch(self.batch, x_BTH, mask_BT)
        if self.kind in ("layernorm", "rmsnorm"):
            return self._with_weights(over(x_BTH, -1, None, self.eps, centred=self.kind == "layernorm"))
        mask = None if mask_BT is None else mask_BT[..., None]
        return self._with_weights(over(x_BTH, 1, mask, self.eps))

    def _over_batch(self, norm: nn.BatchNorm1d, x_BTH: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
        assert norm.running_mean is not None
        x_BTH = x_BTH.to(norm.running_mean.dtype)
        if mask_BT is None:
            return norm(x_BTH.flatten(0, 1)).view_as(x_BTH)
        mask = mask_BT.expand(x_BTH.shape[:2])
        return torch.zeros_like(x_BTH).masked_scatter(mask[..., None], norm(x_BTH[mask]))

    def _with_weights(self, x: torch.Tensor, head_dim: int = -1) -> torch.Tensor:
        """x with weight and bias along the dimension of the heads."""
        shape = [1] * x.dim()
        shape[head_dim] = -1
        if self.weight is not None:
            x = x * self.weight.to(x.dtype).view(shape)
        return x if self.bias is None else x + self.bias.to(x.dtype).view(shape)


def normalize_map(norm: InteractionNorm, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The map (B, H, T, R) before its reduction: over heads, or per row, head and bin over residues.

    Args:
        norm: a layer, root-mean-square or instance norm.
        mask: (B, R) bool, True = real; None = all.
    """
    if norm.kind in ("layernorm", "rmsnorm"):
        normed = over(scores, 1, None, norm.eps, centred=norm.kind == "layernorm")
    else:
        normed = over(scores, -1, None if mask is None else mask[:, None, None, :], norm.eps)
    return norm._with_weights(normed, head_dim=1)


def over(x: torch.Tensor, dim: int, mask: torch.Tensor | None, eps: float, centred: bool = True) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) along a dimension, over entries where `mask` (broadcast) is True.

    Args:
        centred: False leaves the mean in (root mean square).
    """
    weight = torch.ones_like(x) if mask is None else mask.to(x.dtype).expand_as(x)
    count = weight.sum(dim, keepdim=True).clamp(min=1)
    if centred:
        x = x - (x * weight).sum(dim, keepdim=True) / count
    return x * torch.rsqrt((x.square() * weight).sum(dim, keepdim=True) / count + eps)
