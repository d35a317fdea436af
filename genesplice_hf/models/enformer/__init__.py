"""Registers Enformer with the Auto classes of transformers and of the package."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from genesplice_hf.models.auto import AutoModelForTrackPrediction
from genesplice_hf.models.enformer.configuration_enformer import EnformerConfig
from genesplice_hf.models.enformer.modeling_enformer import (
    EnformerForSequenceClassification,
    EnformerForTokenClassification,
    EnformerForTrackPrediction,
)
from genesplice_hf.models.enformer.modeling_enformer_base import EnformerModel

AutoConfig.register("genesplice_enformer", EnformerConfig)
AutoModel.register(EnformerConfig, EnformerModel)
AutoModelForTrackPrediction.register(EnformerConfig, EnformerForTrackPrediction)
AutoModelForSequenceClassification.register(EnformerConfig, EnformerForSequenceClassification)
AutoModelForTokenClassification.register(EnformerConfig, EnformerForTokenClassification)
