"""Registers scGPT with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from genesplice_hf.models.auto import AutoModelForMaskedExpression
from genesplice_hf.models.scgpt.configuration_scgpt import ScGPTConfig
from genesplice_hf.models.scgpt.modeling_scgpt import (
    ScGPTForMaskedExpression,
    ScGPTForSequenceClassification,
    ScGPTModel,
)

AutoConfig.register("genesplice_scgpt", ScGPTConfig)
AutoModel.register(ScGPTConfig, ScGPTModel)
AutoModelForMaskedExpression.register(ScGPTConfig, ScGPTForMaskedExpression)
AutoModelForSequenceClassification.register(ScGPTConfig, ScGPTForSequenceClassification)
