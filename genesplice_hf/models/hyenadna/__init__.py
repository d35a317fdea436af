"""Registers HyenaDNA with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from genesplice_hf.models.hyenadna.configuration_hyenadna import HyenaDNAConfig
from genesplice_hf.models.hyenadna.modeling_hyenadna import (
    HyenaDNAForCausalLM,
    HyenaDNAForSequenceClassification,
    HyenaDNAForTokenClassification,
)
from genesplice_hf.models.hyenadna.modeling_hyenadna_base import HyenaDNAModel

AutoConfig.register("genesplice_hyenadna", HyenaDNAConfig)
AutoModel.register(HyenaDNAConfig, HyenaDNAModel)
AutoModelForCausalLM.register(HyenaDNAConfig, HyenaDNAForCausalLM)
AutoModelForSequenceClassification.register(HyenaDNAConfig, HyenaDNAForSequenceClassification)
AutoModelForTokenClassification.register(HyenaDNAConfig, HyenaDNAForTokenClassification)
