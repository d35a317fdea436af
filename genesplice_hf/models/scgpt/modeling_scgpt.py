"""scGPT: masked expression of genes, from the other genes of a cell.

Cui et al. 2024, scGPT: toward building a foundation model for single-cell multi-omics using generative AI (Nature
Methods). The blocks are those of `layers/expression_block.py`, norms after each branch; the heads are in
`heads/expression_tasks.py`.

Shapes: B cells, r genes of a cell, E hidden size.
"""

from genesplice_hf.heads.expression_generation import GeneratesExpression
from genesplice_hf.heads.expression_tasks import CellClassificationTask, MaskedExpressionTask, attach
from genesplice_hf.layers.expression_model import ExpressionBackbone, ExpressionPreTrainedModel
from genesplice_hf.models.scgpt.configuration_scgpt import ScGPTConfig


class ScGPTPreTrainedModel(ExpressionPreTrainedModel):
    """Loading, initialisation and the declared abilities of every scGPT class."""

    config: ScGPTConfig
    config_class = ScGPTConfig
    base_model_prefix = "scgpt"


class ScGPTModel(ExpressionBackbone, ScGPTPreTrainedModel):
    """scGPT without a head."""

    config: ScGPTConfig


class ScGPTForMaskedExpression(GeneratesExpression, MaskedExpressionTask, ScGPTPreTrainedModel):
    """scGPT that predicts masked values: (B, r)."""

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__(config)
        attach(self, config, ScGPTModel(config))


class ScGPTForSequenceClassification(CellClassificationTask, ScGPTPreTrainedModel):
    """scGPT that classifies cells: (B, `num_labels`)."""

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__(config)
        attach(self, config, ScGPTModel(config))
