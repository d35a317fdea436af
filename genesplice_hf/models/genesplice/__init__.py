"""Registers GeneSplice with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from genesplice_hf.models.auto import AutoModelForTrackPrediction
from genesplice_hf.models.genesplice.configuration_genesplice import GeneSpliceConfig
from genesplice_hf.models.genesplice.modeling_genesplice import (
    GeneSpliceForCausalLM,
    GeneSpliceForMaskedLM,
    GeneSpliceForSequenceClassification,
    GeneSpliceForTokenClassification,
    GeneSpliceForTrackPrediction,
)
from genesplice_hf.models.genesplice.modeling_genesplice_base import GeneSpliceModel
from genesplice_hf.models.genesplice.modeling_genesplice_pretraining import GeneSpliceForPreTraining

AutoConfig.register("genesplice", GeneSpliceConfig)
AutoModel.register(GeneSpliceConfig, GeneSpliceModel)
AutoModelForPreTraining.register(GeneSpliceConfig, GeneSpliceForPreTraining)
AutoModelForMaskedLM.register(GeneSpliceConfig, GeneSpliceForMaskedLM)
AutoModelForCausalLM.register(GeneSpliceConfig, GeneSpliceForCausalLM)
AutoModelForSequenceClassification.register(GeneSpliceConfig, GeneSpliceForSequenceClassification)
AutoModelForTokenClassification.register(GeneSpliceConfig, GeneSpliceForTokenClassification)
AutoModelForTrackPrediction.register(GeneSpliceConfig, GeneSpliceForTrackPrediction)
