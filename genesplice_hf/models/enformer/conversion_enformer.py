"""The past of Enformer: configs and state dicts of enformer-pytorch (lucidrains, 0.8), both ways.

That library registers each part of its trunk twice, under its name and in `_trunk`; files hold both names, or of each
tensor one of the two. Its wrappers for fine-tuning become our adaptation classes.
"""

import copy
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from genesplice_hf.errors import CheckpointError
from genesplice_hf.layers.key_maps import demand_keys, inverted, rename
from genesplice_hf.models.enformer.configuration_enformer import EnformerConfig
from genesplice_hf.models.enformer.conversion_enformer_tf import TensorFlowNames
from genesplice_hf.models.enformer.modeling_enformer import EnformerForTrackPrediction
from genesplice_hf.models.enformer.modeling_enformer_adaptation import (
    EnformerForContextAdaptation,
    EnformerForContextAttentionAdaptation,
    EnformerForHeadAdaptation,
)
from genesplice_hf.models.enformer.modeling_enformer_base import EnformerModel

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]

FIELDS = ("dim", "depth", "heads", "output_heads", "target_length", "attn_dim_key", "dropout_rate", "attn_dropout",
          "pos_dropout", "use_checkpointing", "num_downsamples", "dim_divisible_by")  # fmt: skip
# Without an effect: the weights were trained with TensorFlow's basis whatever `use_tf_gamma` says.
MEANINGLESS = ("use_convnext", "use_tf_gamma")
# What that library puts into the channels of positions off the chromosome.
PAD_VALUE = 0.25
# Place in `_trunk` -> name; the others have no tensors.
TRUNK = {"1": "stem", "2": "conv_tower", "4": "transformer", "6": "final_pointwise"}
ALIAS = re.compile(r"^((?:enformer\.)?)_trunk\.([1246])\.")
HEAD = re.compile(r"^(?:enformer\.)?_heads\.(.+)\.0\.weight$")
NEVER_APPLIED = "post_embed_transform.1"
# Their argument -> our field, per wrapper; and the task of each.
WRAPPERS: dict[str, tuple[str, dict[str, str]]] = {
    "HeadAdapterWrapper": ("head_adaptation", {
        "num_tracks": "num_tracks", "post_transformer_embed": "post_transformer",
        "discrete_key_value_bottleneck": "discrete_bottleneck",
    }),
    "ContextAdapterWrapper": ("context_adaptation", {"context_dim": "context_dim"}),
    "ContextAttentionAdapterWrapper": ("context_attention_adaptation", {
        "context_dim": "context_dim", "heads": "context_num_heads", "dim_head": "context_head_dim",
    }),
}  # fmt: skip
STEM = {"0": "conv", "1.fn.0": "norm", "1.fn.2": "pointwise", "2.to_attn_logits": "pool"}
BLOCK = {"0.0": "norm1", "0.2": "conv", "1.fn.0": "norm2", "1.fn.2": "pointwise", "2.to_attn_logits": "pool"}
LAYER = {
    "0.fn.0": "attn_norm",
    "0.fn.1": "attn",
    **{f"0.fn.1.{name}": f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out", "to_rel_k")},
    "1.fn.0": "ffn_norm",
    "1.fn.1": "fc1",
    "1.fn.4": "fc2",
}
# Their module -> ours; a parameter of the wrapper itself has no module of theirs.
ADAPTERS = {
    "head_adaptation": {"to_tracks.0": "classifier.to_tracks"},
    "context_adaptation": {"": "classifier"},
    "context_attention_adaptation": {
        "": "classifier",
        "to_pred.0": "classifier.to_pred",
        **{f"{name}": f"classifier.{name}" for name in
           ("query_norm", "key_values_norm", "to_queries", "to_key_values", "to_out")},
    },
}  # fmt: skip
# Which of an adapter's keys tells it from the others.
MARKS = {
    "head_adaptation": "to_tracks.0.weight",
    "context_adaptation": "to_context_weights",
    "context_attention_adaptation": "to_queries.weight",
}


class EnformerSource:
    """Source `enformer` of `from_original`."""

    name = "enformer"
    model_type = EnformerConfig.model_type
    original_types: tuple[str, ...] = ("enformer",)
    inputs: tuple[str, ...] = ()
    classes: dict[str, type[PreTrainedModel]] = {
        "base": EnformerModel,
        "track_prediction": EnformerForTrackPrediction,
        "head_adaptation": EnformerForHeadAdaptation,
        "context_adaptation": EnformerForContextAdaptation,
        "context_attention_adaptation": EnformerForContextAttentionAdaptation,
    }

    @staticmethod
    def task(state_dict: Tensors) -> str:
        """The task whose head the tensors hold."""
        for task, mark in MARKS.items():
            if mark in state_dict:
                return task
        return "track_prediction" if any(map(HEAD.match, state_dict)) else "base"

    @staticmethod
    def config(original: dict[str, Any], options: dict[str, Any]) -> tuple[EnformerConfig, set[str]]:
        """Our config, and the names of theirs that were understood; `options` are fields of ours."""
        if "enformer" not in original:
            fields = {name: original[name] for name in FIELDS if name in original}
            return EnformerConfig(**({"pad_value": PAD_VALUE} | fields | options)), {*FIELDS, *MEANINGLESS}
        trunk, wrapper = original["enformer"], original.get("wrapper", "HeadAdapterWrapper")
        if wrapper not in WRAPPERS:
            raise CheckpointError(f"`wrapper` must be one of {', '.join(WRAPPERS)}, got {wrapper!r}.")
        names, arguments = WRAPPERS[wrapper][1], original.get("wrapper_kwargs", {})
        fields = {name: trunk[name] for name in FIELDS if name in trunk}
        fields |= {ours: arguments[theirs] for theirs, ours in names.items() if theirs in arguments}
        # Their norm after the transformer exists and is never applied.
        fields |= {"pad_value": PAD_VALUE, "post_transformer_norm": False}
        config = EnformerConfig(**(fields | options))
        rest = {name: trunk[name] for name in trunk if name not in FIELDS + MEANINGLESS}
        rest |= {name: arguments[name] for name in arguments if name not in names}
        if rest:
            logger.warning("enformer: arguments without an effect here: %s", ", ".join(sorted(rest)))
            config.upstream_config = rest
        return config, {"enformer", "wrapper", "wrapper_kwargs"}

    @classmethod
    def tensors(cls, state_dict: Tensors, config: EnformerConfig, task: str) -> tuple[Tensors, list[str]]:
        """(our tensors, keys that another head owns or that have no effect).

        Heads that the config describes otherwise are taken as the tensors are, with a warning.

        Raises:
            CheckpointError: lists missing, unexpected and mis-shaped keys under their names; two names of one tensor
                that hold different numbers.
        """
        prefix = "enformer." if any(mark in state_dict for mark in MARKS.values()) else ""
        found = without_aliases(state_dict)
        described = config
        if task == "track_prediction":
            _adopt_heads(found, config)
            # The heads read embeddings, whatever an adaptation of the same trunk reads.
            described = copy.deepcopy(config)
            described.post_transformer = False
        modules = module_map(config, task, prefix)
        ours = shapes_of(cls.classes[task], described)
        needed = {their_key(key, modules): their_shape(key, shape) for key, shape in ours.items()}
        ignored = [key for key in found if key not in needed and _has_no_effect(key, config)]
        demand_keys({key: tensor for key, tensor in found.items() if key not in ignored}, needed, cls.name)
        config.conversion = {"trunk_aliases": any(map(ALIAS.match, state_dict))}
        converted = {rename(key, modules) if "." in key else f"classifier.{key}": found[key] for key in needed}
        return {key: tensor.reshape(ours[key]) for key, tensor in converted.items()}, sorted(ignored)

    @classmethod
    def original(cls, model: PreTrainedModel) -> tuple[dict[str, Any], Tensors]:
        """Their config and state dict, with `_trunk` names unless the model came without.

        Raises:
            CheckpointError: the reference has no such head, or cannot compute what the model does.
        """
        task = next((task for task, kind in cls.classes.items() if type(model) is kind), None)
        if task is None:
            raise CheckpointError(f"{cls.name!r} has no head like {type(model).__name__}.")
        config: Any = model.config
        _demand_theirs(config, task)
        prefix = "enformer." if task in MARKS else ""
        modules = module_map(config, task, prefix)
        tensors = {
            their_key(key, modules): tensor.detach().clone().reshape(their_shape(key, tensor.shape))
            for key, tensor in model.state_dict().items()
        }
        if task in MARKS:
            tensors |= _never_used(config, task, model.dtype)
        if (config.conversion or {}).get("trunk_aliases", True):
            tensors |= _aliases(tensors, prefix)
        return their_config(config, task), tensors


def without_aliases(state_dict: Mapping[str, torch.Tensor]) -> Tensors:
    """Each tensor once, under its name outside `_trunk`.

    Raises:
        CheckpointError: a tensor's two names hold different numbers.
    """
    found = {key: tensor for key, tensor in state_dict.items() if not ALIAS.match(key)}
    differing = []
    for key in state_dict.keys() - found.keys():
        name = ALIAS.sub(lambda match: f"{match[1]}{TRUNK[match[2]]}.", key)
        if name in state_dict and not torch.equal(state_dict[name], state_dict[key]):
            differing.append(f"{key} and {name}")
        found.setdefault(name, state_dict[key])
    if differing:
        raise CheckpointError(
            f"`state_dict` holds one tensor under two names with different numbers: {'; '.join(sorted(differing))}. "
            "Leave out the wrong one."
        )
    return found


def module_map(config: EnformerConfig, task: str, prefix: str = "") -> dict[str, str]:
    """Every module of theirs -> ours, for one class; `prefix` stands before their trunk's names."""
    base = "" if task == "base" else "enformer."
    modules = {f"{prefix}stem.{theirs}": f"{base}stem.{ours}" for theirs, ours in STEM.items()}
    for index in range(config.num_downsamples - 1):
        for theirs, ours in BLOCK.items():
            modules[f"{prefix}conv_tower.{index}.{theirs}"] = f"{base}conv_tower.{index}.{ours}"
    for index in range(config.depth):
        for theirs, ours in LAYER.items():
            modules[f"{prefix}transformer.{index}.{theirs}"] = f"{base}layers.{index}.{ours}"
    modules |= {
        f"{prefix}final_pointwise.1.0": f"{base}final.norm",
        f"{prefix}final_pointwise.1.2": f"{base}final.conv",
    }
    if task == "track_prediction":
        modules |= {f"{prefix}_heads.{name}.0": f"classifier.{name}" for name in config.output_heads}
    return modules | ADAPTERS.get(task, {})


def shapes_of(model_class: type[PreTrainedModel], config: EnformerConfig) -> dict[str, torch.Size]:
    """The shapes of our tensors, without making them."""
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in model_class(config).state_dict().items()}


def their_key(key: str, modules: Mapping[str, str]) -> str:
    """The name that they have for one of our keys."""
    module, _, name = key.rpartition(".")
    theirs = inverted(modules).get(module, module)
    return f"{theirs}.{name}" if theirs else name


def their_shape(key: str, shape: torch.Size) -> tuple[int, ...]:
    """Convolutions of kernel size 1, which are matrices here, end with sizes of 1 there."""
    kernel = {"pointwise.weight": (1,), "pool.weight": (1, 1), "final.conv.weight": (1,)}
    return (*shape, *next((ones for end, ones in kernel.items() if key.endswith(end)), ()))


def their_config(config: EnformerConfig, task: str) -> dict[str, Any]:
    """Their config, or the arguments of a wrapper and of its Enformer."""
    trunk = {name: getattr(config, name) for name in FIELDS}
    if task not in MARKS:
        return trunk | {"model_type": "enformer"}
    wrapper, names = next((name, fields) for name, (one, fields) in WRAPPERS.items() if one == task)
    arguments = {theirs: getattr(config, ours) for theirs, ours in names.items()}
    return {"enformer": trunk, "wrapper": wrapper, "wrapper_kwargs": arguments}


def _adopt_heads(found: Tensors, config: EnformerConfig) -> None:
    heads = {
        match[1]: len(tensor) for key, tensor in found.items() if (match := HEAD.match(key)) and tensor.dim() == 2
    }
    if not heads or heads == config.output_heads:
        return
    ordered = {name: heads[name] for name in (*config.species, *sorted(heads)) if name in heads}
    if ordered != config.output_heads:
        logger.warning(
            "enformer: `output_heads` is %s in the config; the weights have %s", config.output_heads, ordered
        )
    config.output_heads, config.head_order = ordered, list(ordered)
    if config.default_species not in ordered:
        config.default_species = None


def _has_no_effect(key: str, config: EnformerConfig) -> bool:
    """Whether a tensor belongs to another head, or to a part that is not there or never applied."""
    module = key.rpartition(".")[0]
    heads = [name for adapter in ADAPTERS.values() for name in adapter if name]
    own = module in heads or key in ("to_context_weights", "to_context_bias", "null_key", "null_value")
    final = config.post_transformer and "final_pointwise." in key
    return own or final or module == NEVER_APPLIED or re.match(r"^(enformer\.)?_heads\.", key) is not None


def _demand_theirs(config: EnformerConfig, task: str) -> None:
    differing = {
        "position_embedding_type": config.position_embedding_type != "relative",
        "post_transformer_norm": config.post_transformer
        and config.post_transformer_norm
        and task == "head_adaptation",
        "hidden_act": config.hidden_act != "quick_gelu",
    }
    wrong = [name for name, differs in differing.items() if differs]
    if wrong:
        raise CheckpointError(f"`{wrong[0]}` = {getattr(config, wrong[0])!r} is nothing that the reference computes.")


def _never_used(config: EnformerConfig, task: str, dtype: torch.dtype) -> Tensors:
    """Zeros for the heads inside a wrapper's Enformer, and for the norm that a wrapper never applies."""
    tensors = {}
    for name, tracks in config.output_heads.items():
        tensors[f"enformer._heads.{name}.0.weight"] = torch.zeros(tracks, 2 * config.dim, dtype=dtype)
        tensors[f"enformer._heads.{name}.0.bias"] = torch.zeros(tracks, dtype=dtype)
    if task == "head_adaptation" and config.post_transformer:
        tensors |= {f"{NEVER_APPLIED}.{name}": torch.zeros(config.dim, dtype=dtype) for name in ("weight", "bias")}
    return tensors


def _aliases(tensors: Tensors, prefix: str) -> Tensors:
    places = {f"{prefix}{name}.": f"{prefix}_trunk.{place}." for place, name in TRUNK.items()}
    return {
        alias + key.removeprefix(start): tensor.clone()
        for key, tensor in tensors.items()
        for start, alias in places.items()
        if key.startswith(start)
    }


class EnformerTensorFlowSource(EnformerSource):
    """Source `enformer_tf`: variables of the original TensorFlow model, as {name: tensor} (`read_variables`)."""

    name = "enformer_tf"
    original_types: tuple[str, ...] = ()
    classes: dict[str, type[PreTrainedModel]] = {
        task: EnformerSource.classes[task] for task in ("base", "track_prediction")
    }

    @staticmethod
    def task(state_dict: Tensors) -> str:
        """The task whose head the tensors hold."""
        return "track_prediction" if any("/heads/" in name for name in state_dict) else "base"

    @staticmethod
    def config(original: dict[str, Any], options: dict[str, Any]) -> tuple[EnformerConfig, set[str]]:
        """As of enformer-pytorch, but positions off the chromosome are zeros."""
        return EnformerSource.config(original, {"pad_value": 0.0} | options)

    @classmethod
    def tensors(cls, state_dict: Tensors, config: EnformerConfig, task: str) -> tuple[Tensors, list[str]]:
        """As of enformer-pytorch, of which every name is a variable's here."""
        names = TensorFlowNames.of(config.num_downsamples - 1, config.depth)
        found, ignored = names.to_torch(state_dict)
        converted, others = super().tensors(found, config, task)
        return converted, sorted([*ignored, *others])

    @classmethod
    def original(cls, model: PreTrainedModel) -> tuple[dict[str, Any], Tensors]:
        """Their config and variables."""
        config, tensors = super().original(model)
        names = TensorFlowNames.of(config["num_downsamples"] - 1, config["depth"])
        return config, names.to_variables({key: tensor for key, tensor in tensors.items() if not ALIAS.match(key)})


SOURCES = (EnformerSource, EnformerTensorFlowSource)
