"""Registers GeneSplice with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from genesplice_hf.models.genesplice.configuration_genesplice import GeneSpliceConfig
from genesplice_hf.models.genesplice.modeling_genesplice import (
    GeneSpliceForCausalLM,
    GeneSpliceForMaskedLM,
    GeneSpliceForSequenceClassification,
    GeneSpliceForTokenClassification,
)
from genesplice_hf.models.genesplice.modeling_genesplice_base import GeneSpliceModel

AutoConfig.register("genesplice", GeneSpliceConfig)
AutoModel.register(GeneSpliceConfig, GeneSpliceModel)
AutoModelForMaskedLM.register(GeneSpliceConfig, GeneSpliceForMaskedLM)
AutoModelForCausalLM.register(GeneSpliceConfig, GeneSpliceForCausalLM)
AutoModelForSequenceClassification.register(GeneSpliceConfig, GeneSpliceForSequenceClassification)
AutoModelForTokenClassification.register(GeneSpliceConfig, GeneSpliceForTokenClassification)
