"""Ids, offsets and decoding of k-mers against slow twins, the library's tokenizers and hand-made cases."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenization.twins import lookup, non_overlapping, overlapping, random_sequences
from transformers import EsmTokenizer, PreTrainedTokenizerFast

from genesplice_hf.errors import SequenceError
from genesplice_hf.genome.alphabet import reverse_complement
from genesplice_hf.tokenization.tokenization_kmer import KmerTokenizer
from genesplice_hf.tokenization.vocabularies import KMER_PRESETS

SEQUENCE = "ACGTGTACNTGCACGGANCGACTAGTCTGA"


@pytest.fixture(scope="module")
def nt():
    return KmerTokenizer(preset="nt_v1")


@pytest.fixture(scope="module")
def dnabert():
    return KmerTokenizer(preset="dnabert6")


@pytest.fixture(scope="module")
def corpus():
    return random_sequences(np.random.default_rng(11), 2000)


def body(tokenizer, texts, **options):
    return tokenizer(texts, add_special_tokens=False, **options)["input_ids"]


def test_worked_example(nt):
    assert nt.tokenize(SEQUENCE) == ["ACGTGT", *"ACN", "TGCACG", *"GAN", "CGACTA", "GTCTGA"]


def test_check_values():
    assert body(KmerTokenizer(preset="nt_v1"), ["TTTTTTACGTAC"]) == [[1369, 726]]
    assert body(KmerTokenizer(preset="nt_v2"), ["ACGTAC"]) == [[728]]
    assert [len(KmerTokenizer(preset=p)) for p in KMER_PRESETS] == [4107, 4107, 75, 69, 261, 1029, 4101]
    assert len(KmerTokenizer(k=4)) == 10 + 4**4
    assert KmerTokenizer(k=3).convert_tokens_to_ids(["A", "N", "AAA", "AAC", "TTT"]) == [5, 9, 10, 11, 73]


@pytest.mark.parametrize("preset", ["nt_v1", "nt_v2", "nt_v2_3mer", None])
def test_non_overlapping_equals_the_slow_twin(preset, corpus):
    tokenizer = KmerTokenizer(preset=preset)
    vocabulary, unknown = tokenizer.get_vocab(), tokenizer.unk_token_id
    expected = [lookup(non_overlapping(s, tokenizer.k), vocabulary, unknown) for s in corpus]
    assert body(tokenizer, corpus) == expected
    assert [body(tokenizer, s) for s in corpus[:300]] == expected[:300]


@pytest.mark.parametrize("preset", ["dnabert3", "dnabert4", "dnabert5", "dnabert6"])
def test_overlapping_equals_the_slow_twin(preset, corpus):
    tokenizer = KmerTokenizer(preset=preset, short="drop")
    vocabulary, unknown = tokenizer.get_vocab(), tokenizer.unk_token_id
    expected = [lookup(overlapping(s, tokenizer.k), vocabulary, unknown) for s in corpus]
    assert body(tokenizer, corpus) == expected
    assert [body(tokenizer, s) for s in corpus[:300]] == expected[:300]


def test_library_tokenizers_give_the_same_ids(nt, corpus, tmp_path):
    nt.save_pretrained(tmp_path)
    texts = [text for text in corpus[:600] if text]
    slow = EsmTokenizer(str(tmp_path / "vocab.txt"), eos_token=None)
    rust = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ours = nt(texts)["input_ids"]
    assert ours == slow(texts)["input_ids"]
    assert ours == rust(texts)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nt_v1", "dnabert6"])
def test_a_hundred_thousand_random_strings_equal_the_slow_twin(preset):
    tokenizer = KmerTokenizer(preset=preset, short=None if preset == "nt_v1" else "drop")
    texts = random_sequences(np.random.default_rng(13), 100_000)
    twin = non_overlapping if preset == "nt_v1" else overlapping
    vocabulary, unknown = tokenizer.get_vocab(), tokenizer.unk_token_id
    for first in range(0, len(texts), 1000):
        part = texts[first : first + 1000]
        assert body(tokenizer, part) == [lookup(twin(s, 6), vocabulary, unknown) for s in part]


def test_ids_stay_below_the_embedding(nt, corpus):
    assert max(max(ids) for ids in nt(corpus)["input_ids"]) < 4105


@pytest.mark.parametrize("k", range(2, 10))
@pytest.mark.parametrize("overlap", [True, False])
def test_any_k_equals_the_slow_twin(k, overlap):
    tokenizer = KmerTokenizer(k=k, stride=1 if overlap else k, short="drop" if overlap else None)
    texts = random_sequences(np.random.default_rng(k), 60, 60) + ["ACGTTGCAAT" * 3] * 3
    twin = overlapping if overlap else non_overlapping
    vocabulary, unknown = tokenizer.get_vocab(), tokenizer.unk_token_id
    assert body(tokenizer, texts) == [lookup(twin(s, k), vocabulary, unknown) for s in texts]


@pytest.mark.parametrize("phase", range(6))
def test_phase_shifts_the_first_run_only(phase, corpus):
    tokenizer = KmerTokenizer(preset="nt_v1", phase=phase)
    texts = corpus[:500] + ["ACGT" * 9] * 2
    expected = [lookup(non_overlapping(s, 6, phase), tokenizer.get_vocab(), 0) for s in texts]
    assert body(tokenizer, texts) == expected
    assert body(tokenizer, texts[-2:]) == expected[-2:]
    n = 36
    assert len(expected[-1]) == phase + (n - phase) // 6 + (n - phase) % 6


@pytest.mark.parametrize(
    ("options", "text", "tokens", "offsets"),
    [
        ({}, "ACG", ["A", "C", "G"], [(0, 1), (1, 2), (2, 3)]),
        ({"short": "drop"}, "ACG", [], []),
        ({"short": "pad_n"}, "ACG", ["<unk>"], [(0, 3)]),
        ({"short": "unk"}, "AC", ["<unk>"] * 2, [(0, 1), (1, 2)]),
        ({"remainder": "drop"}, "ACGTACGT", ["ACGTAC"], [(0, 6)]),
        ({"remainder": "pad_n"}, "ACGTACGT", ["ACGTAC", "<unk>"], [(0, 6), (6, 8)]),
        ({"remainder": "unk"}, "ACGTACGT", ["ACGTAC", "<unk>", "<unk>"], [(0, 6), (6, 7), (7, 8)]),
        ({"kmer_with_n": "unk"}, "ACNTACGTACGT", ["<unk>", "GTACGT"], [(0, 6), (6, 12)]),
        ({"collapse_n": "kmer"}, "ACNNNNNNNA", ["A", "C", "N", "N", "A"], [(0, 1), (1, 2), (2, 8), (8, 9), (9, 10)]),
        ({}, "NNA", ["N", "N", "A"], [(0, 1), (1, 2), (2, 3)]),
        ({}, "AC<mask>GT", ["A", "C", "<mask>", "G", "T"], [(0, 1), (1, 2), (2, 8), (8, 9), (9, 10)]),
        ({}, "acgtuRacgtac", ["A", "C", "G", "T", "T", "N", "ACGTAC"], None),
        ({"iupac": "unk"}, "ACRA", ["A", "C", "<unk>", "A"], None),
        ({"lowercase": "unk"}, "ACga", ["A", "C", "<unk>", "<unk>"], None),
    ],
)
def test_rules_for_what_is_no_whole_kmer(options, text, tokens, offsets):
    tokenizer = KmerTokenizer(preset="nt_v1", **options)
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert tokenizer.convert_ids_to_tokens(out["input_ids"]) == tokens
    batch = tokenizer([text, "ACGT", text], add_special_tokens=False)["input_ids"]
    assert batch == [out["input_ids"], body(tokenizer, "ACGT"), out["input_ids"]]
    if offsets is not None:
        assert out["offset_mapping"] == offsets


@pytest.mark.parametrize(
    ("options", "text", "tokens"),
    [
        ({}, "ACG", ["[UNK]"]),
        ({}, "", []),
        ({}, "ACGTAC", ["ACGTAC"]),
        ({}, "ACGTACN", ["ACGTAC", "[UNK]"]),
        ({}, "NNNNNNN", ["[UNK]", "[UNK]"]),
        ({"short": "drop"}, "ACG", []),
        ({}, "ACGTACGT[MASK]ACGTAC", ["ACGTAC", "CGTACG", "GTACGT", "[MASK]", "ACGTAC"]),
        ({}, "ACGTAC CGTACG GTACGT", ["ACGTAC", "CGTACG", "GTACGT"]),
        ({"kmer_with_n": "restart"}, "ACGTACGNACGTACG", ["ACGTAC", "CGTACG", "[UNK]", "ACGTAC", "CGTACG"]),
        ({}, "ACGTRCGTACGT", ["[UNK]"] * 5 + ["CGTACG", "GTACGT"]),
    ],
)
def test_overlapping_rules(options, text, tokens):
    tokenizer = KmerTokenizer(preset="dnabert6", **options)
    assert tokenizer.tokenize(text) == tokens
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert tokenizer([text, "ACGTACGT", ""])["input_ids"][0] == [2, *ids, 3]


@pytest.mark.parametrize("length", [509, 510, 511, 1020, 1021])
def test_pieces(length):
    text = "".join(np.random.default_rng(length).choice(list("ACGT"), length + 5))
    ids = body(KmerTokenizer(preset="dnabert6"), text)
    cut = [ids[i : i + 510] for i in range(0, length, 510)]
    plain = KmerTokenizer(preset="dnabert6", max_piece=510)(text)["input_ids"]
    assert plain == [x for piece in cut for x in (2, *piece, 3)]
    compat = KmerTokenizer(preset="dnabert6", max_piece=510, max_piece_compat=True)(text)["input_ids"]
    assert compat == plain + ([2, 3] if length % 510 == 0 else [])
    assert KmerTokenizer(preset="dnabert6", max_piece=510).decode(plain) == text


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({}, "ACGT-A", "'-' at position 4"),
        ({}, "ACGT*", r"'\*' at position 4"),
        ({}, "AC GT", "' ' at position 2"),
        ({}, "ACG7", "'7' at position 3"),
        ({}, "ACGT.A", r"'\.' at position 4"),
        ({}, "ACGé", "'é' at position 3"),
        ({}, "ACG\n", "position 3"),
        ({}, "ACGTX", "'X' at position 4"),
        ({}, "AC[MASK]", r"'\[' at position 2"),
        ({"lowercase": "error"}, "ACgT", "'g' at position 2.*lower case"),
        ({"iupac": "error"}, "ACRT", "'R' at position 2.*ambiguity"),
        ({"rna": "error"}, "ACU", "'U' at position 2.*RNA"),
        ({"short": "error"}, "ACG", "3 bases at position 0"),
    ],
)
def test_errors_name_the_position(options, text, message):
    tokenizer = KmerTokenizer(preset="nt_v1", **options)
    with pytest.raises(SequenceError, match=message):
        tokenizer(text)
    with pytest.raises(SequenceError, match="`sequence` 1 "):
        tokenizer(["ACGTAC", text])


def test_kmer_text_must_be_consecutive(dnabert):
    with pytest.raises(SequenceError, match="not the next window"):
        dnabert("ACGTAC GGGGGG")


def test_model_limit_raises_with_bp_and_truncates_whole_tokens(dnabert):
    text = "ACGT" * 200
    with pytest.raises(SequenceError, match="at most 515 bp"):
        dnabert(text)
    assert len(dnabert("ACGT" * 128 + "ACG")["input_ids"]) == 512
    cut = dnabert(text, truncation=True, return_offsets_mapping=True)
    assert len(cut["input_ids"]) == 512 and cut["offset_mapping"][-2] == (509, 515)
    assert KmerTokenizer(preset="nt_v1", model_max_length=1000).max_bp == 5994


@pytest.mark.parametrize(
    "options",
    [
        {"k": 1}, {"k": 13}, {"k": 6, "stride": 3}, {"alphabet": "ACGG"}, {"phase": 6}, {"short": "nothing"},
        {"remainder": "x"}, {"stride": 1, "phase": 1}, {"max_piece": 510}, {"preset": "nt_v3"},
        {"preset": "nt_v1", "k": 5}, {"preset": "nt_v1", "alphabet": "ACGT"}, {"lowercase": "fold"},
        {"k": 6, "stride": 1, "max_piece_compat": True}, {"collapse_n": "all"},
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options):
    with pytest.raises(SequenceError, match="`"):
        KmerTokenizer(**options)


def test_typo_is_refused():
    with pytest.raises(TypeError, match=r"`remainders`; did you mean `remainder`"):
        KmerTokenizer(remainders="drop")


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ACGTN", max_size=60))
def test_decode_gives_back_the_sequence(text):
    for tokenizer in SHARED:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ACGTN", min_size=6, max_size=60), st.integers(3, 6))
def test_decode_of_overlapping_kmers_knows_every_base_of_an_n_free_window(text, k):
    tokenizer = OVERLAPPING[k]
    covered = {j for i in range(len(text) - k + 1) for j in range(i, i + k) if "N" not in text[i : i + k]}
    expected = "".join(base if i in covered else "N" for i, base in enumerate(text))
    assert tokenizer.decode(tokenizer.encode(text)) == expected


SHARED = [KmerTokenizer(preset="nt_v1"), KmerTokenizer(preset="nt_v2_3mer"), KmerTokenizer(k=4)]
OVERLAPPING = {k: KmerTokenizer(preset=f"dnabert{k}") for k in (3, 4, 5, 6)}


def test_decode_fills_masked_tokens_from_their_neighbours(dnabert, nt):
    ids = dnabert("ACGTACGTAC")["input_ids"]
    ids[2] = ids[3] = dnabert.mask_token_id
    assert dnabert.decode(ids) == "ACGTACGTAC"
    ids = [dnabert.mask_token_id if i not in (0, 1, len(ids) - 1) else x for i, x in enumerate(ids)]
    assert dnabert.decode(ids) == "ACGTACNNNN"
    assert nt.decode(nt("ACGTAC<mask>A")["input_ids"]) == "ACGTACNNNNNNA"
    assert dnabert.decode(dnabert("ACGTACG", "TTTTTTT")["input_ids"]) == "ACGTACGTTTTTTT"
    assert nt.batch_decode(nt(["ACGTACG", "AN"], padding=True)["input_ids"]) == ["ACGTACG", "AN"]


def test_reverse_complement_ids(dnabert, nt, corpus):
    for k, tokenizer in OVERLAPPING.items():
        texts = [text for text in corpus[:200] if len(text) >= k]
        ids = tokenizer(texts)["input_ids"]
        expected = tokenizer([reverse_complement(text) for text in texts])["input_ids"]
        assert tokenizer.reverse_complement_ids(ids) == expected
    padded = dnabert(["ACGTACGT", "ACGTACG"], padding=True, return_tensors="pt")["input_ids"]
    expected = dnabert(["ACGTACGT", "CGTACGT"], padding=True)["input_ids"]
    assert dnabert.reverse_complement_ids(padded).tolist() == expected
    assert nt.reverse_complement_ids(nt("ACGTACGGTTAANACCGGT")["input_ids"]) == nt("ACCGGTNTTAACCGTACGT")["input_ids"]
    with pytest.raises(SequenceError, match="another frame"):
        nt.reverse_complement_ids(nt("ACGTACG")["input_ids"])


def test_offsets_cover_every_base_once(nt, corpus):
    out = nt(corpus[:300], return_offsets_mapping=True)
    for text, ids, spans in zip(corpus, out["input_ids"], out["offset_mapping"], strict=False):
        assert spans[0] == (0, 0)
        assert [i for start, end in spans for i in range(start, end)] == list(range(len(text)))
        assert [text[a:b] for a, b in spans[1:]] == nt.convert_ids_to_tokens(ids)[1:]


def test_offsets_of_overlapping_kmers_count_covering_windows(dnabert):
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 40))
    out = dnabert(text, return_offsets_mapping=True)
    spans = out["offset_mapping"]
    for base in range(40):
        first, last = max(0, base - 5), min(base, 34)
        assert dnabert.token_of_base(base, n_bases=40) == (first + 1, last + 1)
        assert dnabert.token_of_base(base, spans) == (first + 1, last + 1)
        assert sum(a <= base < b for a, b in spans) == last - first + 1
    assert [text[a:b] for a, b in spans[1:-1]] == dnabert.tokenize(text)


@pytest.mark.parametrize("phase", [0, 2, 5])
@pytest.mark.parametrize("n_bases", [3, 6, 17, 18])
def test_token_of_base_by_formula_and_by_offsets(phase, n_bases):
    tokenizer = KmerTokenizer(preset="nt_v1", phase=phase)
    text = "ACGTGCATTACGATCGTA"[:n_bases]
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    for base in range(n_bases):
        token = tokenizer.token_of_base(base, spans)
        assert tokenizer.token_of_base(base, n_bases=n_bases) == token
        assert tokenizer.bases_of_token(token, spans)[0] <= base < tokenizer.bases_of_token(token, spans)[1]


def test_frames_put_a_base_at_every_place_of_the_token(nt):
    text = "".join(np.random.default_rng(3).choice(list("ACGT"), 41))
    frames = list(nt.frames(text, window=36, base=20))
    assert [frame.start for frame in frames] == list(range(6))
    assert sorted(frame.offset_in_token for frame in frames) == list(range(6))
    for frame in frames:
        assert frame.sequence == text[frame.start : frame.start + 36]
        token = nt.convert_ids_to_tokens(nt(frame.sequence)["input_ids"])[frame.token]
        assert token[frame.offset_in_token] == text[20]
    assert len({len(frame.sequence) for frame in nt.frames(text)}) == 1
    with pytest.raises(SequenceError, match="`window`"):
        list(nt.frames("ACGT"))


def test_other_strand_keeps_the_frame_when_the_window_is_a_multiple_of_k(nt):
    text = "".join(np.random.default_rng(4).choice(list("ACGT"), 36))
    forward, other = nt.tokenize(text), nt.tokenize(reverse_complement(text))
    assert [reverse_complement(token) for token in other[::-1]] == forward


def test_token_phase_and_soft_mask(nt):
    out = nt("acgTACGTN", return_token_phase=True, return_soft_mask=True)
    assert out["token_phase"] == [-1, 0, 0, 1, 2]
    assert out["soft_mask"] == [0.0, 0.5, 0.0, 0.0, 0.0]
    assert KmerTokenizer(preset="nt_v1", lowercase="keep")("acgtacGT")["soft_mask"] == [0.0, 1.0, 0.0, 0.0]


def test_files_with_any_order_define_the_ids(tmp_path):
    tokens = ["[PAD]", "[UNK]", "T", "G", "C", "A", *map("".join, itertools.product("TGAC", repeat=2)), "[CLS]"]
    shuffled = tokens[:6] + tokens[6:][::-1]
    for number, listed in enumerate((tokens, shuffled)):
        path = tmp_path / f"{number}.txt"
        path.write_text("\n".join(listed) + "\n")
        tokenizer = KmerTokenizer(vocab_file=str(path))
        assert tokenizer.k == 2 and tokenizer.preset is None and tokenizer.vocab_source == "vocab.txt"
        ids = {token: index for index, token in enumerate(listed)}
        assert body(tokenizer, "ACGTNGGT") == lookup(["AC", "GT", "N", "GG", "T"], ids, 1)
        assert tokenizer.decode(body(tokenizer, "ACGTGGT")) == "ACGTGGT"
    with pytest.raises(SequenceError, match="where preset 'nt_v1' has"):
        KmerTokenizer(preset="nt_v1", vocab_file=str(path))


def test_one_hot_like_logits_name_their_base(nt):
    text = "ACGTGA"
    logits = np.full((1, 4107), -50.0)
    logits[0, nt.convert_tokens_to_ids(text)] = 50.0
    for place, base in enumerate(text):
        assert "ACGT"[int(nt.kmer_logits_to_base(logits, place).argmax())] == base


@pytest.mark.parametrize("preset", ["nt_v1", "dnabert3", "nt_v2_3mer"])
def test_kmer_logits_to_base_equals_brute_force(preset):
    tokenizer = KmerTokenizer(preset=preset)
    logits = np.random.default_rng(5).normal(size=(2, 3, len(tokenizer)))
    probability = np.exp(logits)
    for place in (0, 1, tokenizer.k - 1):
        mass = np.zeros((2, 3, 4))
        for token, index in tokenizer.get_vocab().items():
            if len(token) == tokenizer.k and set(token) <= set("ACGT"):
                mass[..., "ACGT".index(token[place])] += probability[..., index]
        got = tokenizer.kmer_logits_to_base(logits, place)
        np.testing.assert_allclose(np.exp(got).sum(-1), 1.0, rtol=1e-12)
        np.testing.assert_allclose(np.exp(got), mass / mass.sum(-1, keepdims=True), rtol=1e-10)
