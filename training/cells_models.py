"""Expression models for `training.cells`: fresh, or from a folder, with edges between genes where there are some.

B cells, E hidden size.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, set_seed

from genesplice_hf.adaptation.adapt import merge
from genesplice_hf.adaptation.adapter_files import save_adapter
from genesplice_hf.data.h5ad import GeneExpressionProcessor
from genesplice_hf.data.knowledge import read_edges, to_graph
from genesplice_hf.errors import DataError
from genesplice_hf.heads.expression_tasks import MaskedExpressionOutput
from genesplice_hf.layers.gene_prior import GenePrior
from genesplice_hf.models.auto import AutoModelForMaskedExpression
from genesplice_hf.models.registry import REGISTRY
from genesplice_hf.tokenization.tokenization_gene import GeneTokenizer

logger = logging.getLogger(__name__)

MODEL_TYPES = [one.model_type for one in REGISTRY.values() if "AutoModelForMaskedExpression" in one.auto_classes]


@dataclass
class CellModelSettings:
    """Which network."""

    model: str | None = field(
        default=None, metadata={"help": "Folder (or Hub id) of a pretrained model with its processor; none: fresh."}
    )
    model_config: dict = field(
        default_factory=lambda: {"model_type": "genesplice_scgpt"},
        metadata={"help": "`model_type` and fields of its config, for fresh weights; as JSON."},
    )
    edges: str | None = field(
        default=None,
        metadata={"help": "Edge list for the graph of a GeneGraph or the prior (2 channels) of a BioFormer."},
    )
    start_at_mean: bool = field(
        default=True, metadata={"help": "A fresh model begins by predicting the mean of the training values."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, ..."})


def draft_config(settings: CellModelSettings) -> PreTrainedConfig:
    """The config that the settings name, before the data gave it a vocabulary.

    Raises:
        DataError: no `model_type` of an expression model, or fields that its config refuses.
    """
    if settings.model is not None:
        logger.info("`model` %s brings its own config; `model_config` is not used.", settings.model)
        return AutoConfig.from_pretrained(settings.model)
    model_type = settings.model_config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise DataError(f"`model_config` must hold a `model_type` of {', '.join(MODEL_TYPES)}, got {model_type!r}.")
    return AutoConfig.for_model(**settings.model_config)


def fresh_config(
    settings: CellModelSettings, processor: GeneExpressionProcessor, output_mean: float | None = None
) -> PreTrainedConfig:
    """The config with the vocabulary, bins and special values of the processor."""
    tokenizer, steps = processor.tokenizer, processor.settings
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "n_bins": steps.n_bins,
        "mask_value": steps.mask_value,
        "pad_value": steps.pad_value,
    }
    if settings.start_at_mean and output_mean is not None:
        fields["init_output_bias"] = output_mean
    return AutoConfig.for_model(**(settings.model_config | fields))


def masked_model(
    settings: CellModelSettings, processor: GeneExpressionProcessor, seed: int, output_mean: float
) -> PreTrainedModel:
    """A model that predicts hidden values, drawn from `seed` or loaded."""
    set_seed(seed)
    loading = {"attn_implementation": settings.attn_implementation, "dtype": torch.float32}
    if settings.model is not None:
        return AutoModelForMaskedExpression.from_pretrained(settings.model, **loading)
    config = fresh_config(settings, processor, output_mean)
    return with_edges(AutoModelForMaskedExpression.from_config(config, **loading), settings, processor.tokenizer)


def classifier(
    settings: CellModelSettings,
    source: str | None,
    processor: GeneExpressionProcessor,
    labels: list[str],
    seed: int,
) -> PreTrainedModel:
    """A model with a fresh head for the cell types, and the body of the folder `source` or one from `seed` too."""
    set_seed(seed)
    head: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: number for number, name in enumerate(labels)},
        "problem_type": "single_label_classification",
    }
    loading = {"attn_implementation": settings.attn_implementation, "dtype": torch.float32}
    if source is not None:
        return AutoModelForSequenceClassification.from_pretrained(source, **loading, **head)
    config = fresh_config(settings, processor)
    for name, value in head.items():
        setattr(config, name, value)
    return with_edges(AutoModelForSequenceClassification.from_config(config, **loading), settings, processor.tokenizer)


def with_edges(model: Any, settings: CellModelSettings, tokenizer: GeneTokenizer) -> Any:
    """The model with the edges of `settings` as its graph or prior; without a file as it is."""
    if settings.edges is None:
        return model
    table = to_graph(read_edges(settings.edges), tokenizer)
    logger.info("%d edges; %d name a gene that the vocabulary lacks.", table.edge_index.shape[1], table.num_dropped)
    source, target = torch.from_numpy(table.edge_index)
    features, confidence = torch.from_numpy(table.features), torch.from_numpy(table.confidence)
    prior = GenePrior(source, target, features, len(tokenizer), confidence=confidence)
    (model.set_gene_graph if hasattr(model, "set_gene_graph") else model.set_gene_prior)(prior)
    return model


def save_classifier(
    model: Any, processor: GeneExpressionProcessor, folder: Path, method: str, source: str | None
) -> None:
    """Writes adapter and head beside the name of their base, or the whole network where there is no such base."""
    if method == "full" or source is None:
        merge(model).save_pretrained(folder)
    else:
        save_adapter(model, folder, base_model_name=source, tokenizer_name=source)
    processor.save_pretrained(folder)


class ClassifierReads(nn.Module):
    """A classifier as `embed_cells` takes it: the vector of a cell (B, E) is what its head reads."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, **batch: torch.Tensor) -> MaskedExpressionOutput:
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        read: list[torch.Tensor] = []
        handle = base.classifier.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            self.model(**batch)
        finally:
            handle.remove()
        return MaskedExpressionOutput(cell_embedding=read[0])
