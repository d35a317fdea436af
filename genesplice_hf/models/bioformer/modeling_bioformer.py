"""BioFormer: masked expression of genes with a representation of every pair of genes.

A transformer over genes with the pair bias and the outer-product update of AlphaFold 2's Evoformer (Jumper et al.
2021); without them, and with scGPT's switches, it is scGPT. Blocks in `layers/expression_block.py`, the pair path in
`layers/pair_bias.py`, heads in `heads/expression_tasks.py`.

Shapes: B cells, r genes of a cell, E hidden size.
"""

from genesplice_hf.heads.expression_generation import GeneratesExpression
from genesplice_hf.heads.expression_tasks import (
    CellClassificationTask,
    EdgePredictionTask,
    MaskedExpressionTask,
    attach,
)
from genesplice_hf.layers.expression_model import ExpressionBackbone, ExpressionPreTrainedModel
from genesplice_hf.models.bioformer.configuration_bioformer import BioFormerConfig


class BioFormerPreTrainedModel(ExpressionPreTrainedModel):
    """Loading, initialisation and the declared abilities of every BioFormer class."""

    config: BioFormerConfig
    config_class = BioFormerConfig
    base_model_prefix = "bioformer"


class BioFormerModel(ExpressionBackbone, BioFormerPreTrainedModel):
    """BioFormer without a head."""

    config: BioFormerConfig


class BioFormerForMaskedExpression(GeneratesExpression, MaskedExpressionTask, BioFormerPreTrainedModel):
    """BioFormer that predicts masked values: (B, r)."""

    def __init__(self, config: BioFormerConfig) -> None:
        super().__init__(config)
        attach(self, config, BioFormerModel(config))


class BioFormerForSequenceClassification(CellClassificationTask, BioFormerPreTrainedModel):
    """BioFormer that classifies cells: (B, `num_labels`)."""

    def __init__(self, config: BioFormerConfig) -> None:
        super().__init__(config)
        attach(self, config, BioFormerModel(config))


class BioFormerForEdgePrediction(EdgePredictionTask, BioFormerPreTrainedModel):
    """BioFormer that predicts which gene acts on which: (B, r, r)."""

    def __init__(self, config: BioFormerConfig) -> None:
        super().__init__(config)
        attach(self, config, BioFormerModel(config))
