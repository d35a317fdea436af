"""LayerNorm-only fine-tuning as a PEFT adapter (Zhao et al. 2023, arXiv:2312.11420); RMSNorm works as well."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LNTuningConfig
from transformers import PreTrainedModel

from genesplice_hf.adaptation.targets import build_config, default_targets, require_matches


def layer_norm_config(model: PreTrainedModel, **options: Any) -> LNTuningConfig:
    """An `LNTuningConfig` for `model`: its normalisation layers train, everything else stays.

    Args:
        model: The model to adapt; it is read, not changed.
        **options: Fields of `peft.LNTuningConfig` (`target_modules`, `modules_to_save`, ...); anything else
            raises.

    Raises:
        CheckpointError: The targets match no module.
        GeneSpliceError: An unknown option, or a model type without default targets.
    """
    defaults: dict[str, Any] = {}
    if options.get("target_modules") is None:
        options.pop("target_modules", None)
        defaults["target_modules"] = default_targets(model, "layer_norm_targets")
    config = build_config(LNTuningConfig, model, defaults, options)
    require_matches(model, config)
    return config


@contextmanager
def quiet_layer_norm_warning() -> Iterator[None]:
    """Hide PEFT's "Unsupported layer type" about norm classes that it merely does not know the width of."""
    with warnings.catch_warnings():
        pattern = r"Unsupported layer type '<class '.*[Nn]orm.*'>' encountered"
        warnings.filterwarnings("ignore", message=pattern, category=UserWarning)
        yield
