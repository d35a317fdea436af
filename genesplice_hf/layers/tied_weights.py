"""Tensors that checkpoints of transformers store once or twice, or under an older name."""

import logging
from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


def fill_tied(tensors: dict[str, torch.Tensor], config: PreTrainedConfig, pairs: Mapping[str, str]) -> None:
    """Gives every tied tensor that is stored once its second name; unties where the two copies differ.

    Args:
        tensors: of a checkpoint, completed in place.
        config: its `tie_word_embeddings` becomes False where the copies differ, with a warning.
        pairs: name of the copy -> name of the tensor that it is tied to.
    """
    if not config.tie_word_embeddings:
        return
    for copy, source in pairs.items():
        if copy not in tensors and source in tensors:
            tensors[copy] = tensors[source]
        elif source not in tensors and copy in tensors:
            tensors[source] = tensors[copy]
    apart = [copy for copy, source in pairs.items() if copy in tensors and not _same(tensors, copy, source)]
    if apart:
        config.tie_word_embeddings = False
        logger.warning("%s differ from what they are tied to; `tie_word_embeddings` is now False", ", ".join(apart))


def modern_name(key: str) -> str:
    """A tensor's name with `weight` and `bias` for a LayerNorm's `gamma` and `beta`.

    The older names stand in files of TensorFlow's time, and transformers 5 writes them again when it saves an ESM.
    """
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key


def _same(tensors: dict[str, torch.Tensor], copy: str, source: str) -> bool:
    return source in tensors and torch.equal(tensors[copy], tensors[source])
