"""A golden case of a published model: the reference's config, its tensors, one batch, and what it answers."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

import genesplice_hf


class Golden(NamedTuple):
    """The files of a case; `source` is the reference's name for `from_original`."""

    source: str
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def model(self, **options: Any) -> Any:
        return genesplice_hf.from_original(self.source, self.config, self.weights, **options)


def read_golden(source: str, config: dict[str, Any], folder: Path) -> Golden:
    return Golden(
        source, config, *(load_file(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    )
