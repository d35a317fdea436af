"""The past of GPN: configs and state dicts of songlab-cal/gpn, both ways.

`gpn_convnet` is the legacy `ConvNet` (`gpn/legacy.py`), `gpn` the model with a choice of encoders (`gpn/model.py`).
Their modules are numbered places in sequences. Files of a base model have no `model.` before their keys.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from genesplice_hf.errors import CheckpointError
from genesplice_hf.layers.key_maps import ROFORMER_LAYER, demand_keys, demand_table, inverted, rename, renamed
from genesplice_hf.layers.roformer import position_table
from genesplice_hf.models.gpn.configuration_gpn import GPNConfig
from genesplice_hf.models.gpn.modeling_gpn import (
    GPNForMaskedLM,
    GPNForSequenceClassification,
    GPNForTokenClassification,
)
from genesplice_hf.models.gpn.modeling_gpn_base import GPNModel

BASE = "model."
HEADS = ("cls.", "classifier.")
TABLE = "model.encoder.embed_positions.weight"

# Name of a field there and here, where both have it.
_SHARED = ("vocab_size", "hidden_size", "n_aux_features", "aux_features_vocab_size", "hidden_dropout_prob",
           "hidden_act", "dilation_double_every", "dilation_max", "dilation_cycle", "dilation_base",
           "regression_softplus", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
LEGACY_FIELDS = {name: name for name in (*_SHARED, "kernel_size")} | {"n_layers": "num_hidden_layers"}
# `layer_norm_eps` there is that of RoFormer's layers; the others have torch's default.
FIELDS = {
    name: name
    for name in (*_SHARED, "embedding", "encoder", "num_hidden_layers", "intermediate_size", "bias",
                 "mlm_head_transform", "slim", "first_kernel_size", "rest_kernel_size", "depthwise",
                 "classification_head", "pos_weight", "num_attention_heads", "max_position_embeddings",
                 "rotary_value", "attention_probs_dropout_prob", "tie_word_embeddings")
} | {"layer_norm_eps": "roformer_layer_norm_eps"}  # fmt: skip

# Places of a layer there -> our names.
LEGACY_LAYER = {"conv.1": "conv", "conv.4": "conv_norm", "ffn.0": "ffn", "ffn.2": "ffn_norm"}
LAYERS = {
    "convnet": {
        "conv.0": "conv_norm", "conv.2": "dilated_conv", "conv.5": "conv_proj",
        "ffn.0": "ffn_norm", "ffn.1": "ffn_in", "ffn.3": "ffn_out",
    },
    "bytenet": {
        "layer.0": "norm_in", "layer.2": "proj_in", "layer.3": "norm_mid", "layer.6": "dilated_conv",
        "layer.8": "norm_out", "layer.10": "proj_out",
    },
    "roformer": ROFORMER_LAYER,
}  # fmt: skip
LEGACY_LM_HEAD = {
    "cls.decoder.0": "lm_head.dense",
    "cls.decoder.2": "lm_head.norm",
    "cls.decoder.3": "lm_head.decoder",
}
LM_HEAD = {"cls.transform.0": "lm_head.dense", "cls.transform.2": "lm_head.norm", "cls.decoder": "lm_head.decoder"}
_MLP = {"layer.0": "norm", "layer.1": "up", "layer.3": "down", "shortcut": "shortcut"}
_CNN = {"layer.0": "norm", "layer.2": "taps", "layer.5": "down", "shortcut": "shortcut"}
CLASSIFIERS: dict[str, dict[str, str]] = {
    "standard": {"ln": "norm", "dense": "dense", "out_proj": "final"},
    "lightweight_mlp": {
        **{f"{part}.{theirs}": f"{part}.{ours}" for part in ("mlp1", "mlp2") for theirs, ours in _MLP.items()},
        "ln": "norm", "final": "final",
    },
    "lightweight_cnn": {
        **{f"{part}.{theirs}": f"{part}.{ours}" for part in ("conv1", "conv2") for theirs, ours in _CNN.items()},
        **{f"mlp.{theirs}": f"mlp.{ours}" for theirs, ours in _MLP.items()},
        "ln": "norm", "final": "final",
    },
}  # fmt: skip


class _GPNSource:
    """What both sources share."""

    model_type = GPNConfig.model_type
    inputs: tuple[str, ...] = ()
    original_types: tuple[str, ...] = ()
    name: str
    layout: str
    fields: dict[str, str]
    classes: dict[str, type[PreTrainedModel]]

    @staticmethod
    def task(state_dict: dict[str, torch.Tensor]) -> str:
        """The task whose head the tensors hold."""
        if any(key.startswith("cls.") for key in state_dict):
            return "masked_lm"
        if "classifier.weight" in state_dict:
            return "token_classification"
        return "sequence_classification" if any(key.startswith("classifier.") for key in state_dict) else "base"

    @classmethod
    def config(cls, original: dict[str, Any], options: dict[str, Any]) -> tuple[GPNConfig, set[str]]:
        """Our config, and the names of theirs that were understood; `options` are fields of ours."""
        fields: dict[str, Any] = {ours: original[theirs] for theirs, ours in cls.fields.items() if theirs in original}
        labels, known = _labels(original)
        fields |= labels | {"layout": cls.layout} | options
        return GPNConfig(**fields), known | set(cls.fields)

    @classmethod
    def tensors(
        cls, state_dict: dict[str, torch.Tensor], config: GPNConfig, task: str
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """(our tensors, keys that another task's head owns).

        Raises:
            CheckpointError: lists missing, unexpected and mis-shaped keys under their names; a table of positions
                with other than the standard values.
        """
        foreign = tuple(head for head in HEADS if head != _head_of(task))
        ignored = sorted(key for key in state_dict if key.startswith(foreign))
        own = {_with_prefix(key): tensor for key, tensor in state_dict.items() if key not in ignored}
        modules = module_map(config, task)
        with torch.device("meta"):
            ours = cls.classes[task](config).state_dict()
        needed = {rename(key, inverted(modules)): tensor.shape for key, tensor in ours.items()}
        if config.encoder == "roformer":
            needed[TABLE] = position_table(config).shape
        if task == "token_classification" and config.num_labels == 2:
            own = _two_labels(own)
        demand_keys(own, needed, cls.name)
        if config.encoder == "roformer":
            demand_table(TABLE, own.pop(TABLE), position_table(config))
        return renamed(own, modules), ignored

    @classmethod
    def original(cls, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Their config and state dict.

        Raises:
            CheckpointError: the reference has no such head.
        """
        config: Any = model.config
        source: type[_GPNSource] = ConvNetSource if config.layout == "legacy" else GPNSource
        task = next((task for task, kind in source.classes.items() if type(model) is kind), None)
        if task is None:
            raise CheckpointError(f"{source.name!r} has no head like {type(model).__name__}.")
        original = {theirs: getattr(config, ours) for theirs, ours in source.fields.items()}
        original |= {"model_type": source.original_types[0], "architectures": [_class_name(source, task)]}
        if "classification" in task:
            original |= {"id2label": config.id2label, "label2id": config.label2id, "problem_type": config.problem_type}
        tensors = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
        tensors = renamed(tensors, inverted(module_map(config, task)))
        if config.encoder == "roformer":
            tensors[TABLE] = position_table(config).to(model.dtype)
        if task == "token_classification" and config.num_labels == 2:
            for key in ("classifier.weight", "classifier.bias"):
                tensors[key] = tensors[key][1:] - tensors[key][:1]
        if task == "base":
            tensors = {key.removeprefix(BASE): tensor for key, tensor in tensors.items()}
        return original, tensors


class ConvNetSource(_GPNSource):
    """Source `gpn_convnet` of `from_original`: the legacy ConvNet, such as `songlab/gpn-brassicales`."""

    name = "gpn_convnet"
    layout = "legacy"
    original_types: tuple[str, ...] = ("ConvNet",)
    fields = LEGACY_FIELDS
    classes: dict[str, type[PreTrainedModel]] = {
        "base": GPNModel,
        "masked_lm": GPNForMaskedLM,
        "sequence_classification": GPNForSequenceClassification,
    }


class GPNSource(_GPNSource):
    """Source `gpn` of `from_original`: GPN with a convnet, bytenet or roformer encoder."""

    name = "gpn"
    layout = "v2"
    original_types: tuple[str, ...] = ("GPN",)
    fields = FIELDS
    classes: dict[str, type[PreTrainedModel]] = ConvNetSource.classes | {
        "token_classification": GPNForTokenClassification
    }


def module_map(config: GPNConfig, task: str) -> dict[str, str]:
    """Every module of theirs -> ours, for one model."""
    prefix = "" if task == "base" else "gpn."
    return {theirs: prefix + ours for theirs, ours in _base_modules(config)} | _head_modules(config, task)


def _base_modules(config: GPNConfig) -> Iterator[tuple[str, str]]:
    yield "model.embeddings.word_embeddings", "embeddings"
    yield "model.ln_f", "final_norm"
    is_legacy = config.layout == "legacy"
    for index in range(config.num_hidden_layers):
        place = f"model.encoder.{index}" if is_legacy else f"model.encoder.layer.{index}"
        for theirs, ours in (LEGACY_LAYER if is_legacy else LAYERS[config.encoder]).items():
            yield f"{place}.{theirs}", f"layers.{index}.{ours}"


def _head_modules(config: GPNConfig, task: str) -> dict[str, str]:
    if task == "masked_lm":
        return LEGACY_LM_HEAD if config.layout == "legacy" else LM_HEAD
    if task == "sequence_classification":
        parts = CLASSIFIERS[config.classification_head]
        return {f"classifier.{theirs}": f"classifier.{ours}" for theirs, ours in parts.items()}
    return {"classifier": "classifier.out_proj"} if task == "token_classification" else {}


def _labels(original: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """What the config says of labels, with numbers as ids (JSON makes them text)."""
    names = {"id2label", "label2id", "num_labels", "problem_type"}
    fields = {name: original[name] for name in names if original.get(name) is not None}
    if "id2label" in fields:
        fields["id2label"] = {int(index): label for index, label in fields["id2label"].items()}
        fields.pop("num_labels", None)
    return fields, names


def _head_of(task: str) -> str | None:
    return {"masked_lm": "cls.", "base": None}.get(task, "classifier.")


def _with_prefix(key: str) -> str:
    return key if key.startswith((BASE, *HEADS)) else BASE + key


def _two_labels(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their one logit of a binary classifier as the second of two, beside a first that is 0."""
    return {
        key: torch.cat([torch.zeros_like(tensor), tensor]) if key.startswith("classifier.") else tensor
        for key, tensor in tensors.items()
    }


def _class_name(source: type[_GPNSource], task: str) -> str:
    suffixes = {"base": "Model", "masked_lm": "ForMaskedLM", "sequence_classification": "ForSequenceClassification"}
    return source.original_types[0] + suffixes.get(task, "ForTokenClassification")


SOURCES = (ConvNetSource, GPNSource)
