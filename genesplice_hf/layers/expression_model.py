"""What all expression models are below their heads: loading with the tables beside the weights, and the base model.

Shapes: B cells, r genes of a cell, E hidden size, C channels of z, K channels of the prior.
"""

import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.hub import cached_file
from transformers.utils.output_capturing import capture_outputs

from genesplice_hf.errors import CheckpointError, SequenceError
from genesplice_hf.layers.expression import ExpressionEmbeddings, expression_mask, filled_values
from genesplice_hf.layers.expression_block import (
    ExpressionAttention,
    ExpressionBlock,
    ExpressionContext,
    ExpressionEncoder,
    demand_additive,
    expression_context,
)
from genesplice_hf.layers.expression_config import ExpressionConfig
from genesplice_hf.layers.gene_prior import GenePrior
from genesplice_hf.layers.padding import zero_padding
from genesplice_hf.layers.pair_bias import (
    PairEmbedding,
    ScalarPairEmbedding,
    check_pair_values,
    directed,
    real_pairs,
)
from genesplice_hf.layers.recording import demand_recordable
from genesplice_hf.layers.strict_loading import StrictPreTrainedModel

_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass
class ExpressionModelOutput(ModelOutput):
    """States of one forward pass over cells.

    Attributes:
        last_hidden_state: (B, r, E), zero at padding.
        gene_embedding: (B, r, E) the genes' vectors before values were added.
        pair_states: (B, r, r, C) z after the last block, where it was asked for and exists.
        hidden_states: the input of every block and the last state.
        attentions: weights (B, H, r, r) of every block, eager only.
    """

    last_hidden_state: torch.Tensor | None = None
    gene_embedding: torch.Tensor | None = None
    pair_states: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class ExpressionPreTrainedModel(StrictPreTrainedModel):
    """Loading, saving, initialisation and the declared abilities of every expression class."""

    config: ExpressionConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["ExpressionBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ExpressionBlock, "attentions": ExpressionAttention}

    @property
    def gene_prior(self) -> GenePrior | None:
        """The table of edges that the model owns; None = it has none."""
        return getattr(self.base_model, "_gene_prior", None)

    def set_gene_prior(self, prior: GenePrior) -> None:
        """Gives the model its table of edges, which is saved beside the weights and named by its hash in the config.

        Raises:
            CheckpointError: a table of another vocabulary, or with other channels than `prior_channels`.
        """
        wanted = (self.config.vocab_size, self.config.prior_channels)
        if (prior.vocab_size, prior.num_channels) != wanted:
            raise CheckpointError(
                f"the prior must have (`vocab_size`, `prior_channels`) = {wanted}, has "
                f"{(prior.vocab_size, prior.num_channels)}; build it for this vocabulary, or change the config."
            )
        self.base_model._gene_prior = prior
        self.config.prior_sha256 = prior.sha256()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As `StrictPreTrainedModel.from_pretrained`, with the table of edges beside the weights.

        Args:
            gene_prior: keyword; a table to use instead of the file.

        Raises:
            CheckpointError: tensors do not fit, or the config speaks of a table that is absent or was changed.
        """
        given = kwargs.pop("gene_prior", None)
        hub = {name: kwargs[name] for name in _HUB_KEYWORDS if kwargs.get(name) is not None}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if given is not None:
            model.set_gene_prior(given)
        elif model.config.prior_channels and pretrained_model_name_or_path is not None:
            model.set_gene_prior(_read_prior(model, str(pretrained_model_name_or_path), hub))
        return loaded

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, with the table of edges beside the weights."""
        if self.gene_prior is not None and kwargs.get("is_main_process", True):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self.gene_prior.save(Path(save_directory) / self.config.prior_file)
        super().save_pretrained(save_directory, *args, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers' own; the table of edges keeps those between genes that are left."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if self.gene_prior is not None and self.gene_prior.vocab_size != self.config.vocab_size:
            self.set_gene_prior(self.gene_prior.resized(self.config.vocab_size))
        return embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """torch's defaults, but for genes: uniform, with zeros for padding."""
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                init.uniform_(module.bias, -bound, bound)
            if getattr(module, "starts_at", None) is not None:
                init.constant_(module.bias, float(module.starts_at))
        elif isinstance(module, nn.Embedding):
            limit = self.config.initializer_range
            init.uniform_(module.weight, -limit, limit)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.PReLU):
            init.constant_(module.weight, 0.25)
        elif type(module).__name__ == "PairNorm":
            init.ones_(module.weight)
        elif not isinstance(module, nn.MultiheadAttention):
            super()._init_weights(module)


def _read_prior(model: ExpressionPreTrainedModel, path: str, hub: dict[str, Any]) -> GenePrior:
    config: Any = model.config
    where = str(getattr(model, "name_or_path", "") or path)
    file = cached_file(where, config.prior_file, _raise_exceptions_for_missing_entries=False, **hub)
    if file is None:
        raise CheckpointError(
            f"`{where}` has no {config.prior_file}, and its config says `prior_channels` {config.prior_channels}; "
            "download the table as well, or pass `gene_prior=`."
        )
    return GenePrior.load(file, config.prior_sha256)


class ExpressionBackbone(ExpressionPreTrainedModel):
    """Embeddings and blocks over the genes of a cell; the models are this with their own config."""

    def __init__(self, config: ExpressionConfig) -> None:
        config.validate()
        demand_additive(config)
        super().__init__(config)
        self.embeddings = ExpressionEmbeddings(config)
        self.pair_embedding: nn.Module | None = None
        pair_init = getattr(config, "pair_init", "zeros")
        if pair_init != "zeros":
            self.pair_embedding = (ScalarPairEmbedding if pair_init == "scalar_mlp" else PairEmbedding)(config)  # type: ignore[arg-type]
        self.encoder = ExpressionEncoder(config)
        self._gene_prior: GenePrior | None = None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.gene

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.gene = value

    def enriched_genes(self, genes_BrE: torch.Tensor, input_ids_Br: torch.Tensor | None) -> torch.Tensor:
        """The genes' vectors with what a model knows of genes; here as they are."""
        return genes_BrE

    def attention_terms(
        self, input_ids_Br: torch.Tensor | None, real_Br: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(visible (B, r, r) bool, bias (B, H, r, r)) that hold in every block; here neither."""
        return None, None

    @merge_with_config_defaults
    @capture_outputs
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
        output_pair_states: bool | None = None,
        **kwargs: Any,
    ) -> ExpressionModelOutput:
        """Runs the network.

        Args:
            input_ids: (B, r) ids of genes; `<cls>` stands first where cells are read from its state.
            values: (B, r) expression in the units of training (bins, log1p), `mask_value` where unknown; None = all
                are unknown.
            attention_mask: (B, r), 1 = a gene; None = where `input_ids` is not padding.
            batch_labels: (B,) where the config uses batches.
            pair_values: see `check_pair_values`; None = looked up in the model's prior, or nothing.
            group_ids: (B,) with `opm_group_dim`; cells of a group hold the same genes in the same order.
            generation_mask: (B, r) bool, genes to generate: they are seen by no other gene.
            inputs_embeds: (B, r, E) instead of `input_ids`.
            cell_states: (B, E) that replace the state of the first gene before the first block.
            output_pair_states: return z; None = as the config says.

        Raises:
            SequenceError: input that does not fit; ValueError: `output_attentions` without eager.
        """
        demand_recordable(self.config, kwargs)
        real_Br = expression_mask(self.config, input_ids, inputs_embeds, attention_mask)
        values = filled_values(self.config, values, input_ids, real_Br)
        generated = None if generation_mask is None else generation_mask.bool()
        genes_BrE = self.enriched_genes(self.embeddings.genes(input_ids, inputs_embeds), input_ids)
        x_BrE = self.embeddings(genes_BrE, values, real_Br, batch_labels, generated)
        if cell_states is not None:
            x_BrE = _with_first(x_BrE, real_Br, cell_states)
        channels = self._pair_channels(input_ids, pair_values, real_Br)
        context = self._context(x_BrE, real_Br, generated, input_ids, group_ids, channels)
        z_BiCj = self._first_pair_states(genes_BrE, channels, context)
        x_BrE, z_BiCj = self.encoder(x_BrE, z_BiCj, context, self.pair_embedding, genes_BrE)
        asked = getattr(self.config, "output_pair_states", False) if output_pair_states is None else output_pair_states
        if asked and self.config.pair_mode == "factorized":
            raise SequenceError("`output_pair_states` needs pair_mode='full': the factorized form never makes z.")
        pair_states = z_BiCj.transpose(2, 3) if asked and z_BiCj is not None else None
        return ExpressionModelOutput(zero_padding(x_BrE, real_Br), genes_BrE, pair_states)

    def _pair_channels(
        self, input_ids: torch.Tensor | None, pair_values: torch.Tensor | None, real_Br: torch.Tensor
    ) -> torch.Tensor | None:
        """(B, i, j, channels) that z begins with, edges leaving the row's gene; None where it begins without."""
        config: Any = self.config
        genes = real_Br.shape[1]
        if not hasattr(config, "pair_hidden_size"):
            if pair_values is not None:
                raise SequenceError(f"`pair_values` have no effect in {type(self).__name__}; leave them out.")
            return None
        if pair_values is not None:
            return check_pair_values(config, pair_values, genes)
        if config.pair_init in ("zeros", "gene"):
            return None
        if self._gene_prior is not None and input_ids is not None:
            return self._gene_prior.lookup(input_ids)
        if config.pair_init == "scalar_mlp":
            return torch.zeros(*real_Br.shape, genes, 1, device=real_Br.device)
        raise SequenceError(
            f"pair_init={config.pair_init!r} needs edges: call `set_gene_prior` and pass `input_ids`, or pass "
            "`pair_values`."
        )

    def _context(
        self,
        x_BrE: torch.Tensor,
        real_Br: torch.Tensor,
        generated: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        group_ids: torch.Tensor | None,
        channels: torch.Tensor | None,
    ) -> ExpressionContext:
        visible, shared_bias = self.attention_terms(input_ids, real_Br)
        pair: dict[str, torch.Tensor | None] = {"groups": _groups(self.config, group_ids, input_ids)}
        embedding = self.pair_embedding
        if self.config.pair_mode == "factorized" and isinstance(embedding, PairEmbedding) and channels is not None:
            pair["prior"] = directed(channels, self.config.prior_direction)
            pair["prior_weight"] = embedding.prior_weight()
        return expression_context(self.config, x_BrE, real_Br, generated, visible, shared_bias, **pair)

    def _first_pair_states(
        self, genes_BrE: torch.Tensor, channels: torch.Tensor | None, context: ExpressionContext
    ) -> torch.Tensor | None:
        """z (B, i, C, j) before the first block; None = zeros, or never made."""
        if self.config.pair_mode == "factorized":
            return None
        if isinstance(self.pair_embedding, PairEmbedding):
            prior = None if channels is None else directed(channels, self.config.prior_direction)
            return self.pair_embedding(genes_BrE, prior, context.real)
        if channels is None:
            return None
        z_BijC = channels.to(genes_BrE.dtype) if self.pair_embedding is None else self.pair_embedding(channels[..., 0])
        z_BiCj = z_BijC.transpose(2, 3)
        return z_BiCj if context.real is None else z_BiCj * real_pairs(context.real)


def _with_first(x_BrE: torch.Tensor, real_Br: torch.Tensor, cell_states_BE: torch.Tensor) -> torch.Tensor:
    place = torch.arange(x_BrE.shape[1], device=x_BrE.device) == real_Br.int().argmax(1, keepdim=True)
    return torch.where(place[..., None], cell_states_BE[:, None].to(x_BrE.dtype), x_BrE)


def _groups(config: Any, group_ids: torch.Tensor | None, input_ids: torch.Tensor | None) -> torch.Tensor | None:
    if not getattr(config, "opm_group_dim", None):
        if group_ids is not None:
            raise SequenceError("`group_ids` have no effect without `opm_group_dim=True`; leave them out, or set it.")
        return None
    if group_ids is None:
        raise SequenceError("`group_ids` (B,) are missing, and the config says `opm_group_dim`; pass one per cell.")
    groups = torch.unique(group_ids, return_inverse=True)[1]
    if input_ids is not None:
        first = torch.zeros_like(groups).scatter_reduce(
            0, groups, torch.arange(len(groups), device=groups.device), "amin", include_self=False
        )
        if not torch.equal(input_ids, input_ids[first[groups]]):
            raise SequenceError(
                "cells of one group must hold the same genes in the same order; sort and pad them alike."
            )
    return groups
