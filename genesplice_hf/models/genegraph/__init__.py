"""Registers GeneGraph with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from genesplice_hf.models.auto import AutoModelForEdgePrediction, AutoModelForMaskedExpression
from genesplice_hf.models.genegraph.configuration_genegraph import GeneGraphConfig
from genesplice_hf.models.genegraph.modeling_genegraph import (
    GeneGraphForEdgePrediction,
    GeneGraphForMaskedExpression,
    GeneGraphForSequenceClassification,
)
from genesplice_hf.models.genegraph.modeling_genegraph_base import GeneGraphModel

AutoConfig.register("genesplice_genegraph", GeneGraphConfig)
AutoModel.register(GeneGraphConfig, GeneGraphModel)
AutoModelForMaskedExpression.register(GeneGraphConfig, GeneGraphForMaskedExpression)
AutoModelForSequenceClassification.register(GeneGraphConfig, GeneGraphForSequenceClassification)
AutoModelForEdgePrediction.register(GeneGraphConfig, GeneGraphForEdgePrediction)
