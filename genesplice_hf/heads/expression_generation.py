"""Values for genes that a cell does not have yet, and for more genes than one forward pass takes.

Shapes: B cells, r genes of a cell, E hidden size.
"""

from typing import Any

import torch

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.expression import expression_mask, filled_values


class GeneratesExpression:
    """`generate_expression` and `chunked_predict` for a masked-expression model."""

    config: Any
    training: bool

    @torch.no_grad()
    def generate_expression(
        self: Any,
        input_ids: torch.LongTensor,
        values: torch.Tensor | None = None,
        cell_embedding: torch.Tensor | None = None,
        iterations: int = 1,
        sample_zeros: bool = False,
        generator: torch.Generator | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Fills in the unknown values, (B, r).

        Unknown genes are marked by the generation mask where the model has `use_generation_flag`, and are masked
        values elsewhere. In every iteration the next share of them, in the given order of genes, becomes known.

        Args:
            input_ids: (B, r) genes, `<cls>` first.
            values: (B, r), `mask_value` where unknown; None = all but `<cls>` are unknown.
            cell_embedding: (B, E) that replaces the state of the first gene.
            iterations: passes over the model.
            sample_zeros: draw whether a value is above 0 from the zero head, instead of taking the value as it is.
            generator: of that draw.
            **inputs: what else the model takes (`attention_mask`, `batch_labels`, `pair_values`).

        Raises:
            SequenceError: no iteration, or zeros to draw without a zero head.
        """
        if iterations < 1:
            raise SequenceError(f"`iterations` must be at least 1, got {iterations}.")
        if sample_zeros and not self.config.explicit_zero_prob:
            raise SequenceError("`sample_zeros` needs a zero head; train with `explicit_zero_prob=True`.")
        real = expression_mask(self.config, input_ids, None, inputs.get("attention_mask"))
        values = filled_values(self.config, values, input_ids, real).clone().float()
        unknown = (values == self.config.mask_value) & real
        for left in range(iterations, 0, -1):
            flags = {"generation_mask": unknown} if self.config.use_generation_flag else {}
            outputs = self(input_ids=input_ids, values=values, cell_states=cell_embedding, **flags, **inputs)
            found = outputs.logits.float()
            if sample_zeros:
                chance = outputs.zero_logits.float().sigmoid()
                found = found * torch.bernoulli(chance, generator=generator)
            # Ceiling of what is left over the iterations left.
            share = -(-unknown.sum(1, keepdim=True) // left)
            now = unknown & (unknown.cumsum(1) <= share)
            values = torch.where(now, found, values)
            unknown = unknown & ~now
        return values

    @torch.no_grad()
    def chunked_predict(
        self: Any, input_ids: torch.LongTensor, values: torch.Tensor, chunk: int | None = None, **inputs: Any
    ) -> torch.Tensor:
        """Predictions (B, r) for more genes than `max_seq_len`, chunk by chunk in the given order of genes.

        Every chunk holds the first column (`<cls>`) and the next `chunk` - 1 genes; genes of different chunks do not
        see each other, so that the order matters: sort them the same way for all cells. The first column is predicted
        with the first chunk.

        Args:
            chunk: genes of a pass with `<cls>`; None = `max_seq_len`.
            **inputs: what else the model takes per cell (`batch_labels`).

        Raises:
            SequenceError: a chunk without room for a gene.
        """
        chunk = self.config.max_seq_len if chunk is None else chunk
        if chunk < 2:
            raise SequenceError(f"`chunk` must be at least 2 (`<cls>` and a gene), got {chunk}.")
        found = []
        for start in range(1, max(2, input_ids.shape[1]), chunk - 1):
            parts = [torch.cat([x[:, :1], x[:, start : start + chunk - 1]], dim=1) for x in (input_ids, values)]
            logits = self(input_ids=parts[0], values=parts[1], **inputs).logits
            found.append(logits if start == 1 else logits[:, 1:])
        return torch.cat(found, dim=1)
