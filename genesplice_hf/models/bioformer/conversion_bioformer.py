"""The past of BioFormer: arguments and state dicts of giacomo-ciro/240316_bio-llms, in its three states.

September 2024 (341e4fe with gates and heads of full width, 4277d56 without) and the last one (e1d0b76); which one a
checkpoint comes from is read from its arguments and keys.
"""

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
from genesplice_hf.models.bioformer.configuration_bioformer import BioFormerConfig
from genesplice_hf.models.bioformer.modeling_bioformer import BioFormerForMaskedExpression, BioFormerModel

# Our field -> their argument.
FIELDS = {
    "vocab_size": "ntoken",
    "hidden_size": "d_model",
    "num_attention_heads": "nhead",
    "num_hidden_layers": "nlayers",
    "pad_token_id": "pad_id",
    "use_opm": "do_opm",
    "use_pair_bias": "do_pair_bias",
}
# Arguments of the last state alone.
LATER = {"pair_hidden_size": "d_z", "opm_hidden_size": "d_opm", "explicit_zero_prob": "explicit_zero_prob"}
HEADS = {"expression_head": "decoder.fc.", "zero_head": "decoder.zero_logit."}
UNUSED_HEAD = "mvc_decoder."
UNUSED_BIAS = ".attn.layer_norm_z.bias"
BLOCK = {
    "norm1": "attn.layer_norm_m",
    "attention.q_proj": "attn.linear_q",
    "attention.k_proj": "attn.linear_k",
    "attention.v_proj": "attn.linear_v",
    "attention.out_proj": "attn.linear_o",
    "attention.gate_proj": "attn.linear_g",
    "pair_bias.proj": "attn.linear_z",
    "pair_bias.norm": "attn.layer_norm_z",
    "norm2": "trans.layer_norm",
    "mlp.up": "trans.linear_1",
    "mlp.down": "trans.linear_2",
    "opm.norm": "opm.layer_norm",
    "opm.a": "opm.linear_1",
    "opm.b": "opm.linear_2",
    "opm.out": "opm.linear_out",
}


class BioFormerSource:
    """Source `bioformer` of `from_original`."""

    name = "bioformer"
    model_type = BioFormerConfig.model_type
    original_types: tuple[str, ...] = ()
    classes: dict[str, type[PreTrainedModel]] = {
        "base": BioFormerModel,
        "masked_expression": BioFormerForMaskedExpression,
    }
    inputs: tuple[str, ...] = ()

    @staticmethod
    def task(state_dict: dict[str, torch.Tensor]) -> str:
        """The task whose head the tensors hold."""
        return "masked_expression" if starting(unwrapped(state_dict), "decoder.fc.") else "base"

    @staticmethod
    def config(original: dict[str, Any], options: dict[str, Any]) -> tuple[BioFormerConfig, set[str]]:
        """Our config, and the names of theirs that were understood; `options` are fields of ours.

        Raises:
            CheckpointError: sizes are missing.
        """
        missing = [name for name in ("ntoken", "d_model", "nhead", "nlayers") if name not in original]
        if missing:
            raise CheckpointError(f"`config` lacks {', '.join(missing)}; pass the arguments of BioFormerModel.")
        given = {ours: original[theirs] for ours, theirs in (FIELDS | LATER).items() if theirs in original}
        after = given.get("pad_token_id", -2) + 1
        given["cls_token_id"] = after if 0 < after < given["vocab_size"] else None
        state: Any = "head" if "d_z" in original or "d_opm" in original else "2024-09-11"
        given["conversion"] = {"args": dict(original), "open": sorted({"explicit_zero_prob"} - {*given, *options})}
        known = {*FIELDS.values(), *LATER.values(), "dropout"}
        return BioFormerConfig.seed(state, **(given | options)), known

    @classmethod
    def tensors(
        cls, state_dict: dict[str, torch.Tensor], config: BioFormerConfig, task: str
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """(our tensors, keys without an effect or of another task's head).

        Raises:
            CheckpointError: lists missing, unexpected and mis-shaped keys under their names.
        """
        found = unwrapped(state_dict)
        _decide_by_keys(config, found)
        ignored = sorted(key for key in found if key.endswith(UNUSED_BIAS))
        # September's files hold a head that is never called.
        ignored += starting(found, UNUSED_HEAD, *(HEADS.values() if task == "base" else ()))
        own = {key: tensor for key, tensor in found.items() if key not in set(ignored)}
        modules = module_map(config)
        with torch.device("meta"):
            ours = without_base(cls.classes[task](config).state_dict(), "bioformer")
        needed = {key: tensor.shape for key, tensor in renamed(ours, modules).items()}
        demand_keys(own, needed, cls.name)
        return with_base(renamed(own, inverted(modules)), "bioformer", HEADS, task), ignored

    @classmethod
    def original(cls, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Their arguments and state dict; tensors without an effect come back as zeros.

        Raises:
            CheckpointError: the reference has nothing like a part of the model.
        """
        config: Any = model.config
        expected = BioFormerConfig()
        fixed = ("norm_first", "attention_bias", "final_layer_norm", "pair_update", "pair_layer_norm", "pair_mode")
        wrong = [name for name in fixed if getattr(config, name) != getattr(expected, name)]
        wrong += [] if config.intermediate_size == 4 * config.hidden_size else ["intermediate_size"]
        if wrong:
            raise CheckpointError(f"{cls.name!r} has no {', '.join(wrong)} of this kind.")
        tensors = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
        ours, modules = without_base(tensors, "bioformer"), module_map(config)
        demand_known(ours, modules, cls.name)
        theirs = renamed(ours, modules)
        return _arguments(config), theirs | _unused(config, theirs, next(iter(tensors.values())))


def module_map(config: BioFormerConfig) -> dict[str, str]:
    """Every module of ours, without the base's prefix -> theirs."""
    blocks = {
        f"encoder.layer.{index}.{ours}": f"bioformer.blocks.{index}.{theirs}"
        for index in range(config.num_hidden_layers)
        for ours, theirs in BLOCK.items()
    }
    pairs = {f"pair_embedding.{part}": f"emb_z.{part}" for part in ("linear1", "linear2", "norm")}
    return SEED_EMBEDDINGS | pairs | blocks | DECODERS


def _decide_by_keys(config: BioFormerConfig, tensors: dict[str, torch.Tensor]) -> None:
    """What their arguments do not say."""
    if "explicit_zero_prob" in (config.conversion or {}).get("open", ()):
        config.explicit_zero_prob = bool(starting(tensors, "decoder.zero_logit."))
    if not starting(tensors, "emb_z."):
        config.pair_init = "zeros"
    config.use_gating = bool([key for key in tensors if ".attn.linear_g." in key])
    queries = tensors.get("bioformer.blocks.0.attn.linear_q.weight")
    if queries is not None and len(queries) == config.num_attention_heads * config.hidden_size:
        config.attention_head_dim = config.hidden_size
    config.update_pair_in_last_block = bool(starting(tensors, f"bioformer.blocks.{config.num_hidden_layers - 1}.opm."))


def _unused(config: Any, theirs: dict[str, torch.Tensor], like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Zeros for the tensors that have no effect there: biases of z's norm, and September's uncalled head."""
    zeros = {
        key.replace(".linear_z.weight", ".layer_norm_z.bias"): like.new_zeros(tensor.shape[1])
        for key, tensor in theirs.items()
        if key.endswith(".attn.linear_z.weight")
    }
    size, ignored = config.hidden_size, (config.conversion or {}).get("ignored_keys") or []
    for key in starting(ignored, UNUSED_HEAD):
        zeros[key] = like.new_zeros((size,) if key.endswith(".bias") else (size, size))
    return zeros


def _arguments(config: Any) -> dict[str, Any]:
    """Their constructor's arguments; those that were read come back as they were."""
    read = (config.conversion or {}).get("args")
    built = {theirs: getattr(config, ours) for ours, theirs in (FIELDS | LATER).items()}
    return built | {"dropout": config.hidden_dropout_prob} if read is None else read


SOURCES = (BioFormerSource,)
