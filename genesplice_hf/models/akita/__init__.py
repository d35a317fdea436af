"""Registers Akita with the Auto classes."""

from transformers import AutoConfig, AutoModel

from genesplice_hf.models.akita.configuration_akita import AkitaConfig
from genesplice_hf.models.akita.modeling_akita import AkitaForContactPrediction
from genesplice_hf.models.akita.modeling_akita_base import AkitaModel
from genesplice_hf.models.auto import AutoModelForContactPrediction

AutoConfig.register("genesplice_akita", AkitaConfig)
AutoModel.register(AkitaConfig, AkitaModel)
AutoModelForContactPrediction.register(AkitaConfig, AkitaForContactPrediction)
