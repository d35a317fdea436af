"""The Performer's stem: a convolution over tokens, some of which stand in other chunks or in the cache.

The twin of every test is the same model over whole sequences; that of the stem itself is a sum written out.

Shapes: B batch, L tokens, E embedding size.
"""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from genesplice_hf.models.performer.configuration_performer import PerformerConfig
from genesplice_hf.models.performer.modeling_performer import PerformerForCausalLM, PerformerForMaskedLM
from genesplice_hf.models.performer.modeling_performer_base import PerformerModel

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "attention_block_size": 5,
    "initializer_range": 0.3,
    "slim_chunk_size": -1,
    "stem_kernel_size": 5,
}
MODES: dict[str, dict[str, Any]] = {
    "causal-store": {"is_decoder": True, "slim_states": "store"},
    "causal-reverse": {"is_decoder": True, "slim_states": "reverse"},
    "bidirectional-sublinear": {"is_decoder": False, "bidirectional_strategy": "sublinear"},
    "bidirectional-checkpoint": {"is_decoder": False, "bidirectional_strategy": "checkpoint"},
}
DIRECTIONS = pytest.mark.parametrize("is_decoder", [False, True], ids=["bidirectional", "causal"])
LENGTH = 30


def tiny(model_class: type[PreTrainedModel], **fields: Any) -> PreTrainedModel:
    """A float64 model in evaluation mode, whose stem counts as much as its embedding."""
    torch.manual_seed(0)
    return model_class(PerformerConfig(**(SIZES | fields))).double().eval()


def padded_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Whole, padded on the right, on the left, a single base."""
    position = torch.arange(LENGTH)
    mask = torch.stack([position >= 0, position < 13, position >= 11, position == 4])
    return torch.randint(5, 9, mask.shape).masked_fill(~mask, 0), mask.long()


@DIRECTIONS
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_stem_is_a_sum_over_neighbours(is_decoder: bool, kernel: int) -> None:
    model = tiny(PerformerModel, is_decoder=is_decoder, stem_kernel_size=kernel)
    plain = tiny(PerformerModel, is_decoder=is_decoder, stem_kernel_size=0)
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith("stem.")})
    ids = torch.randint(5, 9, (1, LENGTH))
    with torch.no_grad():
        tokens, mixed = model.input_map(ids)[0], []
        first = 1 - kernel if is_decoder else -(kernel // 2)
        for place in range(LENGTH):
            total = model.stem.bias.clone()
            for tap in range(kernel):
                if 0 <= place + first + tap < LENGTH:
                    total += model.stem.weight[:, :, tap] @ tokens[place + first + tap]
            mixed.append(tokens[place] + 0.5 * total * (1 + torch.erf(total / 2**0.5)))
        expected = plain(inputs_embeds=torch.stack(mixed)[None]).last_hidden_state
        torch.testing.assert_close(model(ids).last_hidden_state, expected)
        torch.testing.assert_close(model(inputs_embeds=model.input_map(ids)).last_hidden_state, expected)


@DIRECTIONS
@pytest.mark.parametrize("scheme", ["add", "concat", "none"])
def test_chunks_and_padding_change_no_state(is_decoder: bool, scheme: str) -> None:
    model, (ids, mask) = tiny(PerformerModel, is_decoder=is_decoder, position_scheme=scheme), padded_rows()
    with torch.no_grad():
        expected = model(ids, mask).last_hidden_state
        for chunk_size in (1, 2, 7, 29, 99):
            found = model(ids, mask, slim_chunk_size=chunk_size).last_hidden_state
            torch.testing.assert_close(found, expected, msg=f"C={chunk_size}")
        for row in range(4):
            alone = model(ids[row][mask[row] == 1][None]).last_hidden_state[0]
            torch.testing.assert_close(expected[row][mask[row] == 1], alone)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [1, 3, 8])
def test_training_in_chunks_has_the_gradient_of_the_whole(mode: str, chunk_size: int) -> None:
    model_class = PerformerForCausalLM if MODES[mode]["is_decoder"] else PerformerForMaskedLM
    model, (ids, mask) = tiny(model_class, **MODES[mode]).train(), padded_rows()
    labels, found = ids.masked_fill(mask == 0, -100), []
    for size in (chunk_size, -1):
        loss = model(ids, mask, labels=labels, slim_chunk_size=size).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    assert model.performer.stem is not None and found[1][2].abs().max() > 1e-3
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cuts", [(20, 21, 24), (1, 2, 3), (3, 17), (14, 15, 16, 29)])
def test_pieces_with_a_cache_are_the_whole(cuts: tuple[int, ...]) -> None:
    """Pieces shorter than the kernel, and rows that begin in different pieces."""
    model, first = tiny(PerformerForCausalLM), torch.tensor([[0], [7], [21]])
    ids, mask = torch.randint(5, 9, (3, LENGTH)), (torch.arange(LENGTH) >= first).long()
    ids = ids.masked_fill(mask == 0, 0)
    logits, cache = [], None
    with torch.no_grad():
        expected = model(ids, mask).logits
        for start, stop in zip((0, *cuts), (*cuts, LENGTH), strict=True):
            outputs = model(ids[:, start:stop], mask[:, :stop], past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1)[mask.bool()], expected[mask.bool()])
    assert cache.stem_inputs.shape == (3, 4, 16)


def test_rows_of_the_cache_move_together() -> None:
    model, ids = tiny(PerformerForCausalLM), torch.randint(5, 9, (2, LENGTH))
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
        found = model(ids[[1, 0, 1], 20:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(found, model(ids).logits[[1, 0, 1], 20:])
    cache.reset()
    assert cache.stem_inputs is None and cache.get_seq_length() == 0


def test_no_base_sees_a_later_one() -> None:
    model, ids = tiny(PerformerForCausalLM), torch.randint(5, 9, (1, LENGTH))
    other = ids.clone()
    other[0, 17:] = ids[0, 17:] % 4 + 5
    with torch.no_grad():
        here, there = (model(x, slim_chunk_size=7).logits for x in (ids, other))
    assert torch.equal(here[:, :17], there[:, :17]) and not torch.equal(here[:, 17], there[:, 17])


def test_generating_with_a_cache_is_generating_without() -> None:
    model, ids = tiny(PerformerForCausalLM), torch.randint(5, 9, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    with_cache = model.generate(ids * mask, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(ids * mask, use_cache=False, **options))
