"""Mixture of experts: a router sends each token to k of n feed-forward networks (Shazeer et al., arXiv 1701.06538).

Dropless: tokens are sorted by expert, so that no expert has a capacity and no token is left out. What keeps the
experts busy are two losses on the router's logits: load balancing (Fedus et al., arXiv 2101.03961, eq. 4-6) and the
z loss (Zoph et al., arXiv 2202.08906, eq. 5).

Shapes: B batch, L tokens, T real tokens, E hidden size, n experts, k experts per token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from genesplice_hf.layers.feed_forward import SwiGLU


class Router(nn.Linear):
    """Linear map to one logit per expert, in float32 whatever the dtype of the weights, the tokens or autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        working = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.to(working), self.weight.to(working))


class MixtureOfExperts(nn.Module):
    """A weighted sum of the k experts that the router prefers, in place of one SwiGLU.

    The weights are the experts' probabilities divided by their sum. With k = 1 the weight is therefore 1, and the
    router learns from its own losses alone.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = Router(hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(hidden_size, intermediate_size) for _ in range(num_experts))

    def forward(self, x_BLE: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Routes the real tokens; the others get zeros.

        Args:
            mask: (B, L) bool, True = real; None = all real.

        Returns:
            (B, L, E), and the router's logits (B, L, n) in float32, padding included.
        """
        logits = self.router(x_BLE)
        tokens = x_BLE.flatten(0, 1)
        out = self._dispatch(tokens, logits.flatten(0, 1), _real_rows(tokens, mask))
        return out.view_as(x_BLE), logits

    def _dispatch(self, tokens: torch.Tensor, logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Every expert runs once on its tokens, on none of them too: so all parameters always have a gradient."""
        _, weight, chosen = route(logits[real], self.top_k)
        expert, order = chosen.flatten().sort(stable=True)
        rows = real[order // self.top_k]
        counts = torch.bincount(expert, minlength=len(self.experts)).tolist()
        parts = zip(self.experts, tokens[rows].split(counts), strict=True)
        out = torch.cat([expert(part) for expert, part in parts])
        out = out * weight.flatten()[order, None].to(out.dtype)
        return out.new_zeros(tokens.shape).index_add_(0, rows, out)


def _real_rows(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(T,) indices of the real rows of (B L, E) tokens."""
    if mask is None:
        return torch.arange(len(tokens), device=tokens.device)
    return mask.flatten().nonzero().flatten()


def route(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities (T, n), and weights (sum 1) and numbers of the chosen experts, (T, k) each."""
    probability = logits.softmax(-1)
    chosen_probability, chosen = probability.topk(top_k, dim=-1)
    return probability, chosen_probability / chosen_probability.sum(-1, keepdim=True), chosen


class RouterLosses(NamedTuple):
    """Scalars in float32: `balance` is 1 for a uniform router, n when all goes to one expert; `z` is >= 0."""

    balance: torch.Tensor
    z: torch.Tensor


def router_losses(
    router_logits: Sequence[torch.Tensor], mask: torch.Tensor | None = None, top_k: int = 2
) -> RouterLosses:
    """Losses of one forward pass, means over the layers.

    With f_e the fraction of the k T routed slots that expert e got, and P_e its mean probability over the T tokens:
    balance = n sum_e f_e P_e, z = mean over tokens of logsumexp(logits)^2. f has no gradient, P has.

    Args:
        router_logits: one (B, L, n) per layer with experts, at least one. Where the rows are several strands of the
            same batch, strand after strand, the mask is repeated.
        mask: (B, L) bool, True = real; None = all real. Without any real token both losses are 0.
        top_k: experts per token.
    """
    layers = [_layer_losses(_real_logits(logits, mask), top_k) for logits in router_logits]
    return RouterLosses(*(torch.stack(losses).mean() for losses in zip(*layers, strict=True)))


def _real_logits(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return logits.flatten(0, 1)
    return logits[mask.repeat(logits.shape[0] // mask.shape[0], 1)]


def _layer_losses(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, num_experts = logits.shape
    probability, _, chosen = route(logits, top_k)
    slots = torch.bincount(chosen.flatten(), minlength=num_experts).to(logits.dtype)
    fraction = slots / max(1, tokens * top_k)
    balance = num_experts * (fraction * probability.sum(0) / max(1, tokens)).sum()
    return balance, logits.logsumexp(-1).square().sum() / max(1, tokens)


def share_of_step(
    labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None, ignored: int = -100
) -> torch.Tensor | float:
    """The part of an optimiser step that this forward pass is: 1, or its labels / `num_items_in_batch`.

    transformers' Trainer adds up the losses of the passes of one step when it gives `num_items_in_batch`, so a loss
    that is a mean per pass must be weighted: the shares add up to 1 over accumulation steps and processes.
    """
    if num_items_in_batch is None or labels is None:
        return 1.0
    return (labels != ignored).sum() / torch.as_tensor(num_items_in_batch, device=labels.device).clamp(min=1)
