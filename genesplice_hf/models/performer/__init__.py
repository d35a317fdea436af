"""Registers the SLiM Performer with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from genesplice_hf.models.performer.configuration_performer import PerformerConfig
from genesplice_hf.models.performer.modeling_performer import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
)
from genesplice_hf.models.performer.modeling_performer_base import PerformerModel

AutoConfig.register("genesplice_performer", PerformerConfig)
AutoModel.register(PerformerConfig, PerformerModel)
AutoModelForMaskedLM.register(PerformerConfig, PerformerForMaskedLM)
AutoModelForCausalLM.register(PerformerConfig, PerformerForCausalLM)
AutoModelForSequenceClassification.register(PerformerConfig, PerformerForSequenceClassification)
AutoModelForTokenClassification.register(PerformerConfig, PerformerForTokenClassification)
