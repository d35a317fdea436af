"""LoRA: low-rank updates beside frozen weight matrices (Hu et al. 2021, arXiv:2106.09685)."""

from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel

from genesplice_hf.adaptation.targets import build_config, default_targets, require_matches

# The settings of DNABERT-2's published fine-tuning script.
LORA_DEFAULTS = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05}


def lora_config(model: PreTrainedModel, **options: Any) -> LoraConfig:
    """A `LoraConfig` for `model`; W x becomes W x + (lora_alpha / r) B A x.

    Args:
        model: The model to adapt; it is read, not changed.
        **options: Fields of `peft.LoraConfig` (`r`, `lora_alpha`, `lora_dropout`, `target_modules`,
            `modules_to_save`, `use_dora`, ...); anything else raises.

    Raises:
        CheckpointError: The targets match no module.
        GeneSpliceError: An unknown option, or a model type without default targets.
    """
    defaults: dict[str, Any] = dict(LORA_DEFAULTS)
    if options.get("target_modules") is None:
        options.pop("target_modules", None)
        defaults["target_modules"] = default_targets(model, "lora_targets")
    config = build_config(LoraConfig, model, defaults, options)
    require_matches(model, config)
    return config
