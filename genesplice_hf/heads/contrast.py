"""Losses of a whole batch that is spread over processes: means over all of it, and the contrast of its pairs.

Under DDP and FSDP every process differentiates its own loss and the gradients are *averaged*. The functions here
therefore return, in every process, the value for the whole batch, with a gradient that is right once it has been
averaged: two processes with half a batch each are one process with all of it.

Shapes: B pairs of this process, N pairs of all processes, P size of an embedding.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.utils import logging

logger = logging.get_logger(__name__)


def spans_processes() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_processes(total: torch.Tensor, count: torch.Tensor, gather: bool) -> torch.Tensor:
    """`total / count`, both summed over the processes first when `gather`; 0 where nothing is counted.

    Args:
        total: scalar sum of this process. count: scalar number (or weight) of what was summed, without gradient.
    """
    smallest = torch.finfo(total.dtype).tiny
    if not gather or not spans_processes():
        return total / count.to(total).clamp(min=smallest)
    sums = torch.stack([total.detach(), count.to(total)])
    dist.all_reduce(sums)
    everything = sums[1].clamp(min=smallest)
    # The average of this over the processes is the mean over all; only the value is moved there at once.
    share = total * dist.get_world_size() / everything
    return share + (sums[0] / everything - share).detach()


class _GatherRows(torch.autograd.Function):
    """Rows of all processes in the order of their ranks; the gradient of a row is the sum of what all asked of it."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        rank = dist.get_rank()
        ctx.own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.own], None


def gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Puts the rows of all processes together, with gradients; processes may hold different numbers of rows.

    Returns:
        (N, ...) rows by rank, and the number of the first one of this process.
    """
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    return _GatherRows.apply(rows, sizes), sum(sizes[: dist.get_rank()])


def info_nce(
    first_BP: torch.Tensor, second_BP: torch.Tensor, temperature: float = 0.07, gather: bool = False
) -> torch.Tensor:
    """How badly each embedding finds its partner among all others, in nats.

    The mean over all 2N embeddings i of -log(exp(s_ip / t) / sum over j != i of exp(s_ij / t)), where s is the dot
    product and p the partner (van den Oord et al., arXiv 1807.03748, eq. 4; in this symmetric form Chen et al.,
    arXiv 2002.05709, eq. 1). Computed in float32, in float64 for embeddings of that type.

    Args:
        first_BP, second_BP: (B, P) embeddings of length 1; row b of both is a pair.
        temperature: t > 0.
        gather: take the pairs of all processes together; every process must then call this.

    Returns:
        Scalar. A single pair has nothing that it could be confused with: its loss is exactly 0, with gradient 0, and
        a warning says so once.
    """
    working = torch.float64 if first_BP.dtype == torch.float64 else torch.float32
    with torch.autocast(first_BP.device.type, enabled=False):
        own = torch.stack([first_BP, second_BP], dim=1).to(working)
        everyone, start = gather_rows(own) if gather and spans_processes() else (own, 0)
        if len(everyone) < 2:
            logger.warning_once("A contrast of one pair is 0 and teaches nothing: use a batch of 2 or more.")
        # First views of all processes, then second views.
        anchors, others = own.transpose(0, 1).flatten(0, 1), everyone.transpose(0, 1).flatten(0, 1)
        itself = torch.arange(start, start + len(own), device=own.device)
        itself = torch.cat([itself, itself + len(everyone)])
        similarity = anchors @ others.T / temperature
        similarity = similarity.scatter(1, itself[:, None], -torch.inf)
        partner = (itself + len(everyone)) % (2 * len(everyone))
        total = nn.functional.cross_entropy(similarity, partner, reduction="sum")
    return mean_over_processes(total, torch.tensor(len(anchors), device=own.device), gather)
