"""The store behind generation: rows of different lengths against lists, its size, beams, and what it refuses.

Shapes: B batch, L new tokens, P stored tokens, K key/value heads, D head size, E hidden size.
"""

import copy

import pytest
import torch

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.hierarchical_cache import GeneSpliceCache, RecentLayer, last_tokens
from genesplice_hf.layers.rotary import rotary_table

CPU = torch.device("cpu")
# Tokens that three rows get in four calls; the chunks are as wide as their longest row.
ARRIVALS = [[3, 0, 1], [0, 0, 1], [2, 7, 2], [1, 1, 1]]
EVEN = [[4, 4, 4], [1, 1, 1], [6, 6, 6], [1, 1, 1]]
UNEVENNESS = pytest.mark.parametrize("arrivals", [ARRIVALS, EVEN], ids=["uneven", "even"])


def new(*counts: int) -> torch.Tensor:
    return torch.tensor(counts)


def chunk(first: list[int], counts: list[int]) -> torch.Tensor:
    """(3, 1, L, 2): token t of row b is (b, t); -1 after a row's end."""
    rows = [
        [[row, first[row] + i] if i < counts[row] else [-1, -1] for i in range(max(counts))]
        for row in range(len(counts))
    ]
    return torch.tensor(rows, dtype=torch.float32).view(len(counts), 1, max(counts), 2)


@pytest.mark.parametrize("ends", [[5, 5, 5], [5, 2, 9]])
@pytest.mark.parametrize("keep", [0, 1, 2])
def test_the_last_tokens_are_those_before_each_end(ends, keep) -> None:
    x = torch.randn(3, 2, 9, 4)
    expected = torch.stack([x[row, :, end - keep : end] for row, end in enumerate(ends)])
    assert torch.equal(last_tokens(x, torch.tensor(ends), keep), expected)
    assert torch.equal(last_tokens(x[:, 0], torch.tensor(ends), keep), expected[:, 0])


@UNEVENNESS
@pytest.mark.parametrize("window", [1, 3, 100, None])
def test_every_layer_keeps_the_last_tokens_of_every_row(arrivals, window) -> None:
    cache, past = GeneSpliceCache(), [0, 0, 0]
    for counts in arrivals:
        view = cache.arrive(torch.tensor(counts), max(counts), [])[0]
        stored = max(past) if window is None else min(window, max(past))
        keys, values = view.update(chunk(past, counts), -chunk(past, counts), 2, window)
        assert torch.equal(values, -keys)
        mask = view.key_mask(max(counts), [window], CPU)
        mask = torch.ones(3, keys.shape[2], dtype=torch.bool) if mask is None else mask
        for row in range(3):
            seen = keys[row, 0][mask[row]][:, 1].tolist()
            last = list(range(max(0, past[row] - stored), past[row] + counts[row]))
            # What follows the row's end in the chunk counts as real, for no token of the row sees it.
            assert seen == last + [-1] * (max(counts) - counts[row])
        past = [before + count for before, count in zip(past, counts, strict=True)]
        assert cache.layers[2].keys.shape[2] == (max(past) if window is None else min(window, max(past)))


def test_no_mask_is_made_where_every_row_has_all_that_is_stored() -> None:
    cache = GeneSpliceCache()
    cache.arrive(new(5, 9), 9, [])
    view = cache.arrive(new(1, 1), 1, [])[0]
    assert view.key_mask(1, [4, 5], CPU) is None
    assert view.key_mask(2, [4, 6], CPU).tolist() == [[False] + [True] * 7, [True] * 8]
    assert view.key_mask(1, [4, None], CPU).sum(1).tolist() == [6, 10]


@UNEVENNESS
def test_a_coarser_level_gets_a_token_when_a_bin_is_full(arrivals) -> None:
    cache, past = GeneSpliceCache(), [0, 0, 0]
    for counts in arrivals:
        levels = cache.arrive(torch.tensor(counts), max(counts), [2, 3])
        after = [before + count for before, count in zip(past, counts, strict=True)]
        for level, bin_size in zip(levels, (1, 2, 6), strict=True):
            assert level.past_B.tolist() == [n // bin_size for n in past]
            assert (level.past_B + level.new_B).tolist() == [n // bin_size for n in after]
        past = after
    assert cache.lengths_B.tolist() == past
    assert cache.get_seq_length() == cache.get_seq_length(1) == sum(max(counts) for counts in arrivals)


@pytest.mark.parametrize("past", [[7, 7, 7], [7, 0, 12]])
def test_every_row_is_rotated_by_its_own_positions(past) -> None:
    cache = GeneSpliceCache()
    cache.arrive(torch.tensor(past), 12, [])
    view = cache.arrive(new(3, 2, 3), 3, [])[0]
    found = view.rotary_table(3, 8, 1e4, CPU, torch.float64)
    for row, start in enumerate(past):
        for table, expected in zip(found, rotary_table(3, 8, 1e4, start, CPU, torch.float64), strict=True):
            # Exact where no sum is taken: cosines and sines of the same float64 angles.
            assert torch.equal(table.expand(3, 1, 3, 8)[row, 0], expected)


@UNEVENNESS
def test_the_stem_gets_the_last_embeddings_of_every_row_and_zeros_before_the_first(arrivals) -> None:
    cache, past = GeneSpliceCache(), [0, 0, 0]
    for counts in arrivals:
        view = cache.arrive(torch.tensor(counts), max(counts), [])[0]
        joined = view.extend_stem(chunk(past, counts)[:, 0] + 1, keep=4)
        for row in range(3):
            numbers = [0] * 4 + [token + 1 for token in range(past[row] + counts[row])]
            assert joined[row, : 4 + counts[row], 1].tolist() == numbers[past[row] :]
        past = [before + count for before, count in zip(past, counts, strict=True)]


def filled() -> GeneSpliceCache:
    """Three rows whose every stored number is the row's, with all kinds of state."""
    cache, row = GeneSpliceCache(), torch.arange(3.0)
    view = cache.arrive(new(0, 1, 2), 2, [2])[0]
    view.update(*(row.view(3, 1, 1, 1).expand(3, 2, 2, 4) for _ in "kv"), 1, 8)
    view.extend_stem(row.view(3, 1, 1).expand(3, 2, 5), keep=1)
    cache.stem_inputs = row.view(3, 1, 1)
    cache.pooled_sums[0] = cache.carried[1] = row[:, None].expand(3, 5)
    return cache


def rows_of(cache: GeneSpliceCache) -> list[list[float]]:
    layer = cache.layers[1]
    states = [layer.keys, layer.values, cache.stem_inputs, cache.pooled_sums[0], cache.carried[1], cache.lengths_B]
    return [state.flatten(1)[:, 0].tolist() if state.dim() > 1 else state.tolist() for state in states]


@pytest.mark.parametrize(
    ("name", "argument", "rows"),
    [
        ("reorder_cache", new(2, 0, 0), [2, 0, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
        ("batch_select_indices", new(1, 2), [1, 2]),
        ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
    ],
)
def test_all_that_is_stored_follows_the_beams(name, argument, rows) -> None:
    cache = filled()
    getattr(cache, name)(argument)
    assert rows_of(cache) == [rows] * 6


def test_layers_without_tokens_take_any_number_of_rows() -> None:
    cache = GeneSpliceCache()
    cache.arrive(new(0), 3, [])[0].update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), 0, None)
    cache.batch_repeat_interleave(2)
    keys, _ = cache.arrive(new(1, 1), 1, [])[0].update(torch.ones(2, 1, 1, 2), torch.ones(2, 1, 1, 2), 0, None)
    assert torch.equal(keys, torch.ones(2, 1, 1, 2))


def test_what_only_a_row_that_left_had_is_not_seen_any_more() -> None:
    cache = GeneSpliceCache()
    cache.arrive(new(9, 2), 9, [])[0].update(*(torch.rand(2, 1, 9, 2) for _ in "kv"), 0, None)
    cache.batch_select_indices(new(1))
    view = cache.arrive(new(1), 1, [])[0]
    keys, _ = view.update(torch.rand(1, 1, 1, 2), torch.rand(1, 1, 1, 2), 0, None)
    assert keys.shape[2] == 2 + 1
    assert view.key_mask(1, [None], CPU) is None


def test_other_rows_than_before_are_refused() -> None:
    with pytest.raises(SequenceError, match=r"holds 3 sequences, the call has 2.*batch_select_indices"):
        filled().arrive(new(1, 1), 1, [2])


@pytest.mark.parametrize("by", [0, 2, 3])
def test_nothing_or_everything_can_be_cropped(by) -> None:
    """0 and more columns than there are remove nothing; minus all of them removes everything."""
    cache = filled()
    cache.crop(by)
    assert rows_of(cache) == rows_of(filled())
    cache.crop(-2)
    assert cache.get_seq_length() == 0
    assert cache.lengths_B is None and not cache.layers and not cache.carried


@pytest.mark.parametrize("by", [1, -1])
def test_the_cache_refuses_to_be_cropped_in_the_middle(by) -> None:
    cache = filled()
    assert not cache.is_croppable
    with pytest.raises(NotImplementedError, match=r"2 columns cannot be cropped to 1.*copy\.deepcopy.*prefix again"):
        cache.crop(by)
    assert rows_of(cache) == rows_of(filled())


def test_reset_forgets_everything() -> None:
    cache = filled()
    cache.reset()
    assert vars(cache) == vars(GeneSpliceCache())


def test_a_copy_goes_its_own_way() -> None:
    cache = filled()
    other = copy.deepcopy(cache)
    other.arrive(new(1, 1, 1), 1, [2])[0].update(*(torch.zeros(3, 2, 1, 4) for _ in "kv"), 1, 8)
    assert other.layers[1].keys.shape[2] == 3
    assert rows_of(cache) == rows_of(filled())


def test_a_long_prompt_leaves_no_more_than_the_window_behind() -> None:
    layer, long = RecentLayer(), torch.randn(2, 1, 1000, 4)
    layer.append(long, long, 0, new(1000, 1000), 8)
    assert layer.keys.untyped_storage().nbytes() == 2 * 8 * 4 * 4
    for _ in range(20):
        layer.append(long[:, :, :1], long[:, :, :1], 8, new(1, 1), 8)
    assert layer.keys.untyped_storage().nbytes() == 2 * (8 + 1) * 4 * 4
