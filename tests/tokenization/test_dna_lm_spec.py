"""The facts read off configs and tokenizers, against the published values."""

import dataclasses

import pytest
from transformers import BertConfig, EsmConfig, PretrainedConfig

from genesplice_hf.errors import SequenceError
from genesplice_hf.tokenization.dna_lm_spec import dna_lm_spec
from genesplice_hf.tokenization.tokenization_kmer import KmerTokenizer
from genesplice_hf.tokenization.tokenization_nucleotide import MSATokenizer, NucleotideTokenizer


def test_nucleotide_transformer():
    config = EsmConfig(vocab_size=4105, max_position_embeddings=1002, pad_token_id=1)
    spec = dna_lm_spec(config, KmerTokenizer(preset="nt_v1"))
    assert (spec.family, spec.objective, spec.tokenization, spec.k) == ("nt_v1", "mlm", "kmer_nonoverlap", 6)
    assert (spec.n_prefix, spec.n_suffix, spec.mask_token_id) == (1, 0, 2)
    assert spec.nucleotide_token_ids == (4100, 4102, 4103, 4101)
    assert (spec.max_tokens, spec.max_bp) == (1000, 5994)


def test_dnabert():
    spec = dna_lm_spec(BertConfig(vocab_size=4101), KmerTokenizer(preset="dnabert6"))
    assert (spec.family, spec.tokenization, spec.n_prefix, spec.n_suffix) == ("dnabert1", "kmer_overlap", 1, 1)
    assert (spec.max_tokens, spec.max_bp, spec.nucleotide_token_ids) == (512, 515, None)


def test_our_own_causal_model_and_attributes_of_the_config():
    config = PretrainedConfig(architectures=["GeneSpliceForCausalLM"], rc_equivariant=True)
    config.lora_targets = ["q_proj"]
    config.conversion = {"source": "hyenadna", "ignored_keys": ["a"]}
    spec = dna_lm_spec(config, NucleotideTokenizer())
    assert (spec.family, spec.objective, spec.tokenization, spec.k) == ("hyenadna", "clm", "char", 1)
    assert (spec.rc, spec.lora_targets, spec.ignored_keys) == ("equivariant", ("q_proj",), ("a",))
    assert (spec.nucleotide_token_ids, spec.max_tokens, spec.max_bp) == ((5, 6, 7, 8), None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.k = 2


def test_alignments():
    spec = dna_lm_spec(PretrainedConfig(), MSATokenizer())
    assert (spec.tokenization, spec.mask_token_id, spec.nucleotide_token_ids) == ("msa", 5, (1, 2, 3, 4))


def test_a_tokenizer_that_the_model_does_not_embed_is_refused():
    with pytest.raises(SequenceError, match="embeds 12 tokens"):
        dna_lm_spec(PretrainedConfig(vocab_size=12), KmerTokenizer(preset="nt_v1"))
