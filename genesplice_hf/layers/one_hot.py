"""Token ids as one-hot vectors of the hidden width, with other features in the columns after the vocabulary.

The input of GPN (Benegas et al. 2023) and GPN-MSA (Benegas et al. 2025): no parameters, columns 0 .. V-1 hold the
token, columns V .. V+A-1 the auxiliary features, the rest is 0.

Shapes: B batch, L tokens, E hidden size, V vocabulary, A auxiliary columns, S aligned species.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from genesplice_hf.errors import GeneSpliceError, SequenceError


class OneHotEmbedding(nn.Module):
    """(B, L) ids -> (B, L, E); what `nn.Embedding` is for models without an embedding table.

    Attributes:
        num_embeddings, embedding_dim: V and E.
        num_features, num_classes: A, and how many classes an integer feature has (None = features are numbers).
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, num_features: int = 0, num_classes: int | None = None
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.num_features, self.num_classes = num_features, num_classes

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """One-hot vectors in torch's default dtype.

        Raises:
            SequenceError: an id outside the vocabulary.
        """
        _demand_range(ids_BL, self.num_embeddings, "input_ids", "the vocabulary")
        return self.widen(nn.functional.one_hot(ids_BL, self.num_embeddings).to(torch.get_default_dtype()))

    def widen(self, probs_BLV: torch.Tensor) -> torch.Tensor:
        """Probabilities of tokens as an input: (B, L, V) -> (B, L, E)."""
        if probs_BLV.dim() != 3 or probs_BLV.shape[-1] != self.num_embeddings:
            raise SequenceError(
                f"`input_probs` must be (batch, length, {self.num_embeddings}), one probability per token of the "
                f"vocabulary, got shape {tuple(probs_BLV.shape)}."
            )
        return nn.functional.pad(probs_BLV, (0, self.embedding_dim - self.num_embeddings))

    def with_features(self, x_BLE: torch.Tensor, features_BLS: torch.Tensor) -> torch.Tensor:
        """A copy of x whose auxiliary columns hold the features.

        Args:
            features_BLS: integer (B, L, S) classes, S * `num_classes` = A, written species after species; or
                (B, L, A) numbers where the model has no classes.

        Raises:
            SequenceError: another shape, or a class that does not exist.
        """
        features_BLA = self._encoded(features_BLS, tuple(x_BLE.shape[:2])).to(x_BLE)
        start, stop = self.num_embeddings, self.num_embeddings + self.num_features
        return torch.cat([x_BLE[..., :start], features_BLA, x_BLE[..., stop:]], dim=-1)

    def _encoded(self, features: torch.Tensor, places: tuple[int, ...]) -> torch.Tensor:
        classes = self.num_classes or 1
        wanted = (*places, self.num_features // classes)
        if tuple(features.shape) != wanted:
            raise SequenceError(
                f"`aux_features` must be (batch, length, features) = {wanted}, got shape {tuple(features.shape)}; "
                "pass one row per position, with as many features as `n_aux_features` says."
            )
        if self.num_classes is None:
            return features
        _demand_range(features, classes, "aux_features", "`aux_features_vocab_size`")
        return nn.functional.one_hot(features.long(), classes).flatten(2)

    def resize(self, num_embeddings: int) -> None:
        """Takes more (or fewer) columns for tokens.

        Raises:
            GeneSpliceError: the columns are taken.
        """
        if num_embeddings == self.num_embeddings:
            return
        if self.num_features:
            raise GeneSpliceError(
                f"`new_num_tokens` ({num_embeddings}) must stay {self.num_embeddings}: the columns after the "
                "vocabulary hold the auxiliary features, which other weights would then read."
            )
        if num_embeddings > self.embedding_dim:
            raise GeneSpliceError(
                f"`new_num_tokens` ({num_embeddings}) must be at most `hidden_size` ({self.embedding_dim}), for a "
                "token is a column of the hidden state."
            )
        self.num_embeddings = num_embeddings

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, num_features={self.num_features}"


class ResizesOneHot:
    """For models whose input may be one-hot: `resize_token_embeddings` without a table to resize."""

    def resize_token_embeddings(
        self: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """As transformers'; the rows that a decoder gains are drawn with `initializer_range`."""
        embeddings = self.get_input_embeddings()
        if not isinstance(embeddings, OneHotEmbedding):
            return PreTrainedModel.resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of, mean_resizing)
        size = embeddings.num_embeddings if new_num_tokens is None else new_num_tokens
        size += -size % (pad_to_multiple_of or 1)
        embeddings.resize(size)
        decoder = self.get_output_embeddings()
        if decoder is not None and decoder.out_features != size:
            self.set_output_embeddings(_with_rows(decoder, size, self.config.initializer_range))
        self.config.vocab_size = size
        return embeddings


@torch.no_grad()
def _with_rows(old: nn.Linear, size: int, std: float) -> nn.Linear:
    new = nn.Linear(old.in_features, size, bias=old.bias is not None).to(old.weight)
    kept = min(size, old.out_features)
    new.weight.normal_(0.0, std)[:kept] = old.weight[:kept]
    if old.bias is not None:
        new.bias.zero_()[:kept] = old.bias[:kept]
    return new


def _demand_range(values: torch.Tensor, size: int, name: str, what: str) -> None:
    if torch.compiler.is_compiling() or not values.numel():
        return
    lowest, highest = values.min(), values.max()
    if bool((lowest < 0) | (highest >= size)):
        wrong = int(highest) if int(highest) >= size else int(lowest)
        raise SequenceError(f"`{name}` must be 0 to {size - 1} by {what}, got {wrong}; check the tokenizer.")
