"""Registers BioFormer with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from genesplice_hf.models.auto import AutoModelForEdgePrediction, AutoModelForMaskedExpression
from genesplice_hf.models.bioformer.configuration_bioformer import BioFormerConfig
from genesplice_hf.models.bioformer.modeling_bioformer import (
    BioFormerForEdgePrediction,
    BioFormerForMaskedExpression,
    BioFormerForSequenceClassification,
    BioFormerModel,
)

AutoConfig.register("genesplice_bioformer", BioFormerConfig)
AutoModel.register(BioFormerConfig, BioFormerModel)
AutoModelForMaskedExpression.register(BioFormerConfig, BioFormerForMaskedExpression)
AutoModelForSequenceClassification.register(BioFormerConfig, BioFormerForSequenceClassification)
AutoModelForEdgePrediction.register(BioFormerConfig, BioFormerForEdgePrediction)
