"""The golden case of Nucleotide Transformer v1: the reference's config, tensors, one batch, and its answers."""

import json
from functools import cache
from pathlib import Path

import torch
from original_golden import Golden, read_golden

FOLDER = Path(__file__).parent / "golden" / "nt_v1"
# By the README of the golden case.
STATES = {"rtol": 0.0, "atol": 2e-5}


@cache
def golden() -> Golden:
    config = json.loads((FOLDER / "config.json").read_text())["hf_config"]
    return read_golden("nt_v1", config, FOLDER)


def at_tokens(tensor: torch.Tensor) -> torch.Tensor:
    """Padded positions are stored as 0."""
    return tensor * golden().inputs["attention_mask"][..., None]


def classifier_weights(task: str) -> dict[str, torch.Tensor]:
    """The golden body and a classifier of three labels."""
    body = {key: tensor for key, tensor in golden().weights.items() if key.startswith("esm.")}
    if task == "token_classification":
        return body | {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    return body | {
        "classifier.dense.weight": torch.randn(32, 32),
        "classifier.dense.bias": torch.randn(32),
        "classifier.out_proj.weight": torch.randn(3, 32),
        "classifier.out_proj.bias": torch.randn(3),
    }
