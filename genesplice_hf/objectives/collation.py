"""From features to tokens laid end to end, and from there to padded tensors: what all collators share.

Shapes: B examples, N tokens of the whole batch laid end to end without padding, L tokens of the longest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from genesplice_hf.errors import GeneSpliceError, SequenceError
from genesplice_hf.genome.alphabet import reverse_complement
from genesplice_hf.objectives.sampling import ExampleRandom, bits, content_identity, happens, named_identity

IGNORED = -100
_STREAM_STRAND = 0


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of a batch laid end to end.

    Attributes:
        input_ids: (N,) int64.
        attention_mask: (N,) int64, as the features gave it, else ones.
        lengths: (B,) tokens of each example.
        keys: (B,) uint64, the random key of each example.
        extras: further columns (N,) by name: `token_type_ids`, `special_tokens_mask`, `soft_mask`.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray
    extras: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def rows(self) -> np.ndarray:
        """(N,) index of the example of each token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """(B,) index of the first token of each example."""
        return np.cumsum(self.lengths) - self.lengths

    def parts(self, num_tokens: int) -> Iterator[tuple[slice, "TokenBatch"]]:
        """Cuts the batch into whole examples, at least one and about `num_tokens` tokens at a time.

        Yields:
            The tokens (among N) that a part holds, and the part.
        """
        groups = self.starts // num_tokens
        borders = np.flatnonzero(np.diff(groups, prepend=-1, append=groups[-1] + 1))
        for first, last in pairwise(borders.tolist()):
            lengths = self.lengths[first:last]
            tokens = slice(int(self.starts[first]), int(self.starts[first] + lengths.sum()))
            extras = {name: values[tokens] for name, values in self.extras.items()}
            yield (
                tokens,
                TokenBatch(
                    self.input_ids[tokens], self.attention_mask[tokens], lengths, self.keys[first:last], extras
                ),
            )

    def positions(self, counted: np.ndarray) -> np.ndarray:
        """(N,) number of `counted` (N,) bool tokens of the same example that stand before each token."""
        before = np.cumsum(counted) - counted
        return before - np.repeat(before[self.starts], self.lengths)


def check_share(name: str, value: float, low_open: bool = False, high_open: bool = False) -> float:
    """Returns `value` if it is a number in [0, 1] (ends excluded on request), raises otherwise."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1 or (low_open and value == 0) or (high_open and value == 1):
        interval = f"{'(' if low_open else '['}0, 1{')' if high_open else ']'}"
        raise GeneSpliceError(f"`{name}` must be a number in {interval}, it is {value!r}")
    return float(value)


def _column(feature: Mapping[str, Any], name: str, index: int, dtype: type, length: int | None) -> np.ndarray:
    values = np.asarray(feature[name])
    if values.ndim != 1 or (values.size and not np.issubdtype(values.dtype, np.number)):
        raise GeneSpliceError(
            f"`{name}` of feature {index} must be one row of numbers, it has shape {values.shape} and type "
            f"{values.dtype}; give one example per feature"
        )
    if length is not None and len(values) != length:
        raise GeneSpliceError(
            f"`{name}` of feature {index} has {len(values)} entries for {length} tokens; tokenize it again"
        )
    return values.astype(dtype, copy=False)


def _missing_message(name: str, missing: int, total: int) -> str:
    if name == "soft_mask":
        cure = "`soft_mask_weight` below 1 needs it; add it, or give features with `sequence` alone"
    else:
        cure = "give it to all features or to none"
    return f"`{name}` is missing from {missing} of {total} features; {cure}"


def _share_of_lower_case(sequence: str, offsets_N2: np.ndarray) -> np.ndarray:
    letters = np.frombuffer(sequence.encode("ascii"), np.uint8)
    lower_before = np.concatenate([[0], np.cumsum(letters >= ord("a"))])
    starts, ends = offsets_N2[:, 0], offsets_N2[:, 1]
    return (lower_before[ends] - lower_before[starts]) / np.maximum(ends - starts, 1)


class DnaCollator:
    """Reads features, flips strands, weighs soft-masked bases and pads; children say what the labels are.

    Args:
        tokenizer: any tokenizer with a pad token.
        pad_to_multiple_of: pads L up to a multiple of this many tokens.
        soft_mask_weight: loss weight of a lower-case (soft-masked) base, in [0, 1]. Below 1 the batch holds
            `loss_weight`; a token of several bases is weighted by its share of lower-case bases.
        rc_probability: probability that an example is read from the opposite strand.
        seed: see `ExampleRandom`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pad_to_multiple_of: int | None,
        soft_mask_weight: float,
        rc_probability: float,
        seed: int | None,
    ):
        if tokenizer.pad_token_id is None:
            raise GeneSpliceError("`tokenizer` must have a pad token; set `tokenizer.pad_token`")
        is_count = isinstance(pad_to_multiple_of, int) and pad_to_multiple_of >= 1
        if pad_to_multiple_of is not None and not is_count:
            raise GeneSpliceError(
                f"`pad_to_multiple_of` must be a whole number of tokens, 1 or more, or None, it is "
                f"{pad_to_multiple_of!r}"
            )
        self.tokenizer = tokenizer
        self.pad_to_multiple_of = pad_to_multiple_of
        self.soft_mask_weight = check_share("soft_mask_weight", soft_mask_weight)
        self.rc_probability = check_share("rc_probability", rc_probability)
        self.random = ExampleRandom(seed)

    @property
    def seed(self) -> int:
        return self.random.seed

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; call it before each pass over the data, or every pass draws the same."""
        self.random.set_epoch(epoch)

    def read(self, features: Sequence[Mapping[str, Any]]) -> TokenBatch:
        """Turns features into tokens laid end to end; see the collators for what a feature holds."""
        if len(features) == 0:
            raise GeneSpliceError("`features` is empty; a batch needs at least one example")
        by_ids = self._features_hold_ids(features)
        batch = self._read_ids(features) if by_ids else self._read_sequences(features)
        if (batch.lengths == 0).any():
            raise SequenceError(f"feature {int(np.argmin(batch.lengths))} holds no token; remove empty sequences")
        return batch

    def _features_hold_ids(self, features: Sequence[Mapping[str, Any]]) -> bool:
        holds = ["input_ids" in feature for feature in features]
        for index, (feature, has_ids) in enumerate(zip(features, holds, strict=True)):
            if not has_ids and "sequence" not in feature:
                raise GeneSpliceError(
                    f"feature {index} has neither `input_ids` nor `sequence`, only {sorted(feature)}; with "
                    "Trainer, set `remove_unused_columns=False` to keep the `sequence` column"
                )
        if any(holds) != all(holds):
            raise GeneSpliceError("some features hold `input_ids` and some only `sequence`; give one kind")
        if all(holds) and self.rc_probability > 0:
            raise GeneSpliceError(
                f"`rc_probability` ({self.rc_probability}) needs raw strings, the features hold `input_ids`; "
                "give features with `sequence` alone"
            )
        return all(holds)

    def _keys(self, features: Sequence[Mapping[str, Any]], contents: Sequence[bytes | memoryview]) -> np.ndarray:
        return self.random.keys(
            [
                content_identity(content) if feature.get("example_id") is None
                else named_identity(feature["example_id"])
                for feature, content in zip(features, contents, strict=True)
            ]
        )  # fmt: skip

    def _read_ids(self, features: Sequence[Mapping[str, Any]]) -> TokenBatch:
        ids = [_column(feature, "input_ids", i, np.int64, None) for i, feature in enumerate(features)]
        lengths = [len(row) for row in ids]
        extras = self._extras(features, lengths)
        input_ids = np.concatenate(ids)
        attention_mask = extras.pop("attention_mask", np.ones_like(input_ids))
        # The content is what the model may look at: padding an example beforehand does not rename it.
        is_visible = attention_mask != 0
        visible = input_ids[is_visible].astype(np.int32)
        ends = np.append(0, np.cumsum(is_visible))[np.cumsum(lengths)].tolist()
        contents = [visible[begin:end].data for begin, end in pairwise([0, *ends])]
        keys = self._keys(features, contents)
        return TokenBatch(input_ids, attention_mask, np.array(lengths), keys, extras)

    def _extras(self, features: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> dict[str, np.ndarray]:
        wanted: dict[str, type] = {"attention_mask": np.int64, "token_type_ids": np.int64, "special_tokens_mask": bool}
        if self.soft_mask_weight < 1:
            wanted["soft_mask"] = float
        extras = {}
        for name, dtype in wanted.items():
            holders = sum(name in feature for feature in features)
            if holders == len(features):
                rows = [_column(f, name, i, dtype, lengths[i]) for i, f in enumerate(features)]
                extras[name] = np.concatenate(rows)
            elif holders or name == "soft_mask":
                raise GeneSpliceError(_missing_message(name, len(features) - holders, len(features)))
        return extras

    def _read_sequences(self, features: Sequence[Mapping[str, Any]]) -> TokenBatch:
        sequences = [feature["sequence"] for feature in features]
        for index, sequence in enumerate(sequences):
            if not isinstance(sequence, str):
                raise GeneSpliceError(
                    f"`sequence` of feature {index} must be a string, it is {type(sequence).__name__}"
                )
        keys = self._keys(features, [sequence.encode() for sequence in sequences])
        sequences = self._flip_strands(sequences, keys)
        encoded = self.tokenizer(
            sequences,
            padding=True,
            return_tensors="np",
            return_attention_mask=True,
            return_offsets_mapping=self.soft_mask_weight < 1,
        )
        return self._lay_end_to_end(sequences, encoded, keys)

    def _flip_strands(self, sequences: list[str], keys: np.ndarray) -> list[str]:
        if self.rc_probability == 0:
            return sequences
        rows = np.arange(len(sequences))
        flips = happens(bits(keys, rows, np.zeros_like(rows), _STREAM_STRAND), self.rc_probability)
        return [reverse_complement(s) if flip else s for s, flip in zip(sequences, flips, strict=True)]

    def _lay_end_to_end(self, sequences: Sequence[str], encoded: Mapping[str, Any], keys: np.ndarray) -> TokenBatch:
        is_token_BL = np.asarray(encoded["attention_mask"]) != 0
        extras = {}
        if "token_type_ids" in encoded:
            extras["token_type_ids"] = np.asarray(encoded["token_type_ids"], np.int64)[is_token_BL]
        if self.soft_mask_weight < 1:
            offsets_BL2 = np.asarray(encoded["offset_mapping"])
            shares = [
                _share_of_lower_case(sequence, offsets_L2[is_token_L])
                for sequence, offsets_L2, is_token_L in zip(sequences, offsets_BL2, is_token_BL, strict=True)
            ]
            extras["soft_mask"] = np.concatenate(shares)
        input_ids = np.asarray(encoded["input_ids"], np.int64)[is_token_BL]
        return TokenBatch(input_ids, np.ones_like(input_ids), is_token_BL.sum(1), keys, extras)

    def emit(self, batch: TokenBatch, input_ids: np.ndarray, labels: np.ndarray) -> dict[str, torch.Tensor]:
        """Pads to tensors (B,L).

        Returns:
            `input_ids`, `attention_mask`, `labels` (int64), `token_type_ids` (int64) where the features or
            the tokenizer gave them, and `loss_weight` (float32, 0 where the label is ignored) when
            `soft_mask_weight` is below 1.
        """
        columns = {
            "input_ids": (input_ids, self.tokenizer.pad_token_id),
            "attention_mask": (batch.attention_mask, 0),
            "labels": (labels, IGNORED),
        }
        if "token_type_ids" in batch.extras:
            columns["token_type_ids"] = (batch.extras["token_type_ids"], self.tokenizer.pad_token_type_id)
        if self.soft_mask_weight < 1:
            weights = 1 - (1 - self.soft_mask_weight) * batch.extras["soft_mask"]
            columns["loss_weight"] = (np.where(labels == IGNORED, 0, weights).astype(np.float32), 0)
        is_token_BL = self._is_token(batch.lengths)
        return {name: _pad(values, is_token_BL, fill) for name, (values, fill) in columns.items()}

    def _is_token(self, lengths: np.ndarray) -> np.ndarray:
        width = int(lengths.max())
        if self.pad_to_multiple_of is not None:
            width += -width % self.pad_to_multiple_of
        columns = np.arange(width)
        if self.tokenizer.padding_side == "left":
            return columns >= width - lengths[:, None]
        return columns < lengths[:, None]


def _pad(values: np.ndarray, is_token_BL: np.ndarray, fill: float) -> torch.Tensor:
    padded = np.full(is_token_BL.shape, fill, values.dtype)
    padded[is_token_BL] = values
    return torch.from_numpy(padded)
