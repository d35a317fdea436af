"""The past of the Nucleotide Transformer v2: its published configs and tensors, which follow ESM, both ways.

Published files hold tensors that the network never reads: a table of learned positions beside the rotary ones, and a
contact head. They are left out on the way in and are zeros on the way out.
"""

import re
from typing import Any

import torch
from transformers import PreTrainedModel

from genesplice_hf.errors import CheckpointError
from genesplice_hf.layers.tied_weights import fill_tied, modern_name
from genesplice_hf.models.nucleotide_transformer_v2.configuration_nucleotide_transformer_v2 import (
    PUBLISHED_BIAS_FIELD,
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

# The epsilon that the original code adds in every norm.
ORIGINAL_EPS = 1e-5
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# What the published config class assumes where a config.json is silent, and ours does not.
DEFAULTS = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 1026}
# Fields of the same name on both sides.
SHARED = (
    *SIZES, "max_position_embeddings", "position_embedding_type", "token_dropout", "emb_layer_norm_before",
    "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "pad_token_id",
    "mask_token_id", "tie_word_embeddings", "rope_theta",
)  # fmt: skip
# The reference has rotary base 10000 and no name for it.
_OURS_ONLY = ("rope_theta",)

ENCODER, HEAD, CLASSIFIER = "esm.", "lm_head.", "classifier."
OURS = "nucleotide_transformer_v2."
# Modules of a layer, of the rest, and of the heads: theirs -> ours.
LAYER = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.input",
    "output.dense": "feed_forward.output",
    "LayerNorm": "feed_forward_norm",
}
OUTSIDE = {
    "embeddings.word_embeddings": "embeddings",
    "embeddings.layer_norm": "embedding_norm",
    "encoder.emb_layer_norm_after": "final_norm",
}
HEADS = {
    "lm_head.dense.weight": "lm_head.dense.weight",
    "lm_head.dense.bias": "lm_head.dense.bias",
    "lm_head.layer_norm.weight": "lm_head.norm.weight",
    "lm_head.layer_norm.bias": "lm_head.norm.bias",
    "lm_head.decoder.weight": "lm_head.decoder.weight",
    "lm_head.bias": "lm_head.decoder.bias",
    "classifier.weight": "classifier.out_proj.weight",
    "classifier.bias": "classifier.out_proj.bias",
}
POSITIONS = "esm.embeddings.position_embeddings.weight"
NEVER_USED = (POSITIONS, "esm.contact_head.regression.weight", "esm.contact_head.regression.bias")
POSITION_IDS = "esm.embeddings.position_ids"
_FREQUENCIES = re.compile(r"esm\.encoder\.layer\.\d+\.attention\.self\.rotary_embeddings\.inv_freq")
_LAYER_KEY = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
_OUR_LAYER_KEY = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")


class NucleotideTransformerV2Source:
    """Source `nt_v2`; option `layer_norm_eps`: "config" (what the file says), "original" (1e-5) or a number."""

    name = "nt_v2"
    model_type = NucleotideTransformerV2Config.model_type
    # Published config.json files name no type.
    original_types: tuple[str, ...] = ()
    classes: dict[str, type[PreTrainedModel]] = {
        "base": NucleotideTransformerV2Model,
        "masked_lm": NucleotideTransformerV2ForMaskedLM,
        "sequence_classification": NucleotideTransformerV2ForSequenceClassification,
        "token_classification": NucleotideTransformerV2ForTokenClassification,
    }
    inputs: tuple[str, ...] = ()

    @staticmethod
    def task(state_dict: dict[str, torch.Tensor]) -> str:
        """The task whose head the tensors hold."""
        return "masked_lm" if any(key.startswith(HEAD) for key in state_dict) else "base"

    @staticmethod
    def config(original: dict[str, Any], options: dict[str, Any]) -> tuple[NucleotideTransformerV2Config, set[str]]:
        """Our config, and the names of theirs that were understood; `options` are fields of ours."""
        missing = [name for name in SIZES if original.get(name) is None]
        if missing:
            raise CheckpointError(f"`config` lacks {', '.join(missing)}; pass the config.json of the checkpoint.")
        if original.get("position_embedding_type", "rotary") != "rotary":
            raise CheckpointError(
                f"`position_embedding_type` must be 'rotary' for 'nt_v2', got "
                f"{original['position_embedding_type']!r}; for learned positions use source 'nt_v1'."
            )
        fields = DEFAULTS | {name: original[name] for name in SHARED if original.get(name) is not None}
        fields["add_bias_ffn"] = bool(original.get(PUBLISHED_BIAS_FIELD, original.get("add_bias_ffn", False)))
        options = dict(options)
        eps = options.pop("layer_norm_eps", "config")
        if eps != "config":
            options["layer_norm_eps"] = _eps(eps)
            fields["conversion"] = {"layer_norm_eps": original.get("layer_norm_eps", fields.get("layer_norm_eps"))}
        known = {*SHARED, PUBLISHED_BIAS_FIELD, "add_bias_ffn"}
        return NucleotideTransformerV2Config(**(fields | options)), known

    @staticmethod
    def tensors(
        state_dict: dict[str, torch.Tensor], config: NucleotideTransformerV2Config, task: str
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """(our tensors, keys that have no effect or that another task's head owns)."""
        bare = not any(key.startswith(ENCODER) for key in state_dict)
        full = {key: _with_prefix(key) if bare else key for key in state_dict}
        named = {modern_name(full[key]): (key, tensor) for key, tensor in state_dict.items()}
        found, ignored = {}, []
        for key, (given, tensor) in named.items():
            if _has_no_effect(key, tensor, config) or _is_of_another_head(key, task):
                ignored.append(given)
            else:
                found[our_key(key, task)] = tensor
        if task == "masked_lm":
            fill_tied(found, config, NucleotideTransformerV2ForMaskedLM._tied_weights_keys)
        config.conversion = {**(config.conversion or {}), "prefix": "" if bare else ENCODER}
        return found, sorted(ignored)

    @staticmethod
    def original(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Their config and state dict; what the reference never reads is zeros.

        Raises:
            CheckpointError: the model has a head or positions that the published architecture lacks.
        """
        config: NucleotideTransformerV2Config = model.config
        if isinstance(model, NucleotideTransformerV2ForSequenceClassification):
            raise CheckpointError(f"the published architecture has no {type(model).__name__}; convert its base model.")
        if config.rope_theta != NucleotideTransformerV2Config.rope_theta:
            raise CheckpointError(f"`rope_theta` is 10000 in the published architecture, not {config.rope_theta}.")
        conversion = config.conversion or {}
        fields = {name: getattr(config, name) for name in SHARED if name not in _OURS_ONLY}
        fields |= {PUBLISHED_BIAS_FIELD: config.add_bias_ffn}
        fields |= {name: conversion[name] for name in ("layer_norm_eps",) if name in conversion}
        if isinstance(model, NucleotideTransformerV2ForTokenClassification):
            fields["num_labels"] = config.num_labels
        prefix = conversion.get("prefix", ENCODER) if isinstance(model, NucleotideTransformerV2Model) else ENCODER
        tensors = {original_key(key): tensor.detach().clone() for key, tensor in model.state_dict().items()}
        tensors |= _filling(config, conversion.get("ignored_keys"), isinstance(model, NucleotideTransformerV2Model))
        return fields, {key if prefix else key.removeprefix(ENCODER): tensor for key, tensor in tensors.items()}

    @staticmethod
    def original_key(key: str) -> str:
        """The published name of one of our tensors, for messages."""
        return original_key(key)


def our_key(key: str, task: str) -> str:
    """Our name of a published tensor; what nobody knows keeps its own."""
    if key in HEADS:
        return HEADS[key]
    inner, prefix = key.removeprefix(ENCODER), "" if task == "base" else OURS
    if (found := _LAYER_KEY.fullmatch(inner)) and found[2] in LAYER:
        return f"{prefix}layers.{found[1]}.{LAYER[found[2]]}.{found[3]}"
    module, _, kind = inner.rpartition(".")
    return f"{prefix}{OUTSIDE[module]}.{kind}" if module in OUTSIDE else key


def original_key(key: str) -> str:
    """The published name of one of our tensors; the inverse of `our_key` for every task."""
    heads = {ours: theirs for theirs, ours in HEADS.items()}
    if key in heads:
        return heads[key]
    inner = key.removeprefix(OURS)
    layer = {ours: theirs for theirs, ours in LAYER.items()}
    if (found := _OUR_LAYER_KEY.fullmatch(inner)) and found[2] in layer:
        return f"{ENCODER}encoder.layer.{found[1]}.{layer[found[2]]}.{found[3]}"
    module, _, kind = inner.rpartition(".")
    outside = {ours: theirs for theirs, ours in OUTSIDE.items()}
    return f"{ENCODER}{outside[module]}.{kind}" if module in outside else key


def _eps(given: Any) -> float:
    if given == "original":
        return ORIGINAL_EPS
    if isinstance(given, bool) or not isinstance(given, int | float) or given <= 0:
        raise CheckpointError(f"`layer_norm_eps` must be 'config', 'original' or a number > 0, got {given!r}.")
    return float(given)


def _with_prefix(key: str) -> str:
    return key if key.startswith((HEAD, CLASSIFIER)) else ENCODER + key


def _has_no_effect(key: str, tensor: torch.Tensor, config: NucleotideTransformerV2Config) -> bool:
    if not _FREQUENCIES.fullmatch(key):
        return key in (*NEVER_USED, POSITION_IDS)
    expected = _frequencies(config)
    rounding = max(1e-6, torch.finfo(tensor.dtype).eps)
    if tensor.shape != expected.shape or not torch.allclose(tensor.float(), expected, rtol=rounding, atol=0):
        raise CheckpointError(
            f"{key} does not hold the rotary frequencies of `rope_theta` {config.rope_theta} and heads of "
            f"{config.head_dim}; pass the base that these tensors were trained with as `rope_theta`."
        )
    return True


def _frequencies(config: NucleotideTransformerV2Config) -> torch.Tensor:
    """In the steps of the reference, so that they come out bit for bit."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    return 1.0 / (config.rope_theta**exponent)


def _is_of_another_head(key: str, task: str) -> bool:
    if key.startswith(HEAD):
        return task != "masked_lm" and key in HEADS
    return key.startswith(CLASSIFIER) and "classification" not in task


def _filling(
    config: NucleotideTransformerV2Config, ignored: list[str] | None, is_base: bool
) -> dict[str, torch.Tensor]:
    """Tensors without effect: those that were read, or all that the published class has."""
    heads = config.num_hidden_layers * config.num_attention_heads
    shapes = dict(
        zip(NEVER_USED, ((config.max_position_embeddings, config.hidden_size), (1, heads), (1,)), strict=True)
    )
    filling = {key: torch.zeros(shape) for key, shape in shapes.items()}
    for layer in range(config.num_hidden_layers):
        filling[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"] = _frequencies(config)
    if ignored is None:
        return filling
    filling[POSITION_IDS] = torch.arange(config.max_position_embeddings)[None]
    read = {_with_prefix(key) if is_base and not key.startswith(ENCODER) else key for key in ignored}
    return {key: tensor for key, tensor in filling.items() if key in read}


SOURCES = (NucleotideTransformerV2Source,)
