"""Registers DNABERT-2 with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from genesplice_hf.models.dnabert2.configuration_dnabert2 import DNABERT2Config
from genesplice_hf.models.dnabert2.modeling_dnabert2 import (
    DNABERT2ForMaskedLM,
    DNABERT2ForSequenceClassification,
    DNABERT2ForTokenClassification,
)
from genesplice_hf.models.dnabert2.modeling_dnabert2_base import DNABERT2Model

AutoConfig.register("genesplice_dnabert2", DNABERT2Config)
AutoModel.register(DNABERT2Config, DNABERT2Model)
AutoModelForMaskedLM.register(DNABERT2Config, DNABERT2ForMaskedLM)
AutoModelForSequenceClassification.register(DNABERT2Config, DNABERT2ForSequenceClassification)
AutoModelForTokenClassification.register(DNABERT2Config, DNABERT2ForTokenClassification)
