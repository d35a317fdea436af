"""Collators of cells: what is hidden, what is never hidden, and that nothing but the cell decides."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler

from genesplice_hf.errors import DataError, GeneSpliceError
from genesplice_hf.objectives.expression import (
    IGNORED,
    DataCollatorForExpression,
    DataCollatorForMaskedExpression,
)
from genesplice_hf.tokenization.tokenization_gene import GeneTokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "scgpt_binning" / "tokenization.json").read_text())
TOKENIZER = GeneTokenizer(genes=[f"G{i}" for i in range(200)])
CLS, PAD = TOKENIZER.cls_token_id, TOKENIZER.pad_token_id
MASK_VALUE, PAD_VALUE = -1.0, -2.0


def cell(number: int, genes: int | None = None, **others: Any) -> dict[str, Any]:
    random = np.random.default_rng(number)
    genes = int(random.integers(1, 60)) if genes is None else genes
    ids = np.sort(random.choice(200, genes, replace=False))
    values = random.integers(1, 50, genes)
    return {
        "input_ids": [CLS, *ids.tolist()],
        "values": [0.0, *values.astype(float).tolist()],
        "length": genes + 1,
        "cell_id": f"cell-{number}",
    } | others


CELLS = [cell(number) for number in range(40)]


def by_cell(batch: dict[str, torch.Tensor]) -> list[tuple]:
    """Rows without their padding, so that rows of different batches can be compared."""
    rows = []
    for row, mask in enumerate(batch["attention_mask"].bool()):
        rows.append(tuple(tuple(batch[name][row][mask].tolist()) for name in ("input_ids", "values", "labels")))
    return rows


@pytest.mark.parametrize("ratio", [0.15, 0.4, 1.0, [0.25, 0.5, 0.75]])
def test_the_number_of_hidden_genes_is_the_floor_but_one(ratio: Any) -> None:
    batch = DataCollatorForMaskedExpression(TOKENIZER, ratio, seed=0)(CELLS)
    hidden = (batch["labels"] != IGNORED).sum(1)
    genes = batch["attention_mask"].sum(1) - 1
    choices = [ratio] if isinstance(ratio, float) else ratio
    allowed = np.stack([np.maximum(np.floor(r * genes.numpy() + 1e-9), 1) for r in choices])
    assert (allowed == hidden.numpy()).any(0).all()
    if len(choices) > 1:
        assert len({tuple(column) for column in (allowed == hidden.numpy()).T.tolist()}) > 2


def test_cls_and_padding_are_never_hidden_and_values_are_kept() -> None:
    for epoch in range(20):
        collator = DataCollatorForMaskedExpression(TOKENIZER, 0.5, mask_value=MASK_VALUE, seed=1)
        collator.set_epoch(epoch)
        batch = collator(CELLS)
        asked = batch["labels"] != IGNORED
        special = (batch["input_ids"] == CLS) | (batch["input_ids"] == PAD)
        assert not (asked & special).any()
        assert (batch["values"][asked] == MASK_VALUE).all()
        assert (batch["values"][batch["attention_mask"] == 0] == PAD_VALUE).all()
        whole = torch.where(asked, batch["labels"], batch["values"])
        for row, given in zip(whole, CELLS, strict=True):
            assert row[: given["length"]].tolist() == given["values"]


def test_a_cell_with_one_gene_or_none() -> None:
    batch = DataCollatorForMaskedExpression(TOKENIZER, 0.15, seed=0)([cell(1, 1), cell(2, 0)])
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [1, 0]


def test_batch_order_and_workers_change_nothing() -> None:
    collator = DataCollatorForMaskedExpression(TOKENIZER, [0.2, 0.6], max_seq_len=20, seed=5)
    collator.set_epoch(3)
    expected = dict(zip([c["cell_id"] for c in CELLS], by_cell(collator(CELLS)), strict=True))
    order = np.random.default_rng(0).permutation(len(CELLS))
    shuffled = [CELLS[i] for i in order]
    for start in range(0, len(CELLS), 7):
        part = shuffled[start : start + 7]
        assert by_cell(collator(part)) == [expected[c["cell_id"]] for c in part]
    rows = Dataset.from_list(CELLS)
    loader = DataLoader(rows, batch_size=6, num_workers=2, collate_fn=collator)
    assert [row for batch in loader for row in by_cell(batch)] == [expected[c["cell_id"]] for c in CELLS]


def test_epochs_differ_unless_masks_are_frozen() -> None:
    for frozen in (False, True):
        collator = DataCollatorForMaskedExpression(TOKENIZER, 0.3, frozen_masks=frozen, max_seq_len=15, seed=2)
        first = by_cell(collator(CELLS))
        collator.set_epoch(1)
        assert (by_cell(collator(CELLS)) == first) == frozen


def test_without_a_name_the_content_decides() -> None:
    unnamed = [{name: value for name, value in c.items() if name != "cell_id"} for c in CELLS]
    collator = DataCollatorForMaskedExpression(TOKENIZER, 0.3, seed=2)
    assert by_cell(collator(unnamed[:5])) == by_cell(collator(unnamed))[:5]


def test_the_masked_share_is_that_of_scgpts_seed_form() -> None:
    """Which never hides position 0; ours hides at least one gene of a cell."""
    golden = GOLDEN["random_mask_value"]
    for case in golden["cases"]:
        if case["first_position_maskable"]:
            continue
        rows = []
        for values in golden["values"]:
            real = [value for value in values if value != golden["pad_value"]]
            rows.append({"input_ids": [CLS, *range(len(real) - 1)], "values": real})
        found = DataCollatorForMaskedExpression(TOKENIZER, case["mask_ratio"], seed=0)(rows)
        hidden = (found["labels"] != IGNORED).sum(1).tolist()
        assert hidden == [max(count, 1) for count in case["n_masked"]]


def test_padding_is_scgpts() -> None:
    tokenizer = GeneTokenizer(genes=[f"G{i}" for i in range(8)])
    for case in GOLDEN["tokenize"]["cases"]:
        kept = [place for place, (ids, _) in enumerate(case["tokenized"]) if ids and len(ids) <= case["max_len"]]
        if not kept:
            continue
        rows = [dict(zip(("input_ids", "values"), case["tokenized"][place], strict=True)) for place in kept]
        found = DataCollatorForExpression(tokenizer, case["max_len"], pad_value=case["pad_value"], seed=0)(rows)
        width = found["input_ids"].shape[1]
        for row, place in enumerate(kept):
            for name, expected, fill in (
                ("input_ids", case["genes"][place], tokenizer.pad_token_id),
                ("values", case["values"][place], case["pad_value"]),
            ):
                full = (expected + [fill] * width)[:width]
                assert found[name][row].tolist() == full


def test_long_cells_are_cut_by_rule() -> None:
    long = cell(7, 50)
    values = dict(zip(long["input_ids"], long["values"], strict=True))
    priority = np.zeros(len(TOKENIZER))
    priority[long["input_ids"][10:15]] = 1.0
    for rule, options in (("random", {}), ("top_expressed", {}), ("top_variance", {"gene_priority": priority})):
        collator = DataCollatorForExpression(TOKENIZER, 6, truncation=rule, seed=0, **options)
        ids = collator([long, cell(8, 2)])["input_ids"][0].tolist()
        assert ids[0] == CLS and len(ids) == 6 and ids[1:] == sorted(ids[1:])
        if rule == "top_expressed":
            assert sorted(values[i] for i in ids[1:]) == sorted(long["values"])[-5:]
        if rule == "top_variance":
            assert ids[1:] == long["input_ids"][10:15]
    seen = set()
    collator = DataCollatorForExpression(TOKENIZER, 6, seed=0)
    for epoch in range(150):
        collator.set_epoch(epoch)
        seen |= set(collator([long])["input_ids"][0].tolist())
    assert seen == set(long["input_ids"])


def test_shapes_and_further_columns() -> None:
    rows = [cell(i, batch_labels=i % 2, cell_type_labels=i, note="text", bin_edges=[0.5, 1.5]) for i in range(4)]
    batch = DataCollatorForExpression(TOKENIZER, pad_to_multiple_of=16, seed=0)(rows)
    assert batch["input_ids"].shape[1] % 16 == 0
    assert set(batch) == {"input_ids", "attention_mask", "values", "batch_labels", "cell_type_labels", "bin_edges"}
    assert batch["batch_labels"].tolist() == [0, 1, 0, 1] and batch["bin_edges"].dtype == torch.float32
    assert batch["values"].dtype == torch.float32 and batch["input_ids"].dtype == torch.int64


def test_rows_can_be_grouped_by_length() -> None:
    """As Trainer does with `train_sampling_strategy="group_by_length"`: the column `length` is there."""
    lengths = [row["length"] for row in CELLS]
    order = list(LengthGroupedSampler(4, lengths=lengths, generator=torch.Generator().manual_seed(0)))
    grouped = sum(max(lengths[i] for i in order[s : s + 4]) * 4 for s in range(0, 40, 4))
    plain = sum(max(lengths[s : s + 4]) * 4 for s in range(0, 40, 4))
    assert sorted(order) == list(range(40)) and grouped < 0.9 * plain


class Config:
    mask_value, pad_value, max_seq_len = -7, -9, 12


def test_a_collator_takes_the_numbers_of_the_model() -> None:
    collator = DataCollatorForMaskedExpression.for_model(Config(), TOKENIZER, seed=0)
    batch = collator(CELLS)
    assert batch["input_ids"].shape[1] == 12
    assert set(batch["values"][batch["values"] < 0].tolist()) == {-7.0, -9.0}


BAD_FEATURES = [
    ([], "`features` is empty"),
    ([{"values": [1.0]}], "`input_ids`"),
    ([{"input_ids": [1]}], "`values`"),
    ([{"input_ids": [1, 2], "values": [1.0]}], "`values` of feature 0"),
    ([{"input_ids": [], "values": []}], "`input_ids` of feature 0 is empty"),
    ([{"input_ids": [1], "values": [float("nan")]}], "`values` of feature 0 hold NaN"),
    ([{"input_ids": [1], "values": [1.0], "labels": 3}], "`labels`"),
    ([cell(0, batch_labels=1), cell(1)], "`batch_labels` is missing"),
]


@pytest.mark.parametrize(("features", "words"), BAD_FEATURES)
def test_bad_features_are_advice(features: list, words: str) -> None:
    with pytest.raises((DataError, GeneSpliceError), match=words):
        DataCollatorForMaskedExpression(TOKENIZER, seed=0)(features)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask_ratio": 0.0}, "`mask_ratio`"),
        ({"mask_ratio": 1.5}, "`mask_ratio`"),
        ({"mask_ratio": []}, "`mask_ratio`"),
        ({"truncation": "longest"}, "`truncation`"),
        ({"truncation": "top_variance"}, "`gene_priority`"),
        ({"max_seq_len": 0}, "`max_seq_len`"),
        ({"pad_to_multiple_of": 1.5}, "`pad_to_multiple_of`"),
        ({"seed": -1}, "`seed`"),
    ],
)
def test_bad_options_are_advice(options: dict, words: str) -> None:
    with pytest.raises(GeneSpliceError, match=words):
        DataCollatorForMaskedExpression(TOKENIZER, **options)
