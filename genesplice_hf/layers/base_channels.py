"""Base ids as four channels A, C, G, T: the input of convolutional networks over DNA.

Shapes: B batch, L bases.
"""

from typing import Any

import torch
from torch import nn

from genesplice_hf.errors import GeneSpliceError, SequenceError
from genesplice_hf.layers.padding import demand_one_input, real_positions

NUM_CHANNELS = 4
UNKNOWN_ID, PAD_ID = 4, 5


class BaseChannels(nn.Module):
    """(B, L) ids of any integer dtype -> (B, L, 4): 0-3 one-hot, 4 (N) zeros, 5 or -1 `pad_value` in every channel.

    Without parameters; what `nn.Embedding` is for models of tokens.

    Attributes:
        num_embeddings, embedding_dim: ids and channels.
        pad_value: of positions off the chromosome, 0.25 = "every base alike".
    """

    num_embeddings, embedding_dim = PAD_ID + 1, NUM_CHANNELS

    def __init__(self, pad_value: float = 0.0) -> None:
        super().__init__()
        self.pad_value = pad_value

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """Channels in torch's default dtype.

        Raises:
            SequenceError: an id that stands for nothing.
        """
        if ids_BL.is_floating_point() or ids_BL.is_complex():
            raise SequenceError(
                f"`input_ids` must hold integers, got {ids_BL.dtype}; pass real-valued channels (batch, length, 4) as "
                "`inputs_embeds`."
            )
        ids_BL = ids_BL.long()
        if not torch.compiler.is_compiling() and ids_BL.numel():
            lowest, highest = ids_BL.min(), ids_BL.max()
            if bool((lowest < -1) | (highest > PAD_ID)):
                wrong = int(lowest) if int(lowest) < -1 else int(highest)
                raise SequenceError(
                    f"`input_ids` must be 0-3 (A, C, G, T), 4 (N), or 5 or -1 (off the chromosome), got {wrong}; use "
                    'NucleotideTokenizer(preset="enformer").'
                )
        ids_BL = ids_BL.masked_fill(ids_BL < 0, PAD_ID)
        table = torch.eye(self.num_embeddings, self.embedding_dim, device=ids_BL.device)
        table[PAD_ID] = self.pad_value
        return nn.functional.embedding(ids_BL, table)

    def pad(self, x_BL4: torch.Tensor, mask_BL: torch.Tensor | None) -> torch.Tensor:
        """Puts `pad_value` where `mask_BL` (bool, True = real; None = all real) says padding."""
        return x_BL4 if mask_BL is None else x_BL4.masked_fill(~mask_BL[..., None], self.pad_value)

    def extra_repr(self) -> str:
        return f"pad_value={self.pad_value}"


class FixedBaseChannels:
    """For models whose input is `BaseChannels` in `embeddings`: there is no table, and it cannot be resized."""

    def get_input_embeddings(self) -> nn.Module:
        base: Any = getattr(self, "base_model", self)
        return base.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise GeneSpliceError("the input is four channels of bases, which no other embedding can replace.")

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Returns the input as it is.

        Raises:
            GeneSpliceError: another number than there is.
        """
        size = BaseChannels.num_embeddings
        if new_num_tokens not in (None, size) or pad_to_multiple_of not in (None, 1):
            raise GeneSpliceError(
                f"`new_num_tokens` ({new_num_tokens}) must stay {size}: A, C, G, T, N and padding are four channels, "
                "not a table of tokens."
            )
        return self.get_input_embeddings()


def demand_bases(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
    """Raises unless exactly one of ids (B, L) and channels (B, L, 4) is given, with at least one base."""
    if input_ids is not None and input_ids.dim() != 2:
        hint = "add a batch axis: `input_ids[None]`" if input_ids.dim() == 1 else "pass one row of ids per sequence"
        raise SequenceError(f"`input_ids` must be (batch, length), got shape {tuple(input_ids.shape)}; {hint}.")
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != NUM_CHANNELS):
        raise SequenceError(
            f"`inputs_embeds` must be (batch, length, {NUM_CHANNELS}), one channel per base A, C, G, T, got shape "
            f"{tuple(inputs_embeds.shape)}."
        )
    demand_one_input(input_ids, inputs_embeds)


def window_mask(attention_mask: torch.Tensor | None, x_BLC: torch.Tensor) -> torch.Tensor | None:
    """(B, L) bool, None where everything is real.

    Raises:
        SequenceError: another shape, holes, or a row of padding alone.
    """
    mask = real_positions(attention_mask)
    if mask is None:
        return None
    if mask.shape != x_BLC.shape[:2]:
        raise SequenceError(
            f"`attention_mask` must be (batch, length) = {tuple(x_BLC.shape[:2])}, got {tuple(mask.shape)}."
        )
    if not torch.compiler.is_compiling() and not bool(mask.any(1).all()):
        raise SequenceError("`attention_mask` hides every base of a row; leave such rows out of the batch.")
    return mask
