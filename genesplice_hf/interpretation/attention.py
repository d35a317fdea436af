"""Attention maps of one sequence, by layer.

Shapes: H heads, T tokens; row = the token that looks, column = the token looked at.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.interpretation.encoding import encode
from genesplice_hf.interpretation.targets import check_length, check_sequence, evaluation_mode


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Attention weights by name: ``layer_0`` is the first layer's (H, T, T) float32; each row sums to 1."""

    tokens: list[str]
    layers: dict[str, np.ndarray]


def attention_maps(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequence: str) -> AttentionMaps:
    """Runs the model on `sequence` and returns the attention weights of every layer.

    Only the eager implementation computes the weights; the fast ones never hold them.

    Raises:
        GeneSpliceError: the model runs another implementation or records no attention.
        SequenceError: the sequence is empty, holds other letters than A, C, G, T, N or is too long.
    """
    sequence = check_sequence(sequence)
    _check_eager(model)
    inputs = encode(tokenizer, [sequence], next(model.parameters()).device)
    check_length(model, inputs["input_ids"].shape[1])
    with evaluation_mode(model), torch.inference_mode():
        attentions = getattr(model(**inputs, output_attentions=True), "attentions", None)
    if not attentions or any(weights is None for weights in attentions):
        raise GeneSpliceError(f"`model` ({type(model).__name__}) records no attention weights; use gradients instead")
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    named = {f"layer_{index}": weights[0].float().cpu().numpy() for index, weights in enumerate(attentions)}
    return AttentionMaps(tokens, named)


def _check_eager(model: PreTrainedModel) -> None:
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation != "eager":
        raise GeneSpliceError(
            f"`model` runs the {implementation!r} attention, which keeps no weights; call "
            "model.set_attn_implementation('eager') first"
        )
