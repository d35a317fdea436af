"""DNABERT-1 in transformers' BERT classes, both ways (Ji et al. 2021).

The published tensors are those of BERT. The fork that trained them adds the raw attention mask to the scores, so that
padding counts, and the output bias twice: here padding is masked and the bias added once, which gives the same values
as the fork's code with these two slips corrected.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import BertConfig, PreTrainedConfig, PreTrainedModel

from genesplice_hf.layers.tied_weights import fill_tied, modern_name
from genesplice_hf.layers.transformers_classes import TransformersClasses

BODY = "bert."
POOLER = ("pooler.dense.weight", "pooler.dense.bias")
NEVER_USED = ("embeddings.position_ids",)
HEADS = {
    "masked_lm": "cls.predictions.",
    "sequence_classification": "classifier.",
    "token_classification": "classifier.",
    # Of BERT's pretraining; no class here has it.
    "next_sentence": "cls.seq_relationship.",
}
# BertForTokenClassification and BertForMaskedLM have no pooler.
POOLED = ("base", "sequence_classification")
FIELDS = set(BertConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
# What else of a config.json the way back gives, where it stood there.
STANDARD = {"architectures", "id2label", "label2id", "model_type", "num_labels", "problem_type"}


class DnabertSource:
    """Source `dnabert1` of `from_original`, for overlapping 3- to 6-mers."""

    name = "dnabert1"
    model_type = BertConfig.model_type
    classes: Mapping[str, type[PreTrainedModel]] = TransformersClasses(
        base="BertModel",
        masked_lm="BertForMaskedLM",
        sequence_classification="BertForSequenceClassification",
        token_classification="BertForTokenClassification",
    )
    inputs: tuple[str, ...] = ()
    # transformers' own type: AutoModel loads the published folders as it always did.
    original_types: tuple[str, ...] = ()

    @staticmethod
    def task(state_dict: Mapping[str, torch.Tensor]) -> str:
        """The task whose head the tensors hold; classifiers of sequences and of tokens look alike."""
        if any(key.startswith(HEADS["masked_lm"]) for key in state_dict):
            return "masked_lm"
        if "classifier.weight" not in state_dict:
            return "base"
        pooled = any(key.removeprefix(BODY) in POOLER for key in state_dict)
        return "sequence_classification" if pooled else "token_classification"

    @staticmethod
    def config(original: dict[str, Any], options: dict[str, Any]) -> tuple[BertConfig, set[str]]:
        """A BERT config, and the names of theirs that were understood; `options` are fields of it."""
        fields = {name: original[name] for name in FIELDS & original.keys()}
        record = {"fields": sorted((FIELDS | STANDARD) & original.keys())}
        return BertConfig(**{"conversion": record, **fields, **options}), FIELDS

    @staticmethod
    def tensors(
        state_dict: dict[str, torch.Tensor], config: BertConfig, task: str
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """(tensors of the BERT class for `task`, keys that it has no use for)."""
        prefix = "" if task == "base" else BODY
        others = tuple(start for name, start in HEADS.items() if start != HEADS.get(task))
        found, ignored = {}, []
        for key, tensor in state_dict.items():
            name = modern_name(key).removeprefix(BODY)
            useless = name in NEVER_USED or (name in POOLER and task not in POOLED)
            if useless or key.startswith(others):
                ignored.append(key)
            else:
                found[name if key.startswith(HEADS.get(task, " ")) else prefix + name] = tensor
        if task == "masked_lm":
            fill_tied(found, config, DnabertSource.classes["masked_lm"]._tied_weights_keys)
        return found, sorted(ignored)

    @staticmethod
    def arguments(task: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """BERT adds an untrained pooler to the base model unless it is told that there is none."""
        return {"add_pooling_layer": POOLER[0] in tensors} if task == "base" else {}

    @staticmethod
    def original(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Their config and state dict; a pooler that was left out on the way in comes back as zeros."""
        config = model.config
        record = getattr(config, "conversion", None) or {}
        original = _original_fields(model, record.get("fields", FIELDS | STANDARD))
        prefix = BODY if isinstance(model, DnabertSource.classes["base"]) else ""
        tensors = {prefix + key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
        size = config.hidden_size
        for name, shape in zip(POOLER, ((size, size), (size,)), strict=True):
            if BODY + name in record.get("ignored_keys", ()) and BODY + name not in tensors:
                tensors[BODY + name] = torch.zeros(shape, dtype=model.dtype)
        return original, tensors


def _original_fields(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Any]:
    """The fields of a config.json: label numbers are text there, and the class is the one that is saved."""
    fields = {name: getattr(model.config, name, None) for name in sorted(names)}
    labels = fields.get("id2label")
    if labels:
        fields["id2label"] = {str(index): label for index, label in labels.items()}
    return fields | ({"architectures": [type(model).__name__]} if "architectures" in fields else {})


SOURCES = (DnabertSource,)
