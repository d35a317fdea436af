"""Base <-> token projection against loops over bases."""

import numpy as np
import pytest
import torch

from genesplice_hf.errors import SequenceError
from genesplice_hf.tokenization.offsets import (
    bases_of_token,
    kmer_logits_to_base,
    offset_array,
    to_base_level,
    to_token_level,
    tokens_of_base,
)
from genesplice_hf.tokenization.tokenization_kmer import KmerTokenizer

TEXTS = ["ACGTACGTNACGTAC", "ACGTACG", "ACGTACGTACGTACGTA"]


def setup(preset):
    out = KmerTokenizer(preset=preset)(TEXTS, padding=True, return_offsets_mapping=True)
    spans = out["offset_mapping"]
    x = np.random.default_rng(0).normal(size=(len(TEXTS), len(spans[0]), 4))
    return spans, x


def covering(row, base):
    return [token for token, (start, end) in enumerate(row) if start <= base < end]


@pytest.mark.parametrize("preset", ["nt_v1", "dnabert6", "dnabert3"])
@pytest.mark.parametrize("mode", ["repeat", "mean", "sum", "first", "center"])
def test_to_base_level_equals_a_loop(preset, mode):
    spans, x = setup(preset)
    got = to_base_level(x, spans, 17, mode)
    for b, row in enumerate(spans):
        for base in range(17):
            tokens = covering(row, base)
            if not tokens:
                expected = np.zeros(4)
            elif mode in ("repeat", "first"):
                expected = x[b, tokens[0]]
            elif mode == "center":
                middle = [abs((row[t][0] + row[t][1]) // 2 - base) for t in tokens]
                expected = x[b, tokens[int(np.argmin(middle))]]
            else:
                expected = x[b, tokens].sum(0) / (len(tokens) if mode == "mean" else 1)
            np.testing.assert_allclose(got[b, base], expected, atol=1e-12)


def test_default_mode_and_torch_gradients():
    spans, x = setup("dnabert6")
    tensor = torch.tensor(x, requires_grad=True)
    got = to_base_level(tensor, torch.tensor(offset_array(spans)), 17)
    np.testing.assert_allclose(got.detach().numpy(), to_base_level(x, spans, 17, "mean"), atol=1e-12)
    got.sum().backward()
    share = to_base_level(np.ones_like(x), spans, 17, "sum")
    assert tensor.grad.sum().item() == pytest.approx((share > 0).sum())
    spans, x = setup("nt_v1")
    np.testing.assert_array_equal(to_base_level(x, spans, 17), to_base_level(x, spans, 17, "repeat"))


def test_bend_repeats_two_before_and_three_after():
    out = KmerTokenizer(preset="dnabert6")("ACGTACGTACG", return_offsets_mapping=True)
    x = np.arange(8.0)[None, :, None]
    got = to_base_level(x, [out["offset_mapping"]], 11, "bend")
    assert got[0, :, 0].tolist() == [1, 1, 1, 2, 3, 4, 5, 6, 6, 6, 6]


@pytest.mark.parametrize("preset", ["nt_v1", "dnabert6"])
@pytest.mark.parametrize("mode", ["any", "majority", "mean", "center"])
def test_to_token_level_equals_a_loop(preset, mode):
    spans, _ = setup(preset)
    labels = np.random.default_rng(1).integers(0, 3, size=(3, 17))
    labels[0, 2:9] = -100
    got = to_token_level(labels, spans, mode)
    for b, row in enumerate(spans):
        for token, (start, end) in enumerate(row):
            known = [y for y in labels[b, start:end] if y != -100]
            if not known:
                expected = -100
            elif mode == "any":
                expected = max(known)
            elif mode == "mean":
                expected = np.mean(known)
            elif mode == "center":
                expected = labels[b, start:end][(end - start) // 2]
            else:
                expected = min(known, key=lambda y: (-known.count(y), y))
            assert got[b, token] == pytest.approx(expected)


def test_labels_as_tensors_keep_their_kind():
    spans, _ = setup("nt_v1")
    labels = torch.ones(3, 17, dtype=torch.long)
    assert to_token_level(labels, spans).dtype == torch.long
    assert to_token_level(labels, spans, "mean").dtype == torch.float32


def test_wrong_arguments_are_named():
    spans, x = setup("nt_v1")
    with pytest.raises(SequenceError, match="`mode`"):
        to_base_level(x, spans, 17, "median")
    with pytest.raises(SequenceError, match="`mode`"):
        to_token_level(np.zeros((3, 17)), spans, "sum")
    with pytest.raises(SequenceError, match="`y` has 5 bases"):
        to_token_level(np.zeros((3, 5)), spans)
    with pytest.raises(SequenceError, match="`offsets`"):
        offset_array([1, 2, 3])
    with pytest.raises(SequenceError, match=r"`base` \(99\)"):
        tokens_of_base(spans[0], 99)
    with pytest.raises(SequenceError, match="`offset_in_token`"):
        kmer_logits_to_base(np.zeros(16), 2, np.arange(16), "ACGT")


def test_questions_to_one_row():
    row = [(0, 0), (0, 6), (6, 7), (0, 0)]
    assert bases_of_token(row, 1) == (0, 6)
    assert tokens_of_base(row, 5) == (1, 1)
    assert tokens_of_base(row, 6) == (2, 2)


def test_kmer_logits_as_tensors_carry_gradients():
    logits = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    got = kmer_logits_to_base(logits, 0, np.arange(16), "ATCG")
    expected = torch.softmax(logits, -1).reshape(2, 4, 4).sum(-1)[:, [0, 2, 3, 1]]
    torch.testing.assert_close(got.exp(), expected)
    got[0, 0].backward()
    assert logits.grad.abs().sum() > 0
