"""Configs of every row of the registry that run in milliseconds: for tests, and for trying a model out."""

from typing import Any

from tokenizers import Tokenizer, models

from genesplice_hf.models.akita.configuration_akita import AkitaConfig
from genesplice_hf.models.bioformer.configuration_bioformer import BioFormerConfig
from genesplice_hf.models.caduceus.configuration_caduceus import CaduceusConfig
from genesplice_hf.models.dnabert2.configuration_dnabert2 import DNABERT2Config
from genesplice_hf.models.enformer.configuration_enformer import EnformerConfig
from genesplice_hf.models.genegraph.configuration_genegraph import GeneGraphConfig
from genesplice_hf.models.genesplice.configuration_genesplice import GeneSpliceConfig
from genesplice_hf.models.gpn.configuration_gpn import GPNConfig
from genesplice_hf.models.gpn_msa.configuration_gpn_msa import GPNMSAConfig
from genesplice_hf.models.hyenadna.configuration_hyenadna import HyenaDNAConfig
from genesplice_hf.models.nucleotide_transformer_v2.configuration_nucleotide_transformer_v2 import (
    NucleotideTransformerV2Config,
)
from genesplice_hf.models.performer.configuration_performer import PerformerConfig
from genesplice_hf.models.scgpt.configuration_scgpt import ScGPTConfig
from genesplice_hf.models.tfbind.configuration_tfbind import TFBindConfig

# Arguments of a `GeneTokenizer`: special tokens 0 to 2, then 45 genes.
TINY_GENES: dict[str, Any] = {"genes": [f"G{index}" for index in range(45)], "specials_first": True}
_CELLS: dict[str, Any] = {
    "vocab_size": 48,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def tiny_genesplice(**overrides: Any) -> GeneSpliceConfig:
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


def tiny_performer(**overrides: Any) -> PerformerConfig:
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


def tiny_nucleotide_transformer_v2(**overrides: Any) -> NucleotideTransformerV2Config:
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


def tiny_dnabert2(**overrides: Any) -> DNABERT2Config:
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


def tiny_bpe() -> Tokenizer:
    """A few merges under the special tokens of DNABERT-2, whose own vocabulary comes with its weights."""
    merges = [("A", "C"), ("G", "T"), ("T", "T"), ("AC", "G"), ("GT", "A")]
    tokens = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *"ACGNT", *map("".join, merges)]
    return Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges, unk_token="[UNK]"))


def tiny_hyenadna(**overrides: Any) -> HyenaDNAConfig:
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


def tiny_caduceus(**overrides: Any) -> CaduceusConfig:
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


def tiny_gpn(**overrides: Any) -> GPNConfig:
    """A GPN of two layers whose convolutions see 4 bases to each side, then 4 again at distance 2."""
    fields: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "max_position_embeddings": 64,
        # Large enough for the branches to show beside the skips.
        "initializer_range": 0.1,
    }
    return GPNConfig(**(fields | overrides))


def tiny_gpn_msa(**overrides: Any) -> GPNMSAConfig:
    """A GPN-MSA of two layers that sees three aligned species."""
    fields: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "n_aux_features": 15,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    return GPNMSAConfig(**(fields | overrides))


def tiny_enformer(**overrides: Any) -> EnformerConfig:
    """Two layers over bins of 8 bases, all of which are predicted."""
    fields: dict[str, Any] = {
        "dim": 24,
        "depth": 2,
        "heads": 2,
        "attn_dim_key": 8,
        "num_downsamples": 3,
        "dim_divisible_by": 4,
        "output_heads": {"human": 3},
        "target_length": -1,
        "dropout_rate": 0.0,
        "attn_dropout": 0.0,
        "pos_dropout": 0.0,
        "classifier_dropout": 0.0,
    }
    return EnformerConfig(**(fields | overrides))


def tiny_tfbind(**overrides: Any) -> TFBindConfig:
    """A trainable GeneSplice inside, proteins as states of width 10, a context of 6 numbers."""
    fields: dict[str, Any] = {
        "dna_config": tiny_genesplice(),
        "freeze_dna": False,
        "protein_dim": 10,
        "context_dim": 6,
        "conditioning": ["film", "hypergrid"],
        "attn_heads": 2,
        "attn_dim_head": 8,
        "ff_mult": 2,
        "latent_heads": 8,
        "latent_dim": 8,
        "num_tracks": 3,
    }
    return TFBindConfig(**(fields | overrides))


def tiny_akita(**overrides: Any) -> AkitaConfig:
    """An Akita with bins of 4 bases; nothing is cut off its map, so that one base is enough."""
    fields: dict[str, Any] = {
        "seq_length": 64,
        "stem_filters": 12,
        "stem_kernel_size": 5,
        "tower_filters_init": 12,
        "tower_repeat": 1,
        "dilated_filters": 8,
        "dilated_repeat": 2,
        "dilated_dropout": 0.0,
        "trunk_out_filters": 8,
        "head2d_filters": 8,
        "dilated2d_filters": 6,
        "dilated2d_repeat": 1,
        "dilated2d_dropout": 0.0,
        "target_crop": 0,
        "diagonal_offset": 0,
        "num_targets": 3,
    }
    return AkitaConfig(**(fields | overrides))


def tiny_scgpt(**overrides: Any) -> ScGPTConfig:
    """An scGPT of two layers over 45 genes."""
    # Wide enough for bfloat16 to show no more than its rounding.
    fields: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "classifier_num_layers": 2}
    return ScGPTConfig(**(_CELLS | fields | overrides))


def tiny_bioformer(**overrides: Any) -> BioFormerConfig:
    """A BioFormer of two layers whose first pair bias reads the genes; every part of the pair path is on."""
    fields: dict[str, Any] = {
        "use_gating": True,
        "pair_hidden_size": 12,
        "opm_hidden_size": 4,
        "pair_init": "gene",
        "pair_init_rank": 3,
    }
    return BioFormerConfig(**(_CELLS | fields | overrides))


def tiny_genegraph(**overrides: Any) -> GeneGraphConfig:
    """A GeneGraph of two layers whose genes come with a graph, terms and outside vectors."""
    fields: dict[str, Any] = {
        "graph_num_layers": 1,
        "graph_num_heads": 2,
        "graph_hidden_size": 16,
        "graph_dropout": 0.0,
        "use_gene_annotations": True,
        "num_annotation_terms": 5,
        "num_annotation_pairs": 40,
        "gene_feature_size": 3,
    }
    return GeneGraphConfig(**(_CELLS | fields | overrides))
