"""The past of GPN-MSA: configs and state dicts of `GPNRoFormer` in songlab-cal/gpn (`gpn/legacy.py`), both ways."""

from typing import Any

import torch
from transformers import PreTrainedModel

from genesplice_hf.errors import CheckpointError
from genesplice_hf.layers.key_maps import ROFORMER_LAYER, demand_keys, demand_table, inverted, rename, renamed
from genesplice_hf.layers.roformer import position_table
from genesplice_hf.models.gpn_msa.configuration_gpn_msa import GPNMSAConfig
from genesplice_hf.models.gpn_msa.modeling_gpn_msa import GPNMSAForMaskedLM, GPNMSAModel

BASE, HEAD = "model.", "cls."
TABLE = "model.encoder.embed_positions.weight"
# The same numbers twice: older library versions stored one parameter under both names.
BIASES = ("cls.predictions.bias", "cls.predictions.decoder.bias")
FIELDS = ("vocab_size", "aux_features_vocab_size", "n_aux_features", "group_tokens", "hidden_size",
          "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "embedding_size",
          "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "layer_norm_eps",
          "rotary_value", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
# Says nothing here: there is no word embedding that could be tied.
MEANINGLESS = ("tie_word_embeddings",)
LM_HEAD = {
    "cls.predictions.transform.dense": "lm_head.dense",
    "cls.predictions.transform.LayerNorm": "lm_head.norm",
    "cls.predictions.decoder": "lm_head.decoder",
}


class GPNMSASource:
    """Source `gpn_msa` of `from_original`."""

    name = "gpn_msa"
    model_type = GPNMSAConfig.model_type
    original_types: tuple[str, ...] = ("GPNRoFormer",)
    classes: dict[str, type[PreTrainedModel]] = {"base": GPNMSAModel, "masked_lm": GPNMSAForMaskedLM}
    inputs: tuple[str, ...] = ()

    @staticmethod
    def task(state_dict: dict[str, torch.Tensor]) -> str:
        """The task whose head the tensors hold."""
        return "masked_lm" if any(key.startswith(HEAD) for key in state_dict) else "base"

    @staticmethod
    def config(original: dict[str, Any], options: dict[str, Any]) -> tuple[GPNMSAConfig, set[str]]:
        """Our config, and the names of theirs that were understood; `options` are fields of ours."""
        fields = {name: original[name] for name in FIELDS if name in original}
        return GPNMSAConfig(**(fields | options)), {*FIELDS, *MEANINGLESS}

    @classmethod
    def tensors(
        cls, state_dict: dict[str, torch.Tensor], config: GPNMSAConfig, task: str
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """(our tensors, keys that another task's head owns).

        Raises:
            CheckpointError: lists missing, unexpected and mis-shaped keys under their names; two biases that differ;
                a table of positions with other than the standard values.
        """
        ignored = sorted(key for key in state_dict if key.startswith(HEAD)) if task == "base" else []
        own = {_with_prefix(key): tensor for key, tensor in state_dict.items() if key not in ignored}
        _one_bias(own)
        modules = module_map(config, task)
        with torch.device("meta"):
            ours = cls.classes[task](config).state_dict()
        needed = {rename(key, inverted(modules)): tensor.shape for key, tensor in ours.items()}
        needed[TABLE] = position_table(config).shape
        demand_keys(own, needed, cls.name)
        demand_table(TABLE, own.pop(TABLE), position_table(config))
        return renamed(own, modules), ignored

    @classmethod
    def original(cls, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Their config and state dict.

        Raises:
            CheckpointError: the reference has no such head.
        """
        task = next((task for task, kind in cls.classes.items() if type(model) is kind), None)
        if task is None:
            raise CheckpointError(f"{cls.name!r} has no head like {type(model).__name__}.")
        config: Any = model.config
        suffix = "Model" if task == "base" else "ForMaskedLM"
        original = {name: getattr(config, name) for name in FIELDS}
        original |= {"model_type": cls.original_types[0], "architectures": [cls.original_types[0] + suffix]}
        tensors = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
        tensors = renamed(tensors, inverted(module_map(config, task)))
        tensors[TABLE] = position_table(config).to(model.dtype)
        if task == "base":
            return original, {key.removeprefix(BASE): tensor for key, tensor in tensors.items()}
        return original, tensors | {BIASES[0]: tensors[BIASES[1]].clone()}


def module_map(config: GPNMSAConfig, task: str) -> dict[str, str]:
    """Every module of theirs -> ours, for one model."""
    prefix = "" if task == "base" else "gpn_msa."
    layers = {
        f"model.encoder.layer.{index}.{theirs}": f"{prefix}layers.{index}.{ours}"
        for index in range(config.num_hidden_layers)
        for theirs, ours in ROFORMER_LAYER.items()
    }
    return layers if task == "base" else layers | LM_HEAD


def _with_prefix(key: str) -> str:
    return key if key.startswith((BASE, HEAD)) else BASE + key


def _one_bias(tensors: dict[str, torch.Tensor]) -> None:
    """Leaves one of the two names of the decoder's bias, which is added once."""
    first, second = (tensors.pop(key, None) for key in BIASES)
    if first is not None and second is not None and not torch.equal(first, second):
        raise CheckpointError(f"`{BIASES[0]}` and `{BIASES[1]}` differ; they are one parameter, which is added once.")
    found = first if second is None else second
    if found is not None:
        tensors[BIASES[1]] = found


SOURCES = (GPNMSASource,)
