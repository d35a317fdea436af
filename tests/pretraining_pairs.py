"""A toy genome for the objectives of pretraining: contigs of few hundred bases, each rich in one of the four bases.

Neighbouring halves of a window have the same favourite base, halves of different contigs mostly not.
"""

import random
from typing import Any

import torch

CONTIGS, PER_CONTIG, WINDOW = 24, 10, 24


def windows(count_from: int = 0, rich: float = 0.7) -> list[dict[str, Any]]:
    """Window rows, contig after contig; `count_from` makes other contigs of the same kind."""
    rows = []
    for number in range(count_from, count_from + CONTIGS):
        letters = random.Random(number)
        weights = [rich if i == number % 4 else (1 - rich) / 3 for i in range(4)]
        for start in range(0, PER_CONTIG * WINDOW, WINDOW):
            text = "".join(letters.choices("ACGT", weights, k=WINDOW))
            place = {"chrom": f"c{number}", "start": start, "end": start + WINDOW}
            rows.append(place | {"sequence": text, "example_id": f"toy|c{number}:{start}-{start + WINDOW}"})
    return rows


def whole_batch() -> dict[str, torch.Tensor]:
    """A batch of 6 examples with every objective; the number of labels and the padding differ from row to row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 9, (6, 20), generator=generator)
    lengths = torch.tensor([20, 7, 13, 20, 5, 18])
    mask = (torch.arange(20) < lengths[:, None]).long()
    chosen = (torch.rand(6, 20, generator=generator) < torch.linspace(0.2, 0.9, 6)[:, None]) & mask.bool()
    view = torch.randint(5, 9, (6, 14), generator=generator)
    segments = (torch.arange(16) >= 8).long().repeat(6, 1)
    return {
        "input_ids": torch.where(chosen, 4, ids * mask),
        "attention_mask": mask,
        "labels": ids.masked_fill(~chosen, -100),
        "view_input_ids": view,
        "view_attention_mask": torch.ones_like(view),
        "segment_input_ids": torch.randint(5, 9, (6, 16), generator=generator),
        "segment_attention_mask": torch.ones(6, 16).long(),
        "segment_ids": segments,
        "follows": torch.tensor([1, 0, 0, 1, -100, 1]),
    }
