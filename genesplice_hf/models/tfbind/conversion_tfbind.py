"""The past of TFBind: configs and state dicts of lucidrains' tf-bind-transformer (`AdapterModel`, 0.0.118), both ways.

Its Enformer is converted by the source of Enformer, which the door hands in (`trunk`). Projections of the interaction
are stored (in, out) there, and the three of self attention in one matrix.
"""

import logging
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from genesplice_hf.errors import CheckpointError, GeneSpliceError
from genesplice_hf.layers.key_maps import demand_keys, inverted, rename
from genesplice_hf.models.tfbind.configuration_tfbind import LEGACY_ARGUMENTS, TFBindConfig, legacy_fields
from genesplice_hf.models.tfbind.modeling_tfbind import TFBindForSequenceClassification, TFBindForTrackPrediction
from genesplice_hf.models.tfbind.modeling_tfbind_base import TFBindModel

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]

TRUNK, TRUNK_HEADS = "enformer.", "enformer._heads."
HEADS = ("to_pred.", "to_read_value_aux_loss.")
# The arithmetic of the reference where ours differs.
COMPATIBLE: dict[str, Any] = {
    "film_residual": False, "se_scale": 1.0, "normalize_null": False, "mse_on_logits": True,
    "read_value_features": "reference",
}  # fmt: skip
# Fields that may have any value in a model that goes back.
FREE = {
    "dna_config", "freeze_dna", "freeze_protein", "freeze_text", "encoder_cache_size", "interaction_chunk_size",
    "norm_type", "task", "target_length", "residue_dropout", "conversion", "upstream_config", "text_max_length",
    "max_protein_length", "protein_overflow", "protein_layer", "interaction_norm_eps", "interaction_norm_affine",
    "interaction_norm_position", "isab_latents", "isab_depth", "track_heads", "pos_weight", "loss_type",
    "dna_name_or_path", "protein_name_or_path", "text_name_or_path", "conditioning_targets", "text_pooling",
    "aux_read_value_weight",
}  # fmt: skip
SELF_ATTENTION = {"attn.norm": "attn_norm", "attn.to_out": "attn.to_out", "ff.0": "ff_norm", "ff.1": "ff.fc1",
                  "ff.4": "ff.fc2"}  # fmt: skip
JOINT_ATTENTION = {
    **{f"attn.{name}": name for name in ("norm", "context_norm", "to_qk", "context_to_qk", "to_v", "context_to_v",
                                         "to_out", "context_to_out")},
    **{f"{side}ff.{theirs}": f"{side}{ours}"
       for side in ("", "context_") for theirs, ours in (("0", "ff_norm"), ("1", "ff.fc1"), ("4", "ff.fc2"))},
}  # fmt: skip
CONDITIONING = {
    "film": {"to_gamma": "gamma", "to_bias": "beta"},
    "squeeze_excite": {"to_gate": "gate"},
}
SIDES = {"cond_genetic": "dna", "cond_protein": "protein"}
TASK_HEADS = {
    "track_prediction": {"to_pred.0": "classifier.out_proj"},
    "sequence_classification": {"to_pred.1": "classifier.norm", "to_pred.2": "classifier.out_proj"},
}
READ_VALUE = {"logits_norm.1": "norm", "mlp.0": "fc1", "mlp.2": "fc2"}
# Parameters of theirs that belong to no module -> ours; those of two dimensions but the null key are transposed.
PARAMETERS = {
    "filip.to_latent_w": "interaction.to_latent.weight",
    "filip.to_latent_b": "interaction.to_latent.bias",
    "filip.context_to_latent_w": "interaction.context_to_latent.weight",
    "filip.context_to_latent_b": "interaction.context_to_latent.bias",
    "filip.null_context": "interaction.null_residue",
    "linear_with_hypergrid.weights": "hypergrid.weight",
}
TRANSPOSED = ("filip.to_latent_w", "filip.context_to_latent_w")
QKV = "attn.to_qkv.weight"


class TFBindSource:
    """Source `tfbind` of `from_original`; config = {"enformer": {...}, "adapter_kwargs": {...}}.

    `finetune_enformer=True` beside them leaves the trunk trainable.
    """

    name = "tfbind"
    model_type = TFBindConfig.model_type
    original_types: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    classes: dict[str, type[PreTrainedModel]] = {
        "base": TFBindModel,
        "track_prediction": TFBindForTrackPrediction,
        "sequence_classification": TFBindForSequenceClassification,
    }
    # The source of the DNA encoder; handed in, for no model imports another.
    trunk: ClassVar[Any] = None

    @staticmethod
    def task(state_dict: Tensors) -> str:
        """The task whose head the tensors hold."""
        if any(key.startswith("to_pred.0.") for key in state_dict):
            return "track_prediction"
        return "sequence_classification" if any(key.startswith(HEADS) for key in state_dict) else "base"

    @classmethod
    def config(cls, original: dict[str, Any], options: dict[str, Any]) -> tuple[TFBindConfig, set[str]]:
        """Our config, and the names of theirs that were understood; `options` are fields of ours."""
        missing = [name for name in ("enformer", "adapter_kwargs") if name not in original]
        if missing:
            raise CheckpointError(f"`config` lacks {', '.join(missing)}; pass the arguments of both constructors.")
        trunk, known = cls.trunk.config(dict(original["enformer"]), {})
        arguments = dict(original["adapter_kwargs"])
        rest = {name: value for name, value in original["enformer"].items() if name not in known}
        rest |= {name: arguments.pop(name) for name in list(arguments) if name not in LEGACY_ARGUMENTS}
        if arguments.get("condition_squeeze_excite"):
            # The reference forgets FiLM beside squeeze-and-excitation.
            arguments.pop("condition_film", None)
        try:
            fields = COMPATIBLE | legacy_fields(arguments)
        except GeneSpliceError as error:
            raise CheckpointError(str(error)) from error
        fields |= {"dna_config": trunk, "freeze_dna": not original.get("finetune_enformer", False)}
        config = TFBindConfig(**(fields | options))
        if rest:
            logger.warning("tfbind: arguments without an effect here: %s", ", ".join(sorted(rest)))
            config.upstream_config = {"unused_arguments": rest}
        return config, {"enformer", "adapter_kwargs", "finetune_enformer"}

    @classmethod
    def tensors(cls, state_dict: Tensors, config: TFBindConfig, task: str) -> tuple[Tensors, list[str]]:
        """(our tensors, keys that another head owns or that have no effect).

        Raises:
            CheckpointError: lists missing, unexpected and mis-shaped keys under their names, the trunk's too.
        """
        if config.joint_cross_attn_depth:
            has_bias = "joint_cross_attns.0.attn.norm.bias" in state_dict
            config.norm_type = "layernorm" if has_bias else "rmsnorm"
        trunk = {key.removeprefix(TRUNK): tensor for key, tensor in state_dict.items() if key.startswith(TRUNK)}
        own = {key: tensor for key, tensor in state_dict.items() if not key.startswith(TRUNK)}
        ignored = sorted(key for key in own if task == "base" and key.startswith(HEADS))
        own = {key: tensor for key, tensor in own.items() if key not in ignored}
        faults, converted, unused = [], {}, []
        try:
            demand_keys(own, _their_shapes(cls.classes[task], config, task), cls.name)
        except CheckpointError as error:
            faults.append(str(error))
        try:
            converted, unused = cls.trunk.tensors(trunk, config.dna_config, "base")
        except CheckpointError as error:
            faults.append(f"Of the trunk, whose keys stand after `{TRUNK}`: {error}")
        if faults:
            raise CheckpointError(" ".join(faults))
        prefix = "" if task == "base" else "tfbind."
        found = {f"{prefix}dna_encoder.{key}": tensor for key, tensor in converted.items()}
        return found | to_ours(own, config, task), sorted([*ignored, *(TRUNK + key for key in unused)])

    @classmethod
    def original(cls, model: PreTrainedModel) -> tuple[dict[str, Any], Tensors]:
        """Their config and state dict; heads of the trunk, which have no effect, are zeros.

        Raises:
            CheckpointError: the reference has no such class, or cannot compute what the model does.
        """
        task = next((task for task, kind in cls.classes.items() if type(model) is kind), None)
        if task is None:
            raise CheckpointError(f"{cls.name!r} has no head like {type(model).__name__}.")
        config: Any = model.config
        arguments = _their_arguments(config, task)
        encoder = model.base_model.dna_encoder
        if encoder.config.model_type != cls.trunk.model_type:
            raise CheckpointError(f"{cls.name!r} has an Enformer inside, not {encoder.config.model_type!r}.")
        trunk_config, trunk = cls.trunk.original(encoder)
        result = {"enformer": trunk_config, "adapter_kwargs": arguments}
        if not config.freeze_dna:
            result["finetune_enformer"] = True
        _demand_theirs(config, cls.config(result, {})[0])
        tensors = {TRUNK + key: tensor for key, tensor in trunk.items()}
        for name, tracks in (encoder.config.output_heads or {}).items():
            width = encoder.config.hidden_size
            tensors[f"{TRUNK_HEADS}{name}.0.weight"] = torch.zeros(tracks, width, dtype=model.dtype)
            tensors[f"{TRUNK_HEADS}{name}.0.bias"] = torch.zeros(tracks, dtype=model.dtype)
        prefix = "" if task == "base" else "tfbind."
        own = {key: t for key, t in model.state_dict().items() if not key.startswith(f"{prefix}dna_encoder.")}
        return result, tensors | to_theirs(own, config, task)


def module_map(config: TFBindConfig, task: str) -> dict[str, str]:
    """Every module of theirs outside the trunk -> ours, for one class; modules that do not exist do no harm."""
    prefix = "" if task == "base" else "tfbind."
    modules = {"norm_seq_embed": "norm_dna", "linear_to_logits": "to_logits"}
    modules["linear_with_hypergrid.contextual_projection"] = "hypergrid.gate"
    for index in range(config.genome_self_attn_depth):
        for theirs, ours in SELF_ATTENTION.items():
            modules[f"genome_self_attns.{index}.{theirs}"] = f"genome_layers.{index}.{ours}"
    for index in range(config.joint_cross_attn_depth):
        for theirs, ours in JOINT_ATTENTION.items():
            modules[f"joint_cross_attns.{index}.{theirs}"] = f"joint_layers.{index}.{ours}"
    for way, names in CONDITIONING.items():
        if way in config.conditioning:
            for side, our_side in SIDES.items():
                modules |= {f"{side}.{theirs}": f"{way}.{our_side}.{ours}" for theirs, ours in names.items()}
    modules = {theirs: prefix + ours for theirs, ours in modules.items()}
    modules |= {
        f"to_read_value_aux_loss.{theirs}": f"classifier.read_value.{ours}" for theirs, ours in READ_VALUE.items()
    }
    return modules | TASK_HEADS.get(task, {})


def to_ours(tensors: Tensors, config: TFBindConfig, task: str) -> Tensors:
    """Their tensors outside the trunk under our names, in our layout."""
    modules, prefix = module_map(config, task), "" if task == "base" else "tfbind."
    found: Tensors = {}
    for key, tensor in tensors.items():
        if key in PARAMETERS:
            found[prefix + PARAMETERS[key]] = tensor.T.contiguous() if key in TRANSPOSED else tensor
        elif key.endswith(QKV):
            layer = f"{prefix}genome_layers.{key.split('.')[1]}.attn"
            names = (f"{layer}.{name}.weight" for name in ("to_q", "to_k", "to_v"))
            found |= {name: part.contiguous() for name, part in zip(names, tensor.chunk(3), strict=True)}
        else:
            found[rename(key, modules)] = tensor
    return found


def to_theirs(tensors: Tensors, config: TFBindConfig, task: str) -> Tensors:
    """The way back."""
    modules, prefix = inverted(module_map(config, task)), "" if task == "base" else "tfbind."
    parameters = {prefix + ours: theirs for theirs, ours in PARAMETERS.items()}
    found: Tensors = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().clone()
        if key in parameters:
            theirs = parameters[key]
            found[theirs] = tensor.T.contiguous() if theirs in TRANSPOSED else tensor
        elif key.startswith(f"{prefix}genome_layers.") and key.endswith(("to_q.weight", "to_k.weight", "to_v.weight")):
            layer = key.rpartition(".to_")[0]
            parts = [tensors[f"{layer}.{name}.weight"] for name in ("to_q", "to_k", "to_v")]
            index = layer.removeprefix(f"{prefix}genome_layers.").split(".")[0]
            found[f"genome_self_attns.{index}.{QKV}"] = torch.cat(parts).detach().clone()
        else:
            found[rename(key, modules)] = tensor
    return found


def _their_shapes(
    model_class: type[PreTrainedModel], config: TFBindConfig, task: str
) -> dict[str, torch.Size | tuple[int, ...]]:
    prefix = "" if task == "base" else "tfbind."
    with torch.device("meta"):
        ours = model_class(config).state_dict()
    own = {key: tensor for key, tensor in ours.items() if not key.startswith(f"{prefix}dna_encoder.")}
    return {key: tensor.shape for key, tensor in to_theirs(own, config, task).items()}


def _their_arguments(config: TFBindConfig, task: str) -> dict[str, Any]:
    is_binary = task == "sequence_classification"
    arguments = {
        "latent_dim": config.latent_dim,
        "latent_heads": config.latent_heads,
        "aa_embed_dim": config.protein_dim,
        "contextual_embed_dim": config.context_dim,
        "genome_self_attn_depth": config.genome_self_attn_depth,
        "joint_cross_attn_depth": config.joint_cross_attn_depth,
        "condition_film": "film" in config.conditioning,
        "condition_squeeze_excite": "squeeze_excite" in config.conditioning,
        "condition_hypergrid": "hypergrid" in config.conditioning,
        "dropout": config.dropout,
        "binary_target": is_binary,
        "use_corr_coef_loss": config.loss_type == "correlation",
        "target_mse_loss": config.loss_type == "mse",
        "aux_read_value_loss": config.aux_read_value,
        "read_value_aux_loss_weight": config.aux_read_value_weight,
        "fourier_dims": config.fourier_dims,
    }
    if config.upstream_config:
        arguments |= config.upstream_config.get("unused_arguments", {})
    return arguments


def _demand_theirs(config: TFBindConfig, theirs: TFBindConfig) -> None:
    """Raises where a config says what none of the reference's does."""
    fields = [name for name in vars(TFBindConfig)["__annotations__"] if name not in FREE]
    wrong = [name for name in fields if getattr(config, name) != getattr(theirs, name)]
    wrong += ["num_labels"] if config.num_labels != 1 else []
    if wrong:
        raise CheckpointError(
            f"`{wrong[0]}` = {getattr(config, wrong[0])!r} is nothing that the reference computes"
            + (f" (nor {', '.join(wrong[1:])})" if wrong[1:] else "")
            + "."
        )


SOURCES = (TFBindSource,)
