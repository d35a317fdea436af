"""Registers GPN with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from genesplice_hf.models.gpn.configuration_gpn import GPNConfig
from genesplice_hf.models.gpn.modeling_gpn import (
    GPNForMaskedLM,
    GPNForSequenceClassification,
    GPNForTokenClassification,
)
from genesplice_hf.models.gpn.modeling_gpn_base import GPNModel

AutoConfig.register("genesplice_gpn", GPNConfig)
AutoModel.register(GPNConfig, GPNModel)
AutoModelForMaskedLM.register(GPNConfig, GPNForMaskedLM)
AutoModelForSequenceClassification.register(GPNConfig, GPNForSequenceClassification)
AutoModelForTokenClassification.register(GPNConfig, GPNForTokenClassification)
