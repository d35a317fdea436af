"""The golden case of Nucleotide Transformer v1: the reference's config, tensors, one batch, and its answers."""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

import genesplice_hf

FOLDER = Path(__file__).parent / "golden" / "nt_v1"
# By the README of the golden case.
STATES = {"rtol": 0.0, "atol": 2e-5}


class Golden(NamedTuple):
    """The reference's config and tensors, one batch, and what the reference answers."""

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def model(self, **options: Any) -> Any:
        return genesplice_hf.from_original("nt_v1", self.config, self.weights, **options)


@cache
def golden() -> Golden:
    config = json.loads((FOLDER / "config.json").read_text())["hf_config"]
    return Golden(config, *(load_file(FOLDER / f"{part}.safetensors") for part in ("weights", "inputs", "outputs")))


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
