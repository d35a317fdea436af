"""Configuration of GeneGraph, a transformer over the genes of a cell that is given what is known of genes."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from genesplice_hf.layers.expression_config import PairExpressionConfig


@strict
class GeneGraphConfig(PairExpressionConfig):
    """Shape and behaviour of a GeneGraph; the fields not listed here are those of `PairExpressionConfig`.

    Every source of knowledge is on or off by itself; with all of them off this is a plain transformer with norms
    before each branch. The tables are given to the model after it was made (`set_gene_graph`, `set_pathways`,
    `set_annotations`, `set_gene_features`), travel with its weights, and are named by their hashes here.

    Attributes:
        use_graph_encoder: genes are enriched by layers of GATv2 over the graph of the vocabulary: g + s GNN(g).
        graph_num_layers, graph_num_heads, graph_hidden_size: of it.
        graph_edge_channels: features per edge of the table (stimulation and inhibition, say).
        graph_negative_slope, graph_dropout, graph_add_self_loops, graph_share_weights: of its layers.
        graph_residual_scale_init: where the learned number s begins.
        graph_directed: False reads every edge in both directions, as another kind of edge.
        graph_file, graph_sha256, num_graph_edges: the table beside the weights.
        graph_attention_mode: the graph inside the transformer: a learned number per edge channel, direction and head
            joins the logits ("bias"), or a gene sees its neighbours, itself and `<cls>` alone ("masked").
        use_pathway_tokens: one token per pathway, from the expression of its genes alone.
        num_pathways, num_pathway_genes, pathway_sha256: sets, pairs of a set and a gene, and their hash.
        pathway_dim: width of the map from genes to a token; None = `hidden_size`.
        pathway_mode: tokens stand beside genes ("append"), or in their place ("only": genes are then decoded from the
            state of `<cls>` and their own vectors).
        pathway_min_genes, pathway_max_genes, max_pathways: how the sets were chosen; see `select_pathways`.
        pathway_unannotated_tokens: further tokens that see all genes.
        pathway_bias, pathway_norm: a bias and a norm for every token.
        use_gene_annotations: a gene's vector gets the mean of its terms' learned vectors, times a learned number.
        num_annotation_terms, num_annotation_pairs, annotation_sha256: of the table of genes and terms.
        gene_feature_size: width of frozen outside vectors per gene, mapped to `hidden_size` and added; 0 = none.
        link_prediction_weight: in the loss, of predicting edges that are hidden from the batch.
        pathway_contrastive_weight: in the loss, of telling genes that share a pathway from other genes; the model then
            owns the table of `set_pathways` with or without `use_pathway_tokens`.
    """

    model_type = "genesplice_genegraph"

    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 1024
    norm_first: bool = True
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    use_graph_encoder: bool = True
    graph_num_layers: int = 2
    graph_num_heads: int = 4
    graph_hidden_size: int = 256
    graph_edge_channels: int = 2
    graph_negative_slope: float | int = 0.2
    graph_dropout: float | int = 0.1
    graph_add_self_loops: bool = True
    graph_share_weights: bool = False
    graph_residual_scale_init: float | int = 0.2
    graph_directed: bool = True
    graph_file: str = "gene_graph.safetensors"
    graph_sha256: str | None = None
    num_graph_edges: int = 0
    graph_attention_mode: Literal["bias", "masked"] | None = None
    use_pathway_tokens: bool = False
    num_pathways: int = 0
    num_pathway_genes: int = 0
    pathway_sha256: str | None = None
    pathway_dim: int | None = None
    pathway_mode: Literal["append", "only"] = "append"
    pathway_min_genes: int = 5
    pathway_max_genes: int = 300
    max_pathways: int = 300
    pathway_unannotated_tokens: int = 1
    pathway_bias: bool = True
    pathway_norm: bool = True
    use_gene_annotations: bool = False
    num_annotation_terms: int = 0
    num_annotation_pairs: int = 0
    annotation_sha256: str | None = None
    gene_feature_size: int = 0
    link_prediction_weight: float | int = 0.0
    pathway_contrastive_weight: float | int = 0.0

    @property
    def uses_graph(self) -> bool:
        """Whether anything reads the graph."""
        return self.use_graph_encoder or self.graph_attention_mode is not None or self.link_prediction_weight > 0

    @property
    def uses_pathways(self) -> bool:
        """Whether anything reads the table of pathways."""
        return self.use_pathway_tokens or self.pathway_contrastive_weight > 0

    @property
    def enriches_genes(self) -> bool:
        """Whether a gene's vector is more than its embedding."""
        return self.use_graph_encoder or self.use_gene_annotations or self.gene_feature_size > 0

    @property
    def has_additive_bias(self) -> bool:
        """Whether attention adds a tensor to its logits."""
        return self.graph_attention_mode is not None or super().has_additive_bias

    @property
    def num_pathway_tokens(self) -> int:
        """Tokens that pathways add."""
        return self.num_pathways + self.pathway_unannotated_tokens if self.use_pathway_tokens else 0

    def validate_graph(self) -> None:
        """The graph encoder has layers whose heads divide its width, and edges have channels."""
        if self.use_graph_encoder and (
            self.graph_num_layers < 1 or self.graph_num_heads < 1 or self.graph_hidden_size % self.graph_num_heads
        ):
            raise ValueError(
                f"`graph_hidden_size` ({self.graph_hidden_size}) must be a multiple of `graph_num_heads` "
                f"({self.graph_num_heads}), with `graph_num_layers` ({self.graph_num_layers}) of at least 1."
            )
        if self.graph_edge_channels < 1 or self.num_graph_edges < 0:
            raise ValueError(
                f"`graph_edge_channels` must be at least 1 and `num_graph_edges` at least 0, got "
                f"{self.graph_edge_channels} and {self.num_graph_edges}."
            )
        if self.link_prediction_weight < 0:
            raise ValueError(f"`link_prediction_weight` must be at least 0, got {self.link_prediction_weight}.")
        if self.graph_attention_mode == "masked" and self.cls_token_id is None:
            raise ValueError("`graph_attention_mode` 'masked' needs `cls_token_id`: genes meet at `<cls>`.")

    def validate_pathways(self) -> None:
        """Pathways have sizes, and no pair representation beside them."""
        if min(self.num_pathways, self.num_pathway_genes, self.pathway_unannotated_tokens) < 0:
            raise ValueError(
                "`num_pathways`, `num_pathway_genes` and `pathway_unannotated_tokens` must be at least 0, got "
                f"{self.num_pathways}, {self.num_pathway_genes} and {self.pathway_unannotated_tokens}."
            )
        if self.pathway_contrastive_weight < 0:
            raise ValueError(
                f"`pathway_contrastive_weight` must be at least 0, got {self.pathway_contrastive_weight}."
            )
        if self.uses_pathways and (self.num_pathways < 1 or self.num_pathway_genes < self.num_pathways):
            reader = "use_pathway_tokens" if self.use_pathway_tokens else "pathway_contrastive_weight"
            raise ValueError(
                f"`{reader}` needs `num_pathways` of at least 1 ({self.num_pathways}) and a gene for each in "
                f"`num_pathway_genes` ({self.num_pathway_genes}); take both from `select_pathways`."
            )
        if not self.use_pathway_tokens:
            return
        if self.use_pair_bias or self.use_opm or self.pair_init != "zeros":
            raise ValueError("`use_pathway_tokens` and a pair representation exclude each other: pathways have no z.")
        if self.graph_attention_mode is not None and self.pathway_mode == "only":
            raise ValueError("`graph_attention_mode` needs genes as tokens; use `pathway_mode='append'`.")
        if self.pathway_dim is not None and self.pathway_dim < 1:
            raise ValueError(f"`pathway_dim` must be at least 1, or None, got {self.pathway_dim}.")

    def validate_annotations(self) -> None:
        """Annotations have terms, features a width."""
        if min(self.num_annotation_terms, self.num_annotation_pairs, self.gene_feature_size) < 0:
            raise ValueError(
                "`num_annotation_terms`, `num_annotation_pairs` and `gene_feature_size` must be at least 0, got "
                f"{self.num_annotation_terms}, {self.num_annotation_pairs} and {self.gene_feature_size}."
            )
        if self.use_gene_annotations and min(self.num_annotation_terms, self.num_annotation_pairs) < 1:
            raise ValueError(
                "`use_gene_annotations` needs `num_annotation_terms` and `num_annotation_pairs` of at least 1, got "
                f"{self.num_annotation_terms} and {self.num_annotation_pairs}; take both from `gene_annotations`."
            )
