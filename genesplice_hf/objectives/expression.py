"""Batches of cells: padding, truncation, and masked expression.

Everything random about a cell is drawn for (seed, epoch, cell), see `objectives/sampling.py`: batch, worker and order
change nothing. B cells, N tokens of all cells laid end to end, L tokens of the longest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from genesplice_hf.errors import DataError, GeneSpliceError
from genesplice_hf.objectives.collation import check_share
from genesplice_hf.objectives.sampling import (
    ExampleRandom,
    bits,
    content_identity,
    named_identity,
    to_below,
    to_uniform,
)

IGNORED = -100
Truncation = Literal["random", "top_expressed", "top_variance"]
_TRUNCATIONS = ("random", "top_expressed", "top_variance")
_STREAM_TRUNCATION, _STREAM_RATIO, _STREAM_MASK = 10, 11, 12
# What a row may hold beside its tokens, and is no input of a model.
_NOT_FOR_MODELS = ("length", "cell_id")


@dataclass(frozen=True)
class CellBatch:
    """Cells laid end to end.

    Attributes:
        ids, values: (N,) int64 and float32.
        lengths: (B,).
        keys: (B,) uint64, the random key of each cell in this epoch.
    """

    ids: np.ndarray
    values: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """(N,) cell of each token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def columns(self) -> np.ndarray:
        """(N,) place of each token in its cell."""
        return np.arange(len(self.ids)) - np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)

    def uniforms(self, stream: int, keys: np.ndarray | None = None) -> np.ndarray:
        """(N,) numbers in [0, 1), one per token."""
        return to_uniform(bits(self.keys if keys is None else keys, self.rows, self.columns, stream))

    def smallest(self, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """(N,) bool: the `counts` (B,) tokens of each cell with the smallest scores, earlier ones first on ties."""
        order = np.lexsort((scores, self.rows))
        chosen = np.zeros(len(scores), dtype=bool)
        chosen[order] = self.columns < np.repeat(counts, self.lengths)
        return chosen

    def only(self, is_kept: np.ndarray) -> "CellBatch":
        lengths = np.bincount(self.rows[is_kept], minlength=len(self.lengths))
        return replace(self, ids=self.ids[is_kept], values=self.values[is_kept], lengths=lengths)


class DataCollatorForExpression:
    """Stacks cells: pads them, cuts those that are too long, masks nothing.

    Args:
        tokenizer: `GeneTokenizer` of the model; its special tokens are never cut away, and padding uses its pad id.
        max_seq_len: longest row, `<cls>` included; None = no limit.
        truncation: which genes of a longer cell stay, in their order: "random" (new ones every epoch, for
            training), "top_expressed" (the largest values) or "top_variance" (the largest `gene_priority`).
        gene_priority: (vocabulary,) from `GeneExpressionProcessor.gene_priority`, for "top_variance".
        pad_value: value at padding.
        pad_to_multiple_of: rounds L up, so that batches have few shapes.
        seed: see `ExampleRandom`; None draws one.

    A feature holds `input_ids` and `values`, and may hold `cell_id` (a name that random numbers hang on; without one
    they hang on the content) and numbers or lists of one length (`labels`, `batch_labels`, `cell_type_labels`,
    `bin_edges`, ...), which are stacked.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int | None = None,
        truncation: Truncation = "random",
        gene_priority: np.ndarray | None = None,
        pad_value: float = -2,
        pad_to_multiple_of: int | None = None,
        seed: int | None = None,
    ) -> None:
        if truncation not in _TRUNCATIONS:
            raise GeneSpliceError(f"`truncation` must be one of {', '.join(_TRUNCATIONS)}, got {truncation!r}.")
        if truncation == "top_variance" and gene_priority is None:
            raise GeneSpliceError("`truncation='top_variance'` needs `gene_priority`; take the processor's.")
        for name, value in (("max_seq_len", max_seq_len), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise GeneSpliceError(f"`{name}` must be a whole number, 1 or more, or None, got {value!r}.")
        if tokenizer.pad_token_id is None:
            raise GeneSpliceError("`tokenizer` must have a pad token.")
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.truncation = truncation
        self.gene_priority = None if gene_priority is None else np.asarray(gene_priority, dtype=np.float64)
        self.pad_value = pad_value
        self.pad_to_multiple_of = pad_to_multiple_of
        self.random = ExampleRandom(seed)

    @property
    def seed(self) -> int:
        return self.random.seed

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; call it before each pass over the data, or every pass draws the same."""
        self.random.set_epoch(epoch)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `values`, `attention_mask` (B, L) and what else the features hold, stacked."""
        cells = self._cut(self._read(features))
        return self._stacked(cells, {"values": cells.values}) | self._others(features)

    def _read(self, features: Sequence[Mapping[str, Any]]) -> CellBatch:
        if not len(features):
            raise GeneSpliceError("`features` is empty; a batch needs at least one cell.")
        ids, values, identities = [], [], []
        for index, feature in enumerate(features):
            row_ids, row_values = _row(feature, index)
            ids.append(row_ids)
            values.append(row_values)
            name = feature.get("cell_id")
            content = row_ids.astype(np.int32).tobytes() + row_values.tobytes()
            identities.append(content_identity(content) if name is None else named_identity(name))
        lengths = np.array([len(row) for row in ids])
        return CellBatch(np.concatenate(ids), np.concatenate(values), lengths, self.random.keys(identities))

    def _cut(self, cells: CellBatch) -> CellBatch:
        """Leaves at most `max_seq_len` tokens of each cell, special ones first of all."""
        if self.max_seq_len is None or not (cells.lengths > self.max_seq_len).any():
            return cells
        if self.truncation == "random":
            scores = cells.uniforms(_STREAM_TRUNCATION)
        elif self.gene_priority is not None and self.truncation == "top_variance":
            scores = -self.gene_priority[cells.ids]
        else:
            scores = -cells.values.astype(np.float64)
        scores = np.where(self._is_special(cells), -np.inf, scores)
        return cells.only(cells.smallest(scores, np.full(len(cells.lengths), self.max_seq_len)))

    def _is_special(self, cells: CellBatch) -> np.ndarray:
        return np.isin(cells.ids, self.tokenizer.all_special_ids)

    def _stacked(self, cells: CellBatch, columns: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        width = int(cells.lengths.max())
        step = self.pad_to_multiple_of or 1
        shape = (len(cells.lengths), -(-width // step) * step)
        place = (cells.rows, cells.columns)
        batch = {
            "input_ids": _placed(cells.ids, shape, place, self.tokenizer.pad_token_id),
            "attention_mask": _placed(np.ones_like(cells.ids), shape, place, 0),
        }
        fill = {"values": self.pad_value, "labels": IGNORED}
        return batch | {name: _placed(column, shape, place, fill[name]) for name, column in columns.items()}

    def _others(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Numbers of the cells beside their tokens."""
        done = ("input_ids", "values", "attention_mask", *_NOT_FOR_MODELS)
        others = {}
        for name in [name for name in features[0] if name not in done]:
            column = [feature.get(name) for feature in features]
            if any(value is None for value in column):
                raise GeneSpliceError(f"`{name}` is missing from some features; give it to all or to none.")
            array = np.asarray(column)
            if array.dtype.kind in "biuf":
                others[name] = torch.from_numpy(array if array.dtype != np.float64 else array.astype(np.float32))
        return others


class DataCollatorForMaskedExpression(DataCollatorForExpression):
    """Hides the values of some genes and asks for them.

    Of every cell's genes, floor(ratio x genes) but at least one get `mask_value`; their values become `labels`, which
    are -100 elsewhere. `<cls>` and padding are never hidden, and nothing of a cell without genes. The genes themselves
    stay visible: the task is how much, not which.

    Args:
        mask_ratio: share of genes to hide, in (0, 1], or several, of which each cell draws one.
        mask_value: value that the model knows as hidden.
        frozen_masks: the same genes are hidden (and kept, in a cell that is cut) in every epoch: for validation.
        others: see `DataCollatorForExpression`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mask_ratio: float | Sequence[float] = 0.15,
        mask_value: float = -1,
        frozen_masks: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(tokenizer, **others)
        ratios = [mask_ratio] if isinstance(mask_ratio, (int, float)) else list(mask_ratio)
        if not ratios:
            raise GeneSpliceError("`mask_ratio` must hold at least one share, got an empty list.")
        self.mask_ratios = np.array([check_share("mask_ratio", ratio, low_open=True) for ratio in ratios])
        self.mask_value = mask_value
        self.frozen_masks = frozen_masks

    @classmethod
    def for_model(
        cls, config: Any, tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> "DataCollatorForMaskedExpression":
        """A collator with the `mask_value`, `pad_value` and `max_seq_len` of a model's config."""
        shared = {name: getattr(config, name) for name in ("mask_value", "pad_value", "max_seq_len")}
        return cls(tokenizer, **(shared | options))

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; without effect on frozen masks."""
        if not self.frozen_masks:
            super().set_epoch(epoch)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """As the parent, with `labels` (B, L) float: the hidden values, -100 where nothing is asked."""
        if any("labels" in feature for feature in features):
            raise GeneSpliceError("`labels` are the hidden values here; rename the column, e.g. `cell_type_labels`.")
        cells = self._cut(self._read(features))
        is_masked = self.chosen(cells)
        columns = {
            "values": np.where(is_masked, np.float32(self.mask_value), cells.values),
            "labels": np.where(is_masked, cells.values, np.float32(IGNORED)),
        }
        return self._stacked(cells, columns) | self._others(features)

    def chosen(self, cells: CellBatch) -> np.ndarray:
        """(N,) bool: the tokens to hide."""
        is_special = self._is_special(cells)
        genes = np.bincount(cells.rows[~is_special], minlength=len(cells.lengths))
        first = np.arange(len(cells.lengths))
        drawn = to_below(bits(cells.keys, first, np.zeros_like(first), _STREAM_RATIO), len(self.mask_ratios))
        counts = np.minimum(np.maximum(np.floor(self.mask_ratios[drawn] * genes + 1e-9), 1), genes).astype(np.int64)
        scores = np.where(is_special, np.inf, cells.uniforms(_STREAM_MASK))
        return cells.smallest(scores, counts)


def _row(feature: Mapping[str, Any], index: int) -> tuple[np.ndarray, np.ndarray]:
    missing = [name for name in ("input_ids", "values") if name not in feature]
    if missing:
        raise GeneSpliceError(f"feature {index} must hold `{missing[0]}`, but holds {sorted(feature)}.")
    ids, values = np.asarray(feature["input_ids"], dtype=np.int64), np.asarray(feature["values"], dtype=np.float32)
    if ids.ndim != 1 or ids.shape != values.shape:
        raise DataError(
            f"`values` of feature {index} must have one number per token, {ids.shape}, got shape {values.shape}."
        )
    if not len(ids):
        raise DataError(f"`input_ids` of feature {index} is empty; keep `<cls>`, or leave such cells out.")
    if not np.isfinite(values).all():
        raise DataError(f"`values` of feature {index} hold NaN or infinity; repair or drop the cell.")
    return ids, values


def _placed(
    column: np.ndarray, shape: tuple[int, int], place: tuple[np.ndarray, np.ndarray], fill: float
) -> torch.Tensor:
    array = np.full(shape, fill, dtype=column.dtype)
    array[place] = column
    return torch.from_numpy(array)
