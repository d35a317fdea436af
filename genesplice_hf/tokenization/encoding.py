"""The last step of a call: numpy rows become lists, numpy or torch tensors in a `BatchEncoding`."""

from typing import Any

import numpy as np
from transformers import BatchEncoding

from genesplice_hf.errors import SequenceError
from genesplice_hf.tokenization.batches import Batch, Tokens
from genesplice_hf.tokenization.canvas import Canvas
from genesplice_hf.tokenization.normalizer import lower_case


def lower_share(tokens: Tokens, batch: Batch) -> np.ndarray:
    """Returns (T,) float32: the share of lower-case (soft-masked) bases in every token."""
    lower = lower_case(batch.buffer)
    if not lower.any():
        return np.zeros(tokens.ids.size, dtype=np.float32)
    before = np.concatenate([[0], np.cumsum(lower, dtype=np.int64)])
    starts, ends = tokens.spans()
    shift = np.repeat(batch.starts, tokens.counts)
    covered = before[ends + shift] - before[starts + shift]
    return (covered / np.maximum(ends - starts, 1)).astype(np.float32)


def to_encoding(data: dict[str, np.ndarray], canvas: Canvas, tensors: str | None, single: bool) -> BatchEncoding:
    """Wraps painted rows.

    Args:
        data: arrays by name, (R, W, ...) where all rows are equally wide.
        canvas: knows the rows.
        tensors: None, "np" or "pt" (any other kind that transformers knows is left to it).
        single: the caller gave one sequence; lists then lose their outer level.

    Raises:
        SequenceError: tensors were asked for but the rows differ in width.
    """
    if tensors in ("np", "pt"):
        if not canvas.is_rectangular:
            raise SequenceError(
                f"`return_tensors='{tensors}'` needs rows of one length, they have {min(canvas.widths())} to "
                f"{max(canvas.widths())} tokens; pass `padding=True`."
            )
        return BatchEncoding(_torch(data) if tensors == "pt" else data)
    listed = {name: canvas.rows(array) for name, array in data.items()}
    if "offset_mapping" in listed:
        listed["offset_mapping"] = [list(map(tuple, row)) for row in listed["offset_mapping"]]
    if single and tensors is None:
        listed = {name: rows[0] for name, rows in listed.items()}
    return BatchEncoding(listed, tensor_type=tensors)


def _torch(data: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in data.items()}


def add_bookkeeping(
    encoding: BatchEncoding, canvas: Canvas, batch: Batch, overflow: bool, length: bool, tensors: Any
) -> None:
    """Adds `overflow_to_sample_mapping` and `length` where they were asked for."""
    extra: dict[str, Any] = {}
    if overflow:
        extra["overflow_to_sample_mapping"] = canvas.sample.tolist()
    if length:
        extra["length"] = canvas.widths() if batch.is_batched or overflow or tensors else canvas.widths()[0]
    if extra:
        encoding.update(BatchEncoding(extra, tensor_type=tensors))
