"""Config rules across fields, derived fields, and the parameter counts of the published sizes."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny_genesplice import tiny_config

from genesplice_hf.errors import SequenceError
from genesplice_hf.models.genesplice.configuration_genesplice import GeneSpliceConfig
from genesplice_hf.models.genesplice.modeling_genesplice_base import GeneSpliceModel

SIZES = {
    "nano": {},
    "small": {
        "hidden_sizes": [96, 192, 512],
        "num_attention_heads": [3, 6, 8],
        "head_dims": [32, 32, 64],
        "intermediate_sizes": [256, 512, 1408],
        "num_encoder_layers": [1, 2],
        "num_tower_layers": 8,
        "num_decoder_layers": [1, 2],
    },
    "base": {
        "hidden_sizes": [128, 384, 1024],
        "num_attention_heads": [4, 6, 16],
        "head_dims": [32, 64, 64],
        "intermediate_sizes": [384, 1024, 2816],
        "num_encoder_layers": [2, 2],
        "num_tower_layers": 12,
        "num_decoder_layers": [2, 2],
    },
}
TOTALS = {
    "nano": (2_276_928, 2_038_912),
    "small": (27_991_104, 26_877_984),
    "base": (163_101_952, 158_692_480),
}


@pytest.mark.parametrize("use_decoder", [True, False], ids=["whole", "without decoder"])
@pytest.mark.parametrize("size", SIZES)
def test_parameter_totals(size, use_decoder) -> None:
    with torch.device("meta"):
        model = GeneSpliceModel(GeneSpliceConfig(**SIZES[size], use_decoder=use_decoder))
    assert model.num_parameters() == TOTALS[size][0 if use_decoder else 1]


def test_the_checkpoint_holds_these_names_and_no_other() -> None:
    block = ["attn_norm.weight", "mlp_norm.weight"]
    block += [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    block += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    places = ["encoder.0.0", "encoder.1.0", *(f"tower.{i}" for i in range(4)), "decoder.0.0", "decoder.1.0"]
    expected = {f"{place}.{name}" for place in places for name in block}
    expected |= {"embeddings.weight", "stem.weight", "stem.bias", "tower_norm.weight", "final_norm.weight"}
    expected |= {f"{way}.{level}.weight" for way in ("down", "up") for level in (0, 1)}
    with torch.device("meta"):
        assert set(GeneSpliceModel(GeneSpliceConfig()).state_dict()) == expected


CONTRADICTIONS = [
    ("hierarchical", {"hidden_sizes": [16, 24]}, r"`hidden_sizes` must have 3 entries .*tower included.*\[16, 24\]"),
    ("hierarchical", {"num_attention_heads": [2]}, r"`num_attention_heads` must have 3 entries"),
    ("hierarchical", {"num_key_value_heads": [2, 1, 2, 2]}, r"`num_key_value_heads` must have 3 entries"),
    ("flat", {"head_dims": [8, 8]}, r"`head_dims` must have 1 entries"),
    ("flat", {"intermediate_sizes": []}, r"`intermediate_sizes` must have 1 entries"),
    ("hierarchical", {"num_encoder_layers": [1]}, r"`num_encoder_layers` must have 2 entries .*below the tower"),
    ("hierarchical", {"num_decoder_layers": [1, 1, 1]}, r"`num_decoder_layers` must have 2 entries"),
    ("flat", {"local_windows": [4]}, r"`local_windows` must have 0 entries"),
    ("hierarchical", {"pool_sizes": [16, 1]}, r"`pool_sizes` must be >= 2 each, got \[16, 1\]; leave it empty"),
    ("hierarchical", {"hidden_sizes": [16, 12, 32]}, r"`hidden_sizes` must not decrease"),
    ("flat", {"num_key_value_heads": [3]}, r"`num_attention_heads` \(2\) must be a multiple of .* \(3\)"),
    ("flat", {"num_key_value_heads": [0]}, r"multiple of `num_key_value_heads` \(0\)"),
    ("flat", {"head_dims": [7]}, r"`head_dims` must be even with RoPE, got \[7\]"),
    ("flat", {"tower_layer_types": ["full_attention"]}, r"`tower_layer_types` must have 2 entries"),
    ("flat", {"tower_window": None}, r"`tower_layer_types` names sliding_attention, so `tower_window` must be set"),
    ("flat", {"tower_window": 0}, r"radii of at least 1 token, got \[0\]"),
    ("hierarchical", {"local_windows": [20, 0]}, r"radii of at least 1 token, got \[20, 0\]"),
    ("flat", {"complement_map": [0, 1, 2]}, r"`complement_map` must map each of the 16 ids"),
    ("flat", {"complement_map": [*range(1, 16), 0]}, r"to its complement and back"),
    ("flat", {"complement_map": [*range(15), 16]}, r"`complement_map` must map each of the 16 ids"),
    ("flat", {"stem_kernel_size": 4}, r"`stem_kernel_size` must be odd, or 0 for none, got 4"),
    ("flat", {"stem_kernel_size": -3}, r"`stem_kernel_size` must be odd, or 0 for none, got -3"),
]


@pytest.mark.parametrize(("form", "fields", "advice"), CONTRADICTIONS)
def test_contradicting_fields_are_named(form, fields, advice) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=advice):
        tiny_config(form, **fields)


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        ("flat", {"head_dims": [7], "position_embedding": "none"}),
        ("flat", {"stem_kernel_size": 0}),
        ("flat", {"stem_kernel_size": 1}),
        ("flat", {"tower_window": None, "tower_layer_types": ["full_attention"] * 2}),
        ("hierarchical", {"num_encoder_layers": [0, 0], "num_decoder_layers": [0, 0], "num_tower_layers": 0}),
        ("hierarchical", {"qk_norm": True, "classifier_pooling": "attention"}),
    ],
)
def test_what_does_not_contradict_is_allowed_and_runs(form, fields) -> None:
    model = GeneSpliceModel(tiny_config(form, **fields)).eval()
    state = model(input_ids=torch.full((1, 20), 5)).last_hidden_state
    assert state.shape == (1, 20, 16) and torch.isfinite(state).all()


def test_derived_fields() -> None:
    nano, flat = GeneSpliceConfig(), tiny_config("flat")
    assert (nano.num_levels, nano.bin_size, nano.num_hidden_layers, nano.hidden_size) == (2, 128, 8, 64)
    assert (flat.num_levels, flat.bin_size, flat.num_hidden_layers, flat.hidden_size) == (0, 1, 2, 16)
    assert GeneSpliceConfig(use_decoder=False).hidden_size == 192
    assert nano.num_key_value_heads == nano.num_attention_heads
    assert nano.tower_layer_types == ["full_attention"] * 4
    assert GeneSpliceConfig(tower_window=8).tower_layer_types == ["sliding_attention"] * 4


def test_the_complement_of_a_base_pairs_it() -> None:
    mapping = GeneSpliceConfig().complement_map
    assert [mapping[token] for token in (5, 6, 7, 8)] == [8, 7, 6, 5]
    assert [token for token in range(16) if mapping[token] == token] == [0, 1, 2, 3, 4, *range(9, 16)]


@pytest.mark.parametrize(
    ("num_bp", "expected"),
    [(1, (128, (128, 8, 1), 1)), (128, (128, (128, 8, 1), 1)), (129, (256, (256, 16, 2), 2))],
)
def test_the_plan_of_a_length(num_bp, expected) -> None:
    plan = GeneSpliceModel(tiny_config("hierarchical")).plan_length(num_bp)
    assert plan.num_bp == num_bp
    assert (plan.padded_bp, plan.tokens_per_level, plan.num_bins) == expected


def test_the_flat_form_pads_nothing() -> None:
    plan = GeneSpliceModel(tiny_config("flat")).plan_length(17)
    assert (plan.padded_bp, plan.tokens_per_level, plan.num_bins) == (17, (17,), 17)


def test_no_base_has_no_plan() -> None:
    with pytest.raises(SequenceError, match="`num_bp` must be at least 1, got 0"):
        GeneSpliceModel(tiny_config("flat")).plan_length(0)


@pytest.mark.parametrize("form", ["flat", "hierarchical"])
def test_residual_outputs_start_smaller_the_deeper_the_network(form) -> None:
    config = tiny_config(form, hidden_sizes=[64] if form == "flat" else [64, 64, 64], initializer_range=0.02)
    weights = GeneSpliceModel(config).state_dict()
    shrunk = 0.02 / (2 * config.num_hidden_layers) ** 0.5
    for name in ("tower.0.self_attn.o_proj.weight", "tower.0.mlp.down_proj.weight"):
        assert weights[name].std().item() == pytest.approx(shrunk, rel=0.15)
    assert weights["tower.0.mlp.up_proj.weight"].std().item() == pytest.approx(0.02, rel=0.15)
    assert torch.equal(weights["tower_norm.weight"], torch.ones(64))
    assert torch.equal(weights["stem.bias"], torch.zeros(64))
    assert torch.equal(weights["embeddings.weight"][0], torch.zeros(64))
