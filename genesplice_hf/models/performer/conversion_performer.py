"""The past of the SLiM Performer: configs and state dicts of google-research's `SLiMPerformer`, both ways.

The published keys are ours without the base model's prefix; its configs name sizes differently and say `favor+_n` for
n blocks of random features. Those features are drawn anew at every forward pass there, and belong to our model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from genesplice_hf.errors import CheckpointError
from genesplice_hf.models.performer.configuration_performer import PerformerConfig
from genesplice_hf.models.performer.modeling_performer import PerformerForCausalLM
from genesplice_hf.models.performer.modeling_performer_base import PerformerModel

HEAD = "output_logit_map."
# Their name -> ours, for fields that only change their name; the defaults of the published class where it has any.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "ffn_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
}
FEATURE_TYPES = ("relu", "elu+1", "sqr")
DEFAULT_FEATURE_TYPE = "sqr"
DEFAULT_COMPUTE_TYPE = "iter"


class SlimPerformerSource:
    """Source `slim_performer` of `from_original`; option `features`: one (H, D, M) tensor per layer for favor+."""

    name = "slim_performer"
    model_type = PerformerConfig.model_type
    classes: dict[str, type[PreTrainedModel]] = {"base": PerformerModel, "causal_lm": PerformerForCausalLM}
    inputs: tuple[str, ...] = ("features",)
    original_types: tuple[str, ...] = ()

    @staticmethod
    def task(state_dict: dict[str, torch.Tensor]) -> str:
        """The task whose head the tensors hold."""
        return "causal_lm" if any(key.startswith(HEAD) for key in state_dict) else "base"

    @staticmethod
    def config(original: dict[str, Any], options: dict[str, Any]) -> tuple[PerformerConfig, set[str]]:
        """Our config, and the names of theirs that were understood; `options` are fields of ours."""
        missing = [name for name in FIELDS if name not in original]
        if missing:
            raise CheckpointError(f"`config` lacks {', '.join(missing)}; pass the arguments of SLiMPerformer.")
        fields: dict[str, Any] = {ours: original[theirs] for theirs, ours in FIELDS.items()}
        fields |= _features_of(original.get("feature_type", DEFAULT_FEATURE_TYPE))
        fields["norm_placement"] = "branch" if original.get("on_gptln", False) else "pre"
        # Three ways to compute the same sums, of which the name is kept for the way back.
        conversion = {name: original[name] for name in ("feature_type", "compute_type") if name in original}
        known = {*FIELDS, "feature_type", "on_gptln", "compute_type"}
        return PerformerConfig.slim(**(fields | {"conversion": conversion} | options)), known

    @staticmethod
    def tensors(
        state_dict: dict[str, torch.Tensor],
        config: PerformerConfig,
        task: str,
        features: Sequence[torch.Tensor] | None = None,
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """(our tensors, keys that another task's head owns)."""
        ignored = sorted(key for key in state_dict if key.startswith(HEAD)) if task == "base" else []
        prefix = "" if task == "base" else "performer."
        found = {
            key if key.startswith(HEAD) else prefix + key: tensor
            for key, tensor in state_dict.items()
            if key not in ignored
        }
        if config.feature_map == "favor+":
            for layer, tensor in enumerate(_demand_features(features, config)):
                found[f"{prefix}layers.{layer}.attention.features"] = tensor
        elif features is not None:
            raise CheckpointError(f"`features` belong to favor+, and this is {config.feature_map!r}; leave them out.")
        return found, ignored

    @staticmethod
    def original(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Their config and state dict; random features stay behind, for the reference draws its own at every pass.

        Raises:
            CheckpointError: the model has parts that the published architecture lacks.
        """
        config = model.config
        _demand_published(model)
        original = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
        conversion = config.conversion or {}
        original |= {
            "feature_type": _feature_type(config, conversion.get("feature_type")),
            "compute_type": conversion.get("compute_type", DEFAULT_COMPUTE_TYPE),
            "on_gptln": config.norm_placement == "branch",
        }
        tensors = {
            key.removeprefix("performer."): tensor.detach().clone()
            for key, tensor in model.state_dict().items()
            if not key.endswith("attention.features")
        }
        return original, tensors


def _features_of(feature_type: str) -> dict[str, Any]:
    if feature_type in FEATURE_TYPES:
        return {"feature_map": feature_type}
    kind, _, blocks = feature_type.partition("_")
    if kind == "favor+" and (not blocks or (blocks.isdigit() and int(blocks) > 0)):
        return {"feature_map": "favor+", "num_feature_blocks": int(blocks or 1)}
    known = ", ".join([*FEATURE_TYPES, "favor+", "favor+_n"])
    raise CheckpointError(f"`feature_type` must be one of {known}, got {feature_type!r}.")


def _feature_type(config: PerformerConfig, recorded: str | None) -> str:
    """The name that was read, where it still says what the config says: "favor+" and "favor+_1" are the same."""
    if recorded is not None and all(getattr(config, name) == value for name, value in _features_of(recorded).items()):
        return recorded
    return f"favor+_{config.num_feature_blocks}" if config.feature_map == "favor+" else config.feature_map


def _demand_features(features: Sequence[torch.Tensor] | None, config: PerformerConfig) -> Sequence[torch.Tensor]:
    shape = (config.num_attention_heads, config.head_dim, config.num_features)
    if features is None or len(features) != config.num_hidden_layers:
        given = "none" if features is None else str(len(features))
        needed = f"{config.num_hidden_layers} tensors of shape {shape}, one per layer"
        raise CheckpointError(f"favor+ needs `features`: {needed}, got {given}.")
    return features


def _demand_published(model: PreTrainedModel) -> None:
    config = model.config
    wrong = [
        name
        for name, wanted in (
            ("is_decoder", True),
            ("output_projection", False),
            ("final_norm", False),
            ("position_scheme", "concat"),
            ("stem_kernel_size", 0),
            ("feature_redraw", "fixed"),
        )
        if getattr(config, name) != wanted
    ]
    if config.feature_map not in (*FEATURE_TYPES, "favor+"):
        wrong.append("feature_map")
    if wrong or not isinstance(model, PerformerForCausalLM):
        reason = f"{', '.join(wrong)} differ from `PerformerConfig.slim()`" if wrong else type(model).__name__
        raise CheckpointError(
            f"the published SLiMPerformer is a causal LM without additions, and this is not: {reason}."
        )


SOURCES = (SlimPerformerSource,)
