"""The contrast of genes by their pathways: against a loop, which genes enter, when it is off, and its table."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_genegraph import give_tables, tiny_members

from genesplice_hf.errors import CheckpointError, SequenceError
from genesplice_hf.heads.expression import contrastive_genes
from genesplice_hf.layers.pathway import PathwayMembers
from genesplice_hf.models.genegraph import modeling_genegraph
from genesplice_hf.models.genegraph.modeling_genegraph import (
    GeneGraphForMaskedExpression,
    GeneGraphForSequenceClassification,
)
from genesplice_hf.models.genegraph.modeling_genegraph_base import GeneGraphModel
from genesplice_hf.models.tiny_configs import tiny_genegraph

SETS: dict[str, Any] = {"num_pathways": 4, "num_pathway_genes": 24}
ON: dict[str, Any] = SETS | {"pathway_contrastive_weight": 0.5}
TOKENS: dict[str, Any] = {"use_pathway_tokens": True}
OFF: dict[str, Any] = {"use_graph_encoder": False, "use_gene_annotations": False, "gene_feature_size": 0}
PAD, CLS = 0, 1
Batch = dict[str, torch.Tensor]


def model(kind: type = GeneGraphForMaskedExpression, **fields: Any) -> Any:
    torch.manual_seed(0)
    found = kind(tiny_genegraph(**fields))
    give_tables(found)
    return found.train()


def cells(genes: int = 20) -> Batch:
    """Two cells that share genes; the second one ends with padding whose id is a gene's."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(45, generator=generator)[:genes] + 3 for _ in "ab"])
    ids[:, 0] = CLS
    values = torch.randint(1, 9, ids.shape, generator=generator).float()
    values[:, 2::3] = -1
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    labels = torch.where((values == -1) & (mask == 1), 3.0, -100.0)
    return {"input_ids": ids, "values": values, "attention_mask": mask, "labels": labels}


def slow_contrast(vectors: dict[int, torch.Tensor], sets: list[set[int]], temperature: float = 0.1) -> Any:
    """The loss as its words say, gene by gene."""

    def cosine(one: int, other: int) -> torch.Tensor:
        first, second = vectors[one], vectors[other]
        return (first * second).sum() / (first.square().sum().sqrt() * second.square().sum().sqrt())

    partners = {
        gene: [other for other in vectors if other != gene and any({gene, other} <= members for members in sets)]
        for gene in vectors
    }
    anchors = [gene for gene in vectors if partners[gene]]
    losses = []
    for gene in anchors:
        below = sum(torch.exp(cosine(gene, other) / temperature) for other in anchors if other != gene)
        terms = [-torch.log(torch.exp(cosine(gene, other) / temperature) / below) for other in partners[gene]]
        losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses) if losses else torch.zeros(())


def sets_of(found: Any) -> list[set[int]]:
    table = found.base_model.pathway_table
    pairs = list(zip(table.genes.tolist(), table.pathways.tolist(), strict=True))
    return [{gene for gene, number in pairs if number == index} for index in range(found.config.num_pathways)]


def entering(batch: Batch) -> list[int]:
    """Ids of the genes of a batch that are no padding."""
    return sorted(set(batch["input_ids"][batch["attention_mask"] == 1].tolist()) - {PAD, CLS})


def test_values_and_gradients_are_those_of_the_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    for case in range(4):
        vectors = torch.randn(14, 5, generator=generator, dtype=torch.float64).requires_grad_()
        genes = torch.randint(3, 20, (18,), generator=generator)
        numbers = torch.arange(18) * (6 + case) // 18
        ids = torch.arange(3, 17)
        shared = PathwayMembers(genes, numbers, 6 + case).shared(ids)
        found = contrastive_genes(vectors, shared)
        (gradient,) = torch.autograd.grad(found, vectors)
        sets = [set(genes[numbers == index].tolist()) for index in range(6 + case)]
        expected = slow_contrast(dict(zip(ids.tolist(), vectors, strict=True)), sets)
        (other,) = torch.autograd.grad(expected, vectors)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(gradient, other, atol=1e-12, rtol=1e-10)
        alone = ~shared.any(1)
        assert alone.any() and not gradient[alone].any() and gradient[~alone].any(1).all()


@pytest.mark.parametrize("fields", [{}, TOKENS, TOKENS | {"pathway_mode": "only"}, OFF], ids=str)
def test_the_loss_of_a_model_is_that_of_its_enriched_genes(fields: dict[str, Any]) -> None:
    found, batch = model(**ON, **fields).double(), cells()
    outputs = found(**batch)
    torch.testing.assert_close(outputs.loss, outputs.loss_mse + 0.5 * outputs.loss_pathway)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    genes = found.base_model(**inputs).gene_embedding
    places = {int(gene): genes[index] for index, gene in reversed(list(_places(batch)))}
    expected = slow_contrast({gene: places[gene] for gene in entering(batch)}, sets_of(found))
    torch.testing.assert_close(outputs.loss_pathway, expected, atol=1e-12, rtol=1e-12)
    parameters = [p for p in found.parameters() if p.requires_grad]
    ours = torch.autograd.grad(outputs.loss_pathway, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    embedding = found.base_model.embeddings.gene.weight
    assert any(p is embedding and g.any() for p, g in zip(parameters, ours, strict=True))
    for parameter, one, other in zip(parameters, ours, theirs, strict=True):
        one, other = (torch.zeros_like(parameter) if found is None else found for found in (one, other))
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)


def _places(batch: Batch) -> Any:
    for index in (batch["attention_mask"] == 1).nonzero():
        place = tuple(index.tolist())
        yield place, batch["input_ids"][place]


def test_padding_and_cls_never_enter() -> None:
    """Not even where a table counts them as members, or where padding holds ids of genes."""
    found, batch = model(**ON, **OFF), cells()
    genes, numbers = tiny_members(48, 4, 24)
    genes[numbers == 0] = torch.tensor([PAD, CLS, 3, 4, 5, 6])
    found.set_pathways(genes, numbers)
    batch["input_ids"][0, 1], batch["input_ids"][1, -5] = PAD, PAD
    outputs = found(**batch)
    gradient = torch.autograd.grad(outputs.loss_pathway, found.base_model.embeddings.gene.weight)[0]
    sets = sets_of(found)
    known = entering(batch)
    expected = [gene for gene in known if any(gene in members and len(members & set(known)) > 1 for members in sets)]
    assert len(expected) > 8 and gradient.any(1).nonzero().flatten().tolist() == expected
    wider = {
        name: torch.nn.functional.pad(tensor, (0, 3), value={"input_ids": 7, "labels": -100.0}.get(name, 0))
        for name, tensor in batch.items()
    }
    assert torch.equal(found(**wider).loss_pathway, outputs.loss_pathway)


def test_it_is_off_by_default_and_changes_nothing_then() -> None:
    batch, plain, switched = cells(), model(**SETS), model(**ON)
    assert plain.config.pathway_contrastive_weight == 0 and plain.base_model.pathway_table is None
    more = {f"genegraph.members.{name}" for name in ("genes", "pathways")}
    assert switched.state_dict().keys() - plain.state_dict().keys() == more
    torch.manual_seed(5)
    outputs = plain(**batch)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    assert outputs.loss_pathway is None and torch.equal(outputs.loss, outputs.loss_mse)
    other = switched(**batch)
    assert torch.equal(other.logits, outputs.logits) and torch.equal(other.loss_mse, outputs.loss_mse)
    assert other.loss_pathway > 0
    with pytest.raises(CheckpointError, match="`use_pathway_tokens` or `pathway_contrastive_weight`"):
        plain.set_pathways(*tiny_members(48, 4, 24))


def test_it_is_learned_in_training_and_with_labels_alone() -> None:
    found, batch = model(**ON), cells()
    assert found(**(batch | {"labels": None})).loss_pathway is None
    assert found.eval()(**batch).loss_pathway is None
    with pytest.raises(SequenceError, match="`inputs_embeds` have no pathways"):
        model(**ON, **OFF)(inputs_embeds=torch.zeros(2, 3, 32), labels=torch.zeros(2, 3))


def test_a_batch_without_partners_gives_0_with_a_graph() -> None:
    found, batch = model(**ON), cells()
    for genes in (batch["input_ids"][:, :2], torch.full((2, 2), CLS)):
        few = {"input_ids": genes, "values": torch.ones(2, 2), "labels": torch.ones(2, 2)}
        found.set_pathways(torch.full((24,), 40), torch.arange(24) // 6)
        outputs = found(**few)
        assert outputs.loss_pathway == 0 and outputs.loss_pathway.requires_grad
        outputs.loss.backward()
        assert all(p.grad.isfinite().all() for p in found.parameters() if p.grad is not None)


def test_a_sample_of_many_genes_follows_torchs_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    found, batch = model(**ON), cells(40)
    whole = found(**batch).loss_pathway
    monkeypatch.setattr(modeling_genegraph, "_CONTRASTED_GENES", 9)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(found(**batch).loss_pathway)
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    # Nine genes have eight others each: log 8 is the loss of a guess, and cosines lie within 1 of each other.
    assert whole != losses[0] and all(0 < loss < math.log(8) + 20 for loss in losses)
    seen = []
    monkeypatch.setattr(
        modeling_genegraph, "contrastive_genes", lambda vectors, shared: seen.append(shared) or vectors.sum()
    )
    found(**batch)
    assert seen[0].shape == (9, 9) and torch.equal(seen[0], seen[0].transpose(0, 1))


def test_training_brings_genes_of_a_pathway_together() -> None:
    found, batch = model(**(ON | {"pathway_contrastive_weight": 1.0})), cells(30)
    optimizer = torch.optim.Adam(found.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        outputs = found(**batch)
        outputs.loss_pathway.backward()
        optimizer.step()
        losses.append(outputs.loss_pathway.item())
    assert losses[-1] < losses[0] - 0.5


def test_the_table_comes_back_resizes_and_is_demanded(tmp_path: Path) -> None:
    found, batch = model(**ON), cells()
    expected = found(**batch).loss_pathway
    found.save_pretrained(tmp_path)
    again = GeneGraphForMaskedExpression.from_pretrained(tmp_path).train()
    assert torch.equal(again(**batch).loss_pathway, expected)
    assert GeneGraphModel.from_pretrained(tmp_path).pathway_table.genes.equal(found.base_model.members.genes)
    weights = load_file(tmp_path / "model.safetensors")
    key = "genegraph.members.genes"
    save_file(weights | {key: weights[key].roll(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"table of pathways .* another hash"):
        GeneGraphForMaskedExpression.from_pretrained(tmp_path)
    fresh = GeneGraphForMaskedExpression(tiny_genegraph(**ON, **OFF))
    with pytest.raises(CheckpointError, match="`set_pathways`"):
        fresh(**batch)
    found.resize_token_embeddings(60, mean_resizing=False)
    torch.testing.assert_close(found(**batch).loss_pathway, expected)
    found.resize_token_embeddings(30)
    members = found.base_model.members
    assert found.config.num_pathway_genes == len(members.genes) < 24 and int(members.genes.max()) < 30
    assert model(GeneGraphForSequenceClassification, **ON)(
        **{k: batch[k] for k in ("input_ids", "values")}
    ).logits.any()
