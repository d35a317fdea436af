"""Seeded draws: published SplitMix64 outputs, uniformity, and independence of everything but the example."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.objectives.sampling import (
    ExampleRandom,
    bits,
    happens,
    mix,
    named_identity,
    to_below,
    to_uniform,
)

# First outputs of SplitMix64 seeded with 0, as printed in many independent implementations.
SPLITMIX64_SEED_0 = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def draw(count: int, stream: int = 0, seed: int = 0) -> np.ndarray:
    keys = ExampleRandom(seed).keys([7])
    return bits(keys, np.zeros(count, np.int64), np.arange(count), stream)


def test_mix_is_splitmix64():
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(states).tolist() == SPLITMIX64_SEED_0


def test_draws_are_uniform_and_streams_independent():
    first, second = to_uniform(draw(50_000)), to_uniform(draw(50_000, stream=1))
    assert stats.kstest(first, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(50_000)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 / np.sqrt(50_000)
    assert stats.chisquare(np.bincount(to_below(draw(50_000), 7), minlength=7)).pvalue > 1e-3


def test_neighbouring_examples_and_epochs_are_unrelated():
    random = ExampleRandom(3)
    at_start = to_uniform(random.keys(np.arange(20_000)))
    random.set_epoch(1)
    later = to_uniform(random.keys(np.arange(20_000)))
    assert stats.kstest(at_start, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(at_start, later)[0, 1]) < 4 / np.sqrt(20_000)


@given(st.floats(0, 1), st.integers(0, 100))
def test_happens_equals_the_comparison_of_floats(probability, seed):
    words = draw(50, seed=seed)
    assert (happens(words, probability) == (to_uniform(words) < probability)).all()
    assert happens(words, 1.0).all() and not happens(words, 0.0).any()


def test_identity_is_the_same_for_all_kinds_of_number():
    assert len({named_identity(x) for x in (5, np.int32(5), np.array([5]), torch.tensor(5))}) == 1
    assert len({named_identity(x) for x in (5, 6, -5, "5", "6", 2**80)}) == 6
    assert named_identity(np.str_("chr1")) == named_identity("chr1")


@pytest.mark.parametrize("bad", [True, 1.5, [1, 2], {}, b"chr1"])
def test_bad_identity(bad):
    with pytest.raises(GeneSpliceError, match="`example_id`"):
        named_identity(bad)


@pytest.mark.parametrize("seed", [-1, 1.5, "1", True, 2**63])
def test_bad_seed_and_epoch(seed):
    with pytest.raises(GeneSpliceError, match="`seed`"):
        ExampleRandom(seed)
    if seed != 2**63:
        with pytest.raises(GeneSpliceError, match="`epoch`"):
            ExampleRandom(0).set_epoch(seed)


def test_seed_none_is_drawn_once_logged_and_travels(caplog):
    with caplog.at_level("INFO"):
        random = ExampleRandom(None)
    assert str(random.seed) in caplog.text
    random.set_epoch(4)
    copy = pickle.loads(pickle.dumps(random))
    assert (copy.seed, copy.epoch) == (random.seed, 4)
    assert (copy.keys([1, 2]) == random.keys([1, 2])).all()
