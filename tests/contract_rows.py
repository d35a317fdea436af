"""What the contract suite knows of single rows of the registry.

Further forms of a model, to which all checks apply as well, stand in `FORMS`; a check that it cannot pass is named
with its reason in `EXCEPTIONS`; the rules of its config are shown to bite in `CONTRADICTIONS`.
"""

from collections.abc import Callable
from typing import Any

import torch
from tiny_genegraph import give_tables
from transformers import PreTrainedModel

from genesplice_hf.models.caduceus.configuration_caduceus import SSM_DEFAULTS as CADUCEUS_SSM
from genesplice_hf.models.registry import REGISTRY


def _protein_and_context() -> dict[str, torch.Tensor]:
    """One factor of five residues, of which two are padding, and one context."""
    generator = torch.Generator().manual_seed(0)
    return {
        "protein_embeds": torch.randn(1, 7, 10, generator=generator),
        "protein_mask": torch.tensor([[1, 1, 1, 0, 1, 1, 0]]),
        "context": torch.randn(1, 6, generator=generator),
    }


# Per row: what its model needs beside sequences, as a batch of one.
COMPANIONS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {"genesplice_tfbind": _protein_and_context}
# Per row: name of a further form -> fields on top of the tiny config.
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "genesplice": {
        # Bins of 2 and 4 bases: the shortest row fills none of the larger ones, the longest four and a part.
        "hierarchical": {
            "hidden_sizes": [16, 24, 32],
            "pool_sizes": [2, 2],
            "num_attention_heads": [2, 2, 4],
            "num_key_value_heads": [2, 1, 2],
            "head_dims": [8, 8, 8],
            "intermediate_sizes": [24, 24, 48],
            "num_encoder_layers": [1, 1],
            "num_tower_layers": 1,
            "num_decoder_layers": [1, 1],
            "local_windows": [4, 2],
            "tower_window": None,
            "tower_layer_types": ["full_attention"],
        },
        "both_strands": {"rc_equivariant": True},
    },
    "genesplice_caduceus": {"both_strands": {"rcps": True}},
    "genesplice_gpn": {
        "legacy": {"layout": "legacy"},
        "bytenet": {"encoder": "bytenet", "bias": True, "slim": True},
        "roformer": {"encoder": "roformer", "embedding": "embedding", "tie_word_embeddings": True},
    },
    "genesplice_genegraph": {
        "biased": {
            "graph_attention_mode": "bias",
            "use_gene_annotations": False,
            "gene_feature_size": 0,
            "final_layer_norm": True,
        },
        "pathways": {
            "use_graph_encoder": False,
            "use_gene_annotations": False,
            "gene_feature_size": 0,
            "use_pathway_tokens": True,
            "num_pathways": 4,
            "num_pathway_genes": 48,
            "pathway_dim": 8,
            "cell_emb_style": "avg-pool",
        },
    },
    "genesplice_bioformer": {
        "factorized": {"pair_mode": "factorized", "pair_layer_norm": False, "pair_dropout": 0.0},
    },
}
# Per row: what a model is given after it was made, where its config only says how much of it there is.
TABLES: dict[str, Callable[[PreTrainedModel], None]] = {"genesplice_genegraph": give_tables}
_ONE_MECHANISM = "linear attention is a mechanism of its own, not an implementation of softmax attention"
_PUBLISHED_NAME = "the published key layout calls the LM head `output_logit_map`"
_TWO_KINDS = (
    "each class refuses the other's config (`is_decoder`); what the other heads lend is in test_modeling_performer.py"
)
_AMONG_EXAMPLES = "a contrast is among the examples of one batch: fewer of them, or other ones, are another task"
_NO_TASK = "pretraining has no task whose head an adapter carries, and no labels to count"
_PER_TOKEN = "a language model's head has one output per token of the vocabulary, none per label"
_LM_HEAD = "a language model's head is no task's: adapters of a masked LM leave it as it is"
_LONG_TOKENS = "nothing is promised, and tokens of several bases have no complement token each"
_NO_ATTENTION = "there is no attention, and so no implementations of it"
_NO_CACHE = "there is no cache of the past; generation without one is in the checks beside"
_PUBLISHED_HEAD = "the published head has a transform of its own before its decoder"
_CONVOLUTIONS = "a convolutional network has no attention; its hidden states are in test_gpn.py"
_WINDOWS = "the published network knows no padding: a masked base is an unknown one, and its bin a bin"
_VALUE_HEADS = "decoders of values are no task's head: adapters of a pretraining model leave them as they are"
_NO_COMPLEMENT = "nothing is promised, and a config without complement map cannot be asked"
# (row, check), (row-form, check) or (row-form/AutoClass, check), the check being the test's name, -> why it does not
# apply.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("genesplice_caduceus", "test_flex_is_sdpa_in_inference"): _NO_ATTENTION + "; asking for flex raises",
    ("genesplice_caduceus", "test_an_implementation_that_cannot_run_is_refused"): (
        _NO_ATTENTION + "; asking for flash raises a ValueError whatever is installed (test_caduceus.py)"
    ),
    ("genesplice_caduceus", "test_recorded_outputs"): (
        _NO_ATTENTION + "; hidden states, and the refusal of attentions, are in test_caduceus.py"
    ),
    ("genesplice_caduceus-both_strands", "test_embeddings_instead_of_ids"): (
        "one strand's embeddings have no complement; those of both strands are in test_caduceus.py"
    ),
    **{
        (f"genesplice_caduceus{form}/{head}", "test_a_seed_determines_dropout"): (
            "the published network has no dropout; only a classifier drops out"
        )
        for form in ("", "-both_strands")
        for head in ("AutoModel", "AutoModelForMaskedLM")
    },
    ("genesplice-both_strands", "test_embeddings_instead_of_ids"): (
        "embeddings have no complement; that they are refused is in test_genesplice_strands.py"
    ),
    ("genesplice_performer", "test_flex_is_sdpa_in_inference"): _ONE_MECHANISM + "; asking for flex raises",
    ("genesplice_performer", "test_an_implementation_that_cannot_run_is_refused"): (
        _ONE_MECHANISM + "; asking for flash raises a ValueError whatever is installed (test_modeling_performer.py)"
    ),
    ("genesplice_performer", "test_declared_reverse_complement"): (
        "nothing is promised, and a config without complement map cannot be asked"
    ),
    ("genesplice_dnabert2", "test_an_implementation_that_cannot_run_is_refused"): (
        "asking for flash raises a ValueError whatever is installed, for it takes no ALiBi (test_dnabert2.py)"
    ),
    **{
        (row, "test_declared_reverse_complement"): _LONG_TOKENS
        for row in ("genesplice_nucleotide_transformer_v2", "genesplice_dnabert2")
    },
    **{
        (f"{row}/AutoModelForMaskedLM", check): reason
        for row in ("genesplice_nucleotide_transformer_v2", "genesplice_dnabert2")
        for check, reason in {
            "test_the_head_is_where_peft_looks_for_it": _LM_HEAD,
            "test_another_number_of_labels": _PER_TOKEN,
        }.items()
    },
    **{
        ("genesplice_hyenadna", check): reason
        for check, reason in {
            "test_flex_is_sdpa_in_inference": _NO_ATTENTION + "; asking for flex raises",
            "test_an_implementation_that_cannot_run_is_refused": (
                _NO_ATTENTION + "; asking for flash raises a ValueError whatever is installed (test_hyenadna.py)"
            ),
            "test_recorded_outputs": _NO_ATTENTION + "; the hidden states are in test_hyenadna.py",
            "test_step_by_step_with_a_cache_is_at_once_without": _NO_CACHE,
            "test_nothing_leaks_from_the_future": (
                "a Fourier transform rounds all positions together; causality to rounding is in test_hyenadna.py"
            ),
            "test_text_generation": (
                "its tokenizer ends a sequence with [SEP]; with add_special_tokens=False it is in test_hyenadna.py"
            ),
        }.items()
    },
    **{
        (f"genesplice{form}/AutoModelForPreTraining", check): reason
        for form in ("", "-hierarchical", "-both_strands")
        for check, reason in {
            "test_however_the_batch_is_cut": _AMONG_EXAMPLES,
            "test_the_logged_loss_is_the_models_loss": _AMONG_EXAMPLES,
            "test_an_ignored_row_counts_for_nothing": _AMONG_EXAMPLES,
            "test_the_head_is_where_peft_looks_for_it": _NO_TASK,
            "test_another_number_of_labels": _NO_TASK,
        }.items()
    },
    **{
        (f"genesplice_performer/{head}", check): reason
        for head in ("AutoModelForMaskedLM", "AutoModelForCausalLM")
        for check, reason in {
            "test_the_head_is_where_peft_looks_for_it": _PUBLISHED_NAME,
            "test_another_number_of_labels": _PER_TOKEN,
            "test_a_head_lends_its_base_to_another_head": _TWO_KINDS,
        }.items()
    },
}
EXCEPTIONS |= {
    **{
        (f"{row}/AutoModelForMaskedLM", check): reason
        for row in (
            "genesplice_gpn",
            *(f"genesplice_gpn-{form}" for form in FORMS["genesplice_gpn"]),
            "genesplice_gpn_msa",
        )
        for check, reason in {
            "test_the_head_is_where_peft_looks_for_it": _PUBLISHED_HEAD,
            "test_another_number_of_labels": _PER_TOKEN,
            "test_declared_reverse_complement": _NO_COMPLEMENT,
        }.items()
    },
    **{
        (f"genesplice_gpn{form}/{auto_class}", "test_recorded_outputs"): _CONVOLUTIONS
        for form in ("", "-legacy", "-bytenet")
        for auto_class in REGISTRY["genesplice_gpn"].auto_classes
    },
    **{
        (f"genesplice_gpn-{form}/{auto_class}", check): "the published layers have no dropout"
        for form in ("legacy", "bytenet")
        for auto_class in ("AutoModel", "AutoModelForMaskedLM")
        for check in ("test_a_seed_determines_dropout",)
    },
    ("genesplice_gpn_msa", "test_more_tokens_change_nothing_for_the_old_ones"): (
        "the columns after the vocabulary hold the aligned species; that it is refused is in test_gpn_msa.py"
    ),
}
EXCEPTIONS |= {
    **{
        ("genesplice_enformer", check): reason
        for check, reason in {
            "test_padding_and_neighbours_change_nothing": _WINDOWS + "; neighbours are in test_enformer.py",
            "test_padding_gets_no_gradient_and_no_loss": _WINDOWS,
            "test_more_tokens_change_nothing_for_the_old_ones": (
                "four channels are no vocabulary; that another size is refused is in test_enformer.py"
            ),
            "test_token_classification": "the pipeline wants a label per token, and a bin of many bases has one",
        }.items()
    },
}

_NOT_ALONE = "a window alone is no input: pipelines cannot carry proteins and contexts"
EXCEPTIONS |= {
    ("genesplice_tfbind", "test_recorded_outputs"): (
        "its attention is between bins and residues; weights and states are in test_tfbind.py"
    ),
    ("genesplice_tfbind", "test_feature_extraction"): _NOT_ALONE,
    ("genesplice_tfbind", "test_text_classification"): _NOT_ALONE,
}
EXCEPTIONS |= {
    **{
        ("genesplice_akita", check): reason
        for check, reason in {
            "test_flex_is_sdpa_in_inference": _NO_ATTENTION + "; asking for flex raises",
            "test_an_implementation_that_cannot_run_is_refused": (
                _NO_ATTENTION + "; asking for flash raises a ValueError whatever is installed (test_akita.py)"
            ),
            "test_recorded_outputs": _NO_ATTENTION + "; the hidden states are in test_akita.py",
            "test_padding_and_neighbours_change_nothing": _WINDOWS + "; neighbours are in test_akita.py",
            "test_padding_gets_no_gradient_and_no_loss": _WINDOWS,
            "test_more_tokens_change_nothing_for_the_old_ones": (
                "four channels are no vocabulary; that another size is refused is in test_akita.py"
            ),
        }.items()
    },
    ("genesplice_akita/AutoModelForContactPrediction", "test_a_head_lends_its_base_to_another_head"): (
        "contact maps are the only head"
    ),
}
EXCEPTIONS |= {
    ("genesplice_bioformer", "test_an_implementation_that_cannot_run_is_refused"): (
        "asking for flash raises a ValueError whatever is installed, for it adds nothing to logits (test_bioformer.py)"
    ),
    **{
        (f"{row}/AutoModelForMaskedExpression", check): reason
        for row in ("genesplice_scgpt", "genesplice_bioformer", "genesplice_bioformer-factorized")
        for check, reason in {
            "test_the_head_is_where_peft_looks_for_it": _VALUE_HEADS,
            "test_another_number_of_labels": "a value per gene, and none per label",
        }.items()
    },
    **{
        (f"{row}/AutoModelForEdgePrediction", "test_another_number_of_labels"): "a logit per pair, and none per label"
        for row in ("genesplice_bioformer", "genesplice_bioformer-factorized")
    },
}
_BY_GENE = "what is known of a gene is looked up by its id; that embeddings are refused is in test_genegraph.py"
EXCEPTIONS |= {
    **{
        (f"genesplice_genegraph{form}", "test_embeddings_instead_of_ids"): _BY_GENE
        for form in ("", "-biased", "-pathways")
    },
    ("genesplice_genegraph-biased/AutoModel", "test_an_implementation_that_cannot_run_is_refused"): (
        "asking for flash raises a ValueError whatever is installed, for it adds nothing to logits (test_genegraph.py)"
    ),
    ("genesplice_genegraph-pathways", "test_recorded_outputs"): (
        "pathway tokens stand beside the genes; what is recorded of both is in test_genegraph.py"
    ),
    **{
        (f"genesplice_genegraph{form}/AutoModelForMaskedExpression", check): reason
        for form in ("", "-biased", "-pathways")
        for check, reason in {
            "test_the_head_is_where_peft_looks_for_it": _VALUE_HEADS,
            "test_another_number_of_labels": "a value per gene, and none per label",
        }.items()
    },
    **{
        (f"genesplice_genegraph{form}/AutoModelForEdgePrediction", "test_another_number_of_labels"): (
            "a logit per pair, and none per label"
        )
        for form in ("", "-biased", "-pathways")
    },
}

# Per row: fields that contradict each other on top of the tiny config, and a word of the advice.
_EXPRESSION: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_attention_heads": 3}, "num_attention_heads"),
    ({"attention_head_dim": 8, "num_attention_heads": 0}, "num_attention_heads"),
    ({"pad_token_id": 48}, "pad_token_id"),
    ({"cls_token_id": 0}, "cls_token_id"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"mask_value": -2}, "mask_value"),
    ({"n_bins": 1}, "n_bins"),
    ({"use_batch_labels": True}, "num_batch_labels"),
    ({"domain_spec_batchnorm": "dsbn"}, "num_batch_labels"),
    ({"do_mvc": True, "mvc_decoder_style": "sum query", "explicit_zero_prob": True}, "mvc_decoder_style"),
    ({"classifier_num_layers": 0}, "classifier_num_layers"),
    ({"cce_temperature": 0.0}, "cce_temperature"),
]
_PATHWAYS: dict[str, Any] = {"use_pathway_tokens": True, "num_pathways": 2, "num_pathway_genes": 4}
CONTRADICTIONS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "genesplice": [
        ({"hidden_sizes": [32, 32]}, "hidden_sizes"),
        ({"local_windows": [4]}, "local_windows"),
        ({"num_attention_heads": [3], "num_key_value_heads": [2]}, "num_key_value_heads"),
        ({"head_dims": [15]}, "head_dims"),
        ({"tower_window": None}, "tower_window"),
        ({"tower_window": 0}, "at least 1 token"),
        ({"tower_layer_types": ["full_attention"]}, "tower_layer_types"),
        ({"complement_map": [*range(1, 16), 0]}, "complement_map"),
        ({"vocab_size": 12, "complement_map": list(range(16))}, "complement_map"),
        ({"stem_kernel_size": 4}, "stem_kernel_size"),
        ({"token_strand_pairs": [1, 2]}, "token_strand_pairs"),
        ({"moe_num_experts": 2, "moe_top_k": 3}, "moe_top_k"),
        ({"track_bin_size": 0}, "track_bin_size"),
        ({"track_strand_pairs": [1, 2, 0]}, "track_strand_pairs"),
    ],
    "genesplice_performer": [
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"hidden_size": 30, "position_scheme": "concat"}, "hidden_size"),
        ({"position_scheme": "concat", "tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"stem_kernel_size": 4}, "stem_kernel_size"),
        ({"slim_chunk_size": 0}, "slim_chunk_size"),
        ({"slim_chunk_size": 8, "hidden_dropout": 0.1}, "hidden_dropout"),
        ({"attention_block_size": 0}, "attention_block_size"),
        ({"num_feature_blocks": 0}, "num_feature_blocks"),
        ({"feature_redraw": "interval", "feature_redraw_interval": 3}, "feature_redraw"),
        ({"feature_map": "favor+", "feature_redraw": "interval"}, "feature_redraw_interval"),
        ({"stabilizer": "global", "slim_chunk_size": 8}, "stabilizer"),
        ({"denominator_eps": -1.0}, "denominator_eps"),
    ],
    "genesplice_nucleotide_transformer_v2": [
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"num_attention_heads": 32}, "rotary"),
        ({"max_position_embeddings": 2}, "max_position_embeddings"),
        ({"token_dropout": True, "mask_token_id": None}, "mask_token_id"),
    ],
    "genesplice_dnabert2": [({"num_attention_heads": 5}, "num_attention_heads")],
    "genesplice_hyenadna": [
        ({"n_layer": 0}, "n_layer"),
        ({"hyena_order": 1}, "hyena_order"),
        ({"max_seq_len": 0}, "max_seq_len"),
        ({"filter_cache_size": -1}, "filter_cache_size"),
        ({"emb_dim": 4}, "emb_dim"),
        ({"decay_target": 1.0}, "decay_target"),
        ({"slow_decay_pct": 0.0}, "slow_decay_pct"),
    ],
    "genesplice_caduceus": [
        ({"n_layer": 0}, "n_layer"),
        ({"scan_chunk_size": 0}, "scan_chunk_size"),
        ({"ssm_cfg": {**CADUCEUS_SSM, "d_states": 4}}, "d_states"),
        ({"ssm_cfg": {**CADUCEUS_SSM, "d_conv": 0}}, "d_conv"),
        ({"ssm_cfg": {**CADUCEUS_SSM, "dt_rank": "full"}}, "dt_rank"),
        ({"ssm_cfg": {**CADUCEUS_SSM, "dt_init": "zero"}}, "dt_init"),
        ({"ssm_cfg": {**CADUCEUS_SSM, "dt_min": 2.0}}, "dt_min"),
        ({"initializer_cfg": {"std": 0.1}}, "initializer_cfg"),
        ({"complement_map": [*range(1, 16), 0]}, "complement_map"),
        ({"vocab_size": 12, "complement_map": list(range(16))}, "complement_map"),
        ({"token_strand_pairs": [1, 2]}, "token_strand_pairs"),
    ],
    "genesplice_gpn": [
        ({"layout": "legacy", "encoder": "bytenet"}, "layout"),
        ({"vocab_size": 33}, "hidden_size"),
        ({"embedding": "embedding", "n_aux_features": 5}, "n_aux_features"),
        ({"n_aux_features": 7}, "aux_features_vocab_size"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"dilation_cycle": 0}, "dilation_cycle"),
        ({"rest_kernel_size": 4}, "rest_kernel_size"),
        ({"encoder": "roformer", "num_attention_heads": 5}, "num_attention_heads"),
        ({"pos_weight": -1.0}, "pos_weight"),
    ],
    "genesplice_gpn_msa": [
        ({"n_aux_features": 30}, "hidden_size"),
        ({"n_aux_features": 7}, "aux_features_vocab_size"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
    ],
    "genesplice_enformer": [
        ({"dim": 25}, "dim"),
        ({"heads": 5}, "heads"),
        ({"depth": 0}, "depth"),
        ({"heads": 3}, "multiple of 6"),
        ({"position_embedding_type": "rope", "attn_dim_key": 7}, "attn_dim_key"),
        ({"num_downsamples": 2}, "num_downsamples"),
        ({"dim_divisible_by": 0}, "dim_divisible_by"),
        ({"dim_divisible_by": 16}, "dim_divisible_by"),
        ({"output_heads": {"a.b": 3}}, "output_heads"),
        ({"output_heads": {"human": 0}}, "output_heads"),
        ({"default_species": "fly"}, "default_species"),
        ({"target_length": 0}, "target_length"),
        ({"log_eps": 0.0}, "log_eps"),
        ({"num_tracks": 0}, "num_tracks"),
        ({"discrete_bottleneck": True}, "discrete_bottleneck"),
    ],
    "genesplice_tfbind": [
        ({"latent_heads": 0}, "latent_heads"),
        ({"genome_self_attn_depth": -1}, "genome_self_attn_depth"),
        ({"aux_read_value": True, "fourier_dims": 3}, "fourier_dims"),
        ({"protein_dim": None}, "protein_dim"),
        ({"protein_input": "encoder"}, "protein_config"),
        ({"context_mode": "none"}, "context"),
        ({"context_mode": "text"}, "text_config"),
        ({"context_mode": "ids"}, "context_vocab_sizes"),
        ({"context_dim": None}, "context_dim"),
        ({"conditioning": ("film", "film")}, "conditioning"),
        ({"conditioning": ("adaln",), "joint_cross_attn_depth": 0}, "adaln"),
        ({"hypergrid_rank": 3}, "hypergrid_rank"),
        ({"filip_temperature": 0.0}, "filip_temperature"),
        ({"interaction_norm": "zscore_bins", "interaction_norm_position": "pre"}, "interaction_norm_position"),
        ({"interaction_norm": "softmax_residue", "interaction": "mean"}, "softmax_residue"),
        ({"residue_dropout": 1.0}, "residue_dropout"),
    ],
    "genesplice_akita": [
        ({"stem_filters": 0}, "stem_filters"),
        ({"target_crop": -1}, "target_crop"),
        ({"dilated_kernel_size": 4}, "dilated_kernel_size"),
        ({"dilated_rate_mult": 0.5}, "dilated_rate_mult"),
        ({"tower_divisible_by": 64}, "tower_divisible_by"),
        ({"seq_length": 16, "target_crop": 2}, "seq_length"),
        ({"target_names": ["HFF"]}, "target_names"),
    ],
    "genesplice_scgpt": _EXPRESSION,
    "genesplice_bioformer": [
        *_EXPRESSION,
        ({"pair_hidden_size": 0}, "pair_hidden_size"),
        ({"pair_mode": "factorized"}, "pair_layer_norm"),
        ({"pair_mode": "factorized", "pair_layer_norm": False, "pair_init": "scalar_mlp"}, "pair_init"),
        ({"pair_mode": "factorized", "pair_layer_norm": False, "pair_transition": True}, "pair_transition"),
        ({"pair_mode": "factorized", "pair_layer_norm": False, "output_pair_states": True}, "output_pair_states"),
        ({"pair_init": "prior"}, "prior_channels"),
        ({"prior_channels": -1}, "prior_channels"),
        ({"pair_init": "scalar_mlp", "prior_channels": 2}, "one prior channel"),
    ],
    "genesplice_genegraph": [
        *_EXPRESSION,
        ({"pair_hidden_size": 0}, "pair_hidden_size"),
        ({"pair_mode": "factorized"}, "pair_layer_norm"),
        ({"pair_mode": "factorized", "pair_layer_norm": False, "pair_init": "scalar_mlp"}, "pair_init"),
        ({"pair_mode": "factorized", "pair_layer_norm": False, "pair_transition": True}, "pair_transition"),
        ({"pair_mode": "factorized", "pair_layer_norm": False, "output_pair_states": True}, "output_pair_states"),
        ({"pair_init": "prior"}, "prior_channels"),
        ({"prior_channels": -1}, "prior_channels"),
        ({"pair_init": "scalar_mlp", "prior_channels": 2}, "one prior channel"),
        ({"graph_num_heads": 3}, "graph_num_heads"),
        ({"graph_edge_channels": 0}, "graph_edge_channels"),
        ({"link_prediction_weight": -1.0}, "link_prediction_weight"),
        ({"pathway_contrastive_weight": -1.0}, "pathway_contrastive_weight"),
        ({"pathway_contrastive_weight": 0.1}, "`pathway_contrastive_weight` needs `num_pathways`"),
        ({"graph_attention_mode": "masked", "cls_token_id": None}, "cls_token_id"),
        ({"num_pathways": -1}, "num_pathways"),
        ({"use_pathway_tokens": True}, "num_pathways"),
        (_PATHWAYS | {"use_opm": True}, "pair representation"),
        (_PATHWAYS | {"graph_attention_mode": "bias", "pathway_mode": "only"}, "pathway_mode"),
        (_PATHWAYS | {"pathway_dim": 0}, "pathway_dim"),
        ({"gene_feature_size": -1}, "gene_feature_size"),
        ({"num_annotation_terms": 0}, "num_annotation_terms"),
    ],
}
