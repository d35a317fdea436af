"""Registers Caduceus with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from genesplice_hf.models.caduceus.configuration_caduceus import CaduceusConfig
from genesplice_hf.models.caduceus.modeling_caduceus import (
    CaduceusForMaskedLM,
    CaduceusForSequenceClassification,
    CaduceusForTokenClassification,
)
from genesplice_hf.models.caduceus.modeling_caduceus_base import CaduceusModel

AutoConfig.register("genesplice_caduceus", CaduceusConfig)
AutoModel.register(CaduceusConfig, CaduceusModel)
AutoModelForMaskedLM.register(CaduceusConfig, CaduceusForMaskedLM)
AutoModelForSequenceClassification.register(CaduceusConfig, CaduceusForSequenceClassification)
AutoModelForTokenClassification.register(CaduceusConfig, CaduceusForTokenClassification)
