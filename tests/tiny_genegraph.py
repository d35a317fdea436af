"""Tables of a tiny GeneGraph: a graph, terms, outside vectors and pathways over whatever vocabulary it has."""

from typing import Any

import torch

from genesplice_hf.layers.gene_prior import GenePrior


def tiny_graph(vocab_size: int, channels: int = 2, edges: int = 200) -> GenePrior:
    """Random edges between genes (ids from 3 on), with self-interactions and edges without a sign."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(3, vocab_size, (2, edges), generator=generator)
    return GenePrior(*ends, torch.randint(0, 2, (edges, channels), generator=generator).float(), vocab_size)


def tiny_members(vocab_size: int, sets: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(pairs,) genes and the number of their set, sorted by set; sets overlap."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, vocab_size, (pairs,), generator=generator), torch.arange(pairs) * sets // pairs


def give_tables(model: Any) -> None:
    """Gives a GeneGraph every table that its config speaks of."""
    config = model.config
    if config.uses_graph:
        model.set_gene_graph(tiny_graph(config.vocab_size, config.graph_edge_channels))
    if config.use_gene_annotations:
        terms = tiny_members(config.vocab_size, config.num_annotation_terms, config.num_annotation_pairs)
        model.set_annotations(*terms)
    if config.gene_feature_size:
        generator = torch.Generator().manual_seed(2)
        model.set_gene_features(torch.randn(config.vocab_size, config.gene_feature_size, generator=generator))
    if config.uses_pathways:
        model.set_pathways(*tiny_members(config.vocab_size, config.num_pathways, config.num_pathway_genes))
