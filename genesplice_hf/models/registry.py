"""One row per model: what the tests, the bundle and the README table need to know of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel

from genesplice_hf.models import tiny_configs
from genesplice_hf.models.akita.configuration_akita import AkitaConfig
from genesplice_hf.models.akita.modeling_akita import AkitaForContactPrediction
from genesplice_hf.models.akita.modeling_akita_base import AkitaModel
from genesplice_hf.models.bioformer.configuration_bioformer import BioFormerConfig
from genesplice_hf.models.bioformer.modeling_bioformer import (
    BioFormerForEdgePrediction,
    BioFormerForMaskedExpression,
    BioFormerForSequenceClassification,
    BioFormerModel,
)
from genesplice_hf.models.caduceus.configuration_caduceus import CaduceusConfig
from genesplice_hf.models.caduceus.modeling_caduceus import (
    CaduceusForMaskedLM,
    CaduceusForSequenceClassification,
    CaduceusForTokenClassification,
)
from genesplice_hf.models.caduceus.modeling_caduceus_base import CaduceusModel
from genesplice_hf.models.dnabert2.configuration_dnabert2 import DNABERT2Config
from genesplice_hf.models.dnabert2.modeling_dnabert2 import (
    DNABERT2ForMaskedLM,
    DNABERT2ForSequenceClassification,
    DNABERT2ForTokenClassification,
)
from genesplice_hf.models.dnabert2.modeling_dnabert2_base import DNABERT2Model
from genesplice_hf.models.enformer.configuration_enformer import EnformerConfig
from genesplice_hf.models.enformer.modeling_enformer import (
    EnformerForSequenceClassification,
    EnformerForTokenClassification,
    EnformerForTrackPrediction,
)
from genesplice_hf.models.enformer.modeling_enformer_base import EnformerModel
from genesplice_hf.models.genegraph.configuration_genegraph import GeneGraphConfig
from genesplice_hf.models.genegraph.modeling_genegraph import (
    GeneGraphForEdgePrediction,
    GeneGraphForMaskedExpression,
    GeneGraphForSequenceClassification,
)
from genesplice_hf.models.genegraph.modeling_genegraph_base import GeneGraphModel
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
from genesplice_hf.models.gpn.configuration_gpn import GPNConfig
from genesplice_hf.models.gpn.modeling_gpn import (
    GPNForMaskedLM,
    GPNForSequenceClassification,
    GPNForTokenClassification,
)
from genesplice_hf.models.gpn.modeling_gpn_base import GPNModel
from genesplice_hf.models.gpn_msa.configuration_gpn_msa import GPNMSAConfig
from genesplice_hf.models.gpn_msa.modeling_gpn_msa import (
    GPNMSAForMaskedLM,
    GPNMSAForSequenceClassification,
    GPNMSAForTokenClassification,
    GPNMSAModel,
)
from genesplice_hf.models.hyenadna.configuration_hyenadna import HyenaDNAConfig
from genesplice_hf.models.hyenadna.modeling_hyenadna import (
    HyenaDNAForCausalLM,
    HyenaDNAForSequenceClassification,
    HyenaDNAForTokenClassification,
)
from genesplice_hf.models.hyenadna.modeling_hyenadna_base import HyenaDNAModel
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
from genesplice_hf.models.performer.configuration_performer import PerformerConfig
from genesplice_hf.models.performer.modeling_performer import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
)
from genesplice_hf.models.performer.modeling_performer_base import PerformerModel
from genesplice_hf.models.scgpt.configuration_scgpt import ScGPTConfig
from genesplice_hf.models.scgpt.modeling_scgpt import (
    ScGPTForMaskedExpression,
    ScGPTForSequenceClassification,
    ScGPTModel,
)
from genesplice_hf.models.tfbind.configuration_tfbind import TFBindConfig
from genesplice_hf.models.tfbind.modeling_tfbind import TFBindForSequenceClassification, TFBindForTrackPrediction
from genesplice_hf.models.tfbind.modeling_tfbind_base import TFBindModel


@dataclass(frozen=True)
class ModelEntry:
    """One model of the package.

    Attributes:
        model_type: the type in config.json.
        config_class: its configuration.
        auto_classes: name of an Auto class, of transformers or of `models/auto.py` -> our class.
        tiny_config: makes a config that runs in milliseconds, for tests; takes fields to override.
        tokenizer_module, tokenizer_class, tokenizer_kwargs: where its tokenizer lives and how it is made
            (names, for models import no tokenization).
        card: the model card in `model_cards/`.
        causal_overrides: fields that turn the tiny config into one that the causal LM accepts.
        reverse_complement: "equivariant" when the masked LM's logits of the reverse complement are its logits
            read backwards with complementary bases exchanged, "none" when nothing is promised.
    """

    model_type: str
    config_class: type[PreTrainedConfig]
    auto_classes: dict[str, type[PreTrainedModel]]
    tiny_config: Callable[..., PreTrainedConfig]
    tokenizer_module: str
    tokenizer_class: str
    tokenizer_kwargs: dict[str, Any]
    card: str
    causal_overrides: dict[str, Any] = field(default_factory=dict)
    reverse_complement: Literal["none", "equivariant"] = "none"

    @property
    def is_language_model(self) -> bool:
        """Whether it reads and predicts tokens of a vocabulary."""
        return bool({"AutoModelForMaskedLM", "AutoModelForCausalLM"} & self.auto_classes.keys())


REGISTRY: dict[str, ModelEntry] = {
    "genesplice": ModelEntry(
        model_type="genesplice",
        config_class=GeneSpliceConfig,
        auto_classes={
            "AutoModel": GeneSpliceModel,
            "AutoModelForPreTraining": GeneSpliceForPreTraining,
            "AutoModelForMaskedLM": GeneSpliceForMaskedLM,
            "AutoModelForCausalLM": GeneSpliceForCausalLM,
            "AutoModelForSequenceClassification": GeneSpliceForSequenceClassification,
            "AutoModelForTokenClassification": GeneSpliceForTokenClassification,
            "AutoModelForTrackPrediction": GeneSpliceForTrackPrediction,
        },
        tiny_config=tiny_configs.tiny_genesplice,
        tokenizer_module="genesplice_hf.tokenization.tokenization_nucleotide",
        tokenizer_class="NucleotideTokenizer",
        tokenizer_kwargs={"preset": "genesplice"},
        card="genesplice-nano.md",
        causal_overrides={"is_decoder": True},
    ),
    "genesplice_performer": ModelEntry(
        model_type="genesplice_performer",
        config_class=PerformerConfig,
        auto_classes={
            "AutoModel": PerformerModel,
            "AutoModelForMaskedLM": PerformerForMaskedLM,
            "AutoModelForCausalLM": PerformerForCausalLM,
            "AutoModelForSequenceClassification": PerformerForSequenceClassification,
            "AutoModelForTokenClassification": PerformerForTokenClassification,
        },
        tiny_config=tiny_configs.tiny_performer,
        tokenizer_module="genesplice_hf.tokenization.tokenization_nucleotide",
        tokenizer_class="NucleotideTokenizer",
        tokenizer_kwargs={"preset": "genesplice"},
        card="slim-performer.md",
        causal_overrides={"is_decoder": True},
    ),
    "genesplice_nucleotide_transformer_v2": ModelEntry(
        model_type="genesplice_nucleotide_transformer_v2",
        config_class=NucleotideTransformerV2Config,
        auto_classes={
            "AutoModel": NucleotideTransformerV2Model,
            "AutoModelForMaskedLM": NucleotideTransformerV2ForMaskedLM,
            "AutoModelForSequenceClassification": NucleotideTransformerV2ForSequenceClassification,
            "AutoModelForTokenClassification": NucleotideTransformerV2ForTokenClassification,
        },
        tiny_config=tiny_configs.tiny_nucleotide_transformer_v2,
        tokenizer_module="genesplice_hf.tokenization.tokenization_kmer",
        tokenizer_class="KmerTokenizer",
        tokenizer_kwargs={"preset": "nt_v2_3mer"},
        card="nucleotide-transformer-v2.md",
    ),
    "genesplice_dnabert2": ModelEntry(
        model_type="genesplice_dnabert2",
        config_class=DNABERT2Config,
        auto_classes={
            "AutoModel": DNABERT2Model,
            "AutoModelForMaskedLM": DNABERT2ForMaskedLM,
            "AutoModelForSequenceClassification": DNABERT2ForSequenceClassification,
            "AutoModelForTokenClassification": DNABERT2ForTokenClassification,
        },
        tiny_config=tiny_configs.tiny_dnabert2,
        tokenizer_module="genesplice_hf.tokenization.tokenization_bpe",
        tokenizer_class="BPEDnaTokenizer",
        tokenizer_kwargs={"tokenizer_object": tiny_configs.tiny_bpe()},
        card="dnabert2.md",
    ),
    "genesplice_hyenadna": ModelEntry(
        model_type="genesplice_hyenadna",
        config_class=HyenaDNAConfig,
        auto_classes={
            "AutoModel": HyenaDNAModel,
            "AutoModelForCausalLM": HyenaDNAForCausalLM,
            "AutoModelForSequenceClassification": HyenaDNAForSequenceClassification,
            "AutoModelForTokenClassification": HyenaDNAForTokenClassification,
        },
        tiny_config=tiny_configs.tiny_hyenadna,
        tokenizer_module="genesplice_hf.tokenization.tokenization_nucleotide",
        tokenizer_class="NucleotideTokenizer",
        tokenizer_kwargs={"preset": "hyenadna"},
        card="hyenadna.md",
    ),
    "genesplice_caduceus": ModelEntry(
        model_type="genesplice_caduceus",
        config_class=CaduceusConfig,
        auto_classes={
            "AutoModel": CaduceusModel,
            "AutoModelForMaskedLM": CaduceusForMaskedLM,
            "AutoModelForSequenceClassification": CaduceusForSequenceClassification,
            "AutoModelForTokenClassification": CaduceusForTokenClassification,
        },
        tiny_config=tiny_configs.tiny_caduceus,
        tokenizer_module="genesplice_hf.tokenization.tokenization_nucleotide",
        tokenizer_class="NucleotideTokenizer",
        tokenizer_kwargs={"preset": "caduceus"},
        card="caduceus.md",
    ),
    "genesplice_gpn": ModelEntry(
        model_type="genesplice_gpn",
        config_class=GPNConfig,
        auto_classes={
            "AutoModel": GPNModel,
            "AutoModelForMaskedLM": GPNForMaskedLM,
            "AutoModelForSequenceClassification": GPNForSequenceClassification,
            "AutoModelForTokenClassification": GPNForTokenClassification,
        },
        tiny_config=tiny_configs.tiny_gpn,
        tokenizer_module="genesplice_hf.tokenization.tokenization_nucleotide",
        tokenizer_class="NucleotideTokenizer",
        tokenizer_kwargs={"preset": "gpn"},
        card="gpn.md",
    ),
    "genesplice_gpn_msa": ModelEntry(
        model_type="genesplice_gpn_msa",
        config_class=GPNMSAConfig,
        auto_classes={
            "AutoModel": GPNMSAModel,
            "AutoModelForMaskedLM": GPNMSAForMaskedLM,
            "AutoModelForSequenceClassification": GPNMSAForSequenceClassification,
            "AutoModelForTokenClassification": GPNMSAForTokenClassification,
        },
        tiny_config=tiny_configs.tiny_gpn_msa,
        tokenizer_module="genesplice_hf.tokenization.tokenization_nucleotide",
        tokenizer_class="MSATokenizer",
        tokenizer_kwargs={},
        card="gpn-msa.md",
    ),
    "genesplice_enformer": ModelEntry(
        model_type="genesplice_enformer",
        config_class=EnformerConfig,
        auto_classes={
            "AutoModel": EnformerModel,
            "AutoModelForSequenceClassification": EnformerForSequenceClassification,
            "AutoModelForTokenClassification": EnformerForTokenClassification,
            "AutoModelForTrackPrediction": EnformerForTrackPrediction,
        },
        tiny_config=tiny_configs.tiny_enformer,
        tokenizer_module="genesplice_hf.tokenization.tokenization_nucleotide",
        tokenizer_class="NucleotideTokenizer",
        tokenizer_kwargs={"preset": "enformer"},
        card="enformer.md",
    ),
    "genesplice_tfbind": ModelEntry(
        model_type="genesplice_tfbind",
        config_class=TFBindConfig,
        auto_classes={
            "AutoModel": TFBindModel,
            "AutoModelForSequenceClassification": TFBindForSequenceClassification,
            "AutoModelForTrackPrediction": TFBindForTrackPrediction,
        },
        tiny_config=tiny_configs.tiny_tfbind,
        tokenizer_module="genesplice_hf.tokenization.tokenization_nucleotide",
        tokenizer_class="NucleotideTokenizer",
        tokenizer_kwargs={"preset": "genesplice"},
        card="tfbind.md",
    ),
    "genesplice_akita": ModelEntry(
        model_type="genesplice_akita",
        config_class=AkitaConfig,
        auto_classes={"AutoModel": AkitaModel, "AutoModelForContactPrediction": AkitaForContactPrediction},
        tiny_config=tiny_configs.tiny_akita,
        tokenizer_module="genesplice_hf.tokenization.tokenization_nucleotide",
        tokenizer_class="NucleotideTokenizer",
        tokenizer_kwargs={"preset": "enformer"},
        card="akita.md",
    ),
    "genesplice_scgpt": ModelEntry(
        model_type="genesplice_scgpt",
        config_class=ScGPTConfig,
        auto_classes={
            "AutoModel": ScGPTModel,
            "AutoModelForMaskedExpression": ScGPTForMaskedExpression,
            "AutoModelForSequenceClassification": ScGPTForSequenceClassification,
        },
        tiny_config=tiny_configs.tiny_scgpt,
        tokenizer_module="genesplice_hf.tokenization.tokenization_gene",
        tokenizer_class="GeneTokenizer",
        tokenizer_kwargs=tiny_configs.TINY_GENES,
        card="scgpt.md",
    ),
    "genesplice_bioformer": ModelEntry(
        model_type="genesplice_bioformer",
        config_class=BioFormerConfig,
        auto_classes={
            "AutoModel": BioFormerModel,
            "AutoModelForMaskedExpression": BioFormerForMaskedExpression,
            "AutoModelForSequenceClassification": BioFormerForSequenceClassification,
            "AutoModelForEdgePrediction": BioFormerForEdgePrediction,
        },
        tiny_config=tiny_configs.tiny_bioformer,
        tokenizer_module="genesplice_hf.tokenization.tokenization_gene",
        tokenizer_class="GeneTokenizer",
        tokenizer_kwargs=tiny_configs.TINY_GENES,
        card="bioformer.md",
    ),
    "genesplice_genegraph": ModelEntry(
        model_type="genesplice_genegraph",
        config_class=GeneGraphConfig,
        auto_classes={
            "AutoModel": GeneGraphModel,
            "AutoModelForMaskedExpression": GeneGraphForMaskedExpression,
            "AutoModelForSequenceClassification": GeneGraphForSequenceClassification,
            "AutoModelForEdgePrediction": GeneGraphForEdgePrediction,
        },
        tiny_config=tiny_configs.tiny_genegraph,
        tokenizer_module="genesplice_hf.tokenization.tokenization_gene",
        tokenizer_class="GeneTokenizer",
        tokenizer_kwargs=tiny_configs.TINY_GENES,
        card="genegraph.md",
    ),
}
