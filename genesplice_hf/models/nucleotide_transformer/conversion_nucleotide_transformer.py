"""Nucleotide Transformer v1 and AgroNT in transformers' ESM classes, both ways (Dalla-Torre et al. 2024).

The published tensor names are those of ESM already. What is left: the epsilon of the LayerNorms, where the published
configs (1e-12) differ from the code that trained the models (1e-5), parts that no output here depends on, and the
JAX checkpoints that lie beside the others (`haiku_names.py`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import EsmConfig, PreTrainedConfig, PreTrainedModel

from genesplice_hf.errors import CheckpointError
from genesplice_hf.layers.tied_weights import fill_tied, modern_name
from genesplice_hf.layers.transformers_classes import TransformersClasses
from genesplice_hf.models.nucleotide_transformer import haiku_names

# Haiku's default, with which the models were trained.
ORIGINAL_EPS = 1e-5
BODY = "esm."
HEADS = {"masked_lm": "lm_head.", "sequence_classification": "classifier.", "token_classification": "classifier."}
CONTACT_HEAD = ("contact_head.regression.weight", "contact_head.regression.bias")
NEVER_USED = ("embeddings.position_ids",)
POOLER = "pooler."
FIELDS = set(EsmConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
# What else of a config.json the way back gives, where it stood there.
STANDARD = {"architectures", "id2label", "label2id", "model_type", "num_labels", "problem_type"}


class NucleotideTransformerSource:
    """Source `nt_v1` of `from_original`; `layer_norm_eps` is "config", "original" (1e-5) or a number."""

    name = "nt_v1"
    model_type = EsmConfig.model_type
    classes: Mapping[str, type[PreTrainedModel]] = TransformersClasses(
        base="EsmModel",
        masked_lm="EsmForMaskedLM",
        sequence_classification="EsmForSequenceClassification",
        token_classification="EsmForTokenClassification",
    )
    inputs: tuple[str, ...] = ()
    # transformers' own type: AutoModel loads the published folders as it always did.
    original_types: tuple[str, ...] = ()

    @staticmethod
    def task(state_dict: Mapping[str, torch.Tensor]) -> str:
        """The task whose head the tensors hold."""
        if haiku_names.is_haiku(state_dict):
            return "masked_lm" if any("roberta_lm_head/~/lm_" in key for key in state_dict) else "base"
        if any(key.startswith("lm_head.") for key in state_dict):
            return "masked_lm"
        if "classifier.dense.weight" in state_dict:
            return "sequence_classification"
        return "token_classification" if "classifier.weight" in state_dict else "base"

    @staticmethod
    def config(original: dict[str, Any], options: dict[str, Any]) -> tuple[EsmConfig, set[str]]:
        """An ESM config, and the names of theirs that were understood; `options` are fields of it."""
        if original.get("position_embedding_type", "absolute") != "absolute":
            raise CheckpointError(
                "`position_embedding_type` must be 'absolute' for nt_v1, got "
                f"{original['position_embedding_type']!r}; rotary positions belong to nt_v2 or to a protein model."
            )
        epsilon = options.pop("layer_norm_eps", "config")
        if haiku_names.is_haiku_config(original):
            fields, known = haiku_names.esm_fields(original), haiku_names.KNOWN
            record: dict[str, Any] = {"hyperparameters": {name: original[name] for name in known & original.keys()}}
        else:
            fields, known = {name: original[name] for name in FIELDS & original.keys()}, FIELDS
            record = {"fields": sorted((FIELDS | STANDARD) & original.keys())}
        if epsilon != "config":
            fields["layer_norm_eps"] = _epsilon(epsilon)
        return EsmConfig(**{"conversion": record, **fields, **options}), known

    @staticmethod
    def tensors(
        state_dict: dict[str, torch.Tensor], config: EsmConfig, task: str
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """(tensors of the ESM class for `task`, keys that it has no use for)."""
        prefix = "" if task == "base" else BODY
        state_dict = haiku_names.to_esm_names(state_dict) if haiku_names.is_haiku(state_dict) else state_dict
        found, ignored = {}, []
        for key, tensor in state_dict.items():
            name = modern_name(key).removeprefix(BODY)
            is_head = key.startswith(tuple(HEADS.values()))
            useless = name in NEVER_USED or (name.startswith(POOLER) and task != "base")
            if useless or (is_head and not _is_head_of(task, key)):
                ignored.append(key)
            else:
                found[name if is_head else prefix + name] = tensor
        _add_contact_head(found, config, prefix)
        if task == "masked_lm":
            fill_tied(found, config, NucleotideTransformerSource.classes["masked_lm"]._tied_weights_keys)
        return found, sorted(ignored)

    @staticmethod
    def arguments(task: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """ESM adds an untrained pooler to the base model unless it is told that there is none."""
        return {"add_pooling_layer": f"{POOLER}dense.weight" in tensors} if task == "base" else {}

    @staticmethod
    def original(model: PreTrainedModel, layout: str = "auto") -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Their config and state dict; `layout` is "hub" (ESM names), "haiku" or "auto": as the checkpoint came.

        Raises:
            CheckpointError: the model is an ESM that the published architecture does not cover, or the layout has
                no place for its head.
        """
        config = model.config
        if config.position_embedding_type != "absolute" or config.is_folding_model:
            raise CheckpointError("nt_v1 has absolute positions and folds nothing; this ESM model is another one.")
        conversion = getattr(config, "conversion", None) or {}
        prefix = BODY if isinstance(model, NucleotideTransformerSource.classes["base"]) else ""
        tensors = {prefix + key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
        if _layout(layout, conversion) == "haiku":
            return haiku_names.haiku_fields(config), haiku_names.to_haiku_names(tensors)
        return _original_fields(model, conversion.get("fields", FIELDS | STANDARD)), tensors


def _is_head_of(task: str, key: str) -> bool:
    """Whether a head's tensor belongs to `task`: both classifiers share a name, only one has a hidden layer."""
    if not key.startswith(HEADS.get(task, " ")):
        return False
    hidden = key.startswith(("classifier.dense.", "classifier.out_proj."))
    return task == "masked_lm" or hidden == (task == "sequence_classification")


def _add_contact_head(tensors: dict[str, torch.Tensor], config: EsmConfig, prefix: str) -> None:
    """ESM's class has a contact head, which no output used here depends on; checkpoints may leave it out."""
    reference = next(iter(tensors.values()), torch.empty(0))
    shapes = ((1, config.num_hidden_layers * config.num_attention_heads), (1,))
    absent = [name for name in CONTACT_HEAD if prefix + name not in tensors]
    for name, shape in zip(CONTACT_HEAD, shapes, strict=True):
        if name in absent:
            tensors[prefix + name] = torch.zeros(shape, dtype=reference.dtype, device=reference.device)
    record = getattr(config, "conversion", None) or {}
    config.conversion = {**record, "generated_keys": [BODY + name for name in absent]}


def _layout(layout: str, conversion: Mapping[str, Any]) -> str:
    if layout not in ("auto", "hub", "haiku"):
        raise CheckpointError(f"`layout` must be 'auto', 'hub' or 'haiku', got {layout!r}.")
    return layout if layout != "auto" else "haiku" if "hyperparameters" in conversion else "hub"


def _epsilon(value: str | float) -> float:
    if value == "original":
        return ORIGINAL_EPS
    if isinstance(value, str) or value <= 0:
        raise CheckpointError(f"`layer_norm_eps` must be 'config', 'original' or a number above 0, got {value!r}.")
    return float(value)


def _original_fields(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Any]:
    """The fields of a config.json: label numbers are text there, and the class is the one that is saved."""
    fields = {name: getattr(model.config, name, None) for name in sorted(names)}
    labels = fields.get("id2label")
    if labels:
        fields["id2label"] = {str(index): label for index, label in labels.items()}
    return fields | ({"architectures": [type(model).__name__]} if "architectures" in fields else {})


SOURCES = (NucleotideTransformerSource,)
