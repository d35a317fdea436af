"""Nucleotide Transformer v1 and AgroNT as their authors' JAX code (Haiku) names them, both ways.

The JAX checkpoints (`jax_model/pytree_ckpt.joblib`, a tree module -> parameter -> array) lie beside the ESM ones in
the published repositories; `hyperparams.json` is their config. Here: their names, and nothing of the ESM classes.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import EsmConfig

from genesplice_hf.errors import CheckpointError

# Module of Haiku, below the model's own name -> module of ESM; {} is the number of the layer.
MODULES = {
    "~/embed": "esm.embeddings.word_embeddings",
    "~/esm_learned_positional_embeddings/~/embed": "esm.embeddings.position_embeddings",
    "~/emb_layer_norm_before": "esm.embeddings.layer_norm",
    "attention_layer_{}/~/self_attention_layer_norm": "esm.encoder.layer.{}.attention.LayerNorm",
    "attention_layer_{}/~/self_attention/query": "esm.encoder.layer.{}.attention.self.query",
    "attention_layer_{}/~/self_attention/key": "esm.encoder.layer.{}.attention.self.key",
    "attention_layer_{}/~/self_attention/value": "esm.encoder.layer.{}.attention.self.value",
    "attention_layer_{}/~/self_attention/mha_output": "esm.encoder.layer.{}.attention.output.dense",
    "attention_layer_{}/~/final_layer_norm": "esm.encoder.layer.{}.LayerNorm",
    "attention_layer_{}/~/fc1": "esm.encoder.layer.{}.intermediate.dense",
    "attention_layer_{}/~/fc2": "esm.encoder.layer.{}.output.dense",
    "~/roberta_lm_head/~/emb_layer_norm_after": "esm.encoder.emb_layer_norm_after",
    "~/roberta_lm_head/~/lm_head_fc_1": "lm_head.dense",
    "~/roberta_lm_head/~/lm_head_layer_norm": "lm_head.layer_norm",
    "~/roberta_lm_head/~/lm_final_fc": "lm_head.decoder",
}
# How the published files spell what the code of today calls otherwise.
PUBLISHED_SPELLINGS = (
    ("/mha/", "/self_attention/"),
    ("/mha_layer_norm", "/self_attention_layer_norm"),
    ("/esm_roberta_lm_head/", "/roberta_lm_head/"),
)
PARAMETERS = {"w": "weight", "b": "bias", "scale": "weight", "offset": "bias", "embeddings": "weight"}
# The bias over the vocabulary has two names in ESM, one tensor.
FINAL_BIAS = ("lm_head.decoder.bias", "lm_head.bias")
# Field of theirs -> field of ESM's config.
FIELDS = {
    "alphabet_size": "vocab_size",
    "pad_token_id": "pad_token_id",
    "mask_token_id": "mask_token_id",
    "emb_layer_norm_before": "emb_layer_norm_before",
    "attention_heads": "num_attention_heads",
    "embed_dim": "hidden_size",
    "ffn_embed_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "token_dropout": "token_dropout",
    "layer_norm_eps": "layer_norm_eps",
}
# What ESM's classes have one value for only; a file that says otherwise is another model.
FIXED: dict[str, Any] = {
    "embed_scale": 1.0,
    "positional_embedding": "learned",
    "add_bias_kv": False,
    "add_bias_ffn": True,
    "use_rotary_embedding": False,
    "use_glu_in_ffn": False,
    "ffn_activation_name": "gelu-no-approx",
    "pre_layer_norm": True,
}
NEEDED = ("attention_heads", "embed_dim", "ffn_embed_dim", "num_layers", "max_positions")
# Share of tokens masked in training, which ESM's token dropout has written into its code: 0.15 of them, 0.8 by a mask.
MASKED_SHARE = {"masking_ratio": 0.15, "masking_prob": 0.8}
# Tokens beside the 4^k words of a k-mer vocabulary: 4 special ones and the single bases A, T, C, G, N.
EXTRA_TOKENS = 9
NAME = "nucleotide_transformer"
# Every name of a config that is understood; what the last ones ask for has no effect on a number.
KNOWN = {*FIELDS, *NEEDED, *FIXED, *MASKED_SHARE, "k_for_kmers", "key_dim", "key_size", "use_gradient_checkpointing"}


def is_haiku(names: Iterable[str]) -> bool:
    """Whether these are names of Haiku's modules."""
    return any("/~/" in name for name in names)


def is_haiku_config(config: Mapping[str, Any]) -> bool:
    """Whether a config has the names of `hyperparams.json` (or of the arguments of the JAX config)."""
    return "embed_dim" in config and "hidden_size" not in config


def esm_fields(original: Mapping[str, Any]) -> dict[str, Any]:
    """ESM's config fields of the JAX hyperparameters.

    Raises:
        CheckpointError: a field that is needed is missing, or a value that ESM's classes cannot have.
    """
    missing = [name for name in NEEDED if name not in original]
    if missing:
        raise CheckpointError(f"nt_v1's hyperparameters lack {', '.join(missing)}; see its hyperparams.json.")
    _demand_esm(original)
    values = {"pad_token_id": 1, "mask_token_id": 2, "layer_norm_eps": 1e-5, **original}
    values.setdefault("alphabet_size", 4 ** int(original.get("k_for_kmers", 6)) + EXTRA_TOKENS)
    return {
        **{ours: values[theirs] for theirs, ours in FIELDS.items() if theirs in values},
        # The table starts with rows for the ids up to padding.
        "max_position_embeddings": values["max_positions"] + values["pad_token_id"] + 1,
        "position_embedding_type": "absolute",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": False,
    }


def haiku_fields(config: EsmConfig) -> dict[str, Any]:
    """The arguments of the JAX config; those that the checkpoint came with, if it came from there."""
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    fields |= {"max_positions": config.max_position_embeddings - config.pad_token_id - 1} | FIXED | MASKED_SHARE
    recorded = (getattr(config, "conversion", None) or {}).get("hyperparameters")
    return {name: fields.get(name, recorded[name]) for name in recorded} if recorded else fields


def to_esm_names(tree: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """ESM's tensors of a tree module -> parameter -> array, or of its flat form `module/parameter` -> array.

    Haiku multiplies from the left, (in, out); torch keeps (out, in). Names that nobody knows stay as they are.
    """
    found = {_esm_name(key): _turned(_tensor(value), key) for key, value in flat(tree).items()}
    return {FINAL_BIAS[1] if name == FINAL_BIAS[0] else name: tensor for name, tensor in found.items()}


def to_haiku_names(tensors: Mapping[str, torch.Tensor], model_name: str = NAME) -> dict[str, torch.Tensor]:
    """The flat form of the tree that `to_esm_names` reads, without the contact head, which the JAX code does not have.

    Raises:
        CheckpointError: a tensor that has an effect and no place there (a classifier's).
    """
    names = {key: _haiku_name(FINAL_BIAS[0] if key in FINAL_BIAS else key) for key in tensors}
    homeless = [key for key, name in names.items() if name is None and "contact_head." not in key]
    if homeless:
        raise CheckpointError(f"Haiku's layout of nt_v1 has no place for {', '.join(homeless)}; use `layout='hub'`.")
    return {f"{model_name}/{name}": _turned(tensors[key], name) for key, name in names.items() if name is not None}


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`module/parameter` -> array of a tree that is two deep, or flat already."""
    found: dict[str, Any] = {}
    for module, value in tree.items():
        found |= (
            {f"{module}/{name}": leaf for name, leaf in value.items()}
            if isinstance(value, Mapping)
            else {module: value}
        )
    return found


def _tensor(value: Any) -> torch.Tensor:
    # Through numpy, which also understands arrays of JAX; a copy, for those cannot be written to.
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))


def _turned(tensor: torch.Tensor, name: str) -> torch.Tensor:
    is_linear = name.endswith("/w") and tensor.ndim == 2
    return (tensor.T if is_linear else tensor).detach().clone(memory_format=torch.contiguous_format)


def _demand_esm(original: Mapping[str, Any]) -> None:
    for name, value in (FIXED | (MASKED_SHARE if original.get("token_dropout") else {})).items():
        if original.get(name, value) != value:
            raise CheckpointError(
                f"`{name}` must be {value!r} for nt_v1, got {original[name]!r}: another architecture."
            )
    key_size = original.get("key_dim", original.get("key_size"))
    if key_size not in (None, original["embed_dim"] // original["attention_heads"]):
        raise CheckpointError(f"`key_dim` must be embed_dim / attention_heads for nt_v1, got {key_size}.")


def _esm_name(key: str) -> str:
    for published, today in PUBLISHED_SPELLINGS:
        key = key.replace(published, today)
    module, _, parameter = key.partition("/")[2].rpartition("/")
    layer = re.match(r"attention_layer_(\d+)/", module)
    number = layer[1] if layer else ""
    pattern = module.replace(f"attention_layer_{number}/", "attention_layer_{}/", 1) if layer else module
    if pattern not in MODULES or parameter not in PARAMETERS:
        return key
    return f"{MODULES[pattern].format(number)}.{PARAMETERS[parameter]}"


def _haiku_name(key: str) -> str | None:
    module, _, parameter = key.rpartition(".")
    layer = re.search(r"\.layer\.(\d+)\.", module)
    pattern = module.replace(layer[0], ".layer.{}.") if layer else module
    for theirs, ours in MODULES.items():
        if ours == pattern:
            return f"{theirs.format(layer[1] if layer else '')}/{_haiku_parameter(theirs, parameter)}"
    return None


def _haiku_parameter(module: str, parameter: str) -> str:
    if module.endswith("/embed"):
        return "embeddings"
    is_norm = "norm" in module.rpartition("/")[2]
    return {"weight": "scale", "bias": "offset"}[parameter] if is_norm else parameter[0]
