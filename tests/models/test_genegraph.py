"""GeneGraph: knowledge off is a plain transformer, and what each source of knowledge may and may not reach."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_genegraph import give_tables, tiny_graph

from genesplice_hf.errors import CheckpointError, SequenceError
from genesplice_hf.layers.gene_prior import GenePrior
from genesplice_hf.models.bioformer.configuration_bioformer import BioFormerConfig
from genesplice_hf.models.bioformer.modeling_bioformer import BioFormerForMaskedExpression
from genesplice_hf.models.genegraph.configuration_genegraph import GeneGraphConfig
from genesplice_hf.models.genegraph.modeling_genegraph import GeneGraphForMaskedExpression, link_loss
from genesplice_hf.models.genegraph.modeling_genegraph_base import GeneGraphModel
from genesplice_hf.models.tiny_configs import tiny_genegraph

OFF: dict[str, Any] = {"use_graph_encoder": False, "use_gene_annotations": False, "gene_feature_size": 0}
PATHWAYS: dict[str, Any] = {"use_pathway_tokens": True, "num_pathways": 4, "num_pathway_genes": 24}
Batch = dict[str, torch.Tensor]


def model(seed: int = 0, **fields: Any) -> GeneGraphForMaskedExpression:
    torch.manual_seed(seed)
    found = GeneGraphForMaskedExpression(tiny_genegraph(**fields))
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    give_tables(found)
    return found.eval()


def cells(genes: int = 12, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack(
        [torch.cat([torch.tensor([1]), torch.randperm(45, generator=generator)[:genes] + 3]) for _ in "ab"]
    )
    values = torch.randint(1, 9, ids.shape, generator=generator).float()
    values[:, 0] = 0
    values[:, 2::3] = -1
    return {"input_ids": ids, "values": values}


def logits(found: GeneGraphForMaskedExpression, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return found(**batch).logits


def test_without_knowledge_it_is_the_plain_transformer() -> None:
    ours = model(**OFF)
    plain = {"use_pair_bias": False, "use_opm": False, "explicit_zero_prob": False, "attention_bias": True}
    names = ("vocab_size", "pad_token_id", "cls_token_id", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "intermediate_size", "norm_first")  # fmt: skip
    shared = {name: getattr(ours.config, name) for name in names}
    other = BioFormerForMaskedExpression(BioFormerConfig(**(shared | plain))).eval()
    weights = {name.replace("genegraph.", "bioformer."): tensor for name, tensor in ours.state_dict().items()}
    other.load_state_dict(weights)
    assert torch.equal(logits(ours, cells()), logits(other, cells()))


def with_edge(table: GenePrior, source: int, target: int) -> GenePrior:
    ends = [
        torch.cat([column, torch.tensor([new])]) for column, new in ((table.source, source), (table.target, target))
    ]
    return GenePrior(*ends, torch.cat([table.value, torch.ones(1, 2)]), table.vocab_size)


@pytest.mark.parametrize("fields", [{"graph_num_layers": 1}, OFF | {"graph_attention_mode": "bias"}], ids=str)
def test_an_edge_speaks_through_the_enabled_path_only(fields: dict) -> None:
    batch = cells()
    present, absent = batch["input_ids"][0, 3:5].tolist()
    empty = GenePrior(torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0, 2), 48)
    for mode, reads in ((fields, True), (OFF, False)):
        found = model(**mode)
        if found.config.uses_graph:
            found.set_gene_graph(empty)
        before = logits(found, batch)
        if found.config.uses_graph:
            found.set_gene_graph(with_edge(empty, present, absent))
            assert not torch.equal(logits(found, batch)[0], before[0])
            outside = [gene for gene in range(3, 48) if gene not in batch["input_ids"]][:2]
            found.set_gene_graph(with_edge(empty, *outside))
        torch.testing.assert_close(logits(found, batch), before, atol=1e-6, rtol=0)
        assert reads == found.config.uses_graph


def test_masked_attention_is_zero_off_the_graph() -> None:
    found = model(**OFF, graph_attention_mode="masked", attn_implementation="eager")
    batch = cells()
    with torch.no_grad():
        attentions = found(**batch, output_attentions=True).attentions
    table, ids = tiny_graph(48), batch["input_ids"]
    edges = set(zip(table.source.tolist(), table.target.tolist(), strict=True))
    for weights in attentions:
        for row in range(2):
            for i, gene in enumerate(ids[row].tolist()):
                for j, other in enumerate(ids[row].tolist()):
                    allowed = i == j or 1 in (gene, other) or (gene, other) in edges or (other, gene) in edges
                    assert bool((weights[row, :, i, j] > 0).all()) == allowed


def test_a_bias_is_learned_per_channel_direction_and_head() -> None:
    found = model(**OFF, graph_attention_mode="bias")
    bias = found.base_model.graph_bias
    ids = cells()["input_ids"]
    graph = tiny_graph(48)
    table = dict(zip(zip(graph.source.tolist(), graph.target.tolist(), strict=True), graph.value, strict=True))
    _, terms = found.base_model.attention_terms(ids, torch.ones_like(ids).bool())
    for i in range(ids.shape[1]):
        for j in range(ids.shape[1]):
            expected = torch.zeros(2)
            for direction, pair in enumerate([(i, j), (j, i)]):
                value = table.get((int(ids[0, pair[0]]), int(ids[0, pair[1]])))
                if value is not None:
                    expected = expected + torch.cat([torch.ones(1), value]) @ bias.weight[direction]
            torch.testing.assert_close(terms[0, :, i, j], expected)


@pytest.mark.parametrize("mode", ["append", "only"])
def test_pathway_attention_is_that_of_the_last_block(mode: str) -> None:
    found = model(**OFF, **PATHWAYS, pathway_mode=mode, attn_implementation="eager")
    batch = cells()
    with torch.no_grad():
        outputs = found(**batch, output_attentions=True, output_hidden_states=True)
    genes = 1 if mode == "only" else batch["input_ids"].shape[1]
    weights = outputs.attentions[-1]
    assert weights.shape == (2, 2, genes + 5, genes + 5) and outputs.hidden_states[0].shape[1] == genes + 5
    torch.testing.assert_close(outputs.pathway_attention, weights[:, :, 0, genes:].mean(1))
    assert outputs.pathway_states.shape == (2, 5, 32) and outputs.logits.shape == batch["input_ids"].shape
    torch.testing.assert_close(logits(model(**OFF, **PATHWAYS, pathway_mode=mode), batch), outputs.logits)
    assert found.train()(**batch).pathway_attention is None


def test_pathways_alone_decide_where_genes_are_no_tokens() -> None:
    """A gene of no pathway, and no token that sees all, changes no other gene's value."""
    found = model(**OFF, **PATHWAYS, pathway_mode="only", pathway_unannotated_tokens=0)
    members = set(found.base_model.pathways.members.genes.tolist())
    batch = cells(40)
    ids, values = batch["input_ids"][0].tolist(), batch["values"].clone()
    free = next(place for place, gene in enumerate(ids) if place and gene not in members and values[0, place] > 0)
    inside = next(place for place, gene in enumerate(ids) if place and gene in members and values[0, place] > 0)
    before = logits(found, batch)
    for place, changes in ((free, False), (inside, True)):
        other = values.clone()
        other[0, place] += 3
        assert (not torch.equal(logits(found, batch | {"values": other})[0], before[0])) == changes


def test_evaluation_keeps_the_vectors_until_a_parameter_changes() -> None:
    found, batch = model(), cells()
    first = logits(found, batch)
    kept = found.base_model._vectors
    assert torch.equal(logits(found, batch), first) and found.base_model._vectors is kept
    with torch.no_grad():
        found.base_model.knowledge.graph_scale.add_(1.0)
    changed = logits(found, batch)
    assert not torch.equal(changed, first)
    torch.testing.assert_close(found(**batch).logits, changed)
    found.set_gene_graph(GenePrior(torch.tensor([3]), torch.tensor([4]), torch.ones(1, 2), 48))
    assert not torch.equal(logits(found, batch), changed)


def test_a_large_vocabulary_reads_only_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    found, batch = model(graph_num_layers=2, graph_directed=False), cells(3)
    expected = found(**batch).logits
    monkeypatch.setattr("genesplice_hf.models.genegraph.modeling_genegraph_knowledge.FULL_GRAPH_NODES", 1)
    found.set_gene_graph(tiny_graph(48, edges=12))
    part = found(**batch).logits
    monkeypatch.undo()
    torch.testing.assert_close(part, found(**batch).logits, atol=1e-5, rtol=1e-5)
    assert not torch.equal(part, expected)


def test_tables_come_back_and_tampering_is_noticed(tmp_path: Path) -> None:
    found = model(**PATHWAYS)
    found.save_pretrained(tmp_path)
    again = GeneGraphForMaskedExpression.from_pretrained(tmp_path)
    assert again.gene_graph.to_bytes() == found.gene_graph.to_bytes()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in found.state_dict().items())
    halves = GeneGraphForMaskedExpression.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert halves.gene_graph.sha256() == found.gene_graph.sha256()
    weights = load_file(tmp_path / "model.safetensors")
    for name, said in (("annotations.terms", "annotations"), ("pathways.members.genes", "pathways")):
        key = next(key for key in weights if key.endswith(name))
        save_file(weights | {key: weights[key].roll(1)}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"table of {said} .* another hash"):
            GeneGraphForMaskedExpression.from_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    graph = tmp_path / "gene_graph.safetensors"
    content = graph.read_bytes()
    graph.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"gene_graph.safetensors.*SHA-256"):
        GeneGraphForMaskedExpression.from_pretrained(tmp_path)
    graph.unlink()
    with pytest.raises(CheckpointError, match=r"has no gene_graph.safetensors"):
        GeneGraphForMaskedExpression.from_pretrained(tmp_path)


def test_a_smaller_and_a_larger_vocabulary() -> None:
    found, batch = model(**PATHWAYS), cells(8)
    batch["input_ids"] = batch["input_ids"] % 27 + 3
    before = logits(found, batch)
    found.resize_token_embeddings(60, mean_resizing=False)
    torch.testing.assert_close(logits(found, batch), before)
    found.resize_token_embeddings(30)
    config = found.config
    assert logits(found, batch).isfinite().all() and found.gene_graph.vocab_size == 30
    assert config.num_graph_edges == len(found.gene_graph) < 200 and config.num_pathway_genes < 24


def test_hidden_edges_are_learned_and_not_seen() -> None:
    found = model(link_prediction_weight=0.5).train()
    batch = cells(30)
    labels = torch.where(batch["values"] == -1, 3.0, -100.0)
    outputs = found(**batch, labels=labels)
    torch.testing.assert_close(outputs.loss, outputs.loss_mse + 0.5 * outputs.loss_link)
    outputs.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in found.edge_head.parameters())
    hidden = torch.zeros(found.config.num_graph_edges, dtype=torch.bool)
    found.eval()
    base = found.base_model
    kept = tiny_graph(48)
    hidden[::2] = True
    states = base(**batch, hidden_edges=hidden).last_hidden_state
    found.set_gene_graph(GenePrior(kept.source[~hidden], kept.target[~hidden], kept.value[~hidden], 48))
    torch.testing.assert_close(states, base(**batch).last_hidden_state)


def test_the_link_loss_counts_each_side_equally() -> None:
    numbers = torch.full((1, 4, 4), 3)
    numbers[0, 0, 1], numbers[0, 2, 3] = 0, 1
    scores = torch.zeros(1, 4, 4)
    scores[0, 0, 1], scores[0, 2, 3], scores[0, 0, 3], scores[0, 2, 1] = 2.0, 1.0, -1.0, 0.5
    hidden = torch.tensor([True, True, False])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor([2.0, 1.0, -1.0, 0.5]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    )
    torch.testing.assert_close(link_loss(scores, numbers, hidden), expected)
    assert link_loss(scores, numbers, ~hidden[[0, 0, 0]]) == 0


def test_bad_tables_and_inputs_are_advice() -> None:
    fresh = GeneGraphForMaskedExpression(tiny_genegraph())
    with pytest.raises(CheckpointError, match="`set_gene_graph`"):
        fresh(**cells())
    fresh.set_gene_graph(tiny_graph(48))
    with pytest.raises(CheckpointError, match="`set_annotations`"):
        fresh(**cells())
    with pytest.raises(CheckpointError, match="`graph` must have"):
        fresh.set_gene_graph(tiny_graph(40))
    with pytest.raises(CheckpointError, match="`annotations` must have 40 pairs"):
        fresh.set_annotations([3], [0])
    with pytest.raises(CheckpointError, match="`annotations` must hold numbers below 48"):
        fresh.set_annotations([99] * 40, [0] * 40)
    with pytest.raises(CheckpointError, match="`use_pathway_tokens`"):
        fresh.set_pathways([3], [0])
    with pytest.raises(CheckpointError, match="`features`"):
        fresh.set_gene_features(torch.full((48, 3), torch.nan))
    found = model(**PATHWAYS)
    with pytest.raises(CheckpointError, match="`pathways` must be sorted"):
        found.set_pathways([3] * 24, [3, 0] * 12)
    embeds = torch.zeros(1, 3, 32)
    for other in (model(), model(**OFF, graph_attention_mode="bias"), model(**OFF, **PATHWAYS)):
        with pytest.raises(SequenceError, match="`inputs_embeds`"):
            other(inputs_embeds=embeds)
    with pytest.raises(SequenceError, match="`pair_values`"):
        found(**cells(), pair_values=torch.zeros(2, 13, 13))
    with pytest.raises(ValueError, match="flash_attention_2"):
        GeneGraphModel._from_config(
            GeneGraphConfig(**OFF, graph_attention_mode="bias"), attn_implementation="flash_attention_2"
        )
