"""The past of scGPT: arguments and state dicts of bowang-lab/scGPT, and of the baseline of the first BioFormer.

Their `TransformerModel` joins queries, keys and values in one tensor, in three spellings; a published folder holds
args.json, best_model.pt and vocab.json.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from genesplice_hf.errors import CheckpointError
from genesplice_hf.layers.expression_keys import (
    DECODERS,
    SEED_EMBEDDINGS,
    demand_known,
    starting,
    unwrapped,
    with_base,
    without_base,
)
from genesplice_hf.layers.key_maps import demand_keys, inverted, renamed
from genesplice_hf.models.scgpt.configuration_scgpt import ScGPTConfig
from genesplice_hf.models.scgpt.modeling_scgpt import (
    ScGPTForMaskedExpression,
    ScGPTForSequenceClassification,
    ScGPTModel,
)

# Our field -> the names of their constructor and of args.json.
FIELDS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("ntoken",),
    "hidden_size": ("d_model", "embsize"),
    "num_attention_heads": ("nhead", "nheads"),
    "intermediate_size": ("d_hid",),
    "num_hidden_layers": ("nlayers",),
    "classifier_num_layers": ("nlayers_cls", "n_layers_cls"),
    "num_labels": ("n_cls",),
    "pad_token_id": ("pad_id",),
    "pad_value": ("pad_value",),
    "mask_value": ("mask_value",),
    "do_mvc": ("do_mvc", "MVC", "GEPC"),
    "do_dab": ("do_dab", "DAB"),
    "use_batch_labels": ("use_batch_labels",),
    "num_batch_labels": ("num_batch_labels",),
    "domain_spec_batchnorm": ("domain_spec_batchnorm",),
    "input_emb_style": ("input_emb_style",),
    "cell_emb_style": ("cell_emb_style",),
    "mvc_decoder_style": ("mvc_decoder_style",),
    "ecs_threshold": ("ecs_threshold",),
    "explicit_zero_prob": ("explicit_zero_prob",),
    "max_seq_len": ("max_seq_len",),
}
# Understood, and without a field of their own.
OTHERS = ("dropout", "n_bins", "n_input_bins", "vocab", "forward_flags", "pre_norm", "use_fast_transformer",
          "fast_transformer", "fast_transformer_backend", "pad_token", "cls_token")  # fmt: skip
# Flags of their forward -> our fields.
FLAGS = {"ECS": "do_ecs", "CCE": "do_cce"}
SPECIAL = ("<pad>", "<cls>", "<eoc>")
HEADS = {
    "expression_head": "decoder.fc.",
    "zero_head": "decoder.zero_logit.",
    "mvc_head": "mvc_decoder.",
    "classifier": "cls_decoder.",
    "batch_head": "grad_reverse_discriminator.",
    "batch_embedding": "batch_encoder.",
}
# Fields that the keys decide where the arguments are silent.
BY_KEY = {
    "explicit_zero_prob": "decoder.zero_logit.",
    "do_mvc": "mvc_decoder.",
    "do_dab": "grad_reverse_discriminator.",
    "use_batch_labels": "batch_encoder.",
}
CROSS_ATTENTION = ".self_attn.cross_attn."
_SPELLINGS = re.compile(r"\.self_attn\.(_impl\.)?(Wqkv\.|in_proj_|out_proj\.)")


class ScGPTSource:
    """Source `scgpt` of `from_original`."""

    name = "scgpt"
    model_type = ScGPTConfig.model_type
    original_types: tuple[str, ...] = ("scgpt",)
    families: tuple[str, ...] = ("cross_attn",)
    classes: dict[str, type[PreTrainedModel]] = {
        "base": ScGPTModel,
        "masked_expression": ScGPTForMaskedExpression,
        "sequence_classification": ScGPTForSequenceClassification,
    }
    inputs: tuple[str, ...] = ()

    @staticmethod
    def task(state_dict: dict[str, torch.Tensor]) -> str:
        """The task whose head the tensors hold."""
        keys = unwrapped(state_dict)
        if starting(keys, "decoder.fc."):
            return "masked_expression"
        return "sequence_classification" if starting(keys, "cls_decoder.") else "base"

    @staticmethod
    def config(original: dict[str, Any], options: dict[str, Any]) -> tuple[ScGPTConfig, set[str]]:
        """Our config, and the names of theirs that were understood; `options` are fields of ours.

        Raises:
            CheckpointError: sizes are missing, or norms are placed as no other model places them.
        """
        if original.get("pre_norm"):
            raise CheckpointError(
                "`pre_norm` true is not pre-norm there: the residual stream itself is replaced by its norm; such a "
                "checkpoint has no counterpart here."
            )
        given = {ours: original[name] for ours, names in FIELDS.items() for name in names if name in original}
        fields = {name: value for name, value in given.items() if value is not None}
        fields |= _vocabulary_fields(original, fields)
        missing = [name for name in ("vocab_size", "hidden_size", "num_hidden_layers") if name not in fields]
        if missing:
            names = ", ".join(" or ".join(FIELDS[name]) for name in missing)
            raise CheckpointError(f"`config` lacks {names}; pass the arguments of scGPT's model, or its args.json.")
        # The baseline of the first BioFormer has no argument for it.
        fields.setdefault("intermediate_size", 4 * fields["hidden_size"])
        fields |= _value_fields(original, fields)
        if "dropout" in original:
            fields |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), original["dropout"])
        flags = original.get("forward_flags") or {}
        fields |= {ours: bool(flags[flag]) for flag, ours in FLAGS.items() if flag in flags}
        kept = {name: value for name, value in original.items() if name != "vocab"}
        open_fields = sorted(name for name in {*BY_KEY, "num_labels", "classifier_num_layers"} - {*fields, *options})
        fields["conversion"] = {"args": kept, "open": open_fields}
        known = {name for names in FIELDS.values() for name in names} | {*OTHERS}
        return ScGPTConfig(**(fields | options)), known

    @classmethod
    def tensors(
        cls, state_dict: dict[str, torch.Tensor], config: ScGPTConfig, task: str, drop: Sequence[str] = ()
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """(our tensors, keys that another task's head owns or that `drop` names).

        Raises:
            CheckpointError: lists missing, unexpected and mis-shaped keys under their names.
        """
        found = _one_spelling(unwrapped(state_dict))
        conversion = dict(config.conversion or {})
        config.conversion = conversion | {"layout": "seed" if starting(found, "emb_g.") else "upstream"}
        _decide_by_keys(config, found, conversion.get("open", ()))
        kept = {"base": (), "sequence_classification": ("classifier",)}.get(task, tuple(HEADS))
        ignored = starting(found, *(prefix for head, prefix in HEADS.items() if head not in kept))
        if "cross_attn" in drop:
            ignored += sorted(key for key in found if CROSS_ATTENTION in key)
        own = {key: tensor for key, tensor in found.items() if key not in set(ignored)}
        with torch.device("meta"):
            ours = without_base(cls.classes[task](config).state_dict(), "scgpt")
        modules = module_map(config)
        needed = {key: tensor.shape for key, tensor in renamed(_joined(ours), modules).items()}
        demand_keys(own, needed, cls.name)
        split = _split(renamed(own, inverted(modules)))
        return with_base(split, "scgpt", HEADS, task), ignored

    @classmethod
    def original(
        cls, model: PreTrainedModel, qkv_spelling: str = "in_proj"
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Their arguments and state dict.

        Args:
            qkv_spelling: "in_proj" or "Wqkv" (flash-attention 1).

        Raises:
            CheckpointError: the reference has nothing like a part of the model.
        """
        if qkv_spelling not in ("in_proj", "Wqkv"):
            raise CheckpointError(f"`qkv_spelling` must be 'in_proj' or 'Wqkv', got {qkv_spelling!r}.")
        config: Any = model.config
        wrong = [name for name in ("norm_first", "final_layer_norm", "mask_embedding") if getattr(config, name)]
        wrong += [] if config.attention_bias else ["attention_bias"]
        wrong += ["attention_head_dim"] if config.attention_head_dim else []
        if wrong or config.attention_scaling != "head_dim":
            raise CheckpointError(f"{cls.name!r} has no {', '.join(wrong) or 'attention_scaling'} of this kind.")
        tensors = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
        joined, modules = _joined(without_base(tensors, "scgpt")), module_map(config)
        demand_known(joined, modules, cls.name)
        theirs = renamed(joined, modules)
        if qkv_spelling == "Wqkv":
            theirs = {key.replace("in_proj_", "Wqkv."): tensor for key, tensor in theirs.items()}
        return _arguments(config), theirs


def module_map(config: ScGPTConfig) -> dict[str, str]:
    """Every module of ours, without the base's prefix -> theirs."""
    layers = {
        f"encoder.layer.{index}.{ours}": f"transformer_encoder.layers.{index}.{theirs}"
        for index in range(config.num_hidden_layers)
        for ours, theirs in {
            # A joined tensor is a parameter of the attention module itself.
            "attention": "self_attn",
            "attention.out_proj": "self_attn.out_proj",
            "mlp.up": "linear1",
            "mlp.down": "linear2",
            "norm1": "norm1",
            "norm2": "norm2",
        }.items()
    }
    if (config.conversion or {}).get("layout") == "seed":
        return SEED_EMBEDDINGS | layers | DECODERS
    return _embedding_map(config) | layers | DECODERS | _head_map(config)


def _embedding_map(config: ScGPTConfig) -> dict[str, str]:
    norm = "enc_norm" if config.input_emb_style == "category" else "norm"
    parts = {"linear1": "linear1", "linear2": "linear2", "embedding": "embedding", "norm": norm}
    found = {
        "embeddings.gene": "encoder.embedding",
        "embeddings.gene_norm": "encoder.enc_norm",
        "embeddings.generation_flag": "flag_encoder",
        **{f"embeddings.value.{ours}": f"value_encoder.{theirs}" for ours, theirs in parts.items()},
    }
    if config.domain_spec_batchnorm == "batchnorm":
        return found | {"embeddings.batch_norm.bns.0": "bn"}
    return found | {
        f"embeddings.batch_norm.bns.{label}": f"dsbn.bns.{label}" for label in range(config.num_batch_labels or 0)
    }


def _head_map(config: ScGPTConfig) -> dict[str, str]:
    mvc = {"query": "gene2query", "map": "W", "zero_map": "W_zero_logit", "fc1": "fc1", "fc2": "fc2"}
    found = {f"mvc_head.{ours}": f"mvc_decoder.{theirs}" for ours, theirs in mvc.items()}
    found |= {"mvc_head.activation": "mvc_decoder.hidden_activation"}
    depths = {"classifier": config.classifier_num_layers, "batch_head": 3}
    for head, depth in depths.items():
        theirs = HEADS[head]
        found[f"{head}.out"] = f"{theirs}out_layer"
        found |= {f"{head}.hidden.{place}": f"{theirs}_decoder.{place}" for place in range(3 * depth)}
    return found | {
        "batch_embedding.embedding": "batch_encoder.embedding",
        "batch_embedding.norm": "batch_encoder.enc_norm",
    }


def _one_spelling(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    def spelled(match: re.Match[str]) -> str:
        return ".self_attn." + {"Wqkv.": "in_proj_"}.get(match[2], match[2])

    return {_SPELLINGS.sub(spelled, key): tensor for key, tensor in tensors.items()}


def _joined(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors with queries, keys and values in one, `attention.in_proj_weight`."""
    found = {}
    for key, tensor in ours.items():
        stem, _, name = key.partition("q_proj.")
        if ".attention.q_proj." in key:
            found[f"{stem}in_proj_{name}"] = torch.cat(
                [tensor, ours[f"{stem}k_proj.{name}"], ours[f"{stem}v_proj.{name}"]]
            )
        elif ".attention.k_proj." not in key and ".attention.v_proj." not in key:
            found[key] = tensor
    return found


def _split(joined: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for key, tensor in joined.items():
        stem, _, name = key.partition(".in_proj_")
        if not name:
            found[key] = tensor
            continue
        for part, third in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
            found[f"{stem}.{part}.{name}"] = third.clone()
    return found


def _vocabulary_fields(original: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Size and special tokens, of vocab.json where there is one; specials that it lacks follow its last id."""
    vocabulary = original.get("vocab")
    if not isinstance(vocabulary, dict):
        after = fields.get("pad_token_id", -2) + 1
        return {"cls_token_id": after if 0 <= after < fields.get("vocab_size", 0) else None}
    ids = dict(vocabulary)
    for token in SPECIAL:
        ids.setdefault(token, max(ids.values(), default=-1) + 1)
    return {
        "vocab_size": fields.get("vocab_size", max(ids.values()) + 1),
        "pad_token_id": ids["<pad>"],
        "cls_token_id": ids["<cls>"],
    }


def _value_fields(original: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Bins and the mask's value: "category" counts padding and mask among its input bins, and masks with the last."""
    if fields.get("input_emb_style") != "category":
        bins = original.get("n_bins", original.get("n_input_bins"))
        return {} if bins is None else {"n_bins": bins}
    inputs = original.get("n_input_bins")
    bins = inputs - 2 if inputs is not None else original.get("n_bins", 51)
    return {
        "n_bins": bins,
        "mask_value": fields.get("mask_value", bins + 1),
        "pad_value": fields.get("pad_value", bins),
    }


def _decide_by_keys(config: ScGPTConfig, tensors: dict[str, torch.Tensor], open_fields: Sequence[str]) -> None:
    for name in open_fields:
        if name in BY_KEY:
            setattr(config, name, bool(starting(tensors, BY_KEY[name])))
    config.use_generation_flag = "flag_encoder.weight" in tensors
    config.do_cls = bool(starting(tensors, "cls_decoder."))
    if "num_labels" in open_fields and "cls_decoder.out_layer.bias" in tensors:
        config.num_labels = len(tensors["cls_decoder.out_layer.bias"])
    layers = [key for key in starting(tensors, "cls_decoder._decoder.") if key.endswith(".bias")]
    if "classifier_num_layers" in open_fields and config.do_cls:
        config.classifier_num_layers = len(layers) // 2 + 1


def _arguments(config: Any) -> dict[str, Any]:
    """Their constructor's arguments; those that were read come back as they were."""
    found = {names[0]: getattr(config, ours) for ours, names in FIELDS.items()}
    found |= {"dropout": config.hidden_dropout_prob, "pre_norm": False}
    extra = 2 if config.input_emb_style == "category" else 0
    found["n_input_bins"] = config.n_bins + extra
    read = (config.conversion or {}).get("args")
    return found if read is None else read


SOURCES = (ScGPTSource,)
