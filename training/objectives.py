"""What a pretraining run learns: its settings, the collator, the fresh model, and what is saved of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from genesplice_hf.errors import DataError
from genesplice_hf.heads.pretraining import EncoderForPreTraining
from genesplice_hf.heads.pretraining_head import PretrainingOptions
from genesplice_hf.objectives.causal import CLMCollator
from genesplice_hf.objectives.contrastive import ContrastiveCollator, ViewStrength
from genesplice_hf.objectives.masked import DnaMLMCollator
from genesplice_hf.objectives.mixed import MultiObjectiveCollator
from genesplice_hf.objectives.next_segment import NextSegmentCollator, WindowPool

Collator = DnaMLMCollator | CLMCollator | ContrastiveCollator | NextSegmentCollator | MultiObjectiveCollator
PARTS = ("masked", "causal", "contrastive", "next_segment")
_HEAD_OPTIONS = ("contrastive_dim", "contrastive_temperature")


@dataclass
class LanguageModelSettings:
    """Which network and which objective."""

    objective: Literal["masked", "causal", "contrastive", "next_segment", "mixed"] = field(
        default="masked", metadata={"help": "What is predicted; mixed: a weighted sum."}
    )
    objective_weights: dict = field(
        default_factory=dict,
        metadata={"help": "mixed: weights of masked or causal, contrastive, next_segment, as JSON."},
    )
    objective_options: dict = field(
        default_factory=dict,
        metadata={"help": "By part, arguments of its collator; contrastive_dim, contrastive_temperature; as JSON."},
    )
    model_config: dict = field(default_factory=dict, metadata={"help": "`model_type` and fields of its config."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of bases to predict (masked)."})
    rc_probability: float = field(default=0.5, metadata={"help": "Share of windows read from the other strand."})
    soft_mask_weight: float = field(default=1.0, metadata={"help": "Loss weight of lower-case bases."})
    attn_implementation: str | None = field(
        default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2 or flex_attention; none: the model's own."}
    )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every part that is learned.

        Raises:
            DataError: `objective_weights` does not fit `objective`.
        """
        if self.objective != "mixed":
            if self.objective_weights:
                raise DataError("`objective_weights` belongs to `objective` mixed; set that, or leave them out.")
            return {self.objective: 1.0}
        wrong = [part for part in self.objective_weights if part not in PARTS]
        if wrong or len(self.objective_weights) < 2 or {"masked", "causal"} <= set(self.objective_weights):
            raise DataError(
                f"`objective_weights` must weigh two or three of {PARTS}, not both of the first two, got "
                f"{self.objective_weights}."
            )
        return dict(self.objective_weights)

    @property
    def predicts_tokens(self) -> bool:
        """Whether the model has logits per base, which can be measured beside Markov chains."""
        return bool({"masked", "causal"} & set(self.weights))

    @property
    def is_causal(self) -> bool:
        """Whether bases are predicted from those before them alone."""
        return "causal" in self.weights


def build_collator(
    tokenizer: PreTrainedTokenizerBase,
    settings: LanguageModelSettings,
    seed: int,
    partners: WindowPool | None = None,
    rc_equivariant: bool = False,
) -> Collator:
    """The objective as a collator of raw windows.

    Args:
        tokenizer: of the model.
        settings: which objective.
        seed: of masks, strands, views and pairs.
        partners: windows from which the wrong halves come (next_segment).
        rc_equivariant: whether the model gives both strands one embedding (contrastive).

    Raises:
        DataError: options for a part that is not learned.
    """
    weights = settings.weights
    unknown = sorted(set(settings.objective_options) - set(weights) - set(_HEAD_OPTIONS))
    if unknown:
        raise DataError(f"`objective_options` names {unknown}; it may name {[*weights, *_HEAD_OPTIONS]}.")
    shared = {"rc_probability": settings.rc_probability, "seed": seed}
    made: dict[str, Any] = {}
    for part in weights:
        options = shared | dict(settings.objective_options.get(part, {}))
        if part == "masked":
            options = {"soft_mask_weight": settings.soft_mask_weight} | options
            made["tokens"] = DnaMLMCollator(tokenizer, **{"mlm_probability": settings.mlm_probability} | options)
        elif part == "causal":
            made["tokens"] = CLMCollator(tokenizer, **{"soft_mask_weight": settings.soft_mask_weight} | options)
        elif part == "contrastive":
            if "strength" in options:
                options["strength"] = ViewStrength(**options["strength"])
            made[part] = ContrastiveCollator(tokenizer, rc_equivariant=rc_equivariant, **options)
        else:
            made[part] = NextSegmentCollator(tokenizer, partners=partners if partners is not None else [], **options)
    return next(iter(made.values())) if len(made) == 1 else MultiObjectiveCollator(**made)


def build_model(settings: LanguageModelSettings, seed: int) -> PreTrainedModel:
    """A model with fresh weights, drawn from `seed`: a language model, or an encoder with the heads of pretraining."""
    config = model_config(settings)
    set_seed(seed)
    chosen = {} if settings.attn_implementation is None else {"attn_implementation": settings.attn_implementation}
    if settings.objective in ("masked", "causal"):
        auto = AutoModelForCausalLM if settings.is_causal else AutoModelForMaskedLM
        return auto.from_config(config, **chosen)
    weights = settings.weights
    head = {name: settings.objective_options[name] for name in _HEAD_OPTIONS if name in settings.objective_options}
    options = PretrainingOptions(
        mlm_weight=weights.get("masked", weights.get("causal", 0.0)),
        contrastive_weight=weights.get("contrastive", 0.0),
        next_segment_weight=weights.get("next_segment", 0.0),
        **head,
    )
    return EncoderForPreTraining(AutoModel.from_config(config, **chosen), options)


def model_config(settings: LanguageModelSettings) -> PreTrainedConfig:
    """The config of any `model_type` that transformers or this package knows.

    Raises:
        DataError: a causal objective for a model that is not, or the other way round.
    """
    fields = dict(settings.model_config)
    config = AutoConfig.for_model(fields.pop("model_type", "genesplice"), **fields)
    if settings.predicts_tokens and getattr(config, "is_decoder", settings.is_causal) != settings.is_causal:
        raise DataError(
            f"`model_config` has is_decoder={config.is_decoder}, which does not fit `objective` "
            f"{'causal' if settings.is_causal else 'masked'}; set `is_decoder: {str(settings.is_causal).lower()}`."
        )
    return config


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights in bfloat16, config and tokenizer; the model in memory gets the rounded weights too.

    Of an encoder with heads of pretraining `folder` holds the plain encoder, which `AutoModel` loads, and
    `folder` with `_with_heads` behind its name everything.
    """
    model.to(torch.bfloat16)
    if isinstance(model, EncoderForPreTraining):
        model.save_encoder(folder)
        model.save_pretrained(folder.with_name(f"{folder.name}_with_heads"))
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.to(torch.float32)
