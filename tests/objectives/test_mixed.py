"""Several objectives in one batch: every part is what its own collator gives."""

import random

import pytest
import torch
from torch.utils.data import DataLoader

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.objectives.causal import CLMCollator
from genesplice_hf.objectives.contrastive import ContrastiveCollator
from genesplice_hf.objectives.masked import DnaMLMCollator
from genesplice_hf.objectives.mixed import MultiObjectiveCollator
from genesplice_hf.objectives.next_segment import NextSegmentCollator
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> NucleotideTokenizer:
    return NucleotideTokenizer(preset="genesplice")


def windows(count: int = 12) -> list[dict]:
    letters = random.Random(0)
    return [
        {"chrom": f"c{i}", "start": 0, "end": 30, "sequence": "".join(letters.choices("ACGTacgt", k=30)),
         "example_id": f"g|c{i}:0-30"}
        for i in range(count)
    ]  # fmt: skip


def parts(tokenizer, rows: list[dict]) -> dict:
    return {
        "tokens": DnaMLMCollator(tokenizer, soft_mask_weight=0.5, rc_probability=0.5, seed=0),
        "contrastive": ContrastiveCollator(tokenizer, rc_probability=0.5, seed=0),
        "next_segment": NextSegmentCollator(tokenizer, rows, rc_probability=0.5, seed=0),
    }


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


def test_every_part_is_its_own_collators(tokenizer):
    rows = windows()
    made = parts(tokenizer, rows)
    pair = made["next_segment"](rows)
    pair = {f"segment_{n}" if n in ("input_ids", "attention_mask") else n: values for n, values in pair.items()}
    views = {n: values for n, values in made["contrastive"](rows).items() if n.startswith("view_")}
    expected = made["tokens"](rows) | views | pair
    assert_same(MultiObjectiveCollator(**made)(rows), expected)
    assert {"labels", "loss_weight", "view_input_ids", "segment_input_ids", "segment_ids", "follows"} < set(expected)


def test_without_tokens_both_views_are_the_contrasts(tokenizer):
    rows = windows()
    made = parts(tokenizer, rows) | {"tokens": None}
    found = MultiObjectiveCollator(**made)(rows)
    expected = made["contrastive"](rows)
    assert_same({name: found[name] for name in expected}, expected)
    assert "segment_input_ids" in found and "labels" not in found


def test_two_parts_are_enough(tokenizer):
    rows = windows()
    made = parts(tokenizer, rows)
    found = MultiObjectiveCollator(made["tokens"], next_segment=made["next_segment"])(rows)
    assert "view_input_ids" not in found and {"labels", "follows"} < set(found)
    found = MultiObjectiveCollator(CLMCollator(tokenizer, seed=0), made["contrastive"])(rows)
    assert torch.equal(found["labels"], found["input_ids"]) and "follows" not in found


def test_the_epoch_reaches_every_part(tokenizer):
    rows = windows()
    mixed = MultiObjectiveCollator(**parts(tokenizer, rows))
    at_start = mixed(rows)
    mixed.set_epoch(3)
    for name, collator in parts(tokenizer, rows).items():
        collator.set_epoch(3)
        key = {"tokens": "labels", "contrastive": "view_input_ids", "next_segment": "follows"}[name]
        assert torch.equal(mixed(rows)[key], collator(rows)[key])
        assert not torch.equal(mixed(rows)[key], at_start[key])


def test_neither_batch_nor_worker_changes_an_example(tokenizer):
    rows = windows()
    mixed = MultiObjectiveCollator(**parts(tokenizer, rows))
    together = mixed(rows)
    for loader in (DataLoader(rows, 1, collate_fn=mixed), DataLoader(rows, 5, collate_fn=mixed, num_workers=2)):
        found: dict[str, list] = {name: [] for name in together}
        for batch in loader:
            for name, values in batch.items():
                found[name] += values.tolist()
        for name, values in together.items():
            for row, other in zip(values.tolist(), found[name], strict=True):
                # A row of a smaller batch has less padding.
                assert other == (row[: len(other)] if isinstance(row, list) else row), name


def test_token_types_are_left_out():
    """They belong to `input_ids` alone, and are 0 throughout."""
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = NucleotideTokenizer(preset="genesplice", model_input_names=names)
    rows = windows()
    made = parts(tokenizer, rows)
    assert not made["tokens"](rows)["token_type_ids"].any()
    found = MultiObjectiveCollator(**made)(rows)
    assert [name for name in found if "token_type" in name] == []
    assert found.keys() == MultiObjectiveCollator(**parts(NucleotideTokenizer(preset="genesplice"), rows))(rows).keys()


def test_a_view_that_never_differs_from_the_tokens_is_refused(tokenizer):
    """A masked batch differs from its window, a causal one does not."""
    same = ContrastiveCollator(tokenizer, first=("reverse_complement",), second=("identity",), seed=0)
    MultiObjectiveCollator(DnaMLMCollator(tokenizer, seed=0), same)
    with pytest.raises(GeneSpliceError, match="always the same sequence"):
        MultiObjectiveCollator(CLMCollator(tokenizer, seed=0), same)
    turned = ContrastiveCollator(
        tokenizer, first=("crop",), second=("reverse_complement",), rc_equivariant=True, seed=0
    )
    MultiObjectiveCollator(DnaMLMCollator(tokenizer, seed=0), turned)
    with pytest.raises(GeneSpliceError, match="equivariant"):
        MultiObjectiveCollator(CLMCollator(tokenizer, seed=0), turned)


def test_nothing_to_mix(tokenizer):
    with pytest.raises(GeneSpliceError, match="`tokens` and `contrastive` are both None"):
        MultiObjectiveCollator(next_segment=NextSegmentCollator(tokenizer, windows(), seed=0))
