"""The past of DNABERT-2 and DNABERT-S: configs and tensors of the published MosaicBERT code, both ways.

Published configs say `bert` and carry fields of BERT without a meaning here; DNABERT-S publishes a base model, whose
tensors have no `bert.` before their names.
"""

import re
from typing import Any

import torch
from transformers import PreTrainedModel

from genesplice_hf.errors import CheckpointError
from genesplice_hf.layers.tied_weights import fill_tied, modern_name
from genesplice_hf.models.dnabert2.configuration_dnabert2 import MEANINGLESS, DNABERT2Config
from genesplice_hf.models.dnabert2.modeling_dnabert2 import (
    DNABERT2ForMaskedLM,
    DNABERT2ForSequenceClassification,
    DNABERT2ForTokenClassification,
)
from genesplice_hf.models.dnabert2.modeling_dnabert2_base import DNABERT2Model

# Fields of the same name on both sides.
SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size", "alibi_starting_size",
    "initializer_range", "classifier_dropout", "tie_word_embeddings",
)  # fmt: skip
# What the published config class assumes where a config.json is silent, and ours does not: BERT's sizes.
DEFAULTS = {"vocab_size": 30522}
# The published config's padding id is not that of its tokenizer, and nothing here depends on it.
PUBLISHED_PAD_TOKEN_ID = 0

ENCODER, LM_HEAD, CLASSIFIER, POOLER = "bert.", "cls.", "classifier.", "bert.pooler."
OURS = "dnabert2."
# Modules of a layer, of the rest, and of the heads: theirs -> ours.
LAYER = {
    "attention.self.Wqkv": "attention.Wqkv",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "mlp.gated_layers": "mlp.gated_layers",
    "mlp.wo": "mlp.wo",
    "mlp.layernorm": "mlp_norm",
}
OUTSIDE = {
    "bert.embeddings.word_embeddings": "word_embeddings",
    "bert.embeddings.token_type_embeddings": "token_type_embeddings",
    "bert.embeddings.LayerNorm": "embedding_norm",
}
HEADS = {
    "cls.predictions.transform.dense": "lm_head.dense",
    "cls.predictions.transform.LayerNorm": "lm_head.norm",
    "cls.predictions.decoder": "lm_head.decoder",
    "bert.pooler.dense": "classifier.pooler",
    "classifier": "classifier.out_proj",
}
_LAYER_KEY = re.compile(r"bert\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
_OUR_LAYER_KEY = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")


class DNABERT2Source:
    """Source `dnabert2` of `from_original`."""

    name = "dnabert2"
    model_type = DNABERT2Config.model_type
    # Published config.json files say `bert`, which is transformers' own.
    original_types: tuple[str, ...] = ()
    classes: dict[str, type[PreTrainedModel]] = {
        "base": DNABERT2Model,
        "masked_lm": DNABERT2ForMaskedLM,
        "sequence_classification": DNABERT2ForSequenceClassification,
        "token_classification": DNABERT2ForTokenClassification,
    }
    inputs: tuple[str, ...] = ()

    @staticmethod
    def task(state_dict: dict[str, torch.Tensor]) -> str:
        """The task whose head the tensors hold."""
        return "masked_lm" if any(key.startswith(LM_HEAD) for key in state_dict) else "base"

    @staticmethod
    def config(original: dict[str, Any], options: dict[str, Any]) -> tuple[DNABERT2Config, set[str]]:
        """Our config, and the names of theirs that were understood; `options` are fields of ours."""
        fields = DEFAULTS | {name: original[name] for name in SHARED if original.get(name) is not None}
        kept = {name: original[name] for name in (*MEANINGLESS, "pad_token_id") if name in original}
        pooling = {"asked_pooling": options["classifier_pooling"]} if "classifier_pooling" in options else {}
        fields["conversion"] = {"published_fields": kept} | pooling
        return DNABERT2Config(**(fields | options)), {*SHARED, *MEANINGLESS, "pad_token_id"}

    @staticmethod
    def tensors(
        state_dict: dict[str, torch.Tensor], config: DNABERT2Config, task: str
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """(our tensors, keys that another task's head owns).

        A classifier with its pooler sets `classifier_pooling` to "pooler", unless another one was asked for.
        """
        bare = not any(key.startswith(ENCODER) for key in state_dict)
        conversion = {**(config.conversion or {}), "prefix": "" if bare else ENCODER}
        asked = conversion.pop("asked_pooling", None)
        full = {key: _with_prefix(key) if bare else key for key in state_dict}
        named = {modern_name(full[key]): (key, tensor) for key, tensor in state_dict.items()}
        has_pooler = {f"{POOLER}dense.weight", "classifier.weight"} <= named.keys()
        if task == "sequence_classification" and has_pooler and asked is None and config.classifier_pooling == "mean":
            config.classifier_pooling = "pooler"
        config.conversion = conversion
        found, ignored = {}, []
        for key, (given, tensor) in named.items():
            if _is_of_another_head(key, task, config.classifier_pooling):
                ignored.append(given)
            else:
                found[our_key(key, task)] = tensor
        if task == "masked_lm":
            fill_tied(found, config, DNABERT2ForMaskedLM._tied_weights_keys)
        return found, sorted(ignored)

    @staticmethod
    def original(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Their config and state dict.

        Raises:
            CheckpointError: a classifier that does not read the pooler, which the published one does.
        """
        config: DNABERT2Config = model.config
        if isinstance(model, DNABERT2ForSequenceClassification) and config.classifier_pooling != "pooler":
            raise CheckpointError(
                "the published classifier reads the pooler, and this one has `classifier_pooling`="
                f"{config.classifier_pooling!r}; convert its base model."
            )
        conversion = config.conversion or {}
        fields = {name: getattr(config, name) for name in SHARED}
        fields |= conversion.get("published_fields", {"pad_token_id": PUBLISHED_PAD_TOKEN_ID})
        if isinstance(model, DNABERT2ForSequenceClassification | DNABERT2ForTokenClassification):
            fields["num_labels"] = config.num_labels
        tensors = {original_key(key): tensor.detach().clone() for key, tensor in model.state_dict().items()}
        if isinstance(model, DNABERT2Model) and conversion.get("prefix", "") == "":
            tensors = {key.removeprefix(ENCODER): tensor for key, tensor in tensors.items()}
        return fields, tensors

    @staticmethod
    def original_key(key: str) -> str:
        """The published name of one of our tensors, for messages."""
        return original_key(key)


def our_key(key: str, task: str) -> str:
    """Our name of a published tensor; what nobody knows keeps its own."""
    prefix = "" if task == "base" else OURS
    if (found := _LAYER_KEY.fullmatch(key)) and found[2] in LAYER:
        return f"{prefix}layers.{found[1]}.{LAYER[found[2]]}.{found[3]}"
    module, _, kind = key.rpartition(".")
    if module in OUTSIDE:
        return f"{prefix}{OUTSIDE[module]}.{kind}"
    return f"{HEADS[module]}.{kind}" if module in HEADS else key


def original_key(key: str) -> str:
    """The published name of one of our tensors; the inverse of `our_key` for every task."""
    inner = key.removeprefix(OURS)
    layer = {ours: theirs for theirs, ours in LAYER.items()}
    if (found := _OUR_LAYER_KEY.fullmatch(inner)) and found[2] in layer:
        return f"{ENCODER}encoder.layer.{found[1]}.{layer[found[2]]}.{found[3]}"
    module, _, kind = inner.rpartition(".")
    others = {ours: theirs for theirs, ours in (OUTSIDE | HEADS).items()}
    return f"{others[module]}.{kind}" if module in others else key


def _with_prefix(key: str) -> str:
    return key if key.startswith((LM_HEAD, CLASSIFIER)) else ENCODER + key


def _is_of_another_head(key: str, task: str, pooling: str) -> bool:
    if key.rpartition(".")[0] not in HEADS:
        return False
    if key.startswith(LM_HEAD):
        return task != "masked_lm"
    if key.startswith(POOLER):
        return task != "sequence_classification" or pooling != "pooler"
    return "classification" not in task


SOURCES = (DNABERT2Source,)
