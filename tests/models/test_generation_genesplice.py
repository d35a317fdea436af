"""Generation with the cache: equal to the full forward, at a cost and size that do not grow with the past.

Shapes: B batch, L bases, M bins.
"""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from tensor_sizes import LargestTensor
from tiny_genesplice import FORMS, random_bases, tiny
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.attention import eager_attention
from genesplice_hf.layers.hierarchical_cache import GeneSpliceCache
from genesplice_hf.models.genesplice.modeling_genesplice import GeneSpliceForCausalLM
from genesplice_hf.models.genesplice.modeling_genesplice_base import GeneSpliceModel

BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
# Bins of 4 and 12 bases, so that 29 bases cross two borders of the tower.
SMALL: dict[str, Any] = {"pool_sizes": [4, 3], "local_windows": [6, 2]}
ONE_LEVEL: dict[str, Any] = {
    "hidden_sizes": [16, 24],
    "pool_sizes": [5],
    "num_attention_heads": [2, 2],
    "num_key_value_heads": [1, 2],
    "head_dims": [8, 8],
    "intermediate_sizes": [24, 24],
    "num_encoder_layers": [1],
    "num_decoder_layers": [1],
    "local_windows": [6],
}
THREE_LEVELS: dict[str, Any] = {
    "hidden_sizes": [16, 16, 24, 32],
    "pool_sizes": [2, 3, 2],
    "num_attention_heads": [2, 2, 2, 2],
    "num_key_value_heads": [1, 2, 1, 2],
    "head_dims": [8, 8, 8, 8],
    "intermediate_sizes": [24, 24, 24, 24],
    "num_encoder_layers": [1, 2, 1],
    "num_decoder_layers": [1, 1, 2],
    "local_windows": [6, 3, 2],
}
MANY_LAYERS: dict[str, Any] = {"num_encoder_layers": [2, 3], "num_decoder_layers": [3, 2], "num_tower_layers": 3}
MIXED_TOWER: dict[str, Any] = {
    "num_tower_layers": 3,
    "tower_window": 1,
    "tower_layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": SMALL,
    "no stem": SMALL | {"stem_kernel_size": 0},
    "windows larger than the prefix": SMALL | {"local_windows": [60, 60]},
    "windows of one": SMALL | {"local_windows": [1, 1]},
    "one level": ONE_LEVEL,
    "three levels": THREE_LEVELS,
    "many layers": SMALL | MANY_LAYERS,
    "no layers below": SMALL | {"num_encoder_layers": [0, 0], "num_decoder_layers": [0, 0]},
    "no tower": SMALL | {"num_tower_layers": 0},
    "mixed tower": SMALL | MIXED_TOWER,
    "qk_norm": SMALL | {"qk_norm": True},
    "no positions": SMALL | {"position_embedding": "none"},
    "alibi": SMALL | {"position_embedding": "alibi"} | MIXED_TOWER,
    "experts": SMALL | {"num_tower_layers": 2, "moe_num_experts": 3},
}
LENGTH = 29
CHUNKS = {
    "one by one": [1] * 29,
    "pieces": [5, 1, 11, 11, 1],
    "one and the rest": [1, 28],
}


def uneven(length: int, *lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of bases with padding before them, (B, length), and their mask."""
    ids = random_bases(len(lengths), length)
    mask = torch.stack([torch.arange(length) >= length - real for real in lengths])
    return ids * mask, mask.long()


def in_pieces(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, sizes: list[int]) -> list[Any]:
    """The outputs of one call per piece, each with the cache of the one before."""
    outputs, cache, start = [], None, 0
    with torch.no_grad():
        for size in sizes:
            stop = start + size
            past = None if mask is None else mask[:, :stop]
            outputs.append(model(ids[:, start:stop], attention_mask=past, past_key_values=cache, use_cache=True))
            cache, start = outputs[-1].past_key_values, stop
    return outputs


def joined_logits(outputs: list[Any]) -> torch.Tensor:
    return torch.cat([out.logits for out in outputs], dim=1)


@pytest.mark.parametrize(
    ("variant", "implementation"),
    [(variant, "sdpa") for variant in VARIANTS] + [("default", "eager"), ("mixed tower", "eager"), ("alibi", "eager")],
)
def test_reading_in_pieces_equals_reading_at_once(variant, implementation) -> None:
    """Rows of very different lengths, among them one that begins later than the first pieces end."""
    fields = VARIANTS[variant] | {"is_decoder": True, "attn_implementation": implementation}
    model = tiny(GeneSpliceForCausalLM, "hierarchical", **fields).double()
    ids, mask = uneven(LENGTH, LENGTH, 21, 7)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    for sizes in CHUNKS.values():
        found = joined_logits(in_pieces(model, ids, mask, sizes))[mask.bool()]
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [[LENGTH], *CHUNKS.values()], ids=["whole", *CHUNKS])
@pytest.mark.parametrize("batch", [1, 3])
def test_reading_even_rows_without_a_mask(batch, sizes) -> None:
    model = tiny(GeneSpliceForCausalLM, "hierarchical", is_decoder=True, **SMALL).double()
    ids = random_bases(batch, LENGTH)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(joined_logits(in_pieces(model, ids, None, sizes)), whole, rtol=0, atol=1e-12)


@BOTH_FORMS
def test_in_float32_over_two_bins_of_128_bases(form) -> None:
    model, ids = tiny(GeneSpliceForCausalLM, form, is_decoder=True), random_bases(1, 270)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
    found = joined_logits(in_pieces(model, ids, None, [100] + [1] * 170))
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


@BOTH_FORMS
def test_flex_is_asked_only_where_no_past_is(form, monkeypatch) -> None:
    def fake_flex(module, query, key, value, attention_mask, **kwargs):
        assert query.shape[2] == key.shape[2]
        return eager_attention(module, query, key, value, None, kwargs["scaling"])

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", fake_flex)
    fields = SMALL if form == "hierarchical" else {}
    model, ids = tiny(GeneSpliceForCausalLM, form, is_decoder=True, **fields).double(), random_bases(2, LENGTH)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    model.config._attn_implementation = "flex_attention"
    for sizes in ([13, 12, 4], [13] + [1] * 16):
        torch.testing.assert_close(joined_logits(in_pieces(model, ids, None, sizes)), whole, rtol=0, atol=1e-12)


def test_half_precision_sums_are_not_kept_in_half_precision() -> None:
    """The mean over a pool of 64 tokens that came one by one is as exact as that of one call."""
    fields = {"pool_sizes": [64], "local_windows": [4]}
    model = tiny(GeneSpliceModel, "hierarchical", is_decoder=True, **(ONE_LEVEL | fields)).bfloat16()
    ids = random_bases(1, 64)
    outputs = in_pieces(model, ids, None, [1] * 64)
    assert outputs[-1].past_key_values.pooled_sums[0].dtype == torch.float32
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).bin_hidden_state
    torch.testing.assert_close(outputs[-1].bin_hidden_state, whole, rtol=0, atol=0.05)


def test_the_bins_of_all_pieces_are_those_of_the_whole() -> None:
    """Each call gives what it finished; only the first also gives the bins that are not full yet."""
    model, ids = tiny(GeneSpliceModel, "hierarchical", is_decoder=True, **SMALL).double(), random_bases(2, 48)
    outputs = in_pieces(model, ids, None, [12, 1, 10, 1, 24])
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False)
    assert [out.bin_hidden_state.shape[1] for out in outputs] == [1, 0, 0, 1, 2]
    for level, expected in enumerate(whole.level_hidden_states):
        found = torch.cat([out.level_hidden_states[level] for out in outputs], dim=1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert torch.cat([out.bin_mask for out in outputs], dim=1).all()
    ids, mask = uneven(30, 30, 15)
    last = in_pieces(model, ids, mask, [14, 16])[-1]
    # Bases 15 to 30 fill the bins that end at 24; those of the other row, 0 to 15, the one that ends at 12.
    assert last.bin_mask.tolist() == [[True], [True]]
    last = in_pieces(model, ids, mask, [25, 5])[-1]
    assert last.bin_mask.tolist() == [[False], [True]]
    assert not last.bin_hidden_state[0].any()


@BOTH_FORMS
@pytest.mark.parametrize("name", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_rows_can_be_moved_between_steps(form, name) -> None:
    fields = SMALL if form == "hierarchical" else {}
    model = tiny(GeneSpliceForCausalLM, form, is_decoder=True, **fields).double()
    ids, mask = uneven(30, 30, 19, 4)
    rows = {"reorder_cache": [2, 0, 2], "batch_select_indices": [2, 1], "batch_repeat_interleave": [0, 0, 1, 1, 2, 2]}
    cache = in_pieces(model, ids, mask, [17])[0].past_key_values
    getattr(cache, name)(2 if name == "batch_repeat_interleave" else torch.tensor(rows[name]))
    ids, mask = ids[rows[name]], mask[rows[name]]
    with torch.no_grad():
        found = model(ids[:, 17:], attention_mask=mask, past_key_values=cache).logits
        whole = model(ids, attention_mask=mask, use_cache=False).logits[:, 17:]
    real = mask[:, 17:].bool()
    torch.testing.assert_close(found[real], whole[real], rtol=0, atol=1e-12)


def test_a_prompt_read_once_serves_many_continuations() -> None:
    model, prompt = tiny(GeneSpliceForCausalLM, "hierarchical", is_decoder=True, **SMALL).double(), random_bases(1, 22)
    cache = in_pieces(model, prompt, None, [22])[0].past_key_values
    for ending in (random_bases(1, 9), random_bases(1, 4)):
        ids = torch.cat([prompt, ending], dim=1)
        with torch.no_grad():
            found = model(ending, past_key_values=copy.deepcopy(cache)).logits
            whole = model(ids, use_cache=False).logits[:, 22:]
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)
    assert cache.get_seq_length() == 22


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 2.0},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 3, "temperature": 2.0},
}


@BOTH_FORMS
@pytest.mark.parametrize("search", SEARCHES)
def test_generating_with_a_cache_is_generating_without(form, search) -> None:
    """Prompts of different lengths in a batch, through two borders of the tower; each also alone, without padding."""
    fields = SMALL if form == "hierarchical" else {}
    model = tiny(GeneSpliceForCausalLM, form, seed=3, is_decoder=True, **fields).double()
    ids, mask = uneven(14, 14, 9, 1)

    def made(ids: torch.Tensor, mask: torch.Tensor | None, **options: Any) -> torch.Tensor:
        torch.manual_seed(1)
        options = SEARCHES[search] | {"max_new_tokens": 24} | options
        return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]

    found = made(ids, mask)
    assert torch.equal(found, made(ids, mask, use_cache=False))
    assert len(found.unique()) > 2
    if "sampl" not in search:
        each = SEARCHES[search].get("num_return_sequences", 1)
        for row, length in enumerate((14, 9, 1)):
            assert torch.equal(found[row * each : (row + 1) * each], made(ids[row : row + 1, -length:], None))


@BOTH_FORMS
def test_generate_may_read_the_prompt_in_pieces(form) -> None:
    fields = SMALL if form == "hierarchical" else {}
    model = tiny(GeneSpliceForCausalLM, form, seed=3, is_decoder=True, **fields).double()
    ids, mask = uneven(14, 14, 9, 1)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    found = model.generate(ids, past_key_values=GeneSpliceCache(), prefill_chunk_size=5, **options)
    assert torch.equal(found, model.generate(ids, use_cache=False, **options))


def tokens_of_each_level(model: GeneSpliceForCausalLM, seen: Counter) -> None:
    """Counts the tokens that run through every block, by the block's name."""
    for name, block in model.genesplice.named_modules():
        if type(block).__name__ == "WindowedBlock":
            block.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].shape[1]}))


def test_every_new_base_costs_one_token_and_bins_cost_one_each() -> None:
    model, seen = tiny(GeneSpliceForCausalLM, "hierarchical", is_decoder=True), Counter()
    prompt = random_bases(1, 130)
    cache = in_pieces(model, prompt, None, [130])[0].past_key_values
    tokens_of_each_level(model, seen)
    made = model.generate(prompt[:, -1:].repeat(1, 131), past_key_values=cache, max_new_tokens=300, do_sample=False)
    assert made.shape[1] == 131 + 300
    # 300 bases were read: the last of the prompt and all new ones but the last.
    first = {"encoder.0.0": 300, "decoder.0.0": 300}
    bins_of_16, bins_of_128 = 430 // 16 - 130 // 16, 430 // 128 - 130 // 128
    assert seen == first | {"encoder.1.0": bins_of_16, "decoder.1.0": bins_of_16, "tower.0": bins_of_128}
    assert (bins_of_16, bins_of_128) == (18, 2)


def test_a_prompt_is_read_in_one_run_through_every_block() -> None:
    """At once when the cache is empty, and level by level when it is not."""
    for sizes in ([300], [10, 290]):
        model, calls = tiny(GeneSpliceForCausalLM, "hierarchical", is_decoder=True), []
        for block in model.genesplice.modules():
            if type(block).__name__ == "WindowedBlock":
                block.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        in_pieces(model, random_bases(1, 300), None, sizes)
        # Of the first ten bases only the two blocks of bases and, on the bin that is not full, the others are run.
        assert len(calls) == 5 * len(sizes)


def stored_bytes(cache: GeneSpliceCache) -> int:
    """What the cache keeps alive: whole storages, not the views of them."""
    tensors = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    tensors += [cache.lengths_B, cache.stem_inputs, *cache.pooled_sums.values(), *cache.carried.values()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("length", [256, 2048])
@pytest.mark.parametrize("steps", [0, 3])
def test_the_cache_holds_windows_and_one_key_per_bin(length, steps) -> None:
    model = tiny(GeneSpliceForCausalLM, "hierarchical", is_decoder=True)
    sizes = [length - steps] + [1] * steps
    cache = in_pieces(model, random_bases(1, length), None, sizes)[-1].past_key_values
    # Two layers with a window of 20 bases and two heads, two with a window of 2 and one head; heads of 8 numbers.
    windows = 2 * (2 * 2 * (20 + 1) * 8 + 2 * 1 * (2 + 1) * 8)
    tower = 2 * 2 * (length // 128) * 8
    # The stem's last embeddings, sums of both pools, and what coarse tokens (one old, one new) add.
    others = 7 * 16 + (16 + 24) + 2 * (16 + 24)
    assert stored_bytes(cache) <= 4 * (windows + tower + others) + 8
    assert cache.layers[0].keys.shape[2] == 20
    assert cache.layers[2].keys.shape[2] == length // 128


def test_a_long_piece_after_a_short_one_needs_no_mask_of_the_square_of_its_length() -> None:
    for form in FORMS:
        layers = {"tower_layer_types": ["sliding_attention"] * 2} if form == "flat" else {}
        model, length = tiny(GeneSpliceForCausalLM, form, is_decoder=True, **layers), 2048
        with LargestTensor() as largest:
            in_pieces(model, random_bases(1, length), None, [1, length - 1])
        # Two heads and two windows of keys per base.
        assert largest.elements <= 2 * 2 * (length + 40) * 20 < length**2


@BOTH_FORMS
def test_a_cache_is_made_when_wanted_and_in_evaluation(form) -> None:
    model, ids = tiny(GeneSpliceForCausalLM, form, is_decoder=True), random_bases(1, 20)
    assert isinstance(model(ids).past_key_values, GeneSpliceCache)
    assert model(ids, use_cache=False).past_key_values is None
    model.config.use_cache = model.genesplice.config.use_cache = False
    assert model(ids).past_key_values is None
    assert isinstance(model(ids, use_cache=True).past_key_values, GeneSpliceCache)
    assert model.train()(ids, use_cache=True).past_key_values is None


def test_a_pass_with_a_cache_is_bit_for_bit_the_pass_without() -> None:
    model, (ids, mask) = tiny(GeneSpliceModel, "hierarchical", is_decoder=True), uneven(150, 150, 31)
    one, other = (model(ids, attention_mask=mask, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(one.last_hidden_state, other.last_hidden_state)
    assert torch.equal(one.bin_hidden_state, other.bin_hidden_state)


def test_what_a_cache_cannot_continue_is_refused() -> None:
    model, ids = tiny(GeneSpliceForCausalLM, "hierarchical", is_decoder=True), random_bases(2, 20)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match=r"must be a GeneSpliceCache, got DynamicCache; pass none with"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(SequenceError, match=r"holds 2 sequences, the call has 1"):
        model(ids[:1, :1], past_key_values=cache)
    mask = torch.ones(2, 7)
    mask[0, 0] = 0
    with pytest.raises(SequenceError, match=r"must cover the 3 new tokens, or the 20 cached ones too, got 7 columns"):
        model(ids[:, :3], attention_mask=mask, past_key_values=cache)
    with pytest.raises(NotImplementedError, match=r"20 columns cannot be cropped to 16"):
        cache.crop(-4)
    assert cache.get_seq_length() == 20


def test_a_model_of_bins_alone_has_no_cache() -> None:
    model, ids = tiny(GeneSpliceModel, "hierarchical", is_decoder=True, use_decoder=False), random_bases(1, 20)
    assert model(ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match=r"needs a causal config \(`is_decoder`\) with states per base"):
        model(ids, past_key_values=GeneSpliceCache())


def test_a_cache_can_be_used_again_after_a_reset() -> None:
    model, ids = tiny(GeneSpliceForCausalLM, "hierarchical", is_decoder=True, **SMALL), random_bases(1, 20)
    cache = model(random_bases(2, 33)).past_key_values
    cache.reset()
    with torch.no_grad():
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)
    assert cache.get_seq_length() == 20
