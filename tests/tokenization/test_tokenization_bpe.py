"""BPE on DNA: the laws of a tokenizer, a slow twin of the merges, files, and bad input."""

import gzip
import itertools
import json
import pickle
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from genesplice_hf.errors import DataError, GeneSpliceError, SequenceError
from genesplice_hf.tokenization.tokenization_bpe import BPEDnaTokenizer


def make_sequences(count: int, length: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    motifs = ["TATAAA", "GGGCGG", "CCAAT", "ATG", "A", "C", "G", "T"]
    return ["".join(draw.choice(motifs) for _ in range(length)) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> BPEDnaTokenizer:
    return BPEDnaTokenizer.train(make_sequences(60, 300), vocab_size=200)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe")
    tokenizer.save_pretrained(path)
    return path


def merge_slowly(sequence: str, merges: list[tuple[str, str]]) -> list[str]:
    """The definition of BPE: merge the pair of lowest rank, leftmost first, until no pair is left."""
    rank = {pair: i for i, pair in enumerate(merges)}
    tokens = list(sequence)
    while True:
        pairs = [(rank[p], i) for i, p in enumerate(itertools.pairwise(tokens)) if p in rank]
        if not pairs:
            return tokens
        _, i = min(pairs)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]


def test_special_tokens_letters_and_template(tokenizer):
    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "A", "C", "G", "N", "T"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(10))
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 3, 4)
    assert len(tokenizer) == tokenizer.vocab_size == 200
    ids = tokenizer("TATAAA")["input_ids"]
    assert ids[0] == tokenizer.cls_token_id == 1 and ids[-1] == tokenizer.sep_token_id == 2
    assert tokenizer("")["input_ids"] == [1, 2]


def test_merges_equal_the_slow_twin(tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in state["model"]["merges"]]
    for sequence in make_sequences(30, 40, seed=1):
        assert tokenizer.tokenize(sequence) == merge_slowly(sequence, merges)


def test_training_merges_what_is_frequent():
    learned = BPEDnaTokenizer.train(["ACACACACAC", "ACAC"], vocab_size=12)
    assert learned.convert_ids_to_tokens([10, 11]) == ["AC", "ACAC"]


@settings(max_examples=200, deadline=None)
@given(sequence=st.text("ACGT", max_size=200))
def test_decode_gives_the_bases_back_and_offsets_tile(tokenizer, sequence):
    encoded = tokenizer(sequence, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == sequence
    offsets = encoded["offset_mapping"]
    assert offsets[0] == offsets[-1] == (0, 0)
    inner = offsets[1:-1]
    assert [start for start, _ in inner] + [len(sequence)] == [0] + [end for _, end in inner]
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])[1:-1]
    assert tokens == [sequence[start:end] for start, end in inner]


@settings(max_examples=200, deadline=None)
@given(sequence=st.text("ACGTUNRYSWKMBDHVacgtunryswkmbdhv", max_size=80))
def test_letters_are_folded_in_place(tokenizer, sequence):
    folded = sequence.upper().replace("U", "T")
    folded = "".join(base if base in "ACGT" else "N" for base in folded)
    encoded = tokenizer(sequence, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == folded
    for token, (start, end) in zip(encoded.tokens()[1:-1], encoded["offset_mapping"][1:-1], strict=True):
        assert token == folded[start:end]


def test_tokenizer_json_alone_gives_the_same_ids(folder, tokenizer):
    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for sequence in [*make_sequences(5, 50, seed=2), "acgtNNuRYacgg", "NNNN", "tataaa", ""]:
        assert bare.encode(sequence).ids == tokenizer(sequence)["input_ids"]
        assert bare.encode(sequence).offsets == tokenizer(sequence, return_offsets_mapping=True)["offset_mapping"]


def test_n_is_a_token_of_its_own():
    learned = BPEDnaTokenizer.train(["ANNNNA" * 20], vocab_size=40)
    assert {token for token in learned.get_vocab() if "N" in token} == {"N", "[UNK]"}


def test_batches_tensors_pairs_and_truncation(tokenizer):
    batch = tokenizer(["TATAAATATAAA", "ACG"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert (batch["input_ids"][1][batch["attention_mask"][1] == 0] == tokenizer.pad_token_id).all()
    pair = tokenizer("TATAAA", "GGGCGG", return_token_type_ids=True)
    first, second = tokenizer("TATAAA")["input_ids"], tokenizer("GGGCGG")["input_ids"]
    assert pair["input_ids"] == first + second[1:]
    assert pair["token_type_ids"] == [0] * len(first) + [1] * (len(second) - 1)
    short = tokenizer(make_sequences(1, 100)[0], truncation=True, max_length=10, return_offsets_mapping=True)
    assert len(short["input_ids"]) == 10 and short["offset_mapping"][-2][1] < 100


def test_overflow_windows_keep_true_offsets(tokenizer):
    sequence = make_sequences(1, 60)[0]
    rows = tokenizer(
        sequence, truncation=True, max_length=12, return_overflowing_tokens=True, return_offsets_mapping=True
    )
    assert set(rows["overflow_to_sample_mapping"]) == {0} and len(rows["input_ids"]) > 1
    spans = [span for row in rows["offset_mapping"] for span in row if span != (0, 0)]
    assert "".join(sequence[a:b] for a, b in spans) == sequence


def test_too_long_raises_with_the_limit_in_bases(folder):
    limited = BPEDnaTokenizer.from_pretrained(folder, model_max_length=8)
    with pytest.raises(SequenceError, match=r"gives \d+ tokens, the model takes 8 \(about \d+ bp of it\)"):
        limited("ACGT" * 50)
    assert len(limited("ACGT" * 50, truncation=True)["input_ids"]) == 8


def test_written_special_tokens(tokenizer):
    encoded = tokenizer("acg[MASK]acg", return_offsets_mapping=True)
    assert tokenizer.mask_token_id in encoded["input_ids"]
    at = encoded["input_ids"].index(tokenizer.mask_token_id)
    assert encoded["offset_mapping"][at] == (3, 9)
    assert tokenizer.decode(encoded["input_ids"]) == "ACGNACG"
    with pytest.raises(SequenceError, match="position 3"):
        tokenizer("acg[MASK]acg", split_special_tokens=True)


@pytest.mark.parametrize(
    "text, position", [("AC-G", 2), ("ACG1", 3), ("A CG", 1), ("ACGé", 3), ("*", 0), ("ACG.T", 3), ("AXC", 1)]
)
def test_illegal_letters_raise_with_position(tokenizer, text, position):
    with pytest.raises(SequenceError, match=f"position {position}"):
        tokenizer(text)
    with pytest.raises(SequenceError, match=f"position {position}"):
        tokenizer(["ACGT", text])
    with pytest.raises(SequenceError, match=f"position {position}"):
        tokenizer("ACGT", text)


def test_bad_calls(tokenizer):
    with pytest.raises(TypeError, match="paddding"):
        tokenizer("ACGT", paddding=True)
    with pytest.raises(GeneSpliceError, match="is_split_into_words"):
        tokenizer(["ACGT"], is_split_into_words=True)
    with pytest.raises(GeneSpliceError, match="10000"):
        tokenizer.decode([10000])
    with pytest.raises(DataError, match="tokenizer_file"):
        BPEDnaTokenizer()


def test_reload_and_pickle_give_the_same_ids(folder, tokenizer):
    sequences = make_sequences(20, 40, seed=3)
    expected = tokenizer(sequences)["input_ids"]
    assert BPEDnaTokenizer.from_pretrained(folder)(sequences)["input_ids"] == expected
    assert pickle.loads(pickle.dumps(tokenizer))(sequences)["input_ids"] == expected


FRESH_PROCESS = """
import json, sys
from transformers import AutoTokenizer, PreTrainedConfig
from genesplice_hf.tokenization.tokenization_bpe import BPEDnaTokenizer

class Config(PreTrainedConfig):
    model_type = "bpe_test"

AutoTokenizer.register(Config, tokenizer_class=BPEDnaTokenizer)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
sequences = json.loads(sys.argv[2])
print(json.dumps([type(tokenizer).__name__, tokenizer(sequences)["input_ids"], tokenizer.decode([1, 5, 2])]))
"""


def test_auto_tokenizer_in_a_fresh_process(folder, tokenizer):
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "BPEDnaTokenizer"
    sequences = [*make_sequences(5, 40, seed=4), "acguNN"]
    result = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(folder), json.dumps(sequences)],
        capture_output=True,
        text=True,
        check=True,
    )
    name, ids, decoded = json.loads(result.stdout)
    assert (name, ids, decoded) == ("BPEDnaTokenizer", tokenizer(sequences)["input_ids"], "A")


def test_auto_tokenizer_without_the_package_gives_the_same_ids(folder, tokenizer):
    sequences = [*make_sequences(5, 40, seed=5), "acguNNry"]
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    assert not isinstance(plain, BPEDnaTokenizer)
    assert plain(sequences)["input_ids"] == tokenizer(sequences)["input_ids"]
    assert AutoTokenizer.from_pretrained(folder)(sequences)["input_ids"] == tokenizer(sequences)["input_ids"]


def test_loads_a_foreign_tokenizer_json(tmp_path):
    """The layout of DNABERT-2's file: BPE without folding or decoder, no N, an unhelpful tokenizer_config."""
    vocabulary = {t: i for i, t in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *"ACGT", "AC", "ACG"])}
    Tokenizer(models.BPE(vocabulary, [("A", "C"), ("AC", "G")], unk_token="[UNK]")).save(
        str(tmp_path / "tokenizer.json")
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = BPEDnaTokenizer.from_pretrained(tmp_path)
    assert loaded("acgtNNacgr")["input_ids"] == [1, 10, 8, 0, 0, 10, 0, 2]
    assert loaded.decode(loaded("acgtNNacgr")["input_ids"]) == "ACGTNNACGN"


def test_train_from_fasta_equals_train_from_strings(tmp_path):
    records = make_sequences(8, 120, seed=6)
    text = "".join(
        f">r{i} some text\n" + "\n".join(s[j : j + 61].lower() for j in range(0, len(s), 61)) + "\n\n"
        for i, s in enumerate(records)
    )
    plain, zipped = tmp_path / "a.fa", tmp_path / "b.fa"
    plain.write_text(text)
    zipped.write_bytes(gzip.compress(text.encode()))
    vocabularies = [BPEDnaTokenizer.train(s, vocab_size=60).get_vocab() for s in (records, plain, str(zipped))]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_training_limits(caplog):
    for longest in (2, 3, 5):
        limited = BPEDnaTokenizer.train(make_sequences(20, 100), vocab_size=150, max_token_length=longest)
        assert max(len(t) for t in limited.get_vocab() if not t.startswith("[")) == longest
    with caplog.at_level("WARNING"):
        BPEDnaTokenizer.train(["ACGT"], vocab_size=500)
    assert "500" in caplog.text


@pytest.mark.parametrize(
    "source, error, message",
    [
        ([], DataError, "no base"),
        (["", ""], DataError, "no base"),
        (["ACGT", "AC-GT"], SequenceError, r"sequence 1: .*position 2"),
        ("ACGTACGT", DataError, "is no file"),
    ],
)
def test_bad_training_sources(source, error, message):
    with pytest.raises(error, match=message):
        BPEDnaTokenizer.train(source, vocab_size=20)


@pytest.mark.parametrize(
    "content, error, message",
    [
        (b"ACGT\n", DataError, "no FASTA"),
        (b"", DataError, "no base"),
        (b">only a name\n", DataError, "no base"),
        (b">a\nACGT\n>b x\nACGT\nAC1T\n", SequenceError, r"record 2 \(b x\): .*position 6"),
        (gzip.compress(b">a\n" + b"ACGT" * 5000, mtime=0)[:-20], DataError, "damaged gzip"),
    ],
)
def test_bad_fasta(tmp_path, content, error, message):
    path = tmp_path / "x.fa"
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        BPEDnaTokenizer.train(path, vocab_size=20)


@pytest.mark.parametrize(
    "arguments", [{"vocab_size": 9}, {"min_frequency": 0}, {"max_token_length": 1}, {"chunk_bases": 1}]
)
def test_bad_training_arguments(arguments):
    with pytest.raises(GeneSpliceError, match=f"`{next(iter(arguments))}`"):
        BPEDnaTokenizer.train(["ACGT"], **arguments)
