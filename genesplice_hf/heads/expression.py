"""Heads of expression models: values per gene, values from a cell's vector, classes of cells, edges between genes.

The layouts are scGPT's (Cui et al. 2024; `scgpt/model/model.py` and `scgpt/loss.py` at cebd6fa).

Shapes: B cells, r genes of a cell, E hidden size, D width of what decoders read, C channels of z.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from genesplice_hf.heads.contrast import gather_rows, mean_over_processes, spans_processes
from genesplice_hf.heads.losses import IGNORED
from genesplice_hf.heads.pooling import first_real, masked_mean
from genesplice_hf.layers.expression_config import ExpressionConfig
from genesplice_hf.layers.pair_bias import OuterProductUpdate

# Rows of pairs whose differences are held at a time.
_PAIR_NUMBERS = 2**24


class ExpressionDecoder(nn.Sequential):
    """Linear, LeakyReLU, Linear, LeakyReLU, Linear to one number; (..., D) -> (...)."""

    def __init__(self, input_size: int, size: int) -> None:
        super().__init__(
            nn.Linear(input_size, size), nn.LeakyReLU(), nn.Linear(size, size), nn.LeakyReLU(), nn.Linear(size, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).squeeze(-1)


class MVCDecoder(nn.Module):
    """A value for every gene from the cell's vector and the gene alone ("masked value prediction for cell modelling").

    "inner product": (W sigmoid(query(g))) . cell; with "detach" without gradients to the gene. "concat query" and
    "sum query" put query and cell through two layers, and give no zero logits.
    """

    def __init__(self, config: ExpressionConfig) -> None:
        super().__init__()
        size, cell_size, self.style = config.hidden_size, config.decoder_size, config.mvc_decoder_style
        hidden = config.mvc_query_dim
        self.map = self.zero_map = None
        if self.style.startswith("inner"):
            self.query = nn.Linear(size, size)
            self.map = nn.Linear(size, cell_size, bias=False)
            self.zero_map = nn.Linear(size, cell_size) if config.explicit_zero_prob else None
            return
        is_concat = self.style == "concat query"
        self.query = nn.Linear(size, hidden if is_concat else cell_size)
        self.fc1 = nn.Linear(cell_size + hidden if is_concat else cell_size, hidden)
        self.activation = nn.PReLU()
        self.fc2 = nn.Linear(hidden, 1)

    def forward(self, cell_BD: torch.Tensor, genes_BrE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Values (B, r), and logits (B, r) of being above zero, where there is a map for them."""
        query = self.query(genes_BrE.detach() if self.style.endswith("detach") else genes_BrE).sigmoid()
        if self.map is None:
            cell = cell_BD[:, None].expand(-1, query.shape[1], -1)
            joined = torch.cat([cell, query], dim=-1) if self.style == "concat query" else cell + query
            return self.fc2(self.activation(self.fc1(joined))).squeeze(-1), None
        values = (self.map(query) @ cell_BD[..., None]).squeeze(-1)
        if self.zero_map is None:
            return values, None
        return values, (self.zero_map(query) @ cell_BD[..., None]).squeeze(-1)


class CellClassifier(nn.Module):
    """(Linear, activation, LayerNorm) x (layers - 1), then Linear to the classes; (B, E) -> (B, classes)."""

    def __init__(
        self, size: int, num_labels: int, num_layers: int, eps: float, activation: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        hidden: list[nn.Module] = []
        for _ in range(num_layers - 1):
            hidden += [nn.Linear(size, size), activation(), nn.LayerNorm(size, eps)]
        self.hidden = nn.Sequential(*hidden)
        self.out = nn.Linear(size, num_labels)

    def forward(self, cell_BE: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(cell_BE))


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.neg()


class BatchDiscriminator(CellClassifier):
    """Tells batches apart; what stands before it learns the opposite (Ganin and Lempitsky 2015, lambda 1)."""

    def __init__(self, config: ExpressionConfig) -> None:
        super().__init__(config.hidden_size, config.num_batch_labels or 1, 3, config.layer_norm_eps, nn.LeakyReLU)

    def forward(self, cell_BE: torch.Tensor) -> torch.Tensor:
        return super().forward(_Reversed.apply(cell_BE))


class EdgeHead(nn.Module):
    """A logit per ordered pair of genes: w z_ij + b where there is a z, else w [h_i * h_j, |h_i - h_j|] + b.

    Where the base leaves z without the last block's update, the head makes it: base and head load apart.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        is_full = config.pair_mode == "full"
        self.reads_z = is_full and (config.use_opm or getattr(config, "pair_init", "zeros") != "zeros")
        self.opm = None
        if self.reads_z:
            if config.use_opm and not config.updates_pair(config.num_hidden_layers - 1):
                self.opm = OuterProductUpdate(config)
            self.pair = nn.Linear(config.pair_hidden_size, 1)
        else:
            self.product = nn.Linear(config.hidden_size, 1)
            self.difference = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, states_BrE: torch.Tensor, z_BijC: torch.Tensor | None, real_Br: torch.Tensor) -> torch.Tensor:
        """(B, r, r) logits of an edge from gene i (row) to gene j."""
        if not self.reads_z:
            return self._of_states(states_BrE)
        logits = self.pair.bias.expand(*real_Br.shape, real_Br.shape[1])
        # A copy, for products with one row round by where a weight lies in memory.
        weight_1C = self.pair.weight.clone()
        if z_BijC is not None:
            logits = logits + torch.matmul(weight_1C, z_BijC.transpose(2, 3)).squeeze(2)
        return logits if self.opm is None else logits + self._of_update(self.opm, states_BrE, real_Br, weight_1C)

    def _of_update(
        self, opm: OuterProductUpdate, states_BrE: torch.Tensor, real_Br: torch.Tensor, weight_1C: torch.Tensor
    ) -> torch.Tensor:
        """w (z update), (B, r, r), without the update itself."""
        a_BiP, q_BjQ = opm.factors(states_BrE, real_Br)
        real_pairs = (real_Br[:, :, None] & real_Br[:, None]).to(q_BjQ.dtype)
        update = (opm.weighted(a_BiP, weight_1C)[:, 0] @ q_BjQ.transpose(1, 2)) * real_pairs
        return update if opm.out.bias is None else update + real_pairs * (weight_1C[0] * opm.out.bias).sum()

    def _of_states(self, h_BrE: torch.Tensor) -> torch.Tensor:
        products = (h_BrE * self.product.weight) @ h_BrE.transpose(1, 2) + self.product.bias
        step = max(1, _PAIR_NUMBERS // (h_BrE.shape[0] * h_BrE.shape[1] * h_BrE.shape[2]))
        rows = []
        for start in range(0, h_BrE.shape[1], step):
            part = (h_BrE[:, start : start + step], h_BrE, self.difference.weight)
            rows.append(
                checkpoint(_differences, *part, use_reentrant=False) if h_BrE.requires_grad else _differences(*part)
            )
        return products + torch.cat(rows, dim=1)


def _differences(rows_BiE: torch.Tensor, h_BjE: torch.Tensor, weight_1E: torch.Tensor) -> torch.Tensor:
    return (rows_BiE[:, :, None] - h_BjE[:, None]).abs() @ weight_1E[0]


def cell_embedding(
    states_BrE: torch.Tensor, values_Br: torch.Tensor, real_Br: torch.Tensor, style: str
) -> torch.Tensor:
    """(B, E): the first gene's state ("cls"), the mean ("avg-pool"), or the mean weighted by values, of length 1."""
    if style == "cls":
        return first_real(states_BrE, real_Br)
    if style == "avg-pool":
        return masked_mean(states_BrE, real_Br)
    weights = (values_Br * real_Br).to(states_BrE.dtype)
    return nn.functional.normalize((states_BrE * weights[..., None]).sum(1), dim=-1)


def counted(labels: torch.Tensor, num_items: torch.Tensor | int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which labels count (bool), and by how many a sum over them is divided."""
    valid = labels != IGNORED
    number = valid.sum() if num_items is None else torch.as_tensor(num_items, device=labels.device)
    return valid, number.clamp(min=1)


def squared_error(
    predictions: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor, number: torch.Tensor
) -> torch.Tensor:
    """Sum of (p - t)^2 where `valid`, over `number`."""
    targets = targets.masked_fill(~valid, 0.0)
    losses = (_wide(predictions) - targets.to(_wide(predictions))).square()
    return torch.where(valid, losses, 0.0).sum() / number


def presence_loss(
    logits: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor, number: torch.Tensor
) -> torch.Tensor:
    """Binary cross entropy (nats) of `targets > 0` where `valid`, over `number`."""
    present = (targets > 0).to(_wide(logits))
    losses = nn.functional.binary_cross_entropy_with_logits(_wide(logits), present, reduction="none")
    return torch.where(valid, losses, 0.0).sum() / number


def elastic_similarity(cell_BE: torch.Tensor, threshold: float) -> torch.Tensor:
    """mean over all B^2 entries of 1 - (relu(cosine) - threshold)^2, the diagonal counted as a cosine of 0."""
    cell = nn.functional.normalize(_wide(cell_BE), dim=-1)
    cosine = (cell @ cell.transpose(0, 1)).masked_fill(torch.eye(len(cell), device=cell.device).bool(), 0.0)
    return (1 - (cosine.relu() - threshold).square()).mean()


def contrastive_cells(first_BE: torch.Tensor, second_BE: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross entropy (nats) of finding each cell's second vector among those of all cells, of all processes."""
    first, second = (nn.functional.normalize(_wide(x), dim=-1) for x in (first_BE, second_BE))
    everyone, start = gather_rows(second) if spans_processes() else (second, 0)
    targets = torch.arange(start, start + len(first), device=first.device)
    total = nn.functional.cross_entropy(first @ everyone.transpose(0, 1) / temperature, targets, reduction="sum")
    return mean_over_processes(total, torch.tensor(len(first), device=first.device), gather=True)


def contrastive_genes(vectors_mE: torch.Tensor, shared_mm: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """How badly a gene finds those that share a set with it among the others, in nats; 0 where no two share one.

    The mean over genes i of the mean over partners p of -log(exp(s_ip / t) / sum over j != i of exp(s_ij / t)), where
    s is the cosine (Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, equation 2). Genes without a partner
    are left out, on both sides: of what they do, the sets say nothing.

    Args:
        shared_mm: bool, symmetric, False on the diagonal.
    """
    has_partner = shared_mm.any(1)
    shared = shared_mm[has_partner][:, has_partner]
    with torch.autocast(vectors_mE.device.type, enabled=False):
        unit = nn.functional.normalize(_wide(vectors_mE[has_partner]), dim=-1)
        itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        scores = (unit @ unit.transpose(0, 1) / temperature).masked_fill(itself, -torch.inf).log_softmax(-1)
        per_gene = scores.masked_fill(~shared, 0.0).sum(1) / shared.sum(1).clamp(min=1)
        return -per_gene.sum() / max(len(unit), 1)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
