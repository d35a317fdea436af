"""GeneGraph without a head: a transformer over the genes of a cell whose genes come with a graph, terms and pathways.

    g <- g + terms + features;  g <- g + s GATv2(g)          over the vocabulary
    x = g + value;  [genes | pathway tokens] -> blocks       edges may join the logits, or restrict who sees whom

Graph: GATv2 (Brody et al. 2022) with the residual scale of GEARS (Roohani et al. 2024); pathway tokens: TOSICA (Chen
et al. 2023). Blocks: `layers/expression_block.py`.

Shapes: B cells, r genes of a cell, P pathway tokens, N hidden size, H heads, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from genesplice_hf.errors import CheckpointError, SequenceError
from genesplice_hf.layers.expression import expression_mask, filled_values
from genesplice_hf.layers.expression_block import ExpressionContext, expression_context
from genesplice_hf.layers.expression_model import ExpressionBackbone, ExpressionModelOutput
from genesplice_hf.layers.graph_attention import parameter_versions
from genesplice_hf.layers.padding import zero_padding
from genesplice_hf.layers.pathway import PathwayMembers, PathwayTokens
from genesplice_hf.layers.recording import demand_recordable
from genesplice_hf.models.genegraph.configuration_genegraph import GeneGraphConfig
from genesplice_hf.models.genegraph.modeling_genegraph_knowledge import (
    ABSENT,
    GeneKnowledge,
    GraphBias,
    GraphTables,
    absent,
    table_sha256,
)
from genesplice_hf.models.genegraph.modeling_genegraph_tables import GeneGraphPreTrainedModel


@dataclass
class GeneGraphModelOutput(ExpressionModelOutput):
    """States of one forward pass over cells, with those of pathways.

    Attributes:
        pathway_states: (B, P, N) after the last block.
        pathway_attention: (B, P) how much `<cls>` attends to each pathway token in the last block, mean over heads; in
            evaluation only.
        Others: as `ExpressionModelOutput`; with pathways `hidden_states` and `attentions` hold their tokens after the
            genes (after `<cls>` with `pathway_mode` "only").
    """

    pathway_states: torch.Tensor | None = None
    pathway_attention: torch.Tensor | None = None


class GeneGraphModel(ExpressionBackbone, GeneGraphPreTrainedModel):
    """GeneGraph without a head."""

    config: GeneGraphConfig

    def __init__(self, config: GeneGraphConfig) -> None:
        super().__init__(config)
        self.knowledge = GeneKnowledge(config) if config.enriches_genes else None
        heads, channels = config.num_attention_heads, config.graph_edge_channels
        self.graph_bias = GraphBias(channels, heads) if config.graph_attention_mode == "bias" else None
        self.pathways: PathwayTokens | None = None
        if config.use_pathway_tokens:
            self.pathways = PathwayTokens(
                absent(config.num_pathway_genes),
                absent(config.num_pathway_genes),
                config.vocab_size,
                config.num_pathways,
                config.pathway_unannotated_tokens,
                config.pathway_dim or config.hidden_size,
                config.hidden_size,
                bias=config.pathway_bias,
                norm=config.pathway_norm,
                eps=config.layer_norm_eps,
            )
        self.members: PathwayMembers | None = None
        if config.uses_pathways and not config.use_pathway_tokens:
            pairs = config.num_pathway_genes
            self.members = PathwayMembers(absent(pairs), absent(pairs), config.num_pathways)
        self._graph: GraphTables | None = None
        self._vectors: tuple[Any, torch.Tensor] | None = None
        self._hidden_edges: torch.Tensor | None = None
        self._is_complete = False
        self.post_init()

    @property
    def pathway_table(self) -> PathwayMembers | None:
        """Which genes are in which pathway, of the tokens or alone; None = the model has no pathways."""
        return self.members if self.pathways is None else self.pathways.members

    def demand_tables(self) -> None:
        """Raises where a table that the config speaks of was not given.

        Raises:
            CheckpointError: says which, and by what it is given.
        """
        if self.config.uses_graph and self._graph is None:
            raise CheckpointError(
                "the model has no graph; give it one by `set_gene_graph` (a `GenePrior` of the edges), or load it "
                "with `from_pretrained`."
            )
        if self._is_complete:
            return
        annotations = None if self.knowledge is None else self.knowledge.annotations
        for table, setter in ((annotations, "set_annotations"), (self.pathway_table, "set_pathways")):
            if table is not None and bool((table.genes == ABSENT).any()):
                raise CheckpointError(f"the model has no table yet; give it one by `{setter}`.")
        self._is_complete = True

    def enriched_genes(self, genes_BrE: torch.Tensor, input_ids_Br: torch.Tensor | None) -> torch.Tensor:
        """The genes' vectors with what is known of them; kept in evaluation until a parameter changes."""
        if self.knowledge is None:
            return genes_BrE
        if input_ids_Br is None:
            raise SequenceError("`inputs_embeds` have no graph and no terms; pass `input_ids`.")
        key = self._vectors_key()
        if key is not None and self._vectors is not None and self._vectors[0] == key:
            return self._vectors[1][input_ids_Br]
        whole = torch.arange(self.config.vocab_size, device=input_ids_Br.device)
        genes_VN = self.embeddings.genes(whole, None)
        wanted = input_ids_Br.unique() if key is None else None
        vectors_VN = self.knowledge(genes_VN, self._edges(input_ids_Br.device), wanted)
        self._vectors = None if key is None else (key, vectors_VN)
        return vectors_VN[input_ids_Br]

    def _vectors_key(self) -> Any:
        """What the vectors of all genes depend on; None while they are not worth keeping."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if self._hidden_edges is not None:
            return None
        assert self.knowledge is not None
        parts = (self.embeddings.gene, self.embeddings.gene_norm, self.knowledge)
        device = self.embeddings.gene_norm.weight.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return parameter_versions(*parts), id(self._graph), precision

    def _edges(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self._graph is None:
            return None
        index, values = self._graph.edges(device)
        hidden = self._hidden_edges
        return (index, values) if hidden is None else (index[:, ~hidden], values[~hidden])

    def attention_terms(
        self, input_ids_Br: torch.Tensor | None, real_Br: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(visible (B, r, r) bool, bias (B, H, r, r)) that the graph gives every block."""
        if self.config.graph_attention_mode is None or self._graph is None:
            return None, None
        if input_ids_Br is None:
            raise SequenceError("`inputs_embeds` have no graph; pass `input_ids`.")
        numbers, values = self._graph.numbers(input_ids_Br), self._graph.edges(input_ids_Br.device)[1]
        if self._hidden_edges is not None:
            numbers = numbers.masked_fill(nn.functional.pad(self._hidden_edges, (0, 1))[numbers], len(values))
        if self.graph_bias is not None:
            return None, self.graph_bias(numbers, values)
        is_edge = numbers < len(values)
        is_cls = input_ids_Br == self.config.cls_token_id
        itself = torch.eye(input_ids_Br.shape[1], dtype=torch.bool, device=input_ids_Br.device)
        return is_edge | is_edge.transpose(1, 2) | itself | is_cls[:, None, :] | is_cls[:, :, None], None

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        batch_labels: torch.LongTensor | None = None,
        pair_values: torch.Tensor | None = None,
        group_ids: torch.LongTensor | None = None,
        generation_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cell_states: torch.Tensor | None = None,
        hidden_edges: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> GeneGraphModelOutput | ExpressionModelOutput:
        """As `ExpressionBackbone.forward`; with pathways a `GeneGraphModelOutput`.

        Args:
            hidden_edges: (edges of the graph,) bool, edges that this pass must not see.

        Raises:
            CheckpointError: a table was not given. SequenceError: `inputs_embeds` where genes are looked up.
        """
        self.demand_tables()
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "values": values,
            "attention_mask": attention_mask,
            "batch_labels": batch_labels,
            "generation_mask": generation_mask,
            "inputs_embeds": inputs_embeds,
            "cell_states": cell_states,
        }
        self._hidden_edges = hidden_edges
        try:
            if self.pathways is None:
                return super().forward(**inputs, pair_values=pair_values, group_ids=group_ids, **kwargs)
            if pair_values is not None or group_ids is not None or kwargs.pop("output_pair_states", None):
                raise SequenceError("`pair_values`, `group_ids` and `output_pair_states` do not go with pathways.")
            return self._with_pathways(**inputs, **kwargs)
        finally:
            self._hidden_edges = None

    @merge_with_config_defaults
    @capture_outputs
    def _with_pathways(
        self,
        input_ids: torch.Tensor | None,
        values: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        batch_labels: torch.Tensor | None,
        generation_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        cell_states: torch.Tensor | None,
        **kwargs: Any,
    ) -> GeneGraphModelOutput:
        """The forward pass of a model with pathway tokens."""
        demand_recordable(self.config, kwargs)
        real_Br = expression_mask(self.config, input_ids, inputs_embeds, attention_mask)
        if input_ids is None:
            raise SequenceError("`inputs_embeds` have no pathways; pass `input_ids`.")
        values = filled_values(self.config, values, input_ids, real_Br)
        generated = None if generation_mask is None else generation_mask.bool()
        genes_BrE = self.enriched_genes(self.embeddings.genes(input_ids, inputs_embeds), input_ids)
        x_BrE = self.embeddings(genes_BrE, values, real_Br, batch_labels, generated)
        first_B = real_Br.int().argmax(1)
        rows = torch.arange(len(first_B), device=first_B.device)
        if cell_states is not None:
            x_BrE = x_BrE.index_put((rows, first_B), cell_states.to(x_BrE.dtype))
        tokens_BPN = self._pathway_tokens(input_ids, values, real_Br, generated)
        is_only = self.config.pathway_mode == "only"
        x_BrE, kept_Br = (x_BrE[rows, first_B][:, None], real_Br.any(1, keepdim=True)) if is_only else (x_BrE, real_Br)
        joined = torch.cat([x_BrE, tokens_BPN.to(x_BrE.dtype)], dim=1)
        seen_Br = None if is_only else generated
        context = self._joined_context(joined, kept_Br, seen_Br, input_ids, tokens_BPN.shape[1])
        joined, entering = self._encoded(joined, context)
        split = kept_Br.shape[1]
        states, pathway_states = joined[:, :split], joined[:, split:]
        if is_only:
            states = _decodable(states, genes_BrE, first_B)
        first = torch.zeros_like(first_B) if is_only else first_B
        attention = None if entering is None else self._cls_attention(entering, context, first)[:, split:]
        return GeneGraphModelOutput(
            last_hidden_state=zero_padding(states, real_Br),
            gene_embedding=genes_BrE,
            pathway_states=pathway_states,
            pathway_attention=attention,
        )

    def _pathway_tokens(
        self,
        input_ids_Br: torch.Tensor,
        values_Br: torch.Tensor,
        real_Br: torch.Tensor,
        generated_Br: torch.Tensor | None,
    ) -> torch.Tensor:
        """(B, P, N); hidden and generated values count as hidden, `<cls>` and padding for nothing."""
        assert self.pathways is not None
        counts = real_Br & (input_ids_Br != (ABSENT if self.config.cls_token_id is None else self.config.cls_token_id))
        hidden = values_Br == self.config.mask_value
        hidden = counts & (hidden if generated_Br is None else hidden | generated_Br)
        return self.pathways(input_ids_Br, values_Br.masked_fill(~counts | hidden, 0.0), hidden)

    def _joined_context(
        self,
        joined: torch.Tensor,
        kept_Br: torch.Tensor,
        generated_Br: torch.Tensor | None,
        input_ids_Br: torch.Tensor,
        tokens: int,
    ) -> ExpressionContext:
        """The context of genes and pathway tokens, which everything sees and which see everything."""
        visible, bias = (None, None)
        if self.config.pathway_mode == "append":
            visible, bias = self.attention_terms(input_ids_Br, kept_Br)
        sides = (0, tokens, 0, tokens)
        return expression_context(
            self.config,
            joined,
            nn.functional.pad(kept_Br, (0, tokens), value=True),
            None if generated_Br is None else nn.functional.pad(generated_Br, (0, tokens)),
            None if visible is None else nn.functional.pad(visible, sides, value=True),
            None if bias is None else nn.functional.pad(bias, sides),
        )

    def _encoded(self, x: torch.Tensor, context: ExpressionContext) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The states after the blocks, and in evaluation those that enter the last block."""
        if self.training:
            return self.encoder(x, None, context)[0], None
        entering: list[torch.Tensor] = []
        hook = self.encoder.layer[-1].register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0]))
        try:
            x = self.encoder(x, None, context)[0]
        finally:
            hook.remove()
        return x, entering[0].detach()

    @torch.no_grad()
    def _cls_attention(self, x: torch.Tensor, context: ExpressionContext, first_B: torch.Tensor) -> torch.Tensor:
        """(B, r + P) weights of the first gene's attention in the last block, mean over heads."""
        block = self.encoder.layer[-1]
        attention, rows = block.attention, torch.arange(len(x), device=x.device)
        normed = block.norm1(x) if block.norm_first else x
        heads = (-1, attention.head_dim)
        query_BHD = attention.q_proj(normed[rows, first_B]).unflatten(-1, heads)
        key_BrHD = attention.k_proj(normed).unflatten(-1, heads)
        logits_BHr = torch.einsum("bhd,brhd->bhr", query_BHD, key_BrHD).float() * attention.scaling
        if context.shared_bias is not None:
            logits_BHr = logits_BHr + context.shared_bias[rows, :, first_B]
        if context.visible is not None:
            visible = context.visible.expand(len(x), -1, x.shape[1], -1)[rows, 0, first_B]
            logits_BHr = logits_BHr.masked_fill(~visible[:, None], -torch.inf)
        return logits_BHr.softmax(-1).mean(1)

    def resize_tables(self, vocab_size: int) -> None:
        """Makes terms, features and pathways those of a vocabulary of another size."""
        config, knowledge = self.config, self.knowledge
        self._vectors = None
        if knowledge is not None:
            if knowledge.annotations is not None:
                knowledge.annotations.resize(vocab_size)
                table = knowledge.annotations
                config.num_annotation_pairs = len(table.genes)
                config.annotation_sha256 = table_sha256(table.genes, table.terms)
            if knowledge.feature_proj is not None:
                rows = max(0, vocab_size - len(knowledge.features))
                knowledge.features = nn.functional.pad(knowledge.features, (0, 0, 0, rows))[:vocab_size]
        members = self.pathway_table
        if members is not None:
            (members if self.pathways is None else self.pathways).resize(vocab_size)
            config.num_pathway_genes = len(members.genes)
            config.pathway_sha256 = table_sha256(members.genes, members.pathways)


def _decodable(cells_B1N: torch.Tensor, genes_BrN: torch.Tensor, first_B: torch.Tensor) -> torch.Tensor:
    """States of genes that are no tokens: the cell's state plus the gene's vector; the cell's alone at its place."""
    own = torch.arange(genes_BrN.shape[1], device=first_B.device) == first_B[:, None]
    return torch.where(own[..., None], cells_B1N, cells_B1N + genes_BrN)
