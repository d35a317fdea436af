"""Saving and loading: every argument returns, in this process and in a fresh one."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tokenization.twins import random_sequences
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from genesplice_hf.tokenization.tokenization_kmer import KmerTokenizer
from genesplice_hf.tokenization.tokenization_nucleotide import MSATokenizer, NucleotideTokenizer
from genesplice_hf.tokenization.vocabularies import KMER_PRESETS, NUCLEOTIDE_PRESETS

ALL = [
    *[(KmerTokenizer, {"preset": name}) for name in KMER_PRESETS],
    *[(NucleotideTokenizer, {"preset": name}) for name in NUCLEOTIDE_PRESETS],
    (MSATokenizer, {}),
    (KmerTokenizer, {"k": 4}),
    (KmerTokenizer, {"k": 4, "stride": 1, "alphabet": "TGCA"}),
    (KmerTokenizer, {
        "k": 5, "lowercase": "keep", "iupac": "unk", "rna": "error", "seed": 4, "remainder": "pad_n", "short": "unk",
        "phase": 2, "collapse_n": "kmer", "add_prefix": True, "add_suffix": ["[SEP]", "[SEP]"],
        "return_soft_mask": True, "return_offsets": True, "padding_side": "left", "model_max_length": 700,
    }),
    (KmerTokenizer, {"preset": "dnabert6", "max_piece": 510, "max_piece_compat": True, "kmer_with_n": "restart"}),
    (NucleotideTokenizer, {"add_prefix": False, "add_suffix": True, "iupac": "random", "truncation_side": "left"}),
]  # fmt: skip
TEXTS = [*random_sequences(np.random.default_rng(9), 120), "acgtACGTRYN", "ACGT" * 40]


@pytest.mark.parametrize(("build", "options"), ALL)
def test_reloaded_tokenizers_are_equal(build, options, tmp_path):
    tokenizer = build(**options)
    tokenizer.save_pretrained(tmp_path)
    again = build.from_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == build.__name__
    assert {name: getattr(again, name) for name in options} == {name: getattr(tokenizer, name) for name in options}
    assert set(options) <= set(saved)
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert again.special_tokens_map == tokenizer.special_tokens_map and len(again) == len(tokenizer)
    assert again.vocab_source == "vocab.txt" and again.preset == tokenizer.preset
    again.save_pretrained(tmp_path / "second")
    for name in ("tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        assert (tmp_path / "second" / name).read_text() == (tmp_path / name).read_text()


@pytest.mark.parametrize(("build", "options"), ALL)
def test_tokenizer_json_exists_exactly_where_rust_can_say_it(build, options, tmp_path):
    tokenizer = build(**options)
    tokenizer.save_pretrained(tmp_path)
    expressible = tokenizer.rust_pattern() is not None
    assert (tmp_path / "tokenizer.json").exists() == expressible
    assert expressible or options.get("iupac") == "random" or tokenizer.stride < tokenizer.k or tokenizer.phase
    if expressible:
        rust = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        plain = [text for text in TEXTS if set(text) <= set("ACGTN")]
        assert rust(plain)["input_ids"] == tokenizer(plain)["input_ids"]
        if not getattr(tokenizer, "symbols", ""):
            assert rust(["acgtuRYn"])["input_ids"] == tokenizer(["acgtuRYn"])["input_ids"]


def test_auto_tokenizer_without_registration_reads_the_rust_file(tmp_path):
    code = (
        "import sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(t(['ACGTACGTNAC', 'A'])['input_ids']); assert 'genesplice_hf' not in sys.modules"
    )
    tokenizer = KmerTokenizer(preset="nt_v1")
    tokenizer.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.strip().splitlines()[-1]) == tokenizer(["ACGTACGTNAC", "A"])["input_ids"]


def test_auto_tokenizer_finds_the_registered_class(tmp_path):
    class ProbeConfig(PretrainedConfig):
        model_type = "tokenizer_probe"

    AutoTokenizer.register(ProbeConfig, tokenizer_class=KmerTokenizer)
    try:
        for preset in ("nt_v1", "dnabert6"):
            KmerTokenizer(preset=preset, short="drop").save_pretrained(tmp_path / preset)
            again = AutoTokenizer.from_pretrained(tmp_path / preset)
            assert type(again) is KmerTokenizer and again.preset == preset
    finally:
        del TOKENIZER_MAPPING._extra_content[ProbeConfig]


def test_fresh_process_gives_the_same_ids(tmp_path):
    tokenizer = KmerTokenizer(preset="dnabert6")
    tokenizer.save_pretrained(tmp_path)
    code = (
        "import sys, json; from genesplice_hf.tokenization.tokenization_kmer import KmerTokenizer;"
        "t = KmerTokenizer.from_pretrained(sys.argv[1]); print(json.dumps(t(json.loads(sys.argv[2]))['input_ids']))"
    )
    texts = TEXTS[:20]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), json.dumps(texts)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.strip().splitlines()[-1]) == tokenizer(texts)["input_ids"]


def test_upstream_folders_load_by_their_files(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(KmerTokenizer(preset="dnabert6").vocabulary.tokens()) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true, "max_len": 512, "foreign": 1}')
    tokenizer = KmerTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.preset, tokenizer.k, tokenizer.stride, tokenizer.model_max_length) == ("dnabert6", 6, 1, 512)
    assert tokenizer("ACGTACG")["input_ids"] == KmerTokenizer(preset="dnabert6")("ACGTACG")["input_ids"]
    assert "do_lower_case" not in tokenizer.init_kwargs


def test_tokenizer_json_is_read_when_there_is_no_vocab_file(tmp_path):
    NucleotideTokenizer(preset="caduceus").save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    tokenizer = NucleotideTokenizer(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert tokenizer.vocab_source == "tokenizer.json" and tokenizer("ACGTN")["input_ids"] == [7, 8, 9, 10, 11, 1]
    assert NucleotideTokenizer.from_pretrained(tmp_path)("ACGTN")["input_ids"] == [7, 8, 9, 10, 11, 1]


@pytest.mark.parametrize(("build", "options"), ALL[:13])
def test_construction_enumerates_nothing(build, options):
    tokenizer = build(**options)
    assert "_cached_decoder" not in tokenizer.__dict__
    assert not any(isinstance(v, dict) and len(v) > 64 for v in vars(tokenizer.vocabulary).values())
