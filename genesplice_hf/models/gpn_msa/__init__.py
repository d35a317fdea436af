"""Registers GPN-MSA with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from genesplice_hf.models.gpn_msa.configuration_gpn_msa import GPNMSAConfig
from genesplice_hf.models.gpn_msa.modeling_gpn_msa import (
    GPNMSAForMaskedLM,
    GPNMSAForSequenceClassification,
    GPNMSAForTokenClassification,
    GPNMSAModel,
)

AutoConfig.register("genesplice_gpn_msa", GPNMSAConfig)
AutoModel.register(GPNMSAConfig, GPNMSAModel)
AutoModelForMaskedLM.register(GPNMSAConfig, GPNMSAForMaskedLM)
AutoModelForSequenceClassification.register(GPNMSAConfig, GPNMSAForSequenceClassification)
AutoModelForTokenClassification.register(GPNMSAConfig, GPNMSAForTokenClassification)
