"""Graph attention over genes: GATv2 layers, and an encoder that enriches every gene of a vocabulary.

Brody, Alon and Yahav, How Attentive are Graph Attention Networks?, ICLR 2022, equation 7, with edge features.

Shapes: V nodes, E edges (row 0 of `edge_index` holds sources, row 1 targets), H heads, D head size, K edge channels.
"""

from typing import Any

import torch
from torch import nn

# Above so many nodes only those near a batch are computed.
FULL_GRAPH_NODES = 50_000
_SMALLEST = 1e-16


def scatter_softmax(scores_EH: torch.Tensor, targets_E: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """Softmax over the edges that reach the same target, (E, H), in float32 or better."""
    working = scores_EH if scores_EH.dtype == torch.float64 else scores_EH.float()
    index = targets_E[:, None].expand_as(working)
    lowest = torch.full((num_nodes, working.shape[1]), -torch.inf, dtype=working.dtype, device=working.device)
    peaks = lowest.scatter_reduce(0, index, working.detach(), "amax")
    exponentials = (working - peaks[targets_E]).exp()
    sums = torch.zeros_like(lowest).scatter_add(0, index, exponentials)
    return exponentials / sums[targets_E].clamp(min=_SMALLEST)


def with_self_loops(
    edge_index: torch.Tensor, features_EK: torch.Tensor, num_nodes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges without self-interactions, then one for every node whose features are the mean of its incoming edges'."""
    between = edge_index[0] != edge_index[1]
    edge_index, features_EK = edge_index[:, between], features_EK[between]
    sums = features_EK.new_zeros(num_nodes, features_EK.shape[1]).index_add(0, edge_index[1], features_EK)
    counts = torch.bincount(edge_index[1], minlength=num_nodes).clamp(min=1)
    nodes = torch.arange(num_nodes, device=edge_index.device)
    loops = torch.stack([nodes, nodes])
    return torch.cat([edge_index, loops], 1), torch.cat([features_EK, sums / counts[:, None].to(sums.dtype)])


def reversed_edges(edge_index: torch.Tensor, features_EK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every edge, and its reverse as another kind of edge: the channels are doubled, one half is zero (2E, 2K)."""
    nothing = torch.zeros_like(features_EK)
    features = torch.cat([torch.cat([features_EK, nothing], 1), torch.cat([nothing, features_EK], 1)])
    return torch.cat([edge_index, edge_index.flip(0)], 1), features


class GATv2Layer(nn.Module):
    """out_t = concat_h sum_s alpha_st W_l x_s + b, alpha = softmax_s a_h . leaky_relu(W_l x_s + W_r x_t + W_e e_st).

    A node that no edge reaches gets b.

    Args:
        in_size: width of a node. head_dim, num_heads: D and H; the output has H D channels.
        edge_channels: K, 0 = edges have no features.
        negative_slope: of the leaky ReLU. dropout: of alpha.
        share_weights: W_r is W_l.
    """

    def __init__(
        self,
        in_size: int,
        head_dim: int,
        num_heads: int,
        edge_channels: int = 0,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        share_weights: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.negative_slope = negative_slope
        self.source = nn.Linear(in_size, num_heads * head_dim)
        self.target = None if share_weights else nn.Linear(in_size, num_heads * head_dim)
        self.edge = nn.Linear(edge_channels, num_heads * head_dim, bias=False) if edge_channels else None
        self.score = AttentionVector(num_heads, head_dim)
        self.dropout = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.zeros(num_heads * head_dim))

    def forward(
        self, x_VN: torch.Tensor, edge_index: torch.Tensor, features_EK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(V, in_size), (2, E) and (E, K) -> (V, H D)."""
        heads = (-1, self.num_heads, self.head_dim)
        sources, targets = edge_index
        left_VHD = self.source(x_VN).view(heads)
        right_VHD = left_VHD if self.target is None else self.target(x_VN).view(heads)
        from_EHD = left_VHD[sources]
        joint_EHD = from_EHD + right_VHD[targets]
        if self.edge is not None and features_EK is not None:
            joint_EHD = joint_EHD + self.edge(features_EK.to(x_VN.dtype)).view(heads)
        scores_EH = self.score(nn.functional.leaky_relu(joint_EHD, self.negative_slope))
        alpha_EH = self.dropout(scatter_softmax(scores_EH, targets, len(x_VN))).to(from_EHD.dtype)
        messages = (alpha_EH[..., None] * from_EHD).flatten(1)
        out = torch.zeros(len(x_VN), messages.shape[1], dtype=messages.dtype, device=messages.device)
        return out.index_add(0, targets, messages) + self.bias


class AttentionVector(nn.Module):
    """a_h . x for every head, (..., H, D) -> (..., H)."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).sum(-1)


class GeneGraphEncoder(nn.Module):
    """Layers of GATv2 over all genes of a vocabulary: x = norm(x + drop(elu(gat(x)))), between two projections.

    Its cost depends on vocabulary and edges, not on cells; evaluation keeps the result until a parameter changes.

    Args:
        size: width of a gene's vector, in and out. hidden_size: inside; a multiple of `num_heads`.
        num_layers, num_heads, edge_channels, negative_slope, dropout, share_weights: of the layers.
        add_self_loops: see `with_self_loops`.
        directed: False adds the reverse of every edge as another kind of edge.
        eps: of the norms.
    """

    def __init__(
        self,
        size: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        edge_channels: int,
        *,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        add_self_loops: bool = True,
        share_weights: bool = False,
        directed: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.add_self_loops, self.directed = add_self_loops, directed
        channels = edge_channels * (1 if directed else 2)
        self.in_proj = nn.Linear(size, hidden_size)
        self.layers = nn.ModuleList(
            GATv2Layer(
                hidden_size,
                hidden_size // num_heads,
                num_heads,
                channels,
                negative_slope,
                dropout,
                share_weights,
            )
            for _ in range(num_layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size, eps) for _ in range(num_layers))
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden_size, size)

    def prepared(
        self, edge_index: torch.Tensor, features_EK: torch.Tensor, num_nodes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The edges as the layers see them, with reverses and self-loops as configured."""
        if not self.directed:
            edge_index, features_EK = reversed_edges(edge_index, features_EK)
        if self.add_self_loops:
            edge_index, features_EK = with_self_loops(edge_index, features_EK, num_nodes)
        return edge_index, features_EK

    def forward(self, x_VN: torch.Tensor, edge_index: torch.Tensor, features_EK: torch.Tensor) -> torch.Tensor:
        """(V, size) -> (V, size); the edges as in the table, see `prepared`."""
        edge_index, features_EK = self.prepared(edge_index, features_EK, len(x_VN))
        x_VN = self.in_proj(x_VN)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x_VN = norm(x_VN + self.dropout(nn.functional.elu(layer(x_VN, edge_index, features_EK))))
        return self.out_proj(x_VN)


def neighbourhood(
    wanted: torch.Tensor, edge_index: torch.Tensor, num_nodes: int, hops: int, both_ways: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `hops` layers read for some nodes.

    Args:
        wanted: (n,) node ids.
        both_ways: edges are also read against their direction.

    Returns:
        (m,) ids of nodes, increasing, and (E,) bool: edges that lie among them.
    """
    inside = torch.zeros(num_nodes, dtype=torch.bool, device=edge_index.device)
    inside[wanted] = True
    for _ in range(hops):
        reached = inside.clone()
        reached[edge_index[0][inside[edge_index[1]]]] = True
        if both_ways:
            reached[edge_index[1][inside[edge_index[0]]]] = True
        inside = reached
    return inside.nonzero().flatten(), inside[edge_index].all(0)


def parameter_versions(*modules: nn.Module) -> tuple[Any, ...]:
    """Changes with every in-place change or exchange of a parameter: a key for what was computed from them."""
    return tuple((p.data_ptr(), p._version, p.dtype) for module in modules for p in module.parameters())
