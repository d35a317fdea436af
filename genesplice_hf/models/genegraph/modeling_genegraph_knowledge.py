"""What GeneGraph knows of genes: a graph, terms and outside vectors, as vectors of the whole vocabulary.

Shapes: B cells, r genes of a cell, V vocabulary, N hidden size, E edges, K channels of an edge, n pairs of a table.
"""

import hashlib
from typing import Any

import torch
from torch import nn

from genesplice_hf.errors import CheckpointError
from genesplice_hf.layers.gene_prior import GenePrior
from genesplice_hf.layers.graph_attention import FULL_GRAPH_NODES, GeneGraphEncoder, neighbourhood
from genesplice_hf.layers.pathway import GeneAnnotationEmbedding
from genesplice_hf.models.genegraph.configuration_genegraph import GeneGraphConfig

# What stands in a table that was not given yet.
ABSENT = -1


def absent(number: int) -> torch.Tensor:
    """(number,) entries of a table that is still to come."""
    return torch.full((number,), ABSENT, dtype=torch.int64)


def table_sha256(*columns: torch.Tensor) -> str:
    """Hash of the columns of a table of whole numbers."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(column.detach().cpu().to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def fill_table(name: str, buffers: tuple[torch.Tensor, torch.Tensor], columns: Any, limits: tuple[int, int]) -> str:
    """Writes pairs (gene, set) into two buffers, in their order, and returns their hash.

    Args:
        name: of the argument, for messages.
        columns: two columns of n whole numbers.
        limits: V, and the number of sets.

    Raises:
        CheckpointError: another number of pairs than the config says, or numbers outside the limits.
    """
    given = [torch.as_tensor(column, dtype=torch.int64) for column in columns]
    for column, buffer, limit in zip(given, buffers, limits, strict=True):
        if column.shape != buffer.shape:
            raise CheckpointError(
                f"`{name}` must have {len(buffer)} pairs of a gene and a set, as the config says, got "
                f"{tuple(column.shape)}; make the config for this table."
            )
        if len(column) and (int(column.min()) < 0 or int(column.max()) >= limit):
            raise CheckpointError(
                f"`{name}` must hold numbers below {limit}, got {int(column.min())} to {int(column.max())}; match the "
                "names to this vocabulary."
            )
    for column, buffer in zip(given, buffers, strict=True):
        buffer.copy_(column)
    return table_sha256(*given)


class GraphTables:
    """The graph on a device: its edges for the encoder, and which edge joins two genes of a cell."""

    def __init__(self, table: GenePrior) -> None:
        self.table = table
        self._moved: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def edges(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(2, E) and (E, K)."""
        return self._on(device)[0], self._on(device)[1]

    def numbers(self, input_ids_Br: torch.Tensor) -> torch.Tensor:
        """(B, r, r) number of the edge from gene i (row) to gene j, E where there is none."""
        keys = self._on(input_ids_Br.device)[2]
        queries = input_ids_Br[:, :, None] * self.table.vocab_size + input_ids_Br[:, None, :]
        if not len(keys):
            return torch.zeros_like(queries)
        place = torch.searchsorted(keys, queries).clamp_(max=len(keys) - 1)
        return torch.where(keys[place] == queries, place, len(keys))

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if device not in self._moved:
            table = self.table
            index = torch.stack([table.source, table.target])
            keys = table.source * table.vocab_size + table.target
            self._moved[device] = (index.to(device), table.value.to(device), keys.to(device))
        return self._moved[device]


class GeneKnowledge(nn.Module):
    """Vectors of all genes: g + annotations + features, and then + s GNN of that."""

    def __init__(self, config: GeneGraphConfig) -> None:
        super().__init__()
        self.hops = config.graph_num_layers + 1
        self.both_ways = not config.graph_directed
        size, vocabulary = config.hidden_size, config.vocab_size
        self.graph: GeneGraphEncoder | None = None
        if config.use_graph_encoder:
            self.graph = GeneGraphEncoder(
                size,
                config.graph_hidden_size,
                config.graph_num_layers,
                config.graph_num_heads,
                config.graph_edge_channels,
                negative_slope=config.graph_negative_slope,
                dropout=config.graph_dropout,
                add_self_loops=config.graph_add_self_loops,
                share_weights=config.graph_share_weights,
                directed=config.graph_directed,
                eps=config.layer_norm_eps,
            )
            self.graph_scale = nn.Parameter(torch.tensor(float(config.graph_residual_scale_init)))
        self.annotations: GeneAnnotationEmbedding | None = None
        if config.use_gene_annotations:
            pairs = config.num_annotation_pairs
            self.annotations = GeneAnnotationEmbedding(
                absent(pairs), absent(pairs), vocabulary, config.num_annotation_terms, size
            )
        self.feature_proj: nn.Linear | None = None
        if config.gene_feature_size:
            self.feature_proj = nn.Linear(config.gene_feature_size, size)
            self.register_buffer("features", torch.zeros(vocabulary, config.gene_feature_size))

    def described(self, genes_VN: torch.Tensor) -> torch.Tensor:
        """g + annotations + features."""
        if self.annotations is not None:
            genes_VN = genes_VN + self.annotations()
        return genes_VN if self.feature_proj is None else genes_VN + self.feature_proj(self.features)

    def forward(
        self,
        genes_VN: torch.Tensor,
        edges: tuple[torch.Tensor, torch.Tensor] | None,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(V, N) -> (V, N).

        Args:
            edges: (2, E) and (E, K), where there is a graph encoder.
            wanted: ids of the genes that matter; of a large vocabulary only what they read is computed.
        """
        genes_VN = self.described(genes_VN)
        if self.graph is None or edges is None:
            return genes_VN
        if wanted is None or len(genes_VN) <= FULL_GRAPH_NODES:
            return genes_VN + self.graph_scale * self.graph(genes_VN, *edges)
        # One hop more than layers: the features of a self-loop are the mean of what comes in.
        nodes, inside = neighbourhood(wanted, edges[0], len(genes_VN), self.hops, self.both_ways)
        place = torch.full((len(genes_VN),), ABSENT, device=nodes.device)
        place[nodes] = torch.arange(len(nodes), device=nodes.device)
        part = self.graph(genes_VN[nodes], place[edges[0][:, inside]], edges[1][inside])
        return genes_VN.index_add(0, nodes, (self.graph_scale * part).to(genes_VN.dtype))


class GraphBias(nn.Module):
    """What edges add to the logits of attention: a learned number per channel, direction and head.

    The first channel is that there is an edge at all; no edge adds exactly 0. (B, i, j) edge numbers -> (B, H, i, j).
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, channels + 1, num_heads))

    def forward(self, numbers_Bij: torch.Tensor, values_EK: torch.Tensor) -> torch.Tensor:
        """`numbers_Bij` as `GraphTables.numbers` gives them."""
        edges = torch.cat([torch.ones_like(values_EK[:, :1]), values_EK], dim=1).to(self.weight.dtype)
        # One more row for no edge.
        known = nn.functional.pad(edges, (0, 0, 0, 1))
        leaving, reaching = (nn.functional.embedding(numbers, known @ weight) for numbers, weight in zip(
            (numbers_Bij, numbers_Bij.transpose(1, 2)), self.weight, strict=True
        ))  # fmt: skip
        return (leaving + reaching).permute(0, 3, 1, 2)
