"""GeneGraph with heads: masked expression, classes of cells, edges between genes.

Shapes: B cells, r genes of a cell, m some genes, N hidden size, E edges of the graph.
"""

from typing import Any

import torch
from torch import nn

from genesplice_hf.errors import SequenceError
from genesplice_hf.heads.expression import EdgeHead, contrastive_genes
from genesplice_hf.heads.expression_generation import GeneratesExpression
from genesplice_hf.heads.expression_tasks import (
    CellClassificationTask,
    EdgePredictionTask,
    MaskedExpressionTask,
    attach,
)
from genesplice_hf.models.genegraph.configuration_genegraph import GeneGraphConfig
from genesplice_hf.models.genegraph.modeling_genegraph_base import GeneGraphModel
from genesplice_hf.models.genegraph.modeling_genegraph_tables import GeneGraphPreTrainedModel

# Share of the graph's edges that a training pass hides and asks for.
_HIDDEN_SHARE = 0.15
# Genes of a batch that are told apart by their pathways.
_CONTRASTED_GENES = 512


class GeneGraphForMaskedExpression(GeneratesExpression, MaskedExpressionTask, GeneGraphPreTrainedModel):
    """GeneGraph that predicts masked values: (B, r).

    In training and with labels it also learns hidden edges (`link_prediction_weight`), and which genes share a pathway
    (`pathway_contrastive_weight`).
    """

    def __init__(self, config: GeneGraphConfig) -> None:
        super().__init__(config)
        attach(self, config, GeneGraphModel(config))

    def _build_heads(self, config: Any) -> None:
        super()._build_heads(config)
        self.edge_head = EdgeHead(config) if config.link_prediction_weight else None

    def _run(self, inputs: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        self.base_model.demand_tables()
        if self.edge_head is None or not self.training or inputs["input_ids"] is None:
            return super()._run(inputs, kwargs)
        hidden = torch.rand(self.config.num_graph_edges, device=inputs["input_ids"].device) < _HIDDEN_SHARE
        needs_z = {"output_pair_states": True} if self.edge_head.reads_z else {}
        outputs = super()._run(inputs, kwargs | needs_z | {"hidden_edges": hidden})
        outputs.hidden_edges = hidden
        return outputs

    def _further_outputs(self, outputs: Any) -> dict[str, Any]:
        names = ("pathway_states", "pathway_attention")
        return {name: getattr(outputs, name, None) for name in names}

    def _auxiliary_losses(self, outputs: Any, inputs: dict[str, Any]) -> dict[str, tuple[torch.Tensor, float]]:
        losses = self._link_losses(outputs, inputs)
        weight = float(self.config.pathway_contrastive_weight)
        if not weight or not self.training:
            return losses
        if inputs["input_ids"] is None:
            raise SequenceError("`inputs_embeds` have no pathways; pass `input_ids`, or no labels.")
        return losses | {"loss_pathway": (self._pathway_loss(outputs.gene_embedding, inputs), weight)}

    def _pathway_loss(self, genes_BrN: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """The contrast of the batch's genes that are in pathways, of a sample of them where they are many."""
        members, ids_Br = self.base_model.pathway_table, inputs["input_ids"]
        counts = self._real(inputs) & torch.isin(ids_Br, members.genes)
        for special in (self.config.pad_token_id, self.config.cls_token_id):
            counts = counts if special is None else counts & (ids_Br != special)
        ids_m, place_m = first_places(ids_Br.flatten(), counts.flatten())
        if len(ids_m) > _CONTRASTED_GENES:
            sample = torch.randperm(len(ids_m), device=ids_m.device)[:_CONTRASTED_GENES].sort().values
            ids_m, place_m = ids_m[sample], place_m[sample]
        return contrastive_genes(genes_BrN.flatten(0, 1)[place_m], members.shared(ids_m))

    def _link_losses(self, outputs: Any, inputs: dict[str, Any]) -> dict[str, tuple[torch.Tensor, float]]:
        hidden = getattr(outputs, "hidden_edges", None)
        if self.edge_head is None or hidden is None:
            return {}
        logits = self.edge_head(outputs.last_hidden_state, outputs.pair_states, self._real(inputs))
        numbers = self.base_model._graph.numbers(inputs["input_ids"])
        return {"loss_link": (link_loss(logits, numbers, hidden), float(self.config.link_prediction_weight))}


class GeneGraphForSequenceClassification(CellClassificationTask, GeneGraphPreTrainedModel):
    """GeneGraph that classifies cells: (B, `num_labels`)."""

    def __init__(self, config: GeneGraphConfig) -> None:
        super().__init__(config)
        attach(self, config, GeneGraphModel(config))


class GeneGraphForEdgePrediction(EdgePredictionTask, GeneGraphPreTrainedModel):
    """GeneGraph that predicts which gene acts on which: (B, r, r)."""

    def __init__(self, config: GeneGraphConfig) -> None:
        super().__init__(config)
        attach(self, config, GeneGraphModel(config))


def first_places(ids: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(m,) different ids where `counts`, increasing, and the first place of each."""
    places = counts.nonzero().flatten()
    found, number = ids[places].unique(return_inverse=True)
    return found, places.new_zeros(len(found)).scatter_reduce(0, number, places, "amin", include_self=False)


def link_loss(logits_Bij: torch.Tensor, numbers_Bij: torch.Tensor, hidden_E: torch.Tensor) -> torch.Tensor:
    """Mean binary cross entropy (nats) of hidden edges among the genes of a cell, against as many pairs without edge.

    The other pairs join the sources and the targets of the cell's hidden edges anew, so that a gene is source and
    target as often in both; pairs that are edges after all are left out. 0 where no hidden edge is among the genes.

    Args:
        logits_Bij: of an edge from gene i to gene j.
        numbers_Bij: as `GraphTables.numbers` gives them.
        hidden_E: bool, the edges that the model did not see.
    """
    is_hidden = nn.functional.pad(hidden_E, (0, 1))[numbers_Bij]
    cell, source, target = is_hidden.nonzero(as_tuple=True)
    # Rows of `nonzero` are sorted by cell: a turn by one within a cell gives every source another's target.
    starts = torch.searchsorted(cell, cell, side="left")
    counts = torch.bincount(cell, minlength=len(logits_Bij))[cell]
    place = starts + (torch.arange(len(cell), device=cell.device) - starts + counts // 2) % counts.clamp(min=1)
    other = target[place]
    is_free = numbers_Bij[cell, source, other] == len(hidden_E)
    scores = torch.cat([logits_Bij[cell, source, target], logits_Bij[cell, source, other][is_free]]).float()
    truth = torch.cat([torch.ones(len(cell)), torch.zeros(int(is_free.sum()))]).to(scores.device)
    losses = nn.functional.binary_cross_entropy_with_logits(scores, truth, reduction="sum")
    return losses / max(len(scores), 1) + 0 * logits_Bij.sum()
