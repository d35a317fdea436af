"""One vector per cell from a masked-expression model, the same for every batch size and order.

N cells, B batch, E hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from genesplice_hf.errors import CheckpointError, DataError


def embed_cells(
    model: PreTrainedModel,
    rows: Dataset,
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]],
    batch_size: int = 32,
) -> np.ndarray:
    """What does the model say of each cell?

    Args:
        model: returns `cell_embedding` (B, E); used in eval mode and left in the mode it was in.
        rows: from a `GeneExpressionProcessor`; cells of similar length go together.
        collate: `DataCollatorForExpression` with a rule for long cells that draws nothing ("top_expressed").
        batch_size: cells per forward.

    Returns:
        (N, E) float32, in the order of the rows.

    Raises:
        DataError: no rows, or a batch size below 1. CheckpointError: the model has no vector per cell.
    """
    if batch_size < 1:
        raise DataError(f"`batch_size` must be at least 1, got {batch_size}.")
    if not len(rows):
        raise DataError("`rows` must hold at least one cell, got none.")
    order = np.argsort(np.asarray(rows["length"]), kind="stable")
    was_training, parts = model.training, []
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                chosen = rows.select(order[start : start + batch_size].tolist())
                batch = {name: tensor.to(model.device) for name, tensor in collate(list(chosen)).items()}
                parts.append(_vectors(model(**batch)))
    finally:
        model.train(was_training)
    found = np.concatenate(parts)
    back = np.empty_like(found)
    back[order] = found
    return back


def _vectors(outputs: Any) -> np.ndarray:
    vectors = getattr(outputs, "cell_embedding", None)
    if vectors is None:
        raise CheckpointError(
            "`model` must return `cell_embedding`; load it by `AutoModelForMaskedExpression.from_pretrained`."
        )
    return vectors.float().cpu().numpy()
