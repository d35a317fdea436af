"""Laws of the network in both forms: causality, reach, padding, bins, memory, positions.

Shapes: B batch, L bases, M bins, E hidden size.
"""

import pytest
import torch
from tensor_sizes import LargestTensor
from tiny_genesplice import FORMS, change_base, random_bases, tiny
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.window_transformer import WindowedBlock, run_blocks
from genesplice_hf.models.genesplice.modeling_genesplice_base import GeneSpliceModel

BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
DIRECTIONS = pytest.mark.parametrize("is_decoder", [False, True], ids=["bidirectional", "causal"])


def states(model: GeneSpliceModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).last_hidden_state


def touched(model: GeneSpliceModel, ids: torch.Tensor, position: int) -> list[int]:
    """Positions whose state differs at all when one base does."""
    before, after = states(model, ids), states(model, change_base(ids, position))
    return (before != after).any(-1).any(0).nonzero().flatten().tolist()


@BOTH_FORMS
@pytest.mark.parametrize("position", [0, 1, 15, 16, 17, 127, 128, 129, 255, 256])
def test_nothing_leaks_into_the_past(form, position) -> None:
    model, ids = tiny(GeneSpliceModel, form, is_decoder=True), random_bases(2, 300)
    reached = touched(model, ids, position)
    assert reached[0] == position
    assert reached[-1] == 299


@BOTH_FORMS
def test_a_change_in_the_middle_reaches_both_ends(form) -> None:
    assert touched(tiny(GeneSpliceModel, form), random_bases(1, 900), 450) == list(range(900))


@DIRECTIONS
def test_window_layers_alone_reach_exactly_as_far_as_their_windows_add_up(is_decoder) -> None:
    layers = ["sliding_attention"] * 2
    model = tiny(GeneSpliceModel, "flat", is_decoder=is_decoder, tower_layer_types=layers)
    reached = touched(model, random_bases(1, 80), 40)
    # Two windows of 4 and a stem of 7 bases, centred or looking back.
    assert reached == list(range(40, 40 + 6 + 8 + 1) if is_decoder else range(40 - 11, 40 + 11 + 1))


def test_without_the_way_through_the_bins_the_reach_is_local() -> None:
    model = tiny(GeneSpliceModel, "hierarchical", num_tower_layers=0)
    for up in model.up:
        torch.nn.init.zeros_(up.weight)
    # Encoder and decoder windows of 20 bases each, and three bases of the stem.
    assert touched(model, random_bases(1, 300), 150) == list(range(150 - 43, 150 + 43 + 1))


def place(ids: torch.Tensor, before: int, after: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of bases between pads, and its mask."""
    mask = torch.nn.functional.pad(torch.ones_like(ids), (before, after))
    return torch.nn.functional.pad(ids, (before, after)), mask


@DIRECTIONS
@BOTH_FORMS
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 127, 128, 129, 300])
def test_padding_and_its_side_change_nothing(form, is_decoder, length) -> None:
    model = tiny(GeneSpliceModel, form, is_decoder=is_decoder).double()
    ids = random_bases(1, length)
    alone = model(input_ids=ids)
    for before, after in ((0, 37), (53, 0), (200, 3)):
        padded, mask = place(ids, before, after)
        neighbour = random_bases(1, padded.shape[1])
        with torch.no_grad():
            out = model(torch.cat([padded, neighbour]), torch.cat([mask, torch.ones_like(mask)]))
        real = slice(before, before + length)
        torch.testing.assert_close(out.last_hidden_state[:1, real], alone.last_hidden_state, rtol=0, atol=1e-10)
        torch.testing.assert_close(out.last_hidden_state[1:], states(model, neighbour), rtol=0, atol=1e-10)
        assert not out.last_hidden_state[0, :before].any() and not out.last_hidden_state[0, real.stop :].any()
        assert out.bin_mask[0].sum() == alone.bin_mask.sum()
        bins = out.bin_hidden_state[0][out.bin_mask[0]]
        torch.testing.assert_close(bins, alone.bin_hidden_state[0], rtol=0, atol=1e-10)
        assert not out.bin_hidden_state[0][~out.bin_mask[0]].any()


@DIRECTIONS
@BOTH_FORMS
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_gets_a_gradient_of_zero(form, is_decoder, implementation) -> None:
    model = tiny(GeneSpliceModel, form, is_decoder=is_decoder, attn_implementation=implementation)
    mask = torch.tensor([[start <= i < stop for i in range(150)] for start, stop in [(0, 90), (31, 150), (0, 0)]])
    embeds = torch.randn(3, 150, 16, requires_grad=True)
    out = model(inputs_embeds=embeds, attention_mask=mask)
    (out.last_hidden_state.square().sum() + out.bin_hidden_state.square().sum()).backward()
    assert torch.equal(embeds.grad[~mask], torch.zeros_like(embeds.grad[~mask]))
    assert (embeds.grad[mask] != 0).any(-1).all()


@DIRECTIONS
@BOTH_FORMS
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_row_of_padding_gives_zeros(form, is_decoder, implementation) -> None:
    model = tiny(GeneSpliceModel, form, is_decoder=is_decoder, attn_implementation=implementation).double()
    ids = random_bases(2, 150)
    mask = torch.ones_like(ids)
    mask[1] = 0
    out = model(input_ids=ids, attention_mask=mask)
    assert not out.last_hidden_state[1].any()
    assert not out.bin_hidden_state[1].any() and not out.bin_mask[1].any()
    torch.testing.assert_close(out.last_hidden_state[0], states(model, ids[:1])[0], rtol=0, atol=1e-10)


@BOTH_FORMS
def test_a_mask_with_a_hole_raises(form) -> None:
    mask = torch.ones(2, 20)
    mask[1, 7] = 0
    with pytest.raises(SequenceError, match=r"hole in row 1.*N token"):
        tiny(GeneSpliceModel, form)(input_ids=random_bases(2, 20), attention_mask=mask)


@DIRECTIONS
@BOTH_FORMS
def test_eager_equals_sdpa_beside_padding(form, is_decoder) -> None:
    ids, results = random_bases(3, 200), []
    mask = torch.tensor([[start <= i < stop for i in range(200)] for start, stop in [(0, 200), (0, 90), (150, 200)]])
    for implementation in ("eager", "sdpa"):
        model = tiny(GeneSpliceModel, form, is_decoder=is_decoder, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        loss = model(input_ids=ids, attention_mask=mask).last_hidden_state.square().mean()
        results.append((states(model, ids, mask), torch.autograd.grad(loss, list(model.parameters()))))
    (eager, eager_gradients), (sdpa, sdpa_gradients) = results
    torch.testing.assert_close(eager, sdpa, rtol=0, atol=1e-5)
    for first, second in zip(eager_gradients, sdpa_gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("length", "bins"), [(1, 1), (127, 1), (128, 1), (129, 2), (300, 3)])
@DIRECTIONS
def test_without_a_decoder_the_output_is_the_bins_of_the_full_model(length, bins, is_decoder) -> None:
    full = tiny(GeneSpliceModel, "hierarchical", is_decoder=is_decoder)
    encoder = tiny(GeneSpliceModel, "hierarchical", seed=1, is_decoder=is_decoder, use_decoder=False)
    encoder.load_state_dict({name: full.state_dict()[name] for name in encoder.state_dict()})
    left_out = {name.split(".")[0] for name in full.state_dict().keys() - encoder.state_dict().keys()}
    assert left_out == {"decoder", "up", "final_norm"}
    ids = random_bases(2, length)
    with torch.no_grad():
        whole, short = full(input_ids=ids), encoder(input_ids=ids)
    assert short.last_hidden_state.shape == (2, bins, 32)
    assert torch.equal(short.last_hidden_state, whole.bin_hidden_state)
    assert torch.equal(short.bin_hidden_state, whole.bin_hidden_state)


def test_the_network_is_the_one_that_its_docstring_writes_down() -> None:
    """The U by hand from the model's own blocks, on whole bins without padding."""
    model, ids = tiny(GeneSpliceModel, "hierarchical"), random_bases(2, 256)

    def blocks(part, x):
        return run_blocks(model.config, part, x, None)

    x0 = blocks(model.encoder[0], model.stem(model.embeddings(ids), None))
    x1 = blocks(model.encoder[1], model.down[0](x0.view(2, 16, 16, 16).mean(2)))
    bins = model.tower_norm(blocks(model.tower, model.down[1](x1.view(2, 2, 8, 24).mean(2))))
    y = blocks(model.decoder[1], x1 + model.up[1](bins).repeat_interleave(8, dim=1))
    y = blocks(model.decoder[0], x0 + model.up[0](y).repeat_interleave(16, dim=1))
    torch.testing.assert_close(states(model, ids), model.final_norm(y), rtol=0, atol=1e-5)


@DIRECTIONS
@BOTH_FORMS
def test_recorded_states_follow_the_blocks(form, is_decoder) -> None:
    model = tiny(GeneSpliceModel, form, is_decoder=is_decoder, attn_implementation="eager")
    out = model(input_ids=random_bases(2, 40), output_hidden_states=True, output_attentions=True)
    hierarchical = [(128, 16), (8, 24), (1, 32), (8, 24), (128, 16)]
    blocks = [(40, 16)] * 2 if form == "flat" else hierarchical
    tower = [40, 40] if form == "flat" else [1]
    assert [weights.shape[-1] for weights in out.attentions] == tower
    assert [tuple(state.shape[1:]) for state in out.hidden_states] == [*blocks, (40, 16)]
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)


@DIRECTIONS
@BOTH_FORMS
def test_recorded_states_are_the_inputs_of_the_blocks(form, is_decoder) -> None:
    model = tiny(GeneSpliceModel, form, is_decoder=is_decoder, num_tower_layers=2)
    inputs = []
    for block in (module for module in model.modules() if isinstance(module, WindowedBlock)):
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    out = model(input_ids=random_bases(2, 300), output_hidden_states=True)
    assert len(out.hidden_states) == len(inputs) + 1 == model.config.num_hidden_layers + 1
    assert all(torch.equal(state, given) for state, given in zip(out.hidden_states, inputs, strict=False))


@BOTH_FORMS
def test_attentions_of_an_implementation_that_keeps_none_are_refused(form) -> None:
    model = tiny(GeneSpliceModel, form, attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r"`output_attentions` needs the eager implementation, not `sdpa`"):
        model(input_ids=random_bases(1, 20), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


@DIRECTIONS
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_no_tensor_grows_with_the_square_of_the_length(is_decoder, implementation) -> None:
    model = tiny(GeneSpliceModel, "hierarchical", is_decoder=is_decoder, attn_implementation=implementation)
    length = 2048
    with LargestTensor() as largest:
        model(input_ids=random_bases(1, length)).last_hidden_state.sum().backward()
    # Two heads and three windows of 20 bases per base; the tower's full attention is over 16 bins.
    assert largest.elements <= 3 * 2 * (length + 20) * 20 < length**2


def test_without_positions_the_order_of_the_bases_is_lost() -> None:
    fields = {"position_embedding": "none", "stem_kernel_size": 0, "tower_layer_types": ["full_attention"] * 2}
    ids, order = random_bases(1, 30), torch.randperm(30)
    blind, sighted = tiny(GeneSpliceModel, "flat", **fields), tiny(GeneSpliceModel, "flat")
    torch.testing.assert_close(states(blind, ids[:, order]), states(blind, ids)[:, order], rtol=0, atol=1e-5)
    assert not torch.allclose(states(sighted, ids[:, order]), states(sighted, ids)[:, order], atol=1e-2)


@BOTH_FORMS
def test_flash_gets_the_window_of_each_layer_and_the_padding(form, monkeypatch) -> None:
    asked = []

    def fake_flash(module, query, key, value, attention_mask, scaling, dropout, sliding_window=None):
        asked.append((query.shape[2], sliding_window, None if attention_mask is None else attention_mask.sum(1)))
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "fake_flash", fake_flash)
    model, ids = tiny(GeneSpliceModel, form), random_bases(1, 128)
    model.config._attn_implementation = "fake_flash"
    states(model, ids)
    levels = {"flat": [(128, 5), (128, None)], "hierarchical": [(128, 21), (8, 3), (1, None), (8, 3), (128, 21)]}
    assert asked == [(*level, None) for level in levels[form]]
    asked.clear()
    states(model, ids, torch.arange(128)[None] < 20)
    real = {"flat": [20, 20], "hierarchical": [20, 2, 1, 2, 20]}
    assert [mask.tolist() for _, _, mask in asked] == [[tokens] for tokens in real[form]]


@BOTH_FORMS
def test_gradient_checkpointing_equals_plain(form) -> None:
    ids, gradients = random_bases(2, 130), []
    for is_checkpointed in (False, True):
        model = tiny(GeneSpliceModel, form).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        out = model(input_ids=ids)
        gradients.append(torch.autograd.grad(out.last_hidden_state.square().mean(), list(model.parameters())))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-6)


@BOTH_FORMS
def test_saved_and_loaded_is_the_same(form, tmp_path) -> None:
    model, ids = tiny(GeneSpliceModel, form), random_bases(1, 40)
    model.save_pretrained(tmp_path)
    assert torch.equal(states(GeneSpliceModel.from_pretrained(tmp_path).eval(), ids), states(model, ids))


def test_a_base_cannot_be_dropped_from_the_vocabulary() -> None:
    model = tiny(GeneSpliceModel, "flat")
    with pytest.raises(ValueError, match=r"`new_num_tokens` \(8\) would drop a base"):
        model.resize_token_embeddings(8)
    model.resize_token_embeddings(18)
    assert model.config.complement_map == [0, 1, 2, 3, 4, 8, 7, 6, 5, *range(9, 18)]
