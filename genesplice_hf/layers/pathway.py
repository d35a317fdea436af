"""Pathways and annotations: maps between genes and sets of genes, stored by members, never as dense matrices.

Shapes: B cells, r genes of a cell, m some genes, V vocabulary, P pathways, U tokens that see all genes, T terms,
n members (pairs of a gene and a set), C input channels, k width of a token, N hidden size.
"""

import torch
from torch import nn

NUM_CHANNELS = 2


class PathwayMembers(nn.Module):
    """Which genes are in which pathway: n pairs, sorted by pathway.

    Args:
        genes_n, pathways_n: int64 members.
        num_pathways: P.
    """

    def __init__(self, genes_n: torch.Tensor, pathways_n: torch.Tensor, num_pathways: int) -> None:
        super().__init__()
        self.num_pathways = num_pathways
        self.genes: torch.Tensor
        self.pathways: torch.Tensor
        self.register_buffer("genes", genes_n)
        self.register_buffer("pathways", pathways_n)

    def resize(self, vocab_size: int) -> None:
        """Drops members outside a smaller vocabulary."""
        kept = self.genes < vocab_size
        self.genes, self.pathways = self.genes[kept], self.pathways[kept]

    def shared(self, ids_m: torch.Tensor) -> torch.Tensor:
        """(m, m) bool, True where two of m genes (increasing ids) share a pathway; False on the diagonal."""
        belongs_mP = torch.zeros(len(ids_m), self.num_pathways, device=ids_m.device)
        if len(ids_m):
            place_n = torch.searchsorted(ids_m, self.genes).clamp_(max=len(ids_m) - 1)
            known = ids_m[place_n] == self.genes
            belongs_mP[place_n[known], self.pathways[known]] = 1
        return (belongs_mP @ belongs_mP.transpose(0, 1) > 0).fill_diagonal_(False)


class MaskedLinear(PathwayMembers):
    """y_bp = sum over members g of p, and channels c, of x_bgc W_gpc + bias_p; (B, V, C) -> (B, P, k).

    What TOSICA writes as a dense weight times a mask (Chen et al., Nature Communications 2023), kept by members, in
    the layout (P, k): token p reads members of pathway p and nothing else.

    Args:
        genes_n, pathways_n: int64 members, sorted by pathway.
        num_pathways, width: P and k.
        bias: add bias_p.
        channels: C.
    """

    def __init__(
        self, genes_n: torch.Tensor, pathways_n: torch.Tensor, num_pathways: int, width: int, bias: bool, channels: int
    ) -> None:
        super().__init__(genes_n, pathways_n, num_pathways)
        self.weight = nn.Parameter(torch.empty(channels, len(genes_n), width))
        self.bias = nn.Parameter(torch.zeros(num_pathways, width)) if bias else None
        nn.init.normal_(self.weight, std=0.1)

    def forward(self, x_BVC: torch.Tensor) -> torch.Tensor:
        """Every token from its own genes."""
        members = self.genes
        starts = torch.searchsorted(self.pathways, torch.arange(self.num_pathways, device=members.device), side="left")
        shifts = torch.arange(len(x_BVC), device=members.device)[:, None] * len(members)
        bags = (starts + shifts).flatten()
        rows = torch.arange(len(members), device=members.device).repeat(len(x_BVC))
        tokens = [
            nn.functional.embedding_bag(
                rows, weight, bags, mode="sum", per_sample_weights=x_BV[:, members].flatten().to(weight.dtype)
            )
            for weight, x_BV in zip(self.weight, x_BVC.unbind(-1), strict=True)
        ]
        y_BPk = torch.stack(tokens).sum(0).view(len(x_BVC), self.num_pathways, -1)
        return y_BPk if self.bias is None else y_BPk + self.bias

    @torch.no_grad()
    def resize(self, vocab_size: int) -> None:
        """Drops members outside a smaller vocabulary, with their weights."""
        kept = self.genes < vocab_size
        self.weight = nn.Parameter(self.weight[:, kept].clone(), requires_grad=self.weight.requires_grad)
        super().resize(vocab_size)


class PathwayTokens(nn.Module):
    """One token per pathway from the expression of its members; (B, r) genes and values -> (B, P + U, N).

    token = proj(norm(masked linear of [log1p(value), is masked])) + embedding of the pathway. A hidden value counts as
    0 in the first channel and 1 in the second. The last U tokens see every gene.

    Args:
        genes_n, pathways_n: members.
        vocab_size, num_pathways, num_unannotated: V, P and U.
        width, hidden_size: k and N; a projection stands between them where they differ.
        bias, norm, eps: a bias per token, a LayerNorm after it.
    """

    def __init__(
        self,
        genes_n: torch.Tensor,
        pathways_n: torch.Tensor,
        vocab_size: int,
        num_pathways: int,
        num_unannotated: int,
        width: int,
        hidden_size: int,
        *,
        bias: bool = True,
        norm: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.members = MaskedLinear(genes_n, pathways_n, num_pathways, width, bias, NUM_CHANNELS)
        self.everything = nn.ModuleList(nn.Embedding(vocab_size, width * NUM_CHANNELS) for _ in range(num_unannotated))
        self.everything_bias = nn.Parameter(torch.zeros(num_unannotated, width)) if bias and num_unannotated else None
        self.norm = nn.LayerNorm(width, eps) if norm else nn.Identity()
        self.proj = nn.Linear(width, hidden_size) if width != hidden_size else nn.Identity()
        self.embedding = nn.Embedding(num_pathways + num_unannotated, hidden_size)

    def forward(self, input_ids_Br: torch.Tensor, values_Br: torch.Tensor, is_masked_Br: torch.Tensor) -> torch.Tensor:
        """The tokens of each cell.

        Args:
            input_ids_Br: ids. values_Br: values, 0 where nothing counts (special tokens, padding, hidden values).
            is_masked_Br: bool, hidden values.
        """
        channels = torch.stack([values_Br.clamp(min=0).log1p(), is_masked_Br.to(values_Br.dtype)], dim=-1)
        channels = channels.to(self.embedding.weight.dtype)
        x_BVC = channels.new_zeros(len(input_ids_Br), self.vocab_size, NUM_CHANNELS)
        x_BVC = x_BVC.scatter_add(1, input_ids_Br[..., None].expand_as(channels), channels)
        tokens = [self.members(x_BVC), *(self._whole(table, input_ids_Br, channels) for table in self.everything)]
        y_BPk = torch.cat(tokens, dim=1)
        if self.everything_bias is not None:
            y_BPk = torch.cat([tokens[0], torch.cat(tokens[1:], dim=1) + self.everything_bias], dim=1)
        return self.proj(self.norm(y_BPk)) + self.embedding.weight

    @torch.no_grad()
    def resize(self, vocab_size: int) -> None:
        """Takes another vocabulary: members that are left keep their weights, new genes begin with zeros."""
        self.members.resize(vocab_size)
        for table in self.everything:
            rows = max(0, vocab_size - len(table.weight))
            weight = nn.functional.pad(table.weight, (0, 0, 0, rows))[:vocab_size].clone()
            table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
            table.num_embeddings = vocab_size
        self.vocab_size = vocab_size

    @staticmethod
    def _whole(table: nn.Embedding, input_ids_Br: torch.Tensor, channels_BrC: torch.Tensor) -> torch.Tensor:
        weight_CVk = table.weight.unflatten(-1, (NUM_CHANNELS, -1)).transpose(0, 1)
        parts = [
            nn.functional.embedding_bag(input_ids_Br, weight, mode="sum", per_sample_weights=x_Br)
            for weight, x_Br in zip(weight_CVk, channels_BrC.unbind(-1), strict=True)
        ]
        return torch.stack(parts).sum(0)[:, None]


class GeneAnnotationEmbedding(nn.Module):
    """A gene as the mean of its terms' vectors, times a learned number; zero for a gene without terms; -> (V, N).

    Args:
        genes_n, terms_n: int64 pairs, sorted by gene.
        vocab_size, num_terms, hidden_size: V, T and N.
    """

    def __init__(
        self, genes_n: torch.Tensor, terms_n: torch.Tensor, vocab_size: int, num_terms: int, hidden_size: int
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.genes: torch.Tensor
        self.terms: torch.Tensor
        self.register_buffer("genes", genes_n)
        self.register_buffer("terms", terms_n)
        self.embedding = nn.Embedding(num_terms, hidden_size)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self) -> torch.Tensor:
        """The vectors of all genes."""
        starts = torch.searchsorted(self.genes, torch.arange(self.vocab_size, device=self.genes.device), side="left")
        means = nn.functional.embedding_bag(self.terms, self.embedding.weight, starts, mode="mean")
        return self.scale * means

    def resize(self, vocab_size: int) -> None:
        """Takes another vocabulary; genes outside it lose their terms."""
        kept = self.genes < vocab_size
        self.genes, self.terms, self.vocab_size = self.genes[kept], self.terms[kept], vocab_size


def attention_rollout(attentions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """How much of each input flows into each output through all layers, (B, i, j): the product of (A + I) / row sums.

    Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020.

    Args:
        attentions: (B, H, i, j) weights of every layer, first to last; heads are averaged.
    """
    flow = None
    for weights_BHij in attentions:
        mixed = weights_BHij.mean(1) + torch.eye(weights_BHij.shape[-1], device=weights_BHij.device)
        mixed = mixed / mixed.sum(-1, keepdim=True)
        flow = mixed if flow is None else mixed @ flow
    assert flow is not None
    return flow
