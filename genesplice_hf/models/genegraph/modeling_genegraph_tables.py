"""The tables of a GeneGraph: how they are given, saved, loaded, compared with their hashes, and resized.

Shapes: V vocabulary, n pairs of a table.
"""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.hub import cached_file

from genesplice_hf.errors import CheckpointError
from genesplice_hf.layers.expression_model import ExpressionPreTrainedModel
from genesplice_hf.layers.gene_prior import GenePrior
from genesplice_hf.layers.graph_attention import AttentionVector, GATv2Layer
from genesplice_hf.layers.pathway import MaskedLinear, PathwayTokens
from genesplice_hf.models.genegraph.configuration_genegraph import GeneGraphConfig
from genesplice_hf.models.genegraph.modeling_genegraph_knowledge import (
    GeneKnowledge,
    GraphBias,
    GraphTables,
    fill_table,
    table_sha256,
)

_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class GeneGraphPreTrainedModel(ExpressionPreTrainedModel):
    """Loading, saving, initialisation and the tables of every GeneGraph class."""

    config: GeneGraphConfig
    config_class = GeneGraphConfig
    base_model_prefix = "genegraph"

    @property
    def gene_graph(self) -> GenePrior | None:
        """The graph that the model owns; None = it has none."""
        tables = self.base_model._graph
        return None if tables is None else tables.table

    def set_gene_graph(self, graph: GenePrior) -> None:
        """Gives the model its graph, which is saved beside the weights and named by its hash in the config.

        Raises:
            CheckpointError: a graph of another vocabulary, or with other channels than `graph_edge_channels`.
        """
        wanted = (self.config.vocab_size, self.config.graph_edge_channels)
        if (graph.vocab_size, graph.num_channels) != wanted:
            raise CheckpointError(
                f"`graph` must have (`vocab_size`, `graph_edge_channels`) = {wanted}, has "
                f"{(graph.vocab_size, graph.num_channels)}; build it for this vocabulary, or change the config."
            )
        self.base_model._graph = GraphTables(graph)
        self.config.num_graph_edges, self.config.graph_sha256 = len(graph), graph.sha256()

    def set_pathways(self, genes: Any, pathways: Any) -> None:
        """Gives the model the members of its pathways, as `select_pathways` lists them.

        A model has a place for them with `use_pathway_tokens`, or with a `pathway_contrastive_weight`.

        Args:
            genes, pathways: (n,) gene id and number of the pathway, sorted by pathway.

        Raises:
            CheckpointError: other numbers than the config says, or not sorted.
        """
        either = "use_pathway_tokens` or `pathway_contrastive_weight"
        members = self._demand(self.base_model.pathway_table, either)
        limits = (self.config.vocab_size, self.config.num_pathways)
        _demand_sorted("pathways", pathways)
        self.config.pathway_sha256 = fill_table(
            "pathways", (members.genes, members.pathways), (genes, pathways), limits
        )
        self.base_model._is_complete = False

    def set_annotations(self, genes: Any, terms: Any) -> None:
        """Gives the model its table of genes and terms.

        Args:
            genes, terms: (n,) gene id and number of the term, in any order.

        Raises:
            CheckpointError: other numbers than the config says.
        """
        table = self._demand(self.base_model.knowledge, "use_gene_annotations").annotations
        table = self._demand(table, "use_gene_annotations")
        columns = torch.stack([torch.as_tensor(column, dtype=torch.int64) for column in (genes, terms)])
        columns = columns[:, torch.argsort(columns[0] * self.config.num_annotation_terms + columns[1])]
        limits = (self.config.vocab_size, self.config.num_annotation_terms)
        self.config.annotation_sha256 = fill_table("annotations", (table.genes, table.terms), columns, limits)
        self.base_model._is_complete = False

    def set_gene_features(self, features: torch.Tensor) -> None:
        """Gives the model frozen vectors of all genes, (V, `gene_feature_size`).

        Raises:
            CheckpointError: another shape, or numbers that are not finite.
        """
        table = self._demand(self.base_model.knowledge, "gene_feature_size").features
        given = torch.as_tensor(features, dtype=table.dtype)
        if given.shape != table.shape or not bool(given.isfinite().all()):
            raise CheckpointError(
                f"`features` must be finite numbers of shape {tuple(table.shape)}, got {tuple(given.shape)}."
            )
        table.copy_(given)
        self.base_model._vectors = None

    @staticmethod
    def _demand(part: Any, field: str) -> Any:
        if part is None:
            raise CheckpointError(f"the config must have `{field}` for this table; make the model with it.")
        return part

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As `StrictPreTrainedModel.from_pretrained`, with the graph beside the weights; hashes are compared.

        Args:
            gene_graph: keyword; a graph to use instead of the file.

        Raises:
            CheckpointError: tensors do not fit, or a table is absent or was changed.
        """
        given = kwargs.pop("gene_graph", None)
        hub = {name: kwargs[name] for name in _HUB_KEYWORDS if kwargs.get(name) is not None}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        _check_hashes(model)
        if given is not None:
            model.set_gene_graph(given)
        elif model.config.uses_graph and model.config.graph_sha256 is not None:
            where = str(getattr(model, "name_or_path", "") or pretrained_model_name_or_path)
            model.set_gene_graph(_read_graph(model.config, where, hub))
        return loaded

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, with the graph beside the weights."""
        if self.gene_graph is not None and kwargs.get("is_main_process", True):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self.gene_graph.save(Path(save_directory) / self.config.graph_file)
        super().save_pretrained(save_directory, *args, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers' own; tables keep what is said of genes that are left, new genes are in none of them."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.base_model.resize_tables(self.config.vocab_size)
        if self.gene_graph is not None and self.gene_graph.vocab_size != self.config.vocab_size:
            self.set_gene_graph(self.gene_graph.resized(self.config.vocab_size))
        return embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AttentionVector):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, GATv2Layer):
            init.zeros_(module.bias)
        elif isinstance(module, MaskedLinear):
            init.normal_(module.weight, std=0.1)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, PathwayTokens) and module.everything_bias is not None:
            init.zeros_(module.everything_bias)
        elif isinstance(module, GraphBias):
            init.zeros_(module.weight)
        elif isinstance(module, GeneKnowledge) and module.graph is not None:
            init.constant_(module.graph_scale, float(self.config.graph_residual_scale_init))


def _demand_sorted(name: str, column: Any) -> None:
    numbers = torch.as_tensor(column, dtype=torch.int64)
    if len(numbers) > 1 and bool((numbers.diff() < 0).any()):
        raise CheckpointError(f"`{name}` must be sorted: the members of one set stand together.")


def _check_hashes(model: Any) -> None:
    """Compares the tables that came with the weights with the hashes in the config."""
    base, config = model.base_model, model.config
    annotations = None if base.knowledge is None else base.knowledge.annotations
    members = base.pathway_table
    for name, columns, expected in (
        ("annotations", None if annotations is None else (annotations.genes, annotations.terms),
         config.annotation_sha256),
        ("pathways", None if members is None else (members.genes, members.pathways), config.pathway_sha256),
    ):  # fmt: skip
        if columns is not None and expected is not None and table_sha256(*columns) != expected:
            raise CheckpointError(
                f"the table of {name} in `{model.name_or_path}` has another hash than the config says; it was "
                "changed, or belongs to another model: download both again."
            )


def _read_graph(config: GeneGraphConfig, where: str, hub: dict[str, Any]) -> GenePrior:
    file = cached_file(where, config.graph_file, _raise_exceptions_for_missing_entries=False, **hub)
    if file is None:
        raise CheckpointError(
            f"`{where}` has no {config.graph_file}, and its config names its hash; download the graph as well, or "
            "pass `gene_graph=`."
        )
    return GenePrior.load(file, config.graph_sha256)
