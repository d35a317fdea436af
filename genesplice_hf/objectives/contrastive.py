"""Contrastive objective: two views of every example, which a model shall know to be the same place of a genome.

The views follow the manner of Chen et al., "A Simple Framework for Contrastive Learning of Visual
Representations" (2020), with changes that leave the meaning of DNA as it is; the loss is
`heads.pretraining.info_nce`. Every draw is a hash of (seed, epoch, example, view), so that neither the batch
nor the worker changes a view.

Shapes: B examples, L tokens of the first view, W tokens of the second, N tokens of a batch laid end to end.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.genome.alphabet import BASES, reverse_complement
from genesplice_hf.objectives.collation import IGNORED, DnaCollator, TokenBatch, check_share
from genesplice_hf.objectives.sampling import bits, happens, to_below
from genesplice_hf.objectives.vocabulary import DnaVocabulary

Change = Literal["identity", "shift", "crop", "reverse_complement", "mutation", "n_mutation", "mask"]
CHANGES: tuple[str, ...] = get_args(Change)
# Changes that draw: two views that both hold them still differ.
_RANDOM_CHANGES = {"shift", "crop", "mutation", "n_mutation", "mask"}
# Numbers that no other collator uses, so that collators with one seed stay independent.
_FIRST_STREAM, _STREAMS_PER_VIEW = 100, 10
_SHIFT, _CROP_LENGTH, _CROP_START, _COUNT, _PLACE, _BASE, _N_COUNT, _N_PLACE, _MASK = range(9)
_CODES = np.full(256, -1)
for _letters in (BASES, BASES.lower()):
    _CODES[np.frombuffer(_letters.encode(), np.uint8)] = range(4)
_LETTERS = np.frombuffer(BASES.encode(), np.uint8)


@dataclass(frozen=True)
class ViewStrength:
    """How much a change changes; pairs are (least, most) shares, of which one is drawn per example and view.

    Attributes:
        crop: share of the bases that a crop keeps.
        mutation: share of the bases A, C, G, T that become another base; at least one does.
        n_mutation: share of the bases A, C, G, T that become N; at least one does.
        mask: share of the DNA tokens that become the mask token, each drawn alone.
    """

    crop: tuple[float, float] = (0.5, 1.0)
    mutation: tuple[float, float] = (0.01, 0.05)
    n_mutation: tuple[float, float] = (0.01, 0.05)
    mask: float = 0.15

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            ends = [value] if field.name == "mask" else list(value)
            for end in ends:
                check_share(field.name, end, low_open=True)
            if ends != sorted(ends) or len(ends) > 2:
                raise GeneSpliceError(f"`{field.name}` must be (least, most), it is {value}; exchange the two")


def check_views(first: Sequence[str], second: Sequence[str], rc_equivariant: bool) -> None:
    """Raises unless the two views can have different embeddings.

    Args:
        first, second: names of changes.
        rc_equivariant: the model gives both strands the same embedding.

    Raises:
        GeneSpliceError: an unknown change, or two views that a model cannot but embed alike.
    """
    for name, view in (("first", first), ("second", second)):
        unknown = [change for change in view if change not in CHANGES]
        if unknown or isinstance(view, str):
            raise GeneSpliceError(f"`{name}` must list changes out of {CHANGES}, it is {view!r}")
    if _RANDOM_CHANGES & {*first, *second}:
        return
    if rc_equivariant:
        raise GeneSpliceError(
            f"`first` {tuple(first)} and `second` {tuple(second)} have one and the same embedding in a model "
            "that is equivariant to the reverse complement; add a change such as 'crop' or 'mutation'"
        )
    if ("reverse_complement" in first) == ("reverse_complement" in second):
        raise GeneSpliceError(
            f"`first` {tuple(first)} and `second` {tuple(second)} are always the same sequence; add "
            "'reverse_complement', 'crop' or 'mutation' to one of them"
        )


class _Draws:
    """The random numbers of one view of one example."""

    def __init__(self, key: np.uint64, view: int):
        self._key = np.array([key], np.uint64)
        self._first_stream = _FIRST_STREAM + view * _STREAMS_PER_VIEW

    def words(self, stream: int, count: int) -> np.ndarray:
        rows = np.zeros(count, np.int64)
        return bits(self._key, rows, np.arange(count), self._first_stream + stream)

    def below(self, stream: int, limit: int) -> int:
        return int(to_below(self.words(stream, 1), limit)[0])

    def count(self, stream: int, total: int, shares: tuple[float, float]) -> int:
        """A number of things out of `total` whose share lies in `shares`, all such numbers alike; at least 1."""
        # The small number keeps a share such as 0.07 of 100 from becoming 8 by rounding.
        low = max(1, math.ceil(shares[0] * total - 1e-9))
        high = max(low, math.floor(shares[1] * total + 1e-9))
        return low + self.below(stream, high - low + 1)

    def some(self, stream: int, places: np.ndarray, count: int) -> np.ndarray:
        """`count` different ones of `places`."""
        return places[np.argsort(self.words(stream, len(places)), kind="stable")[:count]]


def _shift(feature: Mapping[str, Any], draws: _Draws) -> str:
    """The window moved by some bases within its flanks, never by 0 where it can move."""
    left, sequence, right = feature["left_flank"], feature["sequence"], feature["right_flank"]
    if not left and not right:
        return sequence
    step = draws.below(_SHIFT, len(left) + len(right))
    start = step if step < len(left) else step + 1
    return (left + sequence + right)[start : start + len(sequence)]


def _crop(sequence: str, draws: _Draws, strength: ViewStrength) -> str:
    length = draws.count(_CROP_LENGTH, len(sequence), strength.crop)
    start = draws.below(_CROP_START, len(sequence) - length + 1)
    return sequence[start : start + length]


def _mutate(sequence: str, draws: _Draws, strength: ViewStrength) -> str:
    """Other bases at some places; case is kept, letters besides A, C, G and T stay."""
    letters = np.frombuffer(sequence.encode("ascii", "replace"), np.uint8).copy()
    places = np.flatnonzero(_CODES[letters] >= 0)
    if len(places) == 0:
        return sequence
    places = draws.some(_PLACE, places, draws.count(_COUNT, len(places), strength.mutation))
    case = letters[places] & 0x20
    steps = 1 + to_below(draws.words(_BASE, len(places)), 3)
    letters[places] = _LETTERS[(_CODES[letters[places]] + steps) % 4] | case
    return letters.tobytes().decode("ascii")


def _hide(sequence: str, draws: _Draws, strength: ViewStrength) -> str:
    """N at some places; case is kept, letters besides A, C, G and T stay."""
    letters = np.frombuffer(sequence.encode("ascii", "replace"), np.uint8).copy()
    places = np.flatnonzero(_CODES[letters] >= 0)
    if len(places) == 0:
        return sequence
    places = draws.some(_N_PLACE, places, draws.count(_N_COUNT, len(places), strength.n_mutation))
    letters[places] = ord("N") | letters[places] & 0x20
    return letters.tobytes().decode("ascii")


_TEXT_CHANGES: dict[str, Callable[[str, _Draws, ViewStrength], str]] = {
    "crop": _crop,
    "reverse_complement": lambda sequence, draws, strength: reverse_complement(sequence),
    "mutation": _mutate,
    "n_mutation": _hide,
}


class ContrastiveCollator(DnaCollator):
    """Makes two views of every example.

    A feature holds a raw `sequence`; `example_id` (a number or a string) names it, without one its content
    does. For the change `"shift"` it also holds `left_flank` and `right_flank`, the bases before and after
    the sequence (either may be empty: then the window moves the other way, or not at all). Further columns
    are left aside.

    A view is a list of changes; they are applied in this order, whatever the order of the list:
    `"identity"` (nothing), `"shift"` (the window moves into its flanks), `"crop"` (a part of it),
    `"reverse_complement"` (the opposite strand), `"mutation"` (other bases at some places), `"n_mutation"`
    (N at some places), `"mask"` (mask tokens at some places). How strong they are says `strength`.

    Args:
        tokenizer: any DNA tokenizer with a pad token.
        first, second: the changes of either view.
        strength: how much a change changes.
        rc_equivariant: say True for a model whose embedding does not depend on the strand (config field
            `rc_equivariant`); a reverse-complement view alone would teach it nothing and is refused.
        rc_probability: probability that an example (both of its views) is read from the opposite strand.
        pad_to_multiple_of: pads L and W up to a multiple of this many tokens.
        seed: all draws depend on (seed, epoch, example) alone; None draws a seed once and logs it.

    Raises:
        GeneSpliceError: arguments out of range, views that always agree, a missing column, an empty batch.
        SequenceError: an example without tokens, or a letter that the tokenizer refuses.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        first: Sequence[Change] = ("identity",),
        second: Sequence[Change] = ("crop", "reverse_complement", "mutation"),
        strength: ViewStrength | None = None,
        rc_equivariant: bool = False,
        rc_probability: float = 0.0,
        pad_to_multiple_of: int | None = None,
        seed: int | None = None,
    ):
        super().__init__(tokenizer, pad_to_multiple_of, 1.0, rc_probability, seed)
        check_views(first, second, rc_equivariant)
        self.views: tuple[frozenset[str], frozenset[str]] = (frozenset(first), frozenset(second))
        self.strength = ViewStrength() if strength is None else strength
        self.rc_equivariant = rc_equivariant
        if "mask" in self.views[0] | self.views[1] and tokenizer.mask_token_id is None:
            raise GeneSpliceError("the change 'mask' needs a tokenizer with a mask token; leave it out")
        self.vocabulary = DnaVocabulary(tokenizer)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `attention_mask` (B,L) of the first view and `view_input_ids`,
        `view_attention_mask` (B,W) of the second; row b of both comes from feature b."""
        return self.view(features, 0) | self.second_view(features)

    def second_view(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `view_input_ids`, `view_attention_mask` (B,W)."""
        return {f"view_{name}": values for name, values in self.view(features, 1).items()}

    def view(self, features: Sequence[Mapping[str, Any]], index: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` (B,L) of the first (0) or the second (1) view."""
        self._check(features, self.views[index])
        keys = self._keys(features, [feature["sequence"].encode() for feature in features])
        draws = [_Draws(key, index) for key in keys]
        texts = [self._change(f, self.views[index], d) for f, d in zip(features, draws, strict=True)]
        # Named by the example's key, so that both views are read from the same strand.
        batch = self.read([{"sequence": t, "example_id": int(k)} for t, k in zip(texts, keys, strict=True)])
        input_ids = self._mask(batch, draws) if "mask" in self.views[index] else batch.input_ids
        tensors = self.emit(batch, input_ids, np.full_like(input_ids, IGNORED))
        return {name: tensors[name] for name in ("input_ids", "attention_mask")}

    def _check(self, features: Sequence[Mapping[str, Any]], view: frozenset[str]) -> None:
        needed = ["sequence", *(["left_flank", "right_flank"] if "shift" in view else [])]
        for index, feature in enumerate(features):
            missing = [name for name in needed if not isinstance(feature.get(name), str)]
            if missing:
                raise GeneSpliceError(
                    f"feature {index} must hold strings in {needed}, it lacks {missing} and has {sorted(feature)}; "
                    "with Trainer, set `remove_unused_columns=False`; without flanks, leave 'shift' out"
                )

    def _change(self, feature: Mapping[str, Any], view: frozenset[str], draws: _Draws) -> str:
        text = _shift(feature, draws) if "shift" in view else feature["sequence"]
        for name, change in _TEXT_CHANGES.items():
            if name in view and text:
                text = change(text, draws, self.strength)
        return text

    def _mask(self, batch: TokenBatch, draws: Sequence[_Draws]) -> np.ndarray:
        """The ids (N,) with mask tokens among the DNA tokens; special tokens and N stay."""
        self.vocabulary.check(batch.input_ids)
        words = [draw.words(_MASK, length) for draw, length in zip(draws, batch.lengths.tolist(), strict=True)]
        chosen = happens(np.concatenate(words), self.strength.mask) & self.vocabulary.is_dna[batch.input_ids]
        return np.where(chosen, self.tokenizer.mask_token_id, batch.input_ids)
