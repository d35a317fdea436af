"""One row per model: what the tests, the bundle and the README table need to know of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenizers import Tokenizer, models
from transformers import PreTrainedConfig, PreTrainedModel

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


def _tiny_genesplice(**overrides: Any) -> GeneSpliceConfig:
    """A flat GeneSplice of two blocks with a window of 4 bases."""
    fields: dict[str, Any] = {
        "hidden_sizes": [32],
        "pool_sizes": [],
        "num_attention_heads": [2],
        "head_dims": [16],
        "intermediate_sizes": [48],
        "num_encoder_layers": [],
        "num_tower_layers": 2,
        "num_decoder_layers": [],
        "local_windows": [],
        "tower_window": 4,
        "tower_layer_types": ["sliding_attention", "full_attention"],
        "num_tracks": 3,
        "track_bin_size": 1,
    }
    return GeneSpliceConfig(**(fields | overrides))


def _tiny_performer(**overrides: Any) -> PerformerConfig:
    """A bidirectional Performer of two layers; whole sequences, so that dropout can be tested too."""
    fields: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "is_decoder": False,
        "slim_chunk_size": -1,
        "attention_block_size": 4,
        # Large enough for the paths through attention to show beside the skips.
        "initializer_range": 0.3,
    }
    return PerformerConfig(**(fields | overrides))


def _tiny_nucleotide_transformer_v2(**overrides: Any) -> NucleotideTransformerV2Config:
    """Two layers over 3-mers."""
    fields: dict[str, Any] = {
        "vocab_size": 75,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        # Large enough for the paths through attention to show beside the skips.
        "initializer_range": 0.1,
    }
    return NucleotideTransformerV2Config(**(fields | overrides))


def _tiny_dnabert2(**overrides: Any) -> DNABERT2Config:
    """Two layers with a number of heads that is no power of two."""
    fields: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 48,
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.05,
    }
    return DNABERT2Config(**(fields | overrides))


def _tiny_bpe() -> Tokenizer:
    """A few merges under the special tokens of DNABERT-2, whose own vocabulary comes with its weights."""
    merges = [("A", "C"), ("G", "T"), ("T", "T"), ("AC", "G"), ("GT", "A")]
    tokens = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *"ACGNT", *map("".join, merges)]
    return Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges, unk_token="[UNK]"))


def _tiny_hyenadna(**overrides: Any) -> HyenaDNAConfig:
    """Two layers; tied, for an LM head of its own has a name that adapters do not save."""
    fields: dict[str, Any] = {
        "vocab_size": 16,
        "d_model": 32,
        "n_layer": 2,
        "d_inner": 48,
        "max_seq_len": 96,
        "filter_order": 8,
        "activation_freq": 2,
        "embed_dropout": 0.0,
        "tie_word_embeddings": True,
        # Large enough for the paths through the mixers to show beside the skips.
        "initializer_range": 0.2,
    }
    return HyenaDNAConfig(**(fields | overrides))


def _tiny_caduceus(**overrides: Any) -> CaduceusConfig:
    """A Caduceus-Ph of two blocks; `rcps=True` makes it a Caduceus-PS."""
    fields: dict[str, Any] = {
        "vocab_size": 16,
        "d_model": 16,
        "n_layer": 2,
        "ssm_cfg": {"d_state": 4, "dt_rank": 2, "dt_min": 0.1, "dt_max": 1.0},
        "scan_chunk_size": 8,
        # The paths through the mixers show beside the skips.
        "initializer_cfg": {"initializer_range": 0.1, "rescale_prenorm_residual": False},
    }
    return CaduceusConfig(**(fields | overrides))


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
        tiny_config=_tiny_genesplice,
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
        tiny_config=_tiny_performer,
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
        tiny_config=_tiny_nucleotide_transformer_v2,
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
        tiny_config=_tiny_dnabert2,
        tokenizer_module="genesplice_hf.tokenization.tokenization_bpe",
        tokenizer_class="BPEDnaTokenizer",
        tokenizer_kwargs={"tokenizer_object": _tiny_bpe()},
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
        tiny_config=_tiny_hyenadna,
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
        tiny_config=_tiny_caduceus,
        tokenizer_module="genesplice_hf.tokenization.tokenization_nucleotide",
        tokenizer_class="NucleotideTokenizer",
        tokenizer_kwargs={"preset": "caduceus"},
        card="caduceus.md",
    ),
}
