"""Tiny GeneSplice models of both forms, with weights large enough that every path of the network shows."""

from typing import Any

import torch
from transformers import PreTrainedModel

from genesplice_hf.models.genesplice.configuration_genesplice import GeneSpliceConfig

FLAT: dict[str, Any] = {
    "hidden_sizes": [16],
    "pool_sizes": [],
    "num_attention_heads": [2],
    "head_dims": [8],
    "intermediate_sizes": [24],
    "num_encoder_layers": [],
    "num_tower_layers": 2,
    "num_decoder_layers": [],
    "local_windows": [],
    "tower_window": 4,
    "tower_layer_types": ["sliding_attention", "full_attention"],
    "initializer_range": 0.3,
}
# Bins of 16 and 128 bases, as in the default config.
HIERARCHICAL: dict[str, Any] = {
    "hidden_sizes": [16, 24, 32],
    "pool_sizes": [16, 8],
    "num_attention_heads": [2, 2, 4],
    "num_key_value_heads": [2, 1, 2],
    "head_dims": [8, 8, 8],
    "intermediate_sizes": [24, 24, 24],
    "num_encoder_layers": [1, 1],
    "num_tower_layers": 1,
    "num_decoder_layers": [1, 1],
    "local_windows": [20, 2],
    "initializer_range": 0.3,
}
FORMS = {"flat": FLAT, "hierarchical": HIERARCHICAL}


def tiny_config(form: str, **overrides: Any) -> GeneSpliceConfig:
    return GeneSpliceConfig(**(FORMS[form] | overrides))


def tiny(model_class: type[PreTrainedModel], form: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model in evaluation mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return model_class(tiny_config(form, **overrides)).eval()


def random_bases(batch: int, length: int) -> torch.Tensor:
    """(B, L) ids of A, C, G and T."""
    return torch.randint(5, 9, (batch, length))


def change_base(ids: torch.Tensor, position: int) -> torch.Tensor:
    """The same rows with another base at `position`."""
    changed = ids.clone()
    changed[:, position] = (changed[:, position] - 5 + 1) % 4 + 5
    return changed
