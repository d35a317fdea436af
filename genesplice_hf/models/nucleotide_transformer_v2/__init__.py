"""Registers the Nucleotide Transformer v2 with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from genesplice_hf.models.nucleotide_transformer_v2.configuration_nucleotide_transformer_v2 import (
    NucleotideTransformerV2Config,
)
from genesplice_hf.models.nucleotide_transformer_v2.modeling_nucleotide_transformer_v2 import (
    NucleotideTransformerV2ForMaskedLM,
    NucleotideTransformerV2ForSequenceClassification,
    NucleotideTransformerV2ForTokenClassification,
)
from genesplice_hf.models.nucleotide_transformer_v2.modeling_nucleotide_transformer_v2_base import (
    NucleotideTransformerV2Model,
)

AutoConfig.register("genesplice_nucleotide_transformer_v2", NucleotideTransformerV2Config)
AutoModel.register(NucleotideTransformerV2Config, NucleotideTransformerV2Model)
AutoModelForMaskedLM.register(NucleotideTransformerV2Config, NucleotideTransformerV2ForMaskedLM)
AutoModelForSequenceClassification.register(
    NucleotideTransformerV2Config, NucleotideTransformerV2ForSequenceClassification
)
AutoModelForTokenClassification.register(NucleotideTransformerV2Config, NucleotideTransformerV2ForTokenClassification)
