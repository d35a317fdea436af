"""What a GeneSplice says of itself before it runs, against what is counted when it runs: reach, memory, sizes.

Shapes: B batch, L bases, E hidden size.
"""

from pathlib import Path

import pytest
import torch
from tiny_genesplice import FORMS, random_bases, tiny

from genesplice_hf.errors import SequenceError
from genesplice_hf.models.genesplice.configuration_genesplice import GeneSpliceConfig
from genesplice_hf.models.genesplice.modeling_genesplice import GeneSpliceForMaskedLM
from genesplice_hf.models.genesplice.modeling_genesplice_base import GeneSpliceModel

DIRECTIONS = pytest.mark.parametrize("is_decoder", [False, True], ids=["bidirectional", "causal"])
# A tower that sees two bins to each side: everything has an end.
LOCAL = {"tower_layer_types": ["sliding_attention"], "tower_window": 2, "pool_sizes": [4, 2], "local_windows": [3, 1]}
LENGTH = 200


def seen_from(model: GeneSpliceModel, place: int) -> int:
    """Bases between the first and the last one that an output at `place` depends on, by its gradient."""
    embeds = model.embeddings(random_bases(1, LENGTH)).detach().requires_grad_()
    model(inputs_embeds=embeds).last_hidden_state[0, place].square().sum().backward()
    touched = embeds.grad[0].abs().sum(-1).nonzero().flatten()
    return int(touched[-1] - touched[0] + 1)


@DIRECTIONS
@pytest.mark.parametrize("use_decoder", [True, False], ids=["bases", "bins"])
def test_the_receptive_field_is_what_gradients_reach(is_decoder: bool, use_decoder: bool) -> None:
    model = tiny(GeneSpliceModel, "hierarchical", is_decoder=is_decoder, use_decoder=use_decoder, **LOCAL)
    model.double()
    middle = range(112, 120) if use_decoder else [14]
    assert max(seen_from(model, place) for place in middle) == model.plan_length(LENGTH).receptive_field_bp
    assert model.plan_length(10).receptive_field_bp == 10


def test_full_attention_sees_the_whole_sequence() -> None:
    assert tiny(GeneSpliceModel, "hierarchical").plan_length(130).receptive_field_bp == 130


@pytest.mark.parametrize("length", [1, 15, 128, 129, 1000])
def test_lengths_are_padded_to_whole_bins(length: int) -> None:
    plan = tiny(GeneSpliceModel, "hierarchical").plan_length(length)
    assert plan.padded_bp % 128 == 0 and 0 <= plan.padded_bp - length < 128
    assert plan.tokens_per_level == (plan.padded_bp, plan.padded_bp // 16, plan.padded_bp // 128)
    assert plan.num_bp == length and plan.num_bins == plan.tokens_per_level[-1]


def test_no_base_is_no_sequence() -> None:
    with pytest.raises(SequenceError, match="`num_bp` must be at least 1, got 0"):
        tiny(GeneSpliceModel, "flat").plan_length(0)


def kept_bytes(model: GeneSpliceModel, length: int) -> int:
    """Bytes of all tensors that autograd keeps for the backward pass, each storage once; parameters not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(x)  # so that no other tensor takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.train()(input_ids=random_bases(1, length)).last_hidden_state.sum()
    return sum(kept.values())


@pytest.mark.parametrize("form", FORMS)
def test_the_estimate_of_activations_is_near_what_autograd_keeps(form: str) -> None:
    """The blocks are the whole of the estimate; embedding, stem and norms between levels are not in it."""
    model = tiny(GeneSpliceModel, form, attn_implementation="sdpa")
    for length in (1024, 4096):
        estimate = model.plan_length(length).estimated_activation_bytes
        assert 0.6 < estimate / kept_bytes(model, length) < 1.4


@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_keeps_less(form: str) -> None:
    model = tiny(GeneSpliceModel, form)
    plain = kept_bytes(model, 2048)
    model.gradient_checkpointing_enable()
    assert kept_bytes(model, 2048) < plain / 2


@pytest.mark.parametrize(
    ("config", "with_decoder", "without"),
    [
        (GeneSpliceConfig(), 2_276_928, 2_038_912),
        (GeneSpliceConfig.small(), 27_991_104, 26_877_984),
        (GeneSpliceConfig.base(), 163_101_952, 158_692_480),
    ],
    ids=["nano", "small", "base"],
)
def test_published_sizes(config: GeneSpliceConfig, with_decoder: int, without: int) -> None:
    """Of the masked language model, and of the base model without the way back to bases."""
    encoder = GeneSpliceConfig(**(config.to_dict() | {"use_decoder": False}))
    with torch.device("meta"):
        assert GeneSpliceForMaskedLM(config).num_parameters() == with_decoder
        assert GeneSpliceModel(encoder).num_parameters() == without


def test_a_checkpoint_with_a_decoder_loads_without_it(tmp_path: Path) -> None:
    """As a base model, and of a masked language model's file; the bins stay what they were."""
    model, ids = tiny(GeneSpliceForMaskedLM, "hierarchical"), random_bases(2, 300)
    model.save_pretrained(tmp_path)
    bins = GeneSpliceModel.from_pretrained(tmp_path, use_decoder=False).eval()
    assert not any(name.startswith(("decoder", "up", "final_norm")) for name, _ in bins.named_parameters())
    with torch.no_grad():
        assert torch.equal(bins(input_ids=ids).last_hidden_state, model.genesplice(input_ids=ids).bin_hidden_state)
