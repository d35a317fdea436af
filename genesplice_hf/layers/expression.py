"""From genes and values to the states that enter the first block of an expression model.

Shapes: B cells, r genes of a cell, E hidden size.
"""

from typing import Any

import torch
from torch import nn

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.expression_config import ExpressionConfig


class ContinuousValueEmbedding(nn.Module):
    """norm(W2 relu(W1 min(x, largest) + b1) + b2) and dropout; (...) -> (..., E). Values are cut from above only."""

    def __init__(self, size: int, max_value: float, dropout: float, eps: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, size)
        self.linear2 = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size, eps)
        self.dropout = nn.Dropout(dropout)
        self.max_value = max_value

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        x = values.clamp(max=self.max_value)[..., None].to(self.linear1.weight.dtype)
        return self.dropout(self.norm(self.linear2(torch.relu(self.linear1(x)))))


class CategoryValueEmbedding(nn.Module):
    """norm(embedding of the bin); bins 0 to n_bins - 1, then one for padding and one for masked values."""

    def __init__(self, size: int, n_bins: int, pad_value: float, mask_value: float, eps: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_bins + 2, size, padding_idx=n_bins)
        self.norm = nn.LayerNorm(size, eps)
        self.n_bins, self.pad_value, self.mask_value = n_bins, pad_value, mask_value

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.norm(self.embedding(self.bins(values)))

    def bins(self, values: torch.Tensor) -> torch.Tensor:
        """Rows of the table, int64.

        Raises:
            SequenceError: a value that is no bin.
        """
        is_pad, is_masked = values == self.pad_value, values == self.mask_value
        wrong = ~(is_pad | is_masked | ((values >= 0) & (values < self.n_bins) & (values == values.floor())))
        if not torch.compiler.is_compiling() and bool(wrong.any()):
            raise SequenceError(
                f"`values` must be whole bins 0 to {self.n_bins - 1}, {self.pad_value} at padding or "
                f"{self.mask_value} where masked, with `input_emb_style` 'category'; one was "
                f"{values[wrong][0].item():g}. Use the tie rule 'mid_floor' and the `n_bins` of the config."
            )
        bins = values.masked_fill(is_pad | is_masked, 0).long()
        return bins.masked_fill(is_pad, self.n_bins).masked_fill(is_masked, self.n_bins + 1)


class ScalingValueEmbedding(nn.Module):
    """The gene's vector times the value, without parameters; a `<cls>` of value 0 enters as a zero vector."""

    def forward(self, genes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return genes * values[..., None].to(genes.dtype)


class AutoBinValueEmbedding(nn.Module):
    """A mean of `n_bins` learned vectors, weighted by a softmax that a small network makes of the value.

    After scFoundation (Hao et al., Nature Methods 2024, methods, "embedding module").
    """

    def __init__(self, size: int, n_bins: int) -> None:
        super().__init__()
        self.score = nn.Linear(1, n_bins)
        self.mix = nn.Linear(n_bins, n_bins)
        self.bins = nn.Linear(n_bins, size, bias=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        scores = nn.functional.leaky_relu(self.score(values[..., None].to(self.score.weight.dtype)))
        return self.bins((self.mix(scores) + scores).softmax(-1))


class DomainBatchNorm(nn.Module):
    """Batch normalisation of (B, r, E) per channel over cells and genes, with one set of statistics per batch label.

    Cells are grouped by their own label; the original takes that of the first cell for all of them, which is the same
    where a batch has one label. `kind` "dsbn" has no weights, "do_affine" has; "batchnorm" is one norm for all labels.
    """

    EPS = 6.1e-5

    def __init__(self, kind: str, size: int, num_labels: int | None, exclude_padding: bool) -> None:
        super().__init__()
        number = 1 if kind == "batchnorm" else num_labels or 1
        self.by_label = kind != "batchnorm"
        self.bns = nn.ModuleList(nn.BatchNorm1d(size, self.EPS, affine=kind != "dsbn") for _ in range(number))
        self.exclude_padding = exclude_padding

    def forward(self, x_BrE: torch.Tensor, batch_labels_B: torch.Tensor | None, mask_Br: torch.Tensor) -> torch.Tensor:
        """Zero at padding that is excluded from the statistics.

        Raises:
            SequenceError: labels are missing or out of range.
        """
        chosen = mask_Br if self.exclude_padding else torch.ones_like(mask_Br)
        labels = self._labels(batch_labels_B, len(x_BrE))
        out = torch.zeros_like(x_BrE)
        for label, norm in enumerate(self.bns):
            rows = chosen & (labels == label).to(chosen.device)[:, None]
            if bool(rows.any()):
                out[rows] = _normalised(norm, x_BrE[rows]).to(out.dtype)
        return out

    def _labels(self, labels_B: torch.Tensor | None, cells: int) -> torch.Tensor:
        if not self.by_label:
            return torch.zeros(cells, dtype=torch.long)
        labels_B = demand_batch_labels(labels_B, len(self.bns), "domain_spec_batchnorm")
        return labels_B


def _normalised(norm: nn.BatchNorm1d, x: torch.Tensor) -> torch.Tensor:
    # One position has no variance of its own.
    return (
        norm(x) if len(x) > 1 or not norm.training else (x - norm.running_mean) / (norm.running_var + norm.eps) ** 0.5
    )


def demand_batch_labels(labels_B: torch.Tensor | None, number: int, field: str) -> torch.Tensor:
    """The labels, which must be there.

    Raises:
        SequenceError: there are none, or one is not in 0 .. number - 1.
    """
    if labels_B is None:
        raise SequenceError(f"`batch_labels` (B,) are missing, and the config says `{field}`; pass one per cell.")
    if not torch.compiler.is_compiling() and bool(((labels_B < 0) | (labels_B >= number)).any()):
        raise SequenceError(f"`batch_labels` must be 0 to {number - 1} (`num_batch_labels`), got {labels_B.tolist()}.")
    return labels_B


class BatchLabelEmbedding(nn.Module):
    """norm(embedding of the batch); (B,) -> (B, E)."""

    def __init__(self, number: int, size: int, eps: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(number, size)
        self.norm = nn.LayerNorm(size, eps)

    def forward(self, batch_labels_B: torch.Tensor) -> torch.Tensor:
        return self.norm(self.embedding(batch_labels_B))


class ExpressionEmbeddings(nn.Module):
    """The gene's normalised vector, and what its value makes of it (cells x genes x E)."""

    def __init__(self, config: ExpressionConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.config = config
        self.gene = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.gene_norm = nn.LayerNorm(size, eps)
        self.value = value_embedding(config)
        self.mask_vector = nn.Embedding(1, size) if config.mask_embedding else None
        self.generation_flag = nn.Embedding(2, size) if config.use_generation_flag else None
        kind = config.domain_spec_batchnorm
        self.batch_norm = (
            DomainBatchNorm(str(kind), size, config.num_batch_labels, config.bn_exclude_padding) if kind else None
        )

    def genes(self, input_ids_Br: torch.Tensor | None, inputs_embeds_BrE: torch.Tensor | None) -> torch.Tensor:
        """The genes' vectors before values are added."""
        return self.gene_norm(self.gene(input_ids_Br) if inputs_embeds_BrE is None else inputs_embeds_BrE)

    def forward(
        self,
        genes_BrE: torch.Tensor,
        values_Br: torch.Tensor,
        mask_Br: torch.Tensor,
        batch_labels_B: torch.Tensor | None = None,
        generation_mask_Br: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The states that enter the first block.

        Raises:
            SequenceError: a generation mask without `use_generation_flag`; batch labels are missing or out of range.
        """
        x_BrE = self._with_values(genes_BrE, values_Br, mask_Br)
        x_BrE = self._generated(x_BrE, genes_BrE, generation_mask_Br)
        return x_BrE if self.batch_norm is None else self.batch_norm(x_BrE, batch_labels_B, mask_Br)

    def _with_values(self, genes_BrE: torch.Tensor, values_Br: torch.Tensor, mask_Br: torch.Tensor) -> torch.Tensor:
        if isinstance(self.value, CategoryValueEmbedding):
            # Padding has no bin whatever stands there.
            values_Br = values_Br.masked_fill(~mask_Br, self.config.pad_value)
        if isinstance(self.value, ScalingValueEmbedding):
            x_BrE, plain_BrE = self.value(genes_BrE, values_Br), genes_BrE
        else:
            x_BrE, plain_BrE = genes_BrE + self.value(values_Br), genes_BrE
        if self.mask_vector is None:
            return x_BrE
        is_masked = (values_Br == self.config.mask_value)[..., None]
        return torch.where(is_masked, plain_BrE + self.mask_vector.weight[0], x_BrE)

    def _generated(
        self, x_BrE: torch.Tensor, genes_BrE: torch.Tensor, generation_mask_Br: torch.Tensor | None
    ) -> torch.Tensor:
        if self.generation_flag is None:
            if generation_mask_Br is not None:
                raise SequenceError(
                    "`generation_mask` needs a model with `use_generation_flag=True`; mask values instead."
                )
            return x_BrE
        if generation_mask_Br is None:
            # Every process of a distributed run must see the same parameters.
            return x_BrE + 0 * self.generation_flag.weight.sum()
        return torch.where(generation_mask_Br[..., None], genes_BrE + self.generation_flag.weight[1], x_BrE)


def value_embedding(config: ExpressionConfig) -> nn.Module:
    """The module that the config's `input_emb_style` names."""
    size, eps = config.hidden_size, config.layer_norm_eps
    styles: dict[str, Any] = {
        "continuous": lambda: ContinuousValueEmbedding(size, config.max_value, config.hidden_dropout_prob, eps),
        "category": lambda: CategoryValueEmbedding(size, config.n_bins, config.pad_value, config.mask_value, eps),
        "scaling": ScalingValueEmbedding,
        "autobin": lambda: AutoBinValueEmbedding(size, config.n_bins),
    }
    return styles[config.input_emb_style]()


def filled_values(
    config: ExpressionConfig,
    values_Br: torch.Tensor | None,
    input_ids_Br: torch.Tensor | None,
    mask_Br: torch.Tensor,
) -> torch.Tensor:
    """The values; None = every value is unknown: `mask_value`, 0 at `<cls>`, `pad_value` at padding.

    Raises:
        SequenceError: values of another shape than the genes.
    """
    if values_Br is not None:
        if values_Br.shape != mask_Br.shape:
            raise SequenceError(
                f"`values` must be (cells, genes) = {tuple(mask_Br.shape)} like `input_ids`, got "
                f"{tuple(values_Br.shape)}."
            )
        return values_Br
    values = torch.full(mask_Br.shape, float(config.mask_value), device=mask_Br.device)
    if input_ids_Br is not None and config.cls_token_id is not None:
        values = values.masked_fill(input_ids_Br == config.cls_token_id, 0.0)
    return values.masked_fill(~mask_Br, float(config.pad_value))


def expression_mask(
    config: ExpressionConfig,
    input_ids_Br: torch.Tensor | None,
    inputs_embeds_BrE: torch.Tensor | None,
    attention_mask_Br: torch.Tensor | None,
) -> torch.Tensor:
    """(B, r) bool, True = a gene; None = where `input_ids` is not padding. Genes are a set: holes are welcome.

    Raises:
        SequenceError: not exactly one input, an empty one, or a mask of another shape.
    """
    if (input_ids_Br is None) == (inputs_embeds_BrE is None):
        raise SequenceError("pass exactly one of `input_ids` and `inputs_embeds`.")
    given: Any = inputs_embeds_BrE if input_ids_Br is None else input_ids_Br
    if given.shape[1] < 1:
        raise SequenceError(
            "`input_ids` must hold at least one gene per cell, got none; add `<cls>` or drop the cell."
        )
    if attention_mask_Br is not None:
        if attention_mask_Br.shape != given.shape[:2]:
            raise SequenceError(
                f"`attention_mask` must be (cells, genes) = {tuple(given.shape[:2])} with 1 = real, got shape "
                f"{tuple(attention_mask_Br.shape)}."
            )
        return attention_mask_Br.bool()
    if input_ids_Br is None or config.pad_token_id is None:
        return torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
    return input_ids_Br != config.pad_token_id
