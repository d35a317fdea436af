"""The block: grouped queries, implementations, translation, decoding, memory, experts and slopes.

Shapes: B batch, L tokens, H heads, K key/value heads, D head size, E hidden size.
"""

from dataclasses import replace

import pytest
import torch
from tensor_sizes import LargestTensor
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genesplice_hf.layers.alibi import alibi_slopes
from genesplice_hf.layers.hierarchical_cache import GeneSpliceCache
from genesplice_hf.layers.mixture_of_experts import MixtureOfExperts
from genesplice_hf.layers.rotary import rotary_table
from genesplice_hf.layers.window_transformer import (
    BlockShape,
    LevelContext,
    WindowedAttention,
    WindowedBlock,
    run_blocks,
)

SHAPE = BlockShape(
    hidden_size=12, intermediate_size=20, num_heads=4, num_key_value_heads=2, head_dim=6, window=5, is_causal=False
)
DIRECTIONS = pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
LENGTH = 48  # more than eight windows, so that the banded path runs


def make(kind, shape: BlockShape, implementation: str = "eager") -> torch.nn.Module:
    """An attention or a block of which every weight matters."""
    torch.manual_seed(1)
    module = kind(PreTrainedConfig(attn_implementation=implementation), shape, 0).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def context(
    shape: BlockShape, length: int = LENGTH, start: int = 0, mask: torch.Tensor | None = None, dtype=torch.float32
) -> LevelContext:
    table = rotary_table(length, shape.head_dim, 1e4, start, torch.device("cpu"), dtype)
    return LevelContext(key_mask=mask, full_mask=None, local_table=table, global_table=table)


def padded_mask() -> torch.Tensor:
    return torch.tensor(
        [[start <= i < stop for i in range(LENGTH)] for start, stop in [(0, LENGTH), (0, 17), (9, 40)]]
    )


@DIRECTIONS
@pytest.mark.parametrize("window", [5, None], ids=["window", "full"])
def test_grouped_queries_are_repeated_keys(window, is_causal) -> None:
    """K heads of keys and values, each serving H / K heads of queries = H heads with every weight repeated."""
    grouped_shape = replace(SHAPE, window=window, is_causal=is_causal)
    wide_shape = replace(grouped_shape, num_key_value_heads=4)
    grouped, wide = make(WindowedAttention, grouped_shape), make(WindowedAttention, wide_shape)
    weights = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        weights[name] = weights[name].view(2, 6, 12).repeat_interleave(2, dim=0).reshape(24, 12)
    wide.load_state_dict(weights)
    x = torch.randn(2, LENGTH, 12)
    torch.testing.assert_close(grouped(x, context(SHAPE))[0], wide(x, context(SHAPE))[0])


@DIRECTIONS
@pytest.mark.parametrize("window", [5, None], ids=["window", "full"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"])
def test_eager_equals_sdpa(window, is_causal, is_padded) -> None:
    if window is None and is_padded:
        mask, full_mask = None, padded_mask()[:, None, None, :].expand(-1, 1, LENGTH, -1)
        full_mask = full_mask & (torch.ones(LENGTH, LENGTH).tril().bool() if is_causal else True)
        full_mask = full_mask | ~full_mask.any(-1, keepdim=True)
    else:
        mask, full_mask = (padded_mask() if is_padded else None), None
    shape = replace(SHAPE, window=window, is_causal=is_causal)
    x = torch.randn(3, LENGTH, 12, requires_grad=True)
    results = []
    for implementation in ("eager", "sdpa"):
        level = context(shape, mask=mask)
        level.full_mask = full_mask
        out = make(WindowedBlock, shape, implementation)(x, level)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for eager, sdpa in zip(*results, strict=True):
        torch.testing.assert_close(eager, sdpa, rtol=1e-4, atol=1e-5)


@DIRECTIONS
@pytest.mark.parametrize("window", [5, None], ids=["window", "full"])
def test_moving_everything_a_million_tokens_changes_nothing(window, is_causal) -> None:
    shape = replace(SHAPE, window=window, is_causal=is_causal)
    attention, x = make(WindowedAttention, shape), torch.randn(2, LENGTH, 12)
    here, there = (attention(x, context(shape, start=start))[0] for start in (0, 2**20))
    assert (here - there).abs().max() <= 1e-5


def test_without_a_table_order_inside_the_window_does_not_matter() -> None:
    """Attention alone is blind to order; the rotary table is what tells positions apart."""
    shape = replace(SHAPE, window=LENGTH)
    attention, x = make(WindowedAttention, shape), torch.randn(1, LENGTH, 12)
    order = torch.randperm(LENGTH)
    blind = LevelContext(None, None, None, None)
    torch.testing.assert_close(attention(x[:, order], blind)[0], attention(x, blind)[0][:, order])
    assert not torch.allclose(attention(x[:, order], context(shape))[0], attention(x, context(shape))[0][:, order])


@pytest.mark.parametrize(("is_causal", "reach"), [(False, (15, 26)), (True, (20, 26))])
def test_one_block_reaches_exactly_its_window(is_causal, reach) -> None:
    shape = replace(SHAPE, is_causal=is_causal)
    block, x = make(WindowedBlock, shape), torch.randn(1, LENGTH, 12)
    changed = x.clone()
    changed[:, 20] += 1.0
    moved = (block(changed, context(shape)) - block(x, context(shape))).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == list(range(*reach))


def test_the_block_is_two_residual_steps() -> None:
    block, x = make(WindowedBlock, SHAPE), torch.randn(2, LENGTH, 12)
    middle = x + block.self_attn(block.attn_norm(x), context(SHAPE))[0]
    expected = middle + block.mlp(block.mlp_norm(middle))
    torch.testing.assert_close(block(x, context(SHAPE)), expected)


def test_norms_of_queries_and_keys_make_their_size_irrelevant() -> None:
    attention, x = make(WindowedAttention, replace(SHAPE, qk_norm=True)), torch.randn(1, LENGTH, 12)
    before = attention(x, context(SHAPE))[0]
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.data *= 10
    torch.testing.assert_close(attention(x, context(SHAPE))[0], before, rtol=1e-4, atol=1e-5)


@DIRECTIONS
def test_flash_is_asked_for_the_window_plus_one_and_a_flat_mask(is_causal, monkeypatch) -> None:
    asked = []

    def fake_flash(module, query, key, value, attention_mask, scaling, dropout, sliding_window=None):
        asked.append((module.is_causal, tuple(key.shape), attention_mask, scaling, sliding_window))
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "fake_flash", fake_flash)
    attention = make(WindowedAttention, replace(SHAPE, is_causal=is_causal))
    attention.config._attn_implementation = "fake_flash"
    attention(torch.randn(3, LENGTH, 12), context(SHAPE, mask=padded_mask()))
    ((causal, key_shape, mask, scaling, sliding_window),) = asked
    assert causal is is_causal
    assert key_shape == (3, 2, LENGTH, 6)
    assert torch.equal(mask, padded_mask().long())
    assert scaling == pytest.approx(6**-0.5)
    assert sliding_window == 5 + 1


def test_decoding_in_pieces_equals_one_pass() -> None:
    shape = replace(SHAPE, is_causal=True)
    attention, x = make(WindowedAttention, shape), torch.randn(2, LENGTH, 12)
    whole, cache, pieces, start = attention(x, context(shape))[0], GeneSpliceCache(), [], 0
    for size in (1, 12, 3, 1, 1, LENGTH - 18):
        level = context(shape, length=size, start=start)
        level.cache = cache.arrive(torch.full((2,), size), size, pool_sizes=())[0]
        pieces.append(attention(x[:, start : start + size], level)[0])
        start += size
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


@DIRECTIONS
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_block_and_its_gradient_need_memory_linear_in_the_length(is_causal, implementation) -> None:
    shape = replace(SHAPE, window=16, is_causal=is_causal)
    block, length = make(WindowedBlock, shape, implementation), 2048
    x = torch.randn(1, length, 12, requires_grad=True)
    mask = torch.arange(length)[None] < length - 100
    with LargestTensor() as largest:
        block(x, context(shape, length=length, mask=mask)).sum().backward()
    assert largest.elements <= 3 * shape.num_heads * length * 16 < length**2


@pytest.mark.parametrize("window", [5, None], ids=["window", "full"])
@DIRECTIONS
def test_slopes_are_taken_by_both_kinds_of_layers(window, is_causal) -> None:
    """Without a table, a level of one block that a config with ALiBi runs; its weights shall fall with distance."""
    shape = replace(SHAPE, window=window, is_causal=is_causal)
    config = PreTrainedConfig(attn_implementation="eager", is_decoder=is_causal)
    config.position_embedding = "alibi"
    config.local_rope_theta = config.global_rope_theta = 1e4
    block = make(WindowedBlock, shape)
    # Equal scores everywhere, so that the weights are those of the bias alone.
    torch.nn.init.zeros_(block.self_attn.q_proj.weight)
    block.self_attn.config, seen = config, []
    block.self_attn.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    run_blocks(config, torch.nn.ModuleList([block]), torch.randn(2, 30, 12), None, output_attentions=True)
    distance = torch.tensor([[i - j for j in range(30)] for i in range(30)])
    visible = (distance.abs() <= (window or 30)) & ((distance >= 0) | (not is_causal))
    expected = (-alibi_slopes(4)[:, None, None] * distance.abs()).exp() * visible
    expected = (expected / expected.sum(-1, keepdim=True)).expand(2, -1, -1, -1)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-6)


def test_a_block_with_experts_gives_the_routers_logits_too() -> None:
    shape = replace(SHAPE, num_experts=3, experts_per_token=2)
    block, x, mask = make(WindowedBlock, shape), torch.randn(3, LENGTH, 12), padded_mask()
    level = context(shape, mask=mask)
    middle = x + block.self_attn(block.attn_norm(x), level)[0]
    assert isinstance(block.mlp, MixtureOfExperts)
    mixed, logits = block.mlp(block.mlp_norm(middle), mask)
    out, recorded = block(x, level)
    assert torch.equal(out, middle + mixed)
    assert torch.equal(recorded, logits)
    assert not mixed[~mask].any()
