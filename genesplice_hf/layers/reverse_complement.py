"""Reading both strands of DNA: the reverse complement of a batch, and the mean of what both strands say.

An equivariant model and test-time averaging of any other model are the same computation: run both strands as
one batch of 2B rows, read the second half backwards, and average after exchanging complementary channels.

    out(x)[i, c] = 1/2 (f(x)[i, c] + f(rc x)[L - 1 - i, partner(c)])

so that out(rc x)[i, c] = out(x)[L - 1 - i, partner(c)] whatever f is. L counts real positions, which are contiguous
in a row; padding stays where it stands. Reverse-complement weight sharing by two strands: Zhou et al. 2022
("Towards a better understanding of reverse-complement equivariance for deep learning models in genomics").

Shapes: B batch, L tokens, C channels.
"""

from collections.abc import Callable, Sequence

import torch

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.hierarchical import take_tokens


def reverse_index(mask_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) positions that read the real span of each row backwards and leave the padding in place."""
    position = torch.arange(mask_BL.shape[1], device=mask_BL.device).expand_as(mask_BL)
    start = mask_BL.int().argmax(1, keepdim=True)
    stop = start + mask_BL.sum(1, keepdim=True)
    return torch.where(mask_BL, start + stop - 1 - position, position)


def reverse_tokens(x: torch.Tensor, mask_BL: torch.Tensor | None) -> torch.Tensor:
    """Reads (B, L, ...) backwards inside the real span of each row; None = everything is real."""
    return x.flip(1) if mask_BL is None else take_tokens(x, reverse_index(mask_BL))


def reverse_complement(
    ids_BL: torch.Tensor, complement_map: Sequence[int], mask_BL: torch.Tensor | None = None
) -> torch.Tensor:
    """The other strand of each row, read from its own start.

    Args:
        ids_BL: (B, L) token ids. complement_map: id of the complement of every id.
        mask_BL: (B, L) bool, True = real; None = all.
    """
    complement = torch.tensor(complement_map, device=ids_BL.device)
    other = complement[ids_BL] if mask_BL is None else torch.where(mask_BL, complement[ids_BL], ids_BL)
    return reverse_tokens(other, mask_BL)


def both_strands(
    ids_BL: torch.Tensor, complement_map: Sequence[int], mask_BL: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(2B, L) ids, the given strands before their reverse complements, and the (2B, L) mask."""
    ids = torch.cat([ids_BL, reverse_complement(ids_BL, complement_map, mask_BL)])
    return ids, None if mask_BL is None else mask_BL.repeat(2, 1)


def split_strands(y: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What both strands gave at each position: (2B, L, ...) -> (B, L, ...) twice, the second read backwards."""
    forward, reverse = y.chunk(2)
    return forward, reverse_tokens(reverse, mask)


def strand_mean(strands: Sequence[torch.Tensor], partner: Sequence[int] | None = None) -> torch.Tensor:
    """1/2 (forward[..., c] + reverse[..., partner(c)]).

    Args:
        strands: (..., C) of the given strand and, unless only that was read, of the other one, read backwards.
        partner: channel of the other strand for each channel, an involution; None = itself.
    """
    if len(strands) == 1:
        return strands[0]
    forward, reverse = strands
    if partner is not None:
        reverse = reverse[..., torch.as_tensor(partner, device=reverse.device)]
    return (forward + reverse) / 2


def average_over_strands(
    predict: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    ids_BL: torch.Tensor,
    complement_map: Sequence[int],
    attention_mask: torch.Tensor | None = None,
    partner: Sequence[int] | None = None,
) -> torch.Tensor:
    """Test-time averaging: makes the prediction of any model equivariant, at twice the cost.

    Args:
        predict: takes (2B, L) ids and their mask (or None); gives one row per sequence (2B, C), one per token
            (2B, L, C), or one per bin (2B, M, C) of whole bins.
        ids_BL: (B, L) token ids. complement_map: id of the complement of every id.
        attention_mask: (B, L), 1 = real, contiguous in each row; None = all.
        partner: what each channel is on the other strand, e.g. `complement_map` for logits over the
            vocabulary, or the pairs of stranded tracks; None = itself.

    Returns:
        The mean over both strands, in the places and the shape of `predict` on the given strand.

    Raises:
        SequenceError: predictions per bin of a batch with padding, whose bins cannot be matched here.
    """
    mask = None if attention_mask is None or bool(attention_mask.bool().all()) else attention_mask.bool()
    given = predict(*both_strands(ids_BL, complement_map, mask))
    if given.dim() == 2:
        return strand_mean(given.chunk(2), partner)
    if mask is not None and given.shape[1] != ids_BL.shape[1]:
        raise SequenceError(
            f"`predict` gave {given.shape[1]} bins for {ids_BL.shape[1]} tokens, and `attention_mask` holds padding; "
            "average sequences of equal length, so that the bins of both strands match."
        )
    return strand_mean(split_strands(given, mask), partner)


def demand_whole_bins(mask_BL: torch.Tensor | None, length: int, bin_size: int) -> None:
    """Raises unless every row's real length is a multiple of the bin size; only then do bins of both strands match.

    Raises:
        SequenceError: names the row, its length, and the nearest legal lengths.
    """
    lengths = [length] if mask_BL is None else mask_BL.sum(1).tolist()
    for row, real in enumerate(lengths):
        if real % bin_size:
            below, above = real // bin_size * bin_size, -(-real // bin_size) * bin_size
            nearest = f"{below} or {above}" if below else f"{above}"
            raise SequenceError(
                f"`input_ids` has {real} real bases in row {row}; with `rc_equivariant` the bins of both strands "
                f"match only in multiples of {bin_size} bases: cut or extend it to {nearest}."
            )
