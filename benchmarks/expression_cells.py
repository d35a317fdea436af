"""The cells of `benchmarks.expression`: each builds blocks, measures one thing, and returns its numbers.

Most are forward and backward passes of two blocks of width 256 on one cell in float32, z (and its channels c) as wide
as the outer product, from a z of zeros. A cell runs alone in a fresh process.

Shapes: B cells, r genes of a cell, E hidden size, C channels of z, V genes of a vocabulary.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
import torch
from scipy import sparse

from benchmarks.expression_literal import LiteralBlock, run_literal
from benchmarks.measuring import fastest, measure
from genesplice_hf.data.expression_settings import ExpressionSettings
from genesplice_hf.data.h5ad import GeneExpressionProcessor
from genesplice_hf.layers.expression_block import ExpressionEncoder, expression_context
from genesplice_hf.layers.gene_prior import GenePrior
from genesplice_hf.models.bioformer.configuration_bioformer import BioFormerConfig
from genesplice_hf.models.genegraph.configuration_genegraph import GeneGraphConfig
from genesplice_hf.models.genegraph.modeling_genegraph_base import GeneGraphModel
from genesplice_hf.tokenization.tokenization_gene import GeneTokenizer

WIDTH, HEADS = 256, 8
REPEATS = 3
WARM_UP_GENES = 16
# A vocabulary, and edges as many as a table of transcription factors has.
VOCABULARY, EDGES = 20_000, 20_000


def config(channels: int, layers: int, **fields: Any) -> BioFormerConfig:
    """Blocks as the seed has them, with `channels` for z and for the product."""
    return BioFormerConfig(
        vocab_size=64, pad_token_id=0, cls_token_id=1, hidden_size=WIDTH, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, num_hidden_layers=layers, pair_hidden_size=channels, opm_hidden_size=channels,
        attn_implementation="sdpa", **fields,
    )  # fmt: skip


def encoder(channels: int, layers: int, form: str) -> ExpressionEncoder:
    """Our blocks: "full", "no_norm" (full without the norm of z), "factorized", "hadamard" or "checkpointed"."""
    fields: dict[str, Any] = {
        "no_norm": {"pair_layer_norm": False},
        "factorized": {"pair_layer_norm": False, "pair_mode": "factorized"},
        "hadamard": {"pair_update": "hadamard"},
        "literal": {"update_pair_in_last_block": True},
    }.get(form, {})
    torch.manual_seed(0)
    found = ExpressionEncoder(config(channels, layers, **fields)).train()
    if form == "checkpointed":
        for block in found.layer:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = _checkpoint
    return found


def _checkpoint(function: Callable[..., Any], *inputs: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)


def step(form: str, channels: int, layers: int) -> Callable[[int], torch.Tensor]:
    """A forward and backward pass over one cell of so many genes; gives the states."""
    blocks = encoder(channels, layers, form)
    literal = [LiteralBlock(block, 1e-5) for block in blocks.layer] if form == "literal" else []

    def run(genes: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(genes)
        m = torch.randn(1, genes, WIDTH, generator=generator).requires_grad_()
        if form == "literal":
            states = run_literal(literal, m, torch.zeros(1, genes, genes, channels))
        else:
            context = expression_context(blocks.layer[0].attention.config, m, torch.ones(1, genes, dtype=torch.bool))
            states = blocks(m, None, context)[0]
        blocks.zero_grad()
        states.square().mean().backward()
        return states.detach()

    return run


def train(form: str, genes: int, channels: int, layers: int = 2, repeats: int = REPEATS) -> dict[str, Any]:
    """Time and memory of a pass in one form."""
    run = step(form, channels, layers)
    return measure(lambda: run(genes), lambda: run(WARM_UP_GENES), repeats)


def agree(genes: int, channels: int, layers: int = 2) -> dict[str, float]:
    """Largest difference of states between the forms that are one function; untimed."""
    m = torch.randn(1, genes, WIDTH, generator=torch.Generator().manual_seed(1))
    context = expression_context(config(channels, layers), m, torch.ones(1, genes, dtype=torch.bool))
    literal, ours, full, factorized = (
        encoder(channels, layers, form) for form in ("literal", "full", "no_norm", "factorized")
    )
    # One has tensors that the other does without: the last update, the constant of every update.
    _share(ours, literal)
    _share(factorized, full)
    blocks = [LiteralBlock(block, 1e-5) for block in literal.layer]
    with torch.no_grad():
        expected = run_literal(blocks, m, torch.zeros(1, genes, genes, channels))
        states = [model(m, None, context)[0] for model in (ours, full, factorized)]
    differences = {"literal_full": states[0] - expected, "full_factorized": states[1] - states[2]}
    return {name: difference.abs().max().item() for name, difference in differences.items()}


def _share(model: ExpressionEncoder, other: ExpressionEncoder) -> None:
    """Gives `model` the tensors of the other one that it has."""
    own = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in other.state_dict().items() if name in own})


def lookup(cells: int, genes: int, repeats: int = REPEATS) -> dict[str, Any]:
    """Finding the edges among the genes of cells in a table of `EDGES` edges."""
    pairs = torch.randint(VOCABULARY**2, (EDGES,))
    prior = GenePrior(pairs // VOCABULARY, pairs % VOCABULARY, torch.randn(EDGES, 1), VOCABULARY)
    ids = torch.randint(VOCABULARY, (cells, genes))
    prior.lookup(ids[:1, :4])
    times = fastest({"lookup": lambda: prior.lookup(ids)}, repeats)
    return {
        "cpu_seconds": times["lookup_cpu_seconds"],
        "wall_seconds": times["lookup_wall_seconds"],
        "repeats": repeats,
    }


def nested_lookup(genes: int) -> dict[str, float]:
    """The same for one cell by a loop over pairs in a dict: the plainest form that is right."""
    pairs = torch.randint(VOCABULARY**2, (EDGES,)).tolist()
    table = {divmod(pair, VOCABULARY): 1.0 for pair in pairs}
    ids = torch.randint(VOCABULARY, (genes,)).tolist()
    start = time.process_time()
    found = [[table.get((one, other), 0.0) for other in ids] for one in ids]
    return {"cpu_seconds": time.process_time() - start, "edges": float(sum(map(sum, found)))}


def enrich(form: str, genes: int, edges: int, repeats: int = REPEATS) -> dict[str, Any]:
    """Two layers of GATv2 over the graph of a vocabulary: the "encoder" alone, or twice in a "model" in evaluation."""
    found = graph_model(genes, edges).eval()
    graph = found.knowledge.graph
    with torch.no_grad():
        if form == "encoder":
            x_VE, tables = found.embeddings.gene.weight[:genes], found._graph.edges(torch.device("cpu"))
            return measure(lambda: graph(x_VE, *tables), lambda: graph(x_VE[:WARM_UP_GENES], *few_edges()), repeats)
        runs: list[int] = []
        graph.register_forward_hook(lambda *given: runs.append(1))
        ids = torch.arange(2, 2 + min(WARM_UP_GENES, genes - 2))[None]
        numbers: dict[str, Any] = {}
        for name in ("first", "second"):
            runs.clear()
            start = time.process_time()
            found(input_ids=ids, values=torch.ones(ids.shape))
            numbers |= {f"{name}_cpu_seconds": time.process_time() - start, f"{name}_runs": len(runs)}
    return numbers


def graph_model(genes: int, edges: int) -> GeneGraphModel:
    """A GeneGraph of one block whose graph encoder has two layers, with random edges of two channels."""
    torch.manual_seed(0)
    found = GeneGraphModel(
        GeneGraphConfig(
            vocab_size=genes, pad_token_id=0, cls_token_id=1, hidden_size=WIDTH, num_attention_heads=HEADS,
            num_hidden_layers=1, graph_hidden_size=WIDTH, graph_num_layers=2,
        )
    )  # fmt: skip
    found.set_gene_graph(GenePrior(*torch.randint(2, genes, (2, edges)), torch.randint(2, (edges, 2)), genes))
    return found


def few_edges() -> tuple[torch.Tensor, torch.Tensor]:
    """A ring of the genes of a warm-up."""
    nodes = torch.arange(WARM_UP_GENES)
    return torch.stack([nodes, nodes.roll(1)]), torch.ones(WARM_UP_GENES, 2)


def tokenise(cells: int, genes: int, repeats: int = REPEATS) -> dict[str, Any]:
    """Counts of cells that express so many genes (of ten times as many) to bins and ids, by a fitted processor."""
    random = np.random.default_rng(0)
    names = [f"G{number}" for number in range(10 * genes)]
    places = np.concatenate([np.sort(random.choice(len(names), genes, replace=False)) for _ in range(cells)])
    counts = (random.poisson(random.gamma(0.5, 4.0, len(places))) + 1).astype(np.float32)
    matrix = sparse.csr_matrix((counts, places, np.arange(cells + 1) * genes), shape=(cells, len(names)))
    adata = anndata.AnnData(matrix)
    adata.var_names = names
    processor = GeneExpressionProcessor(GeneTokenizer(genes=names), ExpressionSettings(min_gene_counts=0)).fit(adata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processor(adata[:2])
        times = fastest({"call": lambda: processor(adata)}, repeats)
    seconds = times["call_cpu_seconds"]
    return {"cpu_seconds": seconds, "cells_per_second": cells / seconds, "repeats": repeats}


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function for function in (train, agree, lookup, nested_lookup, enrich, tokenise)
}
