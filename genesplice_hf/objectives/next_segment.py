"""Next-segment objective: does B follow A in the genome?

The DNA form of next-sentence prediction (Devlin et al., BERT, 2019, section 3.1): a window is cut in two
halves A and B; in half of the examples B is exchanged for a half from elsewhere. The collator takes care that
only the sequence can give the answer away:

- length: B is as long as A, whether it follows or not;
- place in the window: the exchanged half is a second half, too, wherever its window is long enough;
- strand: it is read along the same strand as A; a strand draw turns the whole pair;
- species: it comes from the same genome (the name before `|` in `example_id`);
- N and soft-masked letters: a half with N is never brought in, and N stands at the same places as in the true B;
  the case of the true B is laid over it;
- neighbourhood: it lies on another contig, or at least `min_distance_bp` away.

Shapes: B examples, L tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from genesplice_hf.errors import DataError, GeneSpliceError, SequenceError
from genesplice_hf.objectives.collation import DnaCollator, TokenBatch, check_share
from genesplice_hf.objectives.sampling import bits, happens, to_below

_STREAM_LABEL, _STREAM_PARTNER = 130, 131
# A pool in which fewer than one window in a few hundred may stand in is the wrong pool.
_MAX_DRAWS = 512
_COLUMNS = ("chrom", "start", "end", "sequence")
FIRST, SECOND, NEITHER = 0, 1, -1


class WindowPool(Protocol):
    """Rows by number: a `datasets.Dataset` or a list of window rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def genome_of(row: Mapping[str, Any]) -> str:
    """The genome's name in `example_id` (`name|chrom:start-end`), empty where it has none."""
    name, bar, _ = str(row.get("example_id") or "").partition("|")
    return name if bar else ""


def strand_of(row: Mapping[str, Any]) -> str:
    """`"+"` or `"-"`: the column `strand`, or what `example_id` ends with."""
    return row.get("strand") or ("-" if str(row.get("example_id") or "").endswith("(-)") else "+")


def is_elsewhere(row: Mapping[str, Any], other: Mapping[str, Any], min_distance_bp: int) -> bool:
    """Whether two windows lie on different contigs, or with at least `min_distance_bp` bases between them."""
    if row["chrom"] != other["chrom"]:
        return True
    return max(other["start"] - row["end"], row["start"] - other["end"]) >= min_distance_bp


class NextSegmentCollator(DnaCollator):
    """Makes pairs of segments and says which of them follow each other.

    A feature is a window row of `data.windows`: `chrom`, `start`, `end` (0-based, half-open), `sequence` and
    `example_id`. Of a window with an odd number of bases the last one is left out. What takes the place of B is
    drawn from `partners`, never from the batch: it depends on (seed, epoch, example) and on the pool alone, so a
    pair is the same in every batch, worker and process that is given the same pool.

    Args:
        tokenizer: any DNA tokenizer with a pad token that can return offsets.
        partners: window rows by number, from which the wrong halves come: the training `Dataset`, or a list
            of some thousand windows where the training rows are a stream.
        negative_probability: share of pairs in which B does not follow A, in [0, 1].
        min_distance_bp: bases between a window and a wrong half on the same contig, at least.
        rc_probability: probability that a pair is read from the opposite strand: rc(B), then rc(A).
        pad_to_multiple_of: pads L up to a multiple of this many tokens.
        seed: all draws depend on (seed, epoch, example) alone; None draws a seed once and logs it.

    Raises:
        GeneSpliceError: arguments out of range, an empty batch, a missing column.
        DataError: no row of the pool can stand in for an example.
        SequenceError: a window of less than 2 bases, or a letter that the tokenizer refuses.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        partners: WindowPool,
        negative_probability: float = 0.5,
        min_distance_bp: int = 10_000,
        rc_probability: float = 0.0,
        pad_to_multiple_of: int | None = None,
        seed: int | None = None,
    ):
        super().__init__(tokenizer, pad_to_multiple_of, 1.0, rc_probability, seed)
        self.negative_probability = check_share("negative_probability", negative_probability)
        if isinstance(min_distance_bp, bool) or not isinstance(min_distance_bp, int) or min_distance_bp < 0:
            raise GeneSpliceError(f"`min_distance_bp` must be a whole number, 0 or more, it is {min_distance_bp!r}")
        self.min_distance_bp = min_distance_bp
        if len(partners) == 0:
            raise GeneSpliceError("`partners` is empty; give the training windows, or a sample of them")
        _check_row(partners[0], "row 0 of `partners`")
        self.partners = partners

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `attention_mask` (B,L) of A and B in one row, `segment_ids` (B,L): 0 where a token
        begins in A, 1 in B, -1 for special tokens and padding, and `follows` (B,): 1 if B follows A, else 0."""
        keys, follows = self._draw(features)
        batch = self._read_pairs(self._pairs(features, keys, follows), keys)
        tensors = self.emit(batch, batch.input_ids, batch.extras["segment_ids"])
        # `emit` pads labels with -100; a segment is never that.
        segment_ids = tensors.pop("labels").clamp_(min=NEITHER)
        tensors.pop("token_type_ids", None)
        return tensors | {"segment_ids": segment_ids, "follows": torch.from_numpy(follows.astype(np.int64))}

    def pairs(self, features: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, bool]]:
        """(A, B, whether B follows A) of each feature, before the strand is drawn; for a look at the data."""
        keys, follows = self._draw(features)
        pairs = self._pairs(features, keys, follows)
        return [(first, second, bool(true)) for (first, second), true in zip(pairs, follows, strict=True)]

    def _draw(self, features: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """(B,) keys, and (B,) bool whether B shall follow A."""
        if len(features) == 0:
            raise GeneSpliceError("`features` is empty; a batch needs at least one example")
        for index, feature in enumerate(features):
            _check_row(feature, f"feature {index}")
        keys = self._keys(features, [feature["sequence"].encode() for feature in features])
        rows = np.arange(len(keys))
        words = bits(keys, rows, np.zeros_like(rows), _STREAM_LABEL)
        return keys, ~happens(words, self.negative_probability)

    def _pairs(
        self, features: Sequence[Mapping[str, Any]], keys: np.ndarray, follows: np.ndarray
    ) -> list[tuple[str, str]]:
        return [self._pair(*example) for example in zip(features, keys, follows, strict=True)]

    def _pair(self, row: Mapping[str, Any], key: np.uint64, follows: bool) -> tuple[str, str]:
        sequence = row["sequence"]
        half = len(sequence) // 2
        if half == 0:
            raise SequenceError(f"a window must have 2 bases or more to be halved, this one is {dict(row)}")
        first, second = sequence[:half], sequence[half : 2 * half]
        return (first, second) if follows else (first, _dressed_as(second, self._wrong_half(row, key, half)))

    def _wrong_half(self, row: Mapping[str, Any], key: np.uint64, half: int) -> str:
        """The second half of the first drawn window of the pool that may stand in for this one's."""
        rows = np.zeros(_MAX_DRAWS, np.int64)
        words = bits(np.array([key], np.uint64), rows, np.arange(_MAX_DRAWS), _STREAM_PARTNER)
        for index in to_below(words, len(self.partners)).tolist():
            other = self.partners[index]
            same_kind = genome_of(other) == genome_of(row) and strand_of(other) == strand_of(row)
            if same_kind and is_elsewhere(row, other, self.min_distance_bp):
                begin = min(len(other["sequence"]) // 2, len(other["sequence"]) - half)
                piece = other["sequence"][max(begin, 0) : begin + half]
                if len(piece) == half and "N" not in piece.upper():
                    return piece
        raise DataError(
            f"{_MAX_DRAWS} windows drawn from `partners` ({len(self.partners)} rows) hold no half of {half} bases "
            f"without N on the same strand of the same genome, {self.min_distance_bp} bp away from "
            f"{row['chrom']}:{row['start']}-{row['end']}; lower `min_distance_bp` or give more windows"
        )

    def _read_pairs(self, pairs: Sequence[tuple[str, str]], keys: np.ndarray) -> TokenBatch:
        """Tokenizes A and B as one text; extras hold `segment_ids` (N,)."""
        halves = np.array([len(first) for first, _ in pairs])
        texts = self._flip_strands([first + second for first, second in pairs], keys)
        encoded = self.tokenizer(
            texts, padding=True, return_tensors="np", return_attention_mask=True, return_offsets_mapping=True
        )
        batch = self._lay_end_to_end(texts, encoded, keys)
        is_token_BL = np.asarray(encoded["attention_mask"]) != 0
        offsets_N2 = np.asarray(encoded["offset_mapping"])[is_token_BL]
        starts, is_text = offsets_N2[:, 0], offsets_N2[:, 1] > offsets_N2[:, 0]
        segments = np.where(starts < halves[batch.rows], FIRST, SECOND)
        batch.extras["segment_ids"] = np.where(is_text, segments, NEITHER)
        return batch


def _dressed_as(model: str, piece: str) -> str:
    """`piece` with the N and the case of `model`, which is as long: neither may tell the two apart."""
    letters = np.frombuffer(piece.upper().encode("ascii", "replace"), np.uint8).copy()
    pattern = np.frombuffer(model.encode("ascii", "replace"), np.uint8)
    letters[(pattern | 0x20) == ord("n")] = ord("N")
    return (letters | pattern & 0x20).tobytes().decode("ascii")


def _check_row(row: Mapping[str, Any], place: str) -> None:
    missing = [name for name in _COLUMNS if row.get(name) is None]
    if missing or not isinstance(row["sequence"], str):
        raise GeneSpliceError(
            f"{place} must be a window row with {list(_COLUMNS)}, it lacks {missing}; use `data.windows`, and "
            "with Trainer set `remove_unused_columns=False`"
        )
