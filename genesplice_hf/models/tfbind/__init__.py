"""Registers TFBind with the Auto classes of transformers and of the package."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor

from genesplice_hf.models.auto import AutoModelForTrackPrediction
from genesplice_hf.models.tfbind.configuration_tfbind import TFBindConfig
from genesplice_hf.models.tfbind.modeling_tfbind import TFBindForSequenceClassification, TFBindForTrackPrediction
from genesplice_hf.models.tfbind.modeling_tfbind_base import TFBindModel
from genesplice_hf.models.tfbind.processing_tfbind import TFBindProcessor

AutoConfig.register("genesplice_tfbind", TFBindConfig)
AutoModel.register(TFBindConfig, TFBindModel)
AutoModelForTrackPrediction.register(TFBindConfig, TFBindForTrackPrediction)
AutoModelForSequenceClassification.register(TFBindConfig, TFBindForSequenceClassification)
AutoProcessor.register(TFBindConfig, TFBindProcessor)
