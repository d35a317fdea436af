"""The library's calling conventions: padding, truncation, overflow, pairs, tensors, collators, against BERT's Rust."""

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenization.twins import random_sequences
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    EsmConfig,
    EsmForMaskedLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from genesplice_hf.errors import SequenceError
from genesplice_hf.tokenization.tokenization_kmer import KmerTokenizer
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer

TEXTS = ["ACGTACGTACGT", "ACG", "", "ACGTACGTA"]


def specials():
    return NucleotideTokenizer(add_prefix=True, add_suffix=True)


@pytest.fixture(scope="module")
def pair_of_tokenizers(tmp_path_factory):
    """Ours with `[CLS] ... [SEP]`, and the library's Rust tokenizer with the same files."""
    folder = tmp_path_factory.mktemp("tokenizer")
    ours = specials()
    ours.save_pretrained(folder)
    rust = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", unk_token="[UNK]",
    )  # fmt: skip
    return ours, rust


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": True},
        {"padding": True, "padding_side": "left"},
        {"padding": "max_length", "max_length": 20},
        {"padding": True, "pad_to_multiple_of": 8},
        {"truncation": True, "max_length": 6},
        {"truncation": True, "max_length": 6, "padding": "max_length", "pad_to_multiple_of": 3},
        {"truncation": True, "max_length": 6, "stride": 2, "return_overflowing_tokens": True},
        {"truncation": True, "max_length": 5, "stride": 0, "return_overflowing_tokens": True, "padding": True},
        {"truncation": True, "max_length": 7, "stride": 4, "return_overflowing_tokens": True},
        {"add_special_tokens": False},
        {"add_special_tokens": False, "padding": True, "return_special_tokens_mask": True},
        {"return_special_tokens_mask": True, "padding": True},
        {"return_offsets_mapping": True, "padding": True},
        {"return_length": True, "padding": True},
        {"return_attention_mask": False, "return_token_type_ids": True},
        {"padding": True, "return_tensors": "np", "return_token_type_ids": True},
    ],
)
def test_every_option_answers_as_the_rust_backend(pair_of_tokenizers, options):
    ours, rust = pair_of_tokenizers
    options = {"return_token_type_ids": False, **options}
    first, second = ours(TEXTS, **options), rust(TEXTS, **options)
    assert set(first) == set(second)
    for name in second:
        assert np.array_equal(np.asarray(first[name], dtype=object), np.asarray(second[name], dtype=object)), name
    first, second = ours(TEXTS[0], **options), rust(TEXTS[0], **options)
    for name in set(second) - {"length"}:
        assert np.array_equal(np.asarray(first[name], dtype=object), np.asarray(second[name], dtype=object)), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_overflow_windows_on_either_side_equal_the_rust_backend(pair_of_tokenizers, side, overlap):
    ours, rust = pair_of_tokenizers
    texts = random_sequences(np.random.default_rng(8), 30, 40)
    options = {
        "truncation": True, "max_length": 8, "stride": overlap, "return_overflowing_tokens": True,
        "return_offsets_mapping": True, "return_token_type_ids": False,
    }  # fmt: skip
    ours.truncation_side = rust.truncation_side = side
    try:
        first, second = ours(texts, **options), rust(texts, **options)
    finally:
        ours.truncation_side = rust.truncation_side = "right"
    assert first["overflow_to_sample_mapping"] == second["overflow_to_sample_mapping"]
    assert first["input_ids"] == second["input_ids"]
    assert first["offset_mapping"] == second["offset_mapping"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": True},
        {"truncation": "only_first", "max_length": 12},
        {"truncation": "only_second", "max_length": 14},
        {"truncation": True, "max_length": 11},
        {"truncation": True, "max_length": 12, "padding": True},
        {"truncation": "only_second", "max_length": 16, "return_overflowing_tokens": True, "stride": 1},
    ],
)
def test_pairs_equal_the_rust_backend(pair_of_tokenizers, options):
    ours, rust = pair_of_tokenizers
    first, second = ["ACGTACGTAC", "ACGTACG", "GGGGGGG"], ["TTTT", "AAACAAAC", "CCCCCCC"]
    options = {"return_token_type_ids": True, "return_special_tokens_mask": True, **options}
    assert dict(ours(first, second, **options)) == dict(rust(first, second, **options))
    assert dict(ours(list(zip(first, second, strict=True)), **options)) == dict(rust(first, second, **options))


def test_pair_templates():
    assert NucleotideTokenizer()("AC", "GT")["input_ids"] == [2, 5, 6, 3, 7, 8, 3]
    assert NucleotideTokenizer(preset="caduceus")("AC", "GT")["input_ids"] == [7, 8, 1, 9, 10, 1]
    out = KmerTokenizer(preset="dnabert3")("ACGT", "AAA")
    assert [len(out["input_ids"]), out["token_type_ids"]] == [6, [0, 0, 0, 0, 1, 1]]
    with pytest.raises(SequenceError, match="separator"):
        KmerTokenizer(preset="nt_v1")("ACG", "ACG")
    with pytest.raises(SequenceError, match="`text_pair` must have 1 sequences"):
        NucleotideTokenizer()("AC", ["A", "C"])
    with pytest.raises(SequenceError, match="'longest_first'"):
        NucleotideTokenizer()("ACGTAC", "ACGTAC", truncation=True, max_length=8, return_overflowing_tokens=True)


def test_tensors_and_their_shapes():
    tokenizer = KmerTokenizer(preset="nt_v1")
    out = tokenizer(["ACGTAC", "ACGTACG"], padding=True, return_tensors="pt", return_offsets_mapping=True)
    assert out["input_ids"].dtype == torch.int64 and out["input_ids"].shape == (2, 3)
    assert out["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert out["offset_mapping"].shape == (2, 3, 2)
    assert tokenizer("ACGTAC", return_tensors="pt")["input_ids"].shape == (1, 2)
    assert tokenizer([], padding=True)["input_ids"] == []
    with pytest.raises(SequenceError, match="padding=True"):
        tokenizer(["ACGTAC", "ACGTACG"], return_tensors="pt")
    with pytest.raises(TypeError, match="retrun_offsets"):
        tokenizer("ACG", retrun_offsets=True)


def test_collators_and_pad():
    tokenizer = KmerTokenizer(preset="nt_v1")
    features = [tokenizer(text) for text in ("ACGTACA", "ACG", "ACGTAC")]
    batch = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)(features)
    assert batch["input_ids"].shape == (3, 8)
    assert (
        batch["input_ids"].tolist()
        == tokenizer(["ACGTACA", "ACG", "ACGTAC"], padding=True, pad_to_multiple_of=8)["input_ids"]
    )
    masked = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=1)([tokenizer("ACGTAC" * 20)] * 4)
    assert (masked["input_ids"] == tokenizer.mask_token_id).any()
    assert (masked["labels"][:, 0] == -100).all()


def test_special_token_methods():
    tokenizer = specials()
    ids = tokenizer.encode("ACG", add_special_tokens=False)
    assert tokenizer.build_inputs_with_special_tokens(ids) == tokenizer.encode("ACG")
    assert tokenizer.build_inputs_with_special_tokens(ids, ids) == tokenizer("ACG", "ACG")["input_ids"]
    assert tokenizer.get_special_tokens_mask(ids) == [1, 0, 0, 0, 1]
    assert tokenizer.get_special_tokens_mask([2, 5, 4, 3], already_has_special_tokens=True) == [1, 0, 1, 1]
    assert tokenizer.create_token_type_ids_from_sequences(ids, ids) == [0] * 5 + [1] * 4
    assert (tokenizer.num_special_tokens_to_add(), tokenizer.num_special_tokens_to_add(pair=True)) == (2, 3)


@pytest.mark.parametrize("build", [specials, lambda: KmerTokenizer(preset="dnabert4"), lambda: KmerTokenizer(k=5)])
def test_pickled_tokenizers_give_the_same_ids(build):
    tokenizer = build()
    texts = random_sequences(np.random.default_rng(1), 50, 100)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]


def test_words_are_joined():
    tokenizer = KmerTokenizer(preset="nt_v1")
    assert tokenizer(["ACG", "TAC"], is_split_into_words=True)["input_ids"] == tokenizer("ACGTAC")["input_ids"]
    assert tokenizer([["A", "C"], ["G"]], is_split_into_words=True)["input_ids"] == tokenizer(["AC", "G"])["input_ids"]


def test_ids_instead_of_text_are_refused():
    with pytest.raises(SequenceError, match="token ids"):
        NucleotideTokenizer()([[5, 6, 7]])


def test_truncation_and_pieces_exclude_each_other():
    with pytest.raises(SequenceError, match="exclude each other"):
        KmerTokenizer(preset="dnabert6", max_piece=510)("ACGTACGT", truncation=True, max_length=8)
    with pytest.raises(SequenceError, match="must hold the 2 special tokens"):
        specials()("ACG", truncation=True, max_length=1)
    with pytest.raises(SequenceError, match=r"`stride` \(6\)"):
        specials()("ACGTACGTA", truncation=True, max_length=8, stride=6, return_overflowing_tokens=True)


def test_fill_mask_pipeline_of_the_library():
    tokenizer = KmerTokenizer(preset="nt_v1")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = EsmForMaskedLM(EsmConfig(vocab_size=4105, pad_token_id=1, mask_token_id=2, **sizes))
    best = pipeline("fill-mask", model=model, tokenizer=tokenizer)("ACGTAC<mask>ACGTACN", top_k=1)[0]
    assert best["token_str"] == tokenizer.convert_ids_to_tokens(best["token"])
    if len(best["token_str"]) == 6:
        assert best["sequence"] == f"ACGTAC{best['token_str']}ACGTACN"


@pytest.mark.parametrize("share_of_n", [0.0, 0.01, 1.0])
@pytest.mark.parametrize(
    "build",
    [
        lambda: KmerTokenizer(preset="nt_v1"),
        lambda: KmerTokenizer(preset="dnabert6", model_max_length=10**7),
        NucleotideTokenizer,
    ],
)
def test_memory_beside_the_result_stays_below_12_bytes_per_base(build, share_of_n):
    tokenizer, generator, n = build(), np.random.default_rng(0), 1_000_000
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)[generator.integers(0, 4, n)].copy()
    letters[generator.random(n) < share_of_n] = ord("N")
    text = letters.tobytes().decode("ascii")
    tracemalloc.start()
    ids = tokenizer(text, return_tensors="np", return_attention_mask=False, return_token_type_ids=False)["input_ids"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (peak - ids.nbytes) / n <= 12.1


def test_workers_of_a_data_loader_give_the_same_batches():
    tokenizer = KmerTokenizer(preset="dnabert6")
    texts = random_sequences(np.random.default_rng(6), 40, 60)
    collate = DataCollatorWithPadding(tokenizer)
    rows = [tokenizer(text) for text in texts]

    def batches(workers):
        loader = DataLoader(rows, batch_size=8, collate_fn=collate, num_workers=workers)
        return [batch["input_ids"].tolist() for batch in loader]

    assert batches(0) == batches(2)


@pytest.mark.slow
def test_datasets_map_with_two_processes_gives_the_same_ids():
    tokenizer = KmerTokenizer(preset="nt_v1")
    texts = random_sequences(np.random.default_rng(7), 60, 90)
    mapped = Dataset.from_dict({"sequence": texts}).map(
        lambda row: tokenizer(row["sequence"]), batched=True, num_proc=2
    )
    assert mapped["input_ids"][:] == tokenizer(texts)["input_ids"]
    assert tokenizer(Dataset.from_dict({"sequence": texts})["sequence"])["input_ids"] == tokenizer(texts)["input_ids"]
