"""Two views of an example: what each change does, that its strength is kept, and that nothing but the example and the
epoch decides about it."""

import random

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

from genesplice_hf.errors import GeneSpliceError, SequenceError
from genesplice_hf.objectives.contrastive import ContrastiveCollator, ViewStrength
from genesplice_hf.tokenization.tokenization_kmer import KmerTokenizer
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer

PAIRS = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}
PAD, MASK, N = 0, 4, 9


@pytest.fixture(scope="module")
def tokenizer() -> NucleotideTokenizer:
    return NucleotideTokenizer(preset="genesplice")


def sequence(length: int, seed: int, letters: str = "ACGT") -> str:
    return "".join(random.Random(seed).choices(letters, k=length))


def examples(count: int, length: int = 100, letters: str = "ACGT") -> list[dict]:
    return [{"sequence": sequence(length + i % 7, i, letters), "example_id": f"w{i}"} for i in range(count)]


def texts(tokenizer, batch: dict, prefix: str = "") -> list[str]:
    """What stands at the real positions of each row; `*` for the mask token."""
    letters = {index: token for token, index in tokenizer.get_vocab().items()} | {MASK: "*"}
    rows = zip(batch[f"{prefix}input_ids"].tolist(), batch[f"{prefix}attention_mask"].tolist(), strict=True)
    return ["".join(letters[i] for i, real in zip(ids, mask, strict=True) if real) for ids, mask in rows]


def views(tokenizer, features: list[dict], **options) -> tuple[list[str], list[str]]:
    batch = ContrastiveCollator(tokenizer, **({"seed": 0} | options))(features)
    return texts(tokenizer, batch), texts(tokenizer, batch, "view_")


def other_strand(text: str) -> str:
    return "".join(PAIRS[letter] for letter in reversed(text))


def distance(one: str, other: str) -> int:
    assert len(one) == len(other)
    return sum(a != b for a, b in zip(one, other, strict=True))


def test_shapes_and_padding(tokenizer):
    features = [{"sequence": "ACGTN"}, {"sequence": "ACG"}]
    batch = ContrastiveCollator(tokenizer, second=("reverse_complement",), pad_to_multiple_of=4, seed=0)(features)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [5, 6, 7, 0, 0, 0, 0, 0]]
    assert batch["view_input_ids"].tolist() == [[9, 5, 6, 7, 8, 0, 0, 0], [6, 7, 8, 0, 0, 0, 0, 0]]
    assert batch["view_attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 3 + [0] * 5]
    assert set(batch) == {"input_ids", "attention_mask", "view_input_ids", "view_attention_mask"}
    assert {values.dtype for values in batch.values()} == {torch.int64}


@pytest.mark.parametrize("rc_probability", [0.0, 0.5, 1.0])
def test_a_reverse_complement_view_is_exactly_that(tokenizer, rc_probability):
    """Whichever strand the example is read from."""
    features = examples(40, letters="ACGTN")
    first, second = views(tokenizer, features, second=("reverse_complement",), rc_probability=rc_probability)
    assert second == [other_strand(text) for text in first]
    turned = sum(text != feature["sequence"] for text, feature in zip(first, features, strict=True))
    assert turned == 40 * rc_probability if rc_probability != 0.5 else 5 < turned < 35


def test_a_crop_is_a_part_within_its_bounds(tokenizer):
    features = examples(2000, length=200)
    first, second = views(tokenizer, features, second=("crop",))
    shares, starts = [], []
    for whole, part in zip(first, second, strict=True):
        assert part in whole
        shares.append(len(part) / len(whole))
        if len(part) < len(whole):
            starts.append(whole.index(part) / (len(whole) - len(part)))
    assert 0.5 <= min(shares) < 0.51 and max(shares) == 1.0
    assert stats.kstest(shares, stats.uniform(0.5, 0.5).cdf).pvalue > 1e-3
    assert stats.kstest(starts, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("bounds", "counts"), [((0.01, 0.05), range(2, 11)), ((0.07, 0.07), range(14, 15))])
def test_the_share_of_mutations_lies_within_its_bounds(tokenizer, bounds, counts):
    features = [{"sequence": sequence(200, i)} for i in range(400)]
    strength = ViewStrength(mutation=bounds)
    first, second = views(tokenizer, features, second=("mutation",), strength=strength)
    found = [distance(one, other) for one, other in zip(first, second, strict=True)]
    assert set(found) == set(counts)
    assert all(set(text) <= set("ACGT") for text in second)


def test_mutations_are_spread_evenly_over_places_and_bases(tokenizer):
    features = [{"sequence": "A" * 50, "example_id": i} for i in range(1000)]
    _, second = views(tokenizer, features, second=("mutation",), strength=ViewStrength(mutation=(0.1, 0.1)))
    changed = np.array([list(text) for text in second])
    assert stats.chisquare((changed != "A").sum(0)).pvalue > 1e-3
    assert stats.chisquare([(changed == base).sum() for base in "CGT"]).pvalue > 1e-3


def test_bases_hidden_as_n(tokenizer):
    features = [{"sequence": sequence(100, i)} for i in range(300)]
    first, second = views(tokenizer, features, second=("n_mutation",))
    for one, other in zip(first, second, strict=True):
        assert 1 <= other.count("N") <= 5
        assert all(b in (a, "N") for a, b in zip(one, other, strict=True))
    assert {text.count("N") for text in second} == {1, 2, 3, 4, 5}


class Recorder(NucleotideTokenizer):
    """Remembers the texts that it is called with."""

    def __call__(self, text, **options):
        self.seen = text
        return super().__call__(text, **options)


def test_mutations_keep_the_case_and_leave_other_letters():
    recorder = Recorder(preset="genesplice")
    strength = ViewStrength(mutation=(1, 1))
    collator = ContrastiveCollator(recorder, second=("mutation",), strength=strength, seed=0)
    collator.second_view([{"sequence": "ACnNgt"}, {"sequence": "NNN"}])
    changed, untouched = recorder.seen
    assert untouched == "NNN"
    assert changed[2:4] == "nN" and changed[:2].isupper() and changed[4:].islower()
    assert distance(changed.upper(), "ACNNGT") == 4


def test_a_masked_view_respects_padding_and_n(tokenizer):
    features = [{"sequence": sequence(20 + 40 * (i % 2), i, "ACGTN"), "example_id": i} for i in range(200)]
    strength = ViewStrength(mask=0.3)
    batch = ContrastiveCollator(tokenizer, second=("mask",), strength=strength, seed=0)(features)
    plain, masked, real = batch["input_ids"], batch["view_input_ids"], batch["view_attention_mask"].bool()
    assert (masked[~real] == PAD).all() and (real == batch["attention_mask"].bool()).all()
    hidden = masked == MASK
    assert (masked[~hidden] == plain[~hidden]).all()
    assert ((plain[hidden] >= 5) & (plain[hidden] < N)).all()
    bases = int((real & (plain < N)).sum())
    assert stats.binomtest(int(hidden.sum()), bases, 0.3).pvalue > 1e-3


def test_masking_leaves_special_tokens(tokenizer):
    kmers = KmerTokenizer(k=3, stride=3, add_prefix=True, add_suffix=True)
    features = [{"sequence": sequence(60, i)} for i in range(30)]
    batch = ContrastiveCollator(kmers, second=("mask",), strength=ViewStrength(mask=1.0), seed=0)(features)
    special = torch.isin(batch["input_ids"], torch.tensor(kmers.all_special_ids))
    assert special.any()
    assert torch.equal(batch["view_input_ids"][special], batch["input_ids"][special])
    assert (batch["view_input_ids"][~special] == kmers.mask_token_id).all()


def test_a_shift_moves_the_window_into_its_flanks(tokenizer):
    whole = sequence(60, 3)
    feature = {"left_flank": whole[:10], "sequence": whole[10:40], "right_flank": whole[40:]}
    features = [feature | {"example_id": i} for i in range(600)]
    _, second = views(tokenizer, features, second=("shift",))
    starts = [whole.index(text) for text in second]
    assert {len(text) for text in second} == {30}
    assert set(starts) == set(range(31)) - {10}
    assert stats.chisquare(np.bincount(starts, minlength=31)[np.arange(31) != 10]).pvalue > 1e-3


def test_at_the_end_of_a_contig_a_shift_goes_the_other_way_or_nowhere(tokenizer):
    at_end = {"left_flank": "G", "sequence": "ACCA", "right_flank": ""}
    alone = {"left_flank": "", "sequence": "ACCA", "right_flank": ""}
    assert views(tokenizer, [at_end, alone], second=("shift",))[1] == ["GACC", "ACCA"]
    with pytest.raises(GeneSpliceError, match=r"feature 1 .* lacks \['left_flank', 'right_flank'\]"):
        views(tokenizer, [at_end, {"sequence": "ACCA"}], second=("shift",))


def test_changes_compose(tokenizer):
    """Cropped, turned and mutated: near the other strand of a part."""
    features = examples(50, length=300)
    first, second = views(tokenizer, features, second=("mutation", "reverse_complement", "crop"))
    for whole, view in zip(first, second, strict=True):
        back = other_strand(view)
        nearest = min(distance(whole[i : i + len(back)], back) for i in range(len(whole) - len(back) + 1))
        assert 1 <= nearest <= 0.05 * len(view)


def test_the_two_views_draw_apart(tokenizer):
    first, second = views(tokenizer, examples(50), first=("crop", "mutation"), second=("crop", "mutation"))
    assert sum(one == other for one, other in zip(first, second, strict=True)) <= 1


@pytest.mark.parametrize("named", [True, False])
def test_neither_batch_nor_order_nor_worker_changes_a_view(tokenizer, named):
    features = examples(24)
    if not named:
        features = [{"sequence": feature["sequence"]} for feature in features]
    options = {"first": ("crop", "mask"), "second": ("crop", "reverse_complement", "mutation", "n_mutation", "mask")}
    collator = ContrastiveCollator(tokenizer, **options, rc_probability=0.5, seed=5)
    together = collator(features)
    expected = list(zip(texts(tokenizer, together), texts(tokenizer, together, "view_"), strict=True))
    collator.second_view(features[:3])
    alone = [collator([feature]) for feature in features]
    assert [(*texts(tokenizer, b), *texts(tokenizer, b, "view_")) for b in alone] == expected
    backwards = collator(features[::-1])
    assert texts(tokenizer, backwards, "view_")[::-1] == [second for _, second in expected]
    loader = DataLoader(features, batch_size=5, num_workers=2, collate_fn=collator)
    found = [pair for b in loader for pair in zip(texts(tokenizer, b), texts(tokenizer, b, "view_"), strict=True)]
    assert found == expected


def test_epoch_and_seed_change_the_views(tokenizer):
    collator = ContrastiveCollator(tokenizer, seed=0)
    features = examples(20)
    at_start = texts(tokenizer, collator(features), "view_")
    collator.set_epoch(1)
    later = texts(tokenizer, collator(features), "view_")
    assert not set(at_start) & set(later)
    collator.set_epoch(0)
    assert texts(tokenizer, collator(features), "view_") == at_start
    other = ContrastiveCollator(tokenizer, seed=1)(features)
    assert not set(at_start) & set(texts(tokenizer, other, "view_"))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_sequences(tokenizer, length):
    features = [{"sequence": "ACG"[:length], "example_id": i} for i in range(50)]
    _, second = views(tokenizer, features, second=("crop", "reverse_complement", "mutation", "n_mutation"))
    assert {len(text) for text in second} == set(range(-(-length // 2), length + 1))


@pytest.mark.parametrize(
    "options",
    [
        {"second": ("reverse_complement",), "rc_equivariant": True},
        {"first": ("reverse_complement",), "second": ("identity",), "rc_equivariant": True},
    ],
)
def test_an_equivariant_model_needs_more_than_the_other_strand(tokenizer, options):
    with pytest.raises(GeneSpliceError, match=r"one and the same embedding.*'crop'"):
        ContrastiveCollator(tokenizer, seed=0, **options)
    second = (*options["second"], "mutation")
    assert ContrastiveCollator(tokenizer, seed=0, **(options | {"second": second})).rc_equivariant


@pytest.mark.parametrize(
    "options",
    [
        {"second": ("identity",)},
        {"second": ()},
        {"first": ("reverse_complement",), "second": ("identity", "reverse_complement")},
    ],
)
def test_views_that_always_agree_are_refused(tokenizer, options):
    with pytest.raises(GeneSpliceError, match="always the same sequence"):
        ContrastiveCollator(tokenizer, seed=0, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second": ("flip",)}, "`second`"),
        ({"first": "crop"}, "`first`"),
        ({"rc_probability": 2}, "`rc_probability`"),
        ({"pad_to_multiple_of": 0}, "`pad_to_multiple_of`"),
        ({"seed": -1}, "`seed`"),
    ],
)
def test_bad_arguments(tokenizer, options, message):
    with pytest.raises(GeneSpliceError, match=message):
        ContrastiveCollator(tokenizer, **options)


@pytest.mark.parametrize(
    "fields", [{"crop": (0.9, 0.5)}, {"crop": (0, 1)}, {"mutation": (0.1, 1.5)}, {"mask": 0}, {"crop": (0.1, 0.2, 1)}]
)
def test_bad_strength(fields):
    with pytest.raises(GeneSpliceError, match=f"`{next(iter(fields))}`"):
        ViewStrength(**fields)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ([], GeneSpliceError, "`features` is empty"),
        ([{"input_ids": [5, 6]}], GeneSpliceError, "feature 0 must hold strings"),
        ([{"sequence": "ACG"}, {"sequence": 5}], GeneSpliceError, "feature 1 must hold strings"),
        ([{"sequence": "ACG"}, {"sequence": ""}], SequenceError, "feature 1 holds no token"),
        ([{"sequence": "AC-G"}], SequenceError, "position 2"),
    ],
)
def test_bad_features(tokenizer, features, error, message):
    with pytest.raises(error, match=message):
        ContrastiveCollator(tokenizer, second=("reverse_complement",), seed=0)(features)
