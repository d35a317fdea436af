"""Embeddings of sequences from any PreTrainedModel: one vector per sequence and layer.

Shapes: N sequences, B batch, L tokens, E hidden size. Layer 0 is the output of the embedding, layer i that of
block i, as in `hidden_states` of transformers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from genesplice_hf.errors import CheckpointError, SequenceError

Pooling = Literal["mean", "cls", "max"]


class EmbeddingExtractor:
    """What does each layer of a frozen model say about a sequence?

    Padding and special tokens (pad, cls, sep, bos, eos) never enter `mean` and `max`, so a vector depends
    neither on the batch nor on the other sequences.

    Args:
        model: any PreTrainedModel, or a PEFT model around one; with or without a head (only its body runs).
            It is used in eval mode and left in the mode it was in.
        tokenizer: the tokenizer of that model.
        pooling: "mean" or "max" over the real tokens, or "cls": the vector of the leading CLS token.
        layers: "all", or indices into `hidden_states` (0 = embedding, negative counts from the last).
        batch_size: sequences per forward.
        show_progress: draws a bar when there is more than one batch.

    Example:
        >>> features = EmbeddingExtractor(model, tokenizer)(["ACGT", "GGCCA"])
        >>> features[2].shape  # (2, hidden size)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: Pooling = "mean",
        layers: Literal["all"] | Sequence[int] = "all",
        batch_size: int = 64,
        show_progress: bool = True,
    ):
        if pooling not in ("mean", "cls", "max"):
            raise SequenceError(f"`pooling` must be 'mean', 'cls' or 'max', got {pooling!r}.")
        if batch_size < 1:
            raise SequenceError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.body = _body(model)
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.layers = layers
        self.batch_size = batch_size
        self.show_progress = show_progress
        special = [getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "cls", "sep", "bos", "eos")]
        self._special_ids = torch.tensor(sorted({i for i in special if i is not None}), dtype=torch.long)

    def __call__(self, sequences: Sequence[str]) -> dict[int, np.ndarray]:
        """Embeds `sequences`.

        Returns:
            `{layer: (N, E) float32}` with rows in the order given.

        Raises:
            SequenceError: no sequences, an empty one, one longer than the tokenizer's `model_max_length`, or
                "cls" pooling with a tokenizer that puts no CLS token first.
            CheckpointError: the model returns no hidden states, or a layer that it does not have is asked for.
        """
        sequences = _checked_sequences(sequences)
        order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
        parts: dict[int, list[np.ndarray]] = {}
        with torch.inference_mode(), _eval_mode(self.body):
            for rows in self._batches(order):
                for layer, pooled_BE in self._embed([sequences[row] for row in rows], rows).items():
                    parts.setdefault(layer, []).append(pooled_BE.float().cpu().numpy())
        back = np.argsort(np.asarray(order))
        return {layer: np.concatenate(arrays)[back] for layer, arrays in parts.items()}

    def _batches(self, order: Sequence[int]) -> Iterator[Sequence[int]]:
        starts = range(0, len(order), self.batch_size)
        hide = not self.show_progress or len(starts) < 2
        for start in hf_logging.tqdm(starts, desc="embedding", unit="batch", disable=hide):
            yield order[start : start + self.batch_size]

    def _embed(self, batch: list[str], rows: Sequence[int]) -> dict[int, torch.Tensor]:
        inputs = self.tokenizer(batch, padding=True, return_tensors="pt").to(self.body.device)
        self._check_tokens(inputs["input_ids"], rows)
        hidden_states = self.body(**inputs, output_hidden_states=True).hidden_states
        if hidden_states is None:
            raise CheckpointError(f"`model` ({type(self.body).__name__}) returns no hidden states to pool.")
        real_BL = self._real_tokens(inputs, rows)
        return {i: self._pool(hidden_states[i], real_BL, i) for i in self._layer_indices(len(hidden_states))}

    def _check_tokens(self, ids_BL: torch.Tensor, rows: Sequence[int]) -> None:
        limit = getattr(self.tokenizer, "model_max_length", None)
        if limit is not None and ids_BL.shape[1] > limit:
            raise SequenceError(
                f"Sequences near row {rows[-1]} give {ids_BL.shape[1]} tokens, the tokenizer's "
                f"`model_max_length` is {limit}; cut them into windows first."
            )

    def _real_tokens(self, inputs, rows: Sequence[int]) -> torch.Tensor:
        """(B, L) True where a token takes part in the pooling."""
        ids_BL = inputs["input_ids"]
        mask_BL = inputs.get("attention_mask", torch.ones_like(ids_BL)).bool()
        if self.pooling == "cls":
            return self._first_token(ids_BL, mask_BL)
        real_BL = mask_BL & ~torch.isin(ids_BL, self._special_ids.to(ids_BL.device))
        empty = torch.nonzero(~real_BL.any(dim=1)).flatten().tolist()
        if empty:
            raise SequenceError(f"Sequence {rows[empty[0]]} gives no token besides special ones; remove it.")
        return real_BL

    def _first_token(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        first_B = mask_BL.int().argmax(dim=1, keepdim=True)
        cls_id = self.tokenizer.cls_token_id
        if cls_id is None or not bool((ids_BL.gather(1, first_B) == cls_id).all()):
            raise SequenceError(
                "`pooling='cls'` needs a tokenizer that puts a CLS token first, and "
                f"{type(self.tokenizer).__name__} does not here; use pooling='mean'."
            )
        return torch.zeros_like(mask_BL).scatter(1, first_B, True)

    def _layer_indices(self, num_states: int) -> list[int]:
        if isinstance(self.layers, str):
            return list(range(num_states))
        wrong = [layer for layer in self.layers if not -num_states <= layer < num_states]
        if wrong:
            raise CheckpointError(f"`layers` must lie in {-num_states}..{num_states - 1} for this model, got {wrong}.")
        return sorted({layer % num_states for layer in self.layers})

    def _pool(self, hidden_BLE: torch.Tensor, real_BL: torch.Tensor, layer: int) -> torch.Tensor:
        if hidden_BLE.shape[:2] != real_BL.shape:
            raise CheckpointError(
                f"Layer {layer} has {hidden_BLE.shape[1]} positions for {real_BL.shape[1]} tokens; name the "
                "layers at token resolution in `layers`."
            )
        hidden_BLE = hidden_BLE.float()
        keep_BL1 = real_BL.unsqueeze(-1)
        if self.pooling == "max":
            return hidden_BLE.masked_fill(~keep_BL1, -torch.inf).amax(dim=1)
        return hidden_BLE.masked_fill(~keep_BL1, 0.0).sum(dim=1) / keep_BL1.sum(dim=1)


def _body(model) -> PreTrainedModel:
    """The model below its head; adapters stay in place, because PEFT injects them into the body."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise CheckpointError(f"`model` must be a transformers PreTrainedModel, got {type(model).__name__}.")
    return inner.base_model


def _checked_sequences(sequences: Sequence[str]) -> list[str]:
    if isinstance(sequences, str):
        raise SequenceError("`sequences` must be a list of strings, got one string; wrap it in a list.")
    sequences = list(sequences)
    if not sequences:
        raise SequenceError("`sequences` must hold at least one sequence, got none.")
    empty = next((row for row, sequence in enumerate(sequences) if not sequence), None)
    if empty is not None:
        raise SequenceError(f"Sequence {empty} is empty; remove it or give at least one base.")
    return sequences


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
