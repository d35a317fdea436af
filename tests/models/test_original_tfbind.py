"""TFBind against tf-bind-transformer's own numbers, and the way to its layout and back.

The golden cases come from that code (float64, stored as float32); their READMEs say how.

Shapes: B pairs of window and factor, T bins, R residues.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import genesplice_hf
from genesplice_hf.errors import CheckpointError
from genesplice_hf.models.tfbind.configuration_tfbind import TFBindConfig
from genesplice_hf.models.tfbind.conversion_tfbind import TFBindSource
from genesplice_hf.models.tfbind.modeling_tfbind import TFBindForSequenceClassification, TFBindForTrackPrediction
from genesplice_hf.models.tfbind.modeling_tfbind_base import TFBindModel
from genesplice_hf.models.tiny_configs import tiny_tfbind

GOLDEN = Path(__file__).parents[1] / "golden"
# float32: ten times the reference's own largest deviation from float64, relative to the tensor's maximum (READMEs).
FLOAT32 = {
    "tracks": 6.2e-4,
    "binary": 1.4e-5,
    "film": 3.6e-5,
    "squeeze_excite": 9.1e-5,
    "corr_loss": 1.7e-4,
    "no_hypergrid": 1.3e-4,
    "one_sequence_many_factors": 9.6e-5,
}
EVERY_CASE = pytest.mark.parametrize("name", FLOAT32)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
INPUTS = {
    "input_ids": "input_ids",
    "aa_embed": "protein_embeds",
    "aa_mask": "protein_mask",
    "contextual_embed": "context",
    "target": "labels",
    "read_value": "read_value",
    "peaks_nr": "peaks_nr",
}


class Golden(NamedTuple):
    """One case: the reference's config, its tensors, and the batch under our names."""

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    batch: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def model(self, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
        return genesplice_hf.from_original("tfbind", self.config, self.weights, dtype=dtype, **options)


@cache
def golden(name: str) -> Golden:
    folder = GOLDEN / f"tfbind_{name}"
    facts = json.loads((folder / "config.json").read_text())
    config = {part: facts[part] for part in ("enformer", "adapter_kwargs")}
    weights, inputs, outputs = (load_file(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    return Golden(config, weights, {INPUTS[key]: tensor for key, tensor in inputs.items()}, outputs)


def tolerance(name: str, dtype: torch.dtype) -> float:
    return 1e-7 if dtype == torch.float64 else FLOAT32[name]


def assert_near(found: torch.Tensor, expected: torch.Tensor, relative: float, what: str) -> None:
    gap = (found.detach() - expected).abs().max().item()
    assert found.shape == expected.shape, what
    assert gap <= relative * expected.abs().max().item(), f"{what}: {gap:.3g}"


def in_dtype(batch: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in batch.items()}


def expected_of(name: str) -> dict[str, torch.Tensor]:
    """The tensors that ours must equal: of squeeze-and-excitation those with the mask as it was meant."""
    outputs = dict(golden(name).outputs)
    meant = {key.removeprefix("intended_mask."): t for key, t in outputs.items() if key.startswith("intended_mask.")}
    if meant:
        outputs = {key: outputs[key] for key in ("seq_embed", "norm_seq_embed", "cond_genetic")} | meant
    return outputs


@EVERY_CASE
@pytest.mark.parametrize(
    ("dtype", "implementation"), [(torch.float64, "eager"), (torch.float64, "sdpa"), (torch.float32, "sdpa")], ids=str
)
def test_golden_values(name: str, dtype: torch.dtype, implementation: str) -> None:
    case, expected = golden(name), expected_of(name)
    model = case.model(dtype)
    model.set_attn_implementation(implementation)
    batch, found = in_dtype(case.batch, dtype), states_inside(model)
    with torch.no_grad():
        outputs = model(**batch)
        y = model.tfbind(**{key: batch[key] for key in ("input_ids", "protein_embeds", "protein_mask", "context")})
    found |= {"filip": outputs.interactions, "logits": y.last_hidden_state, "loss": outputs.main_loss}
    found["pred"] = outputs.logits.view_as(expected["pred"])
    if "aux_loss" in expected:
        found |= {"aux_loss": outputs.aux_loss, "total_loss": outputs.loss}
    else:
        assert outputs.aux_loss is None and torch.equal(outputs.loss, outputs.main_loss)
    if "corr_coef" in expected:
        found["corr_coef"] = torch.stack(
            [torch.corrcoef(pair)[0, 1] for pair in zip_rows(outputs.logits, batch)]
        ).mean()
    values = {key for key in expected if not key.startswith("grad.")}
    assert values <= found.keys()
    real = case.batch["protein_mask"][..., None]
    for key in values:
        # The reference computes something at masked residues; nothing depends on it.
        of_residues = key == "cond_protein" or key.endswith(".protein")
        one, other = (t * real if of_residues else t for t in (found[key], expected[key]))
        assert_near(one, other, tolerance(name, dtype), key)


def zip_rows(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [torch.stack(pair) for pair in zip(logits, batch["labels"], strict=True)]


def states_inside(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Fills, in the next forward pass, what the fixtures call the outputs of its parts."""
    found: dict[str, torch.Tensor] = {}

    def keep(key: str, part: Any = None) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            found[key] = output if part is None else part(output)

        return hook

    base = model.tfbind
    base.dna_encoder.register_forward_hook(keep("seq_embed", lambda outputs: outputs.last_hidden_state))
    base.norm_dna.register_forward_hook(keep("norm_seq_embed"))
    for index, layer in enumerate(base.genome_layers):
        layer.register_forward_hook(keep(f"genome_self_attn.{index}"))
    for way in (base.film, base.squeeze_excite):
        for side, name in (("dna", "cond_genetic"), ("protein", "cond_protein")):
            if way is not None:
                way[side].register_forward_hook(keep(name))
    for index, layer in enumerate(base.joint_layers):
        layer.register_forward_hook(keep(f"joint_cross_attn.{index}.seq", lambda sides: sides[0]))
        layer.register_forward_hook(keep(f"joint_cross_attn.{index}.protein", lambda sides: sides[1]))
    return found


@EVERY_CASE
@EVERY_DTYPE
def test_golden_gradients(name: str, dtype: torch.dtype) -> None:
    """In evaluation mode, as the fixtures were made; gradients of their layout, through the way back."""
    case, expected = golden(name), expected_of(name)
    is_trained = any(key.startswith("grad.enformer.") for key in expected)
    model = case.model(dtype, freeze_dna=not is_trained)
    model(**in_dtype(case.batch, dtype)).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    _, gradients = genesplice_hf.to_original(model)
    keys = [key for key in expected if key.startswith("grad.")]
    assert len(keys) >= 6
    for key in keys:
        assert_near(gradients[key.removeprefix("grad.")], expected[key], tolerance(name, dtype), key)


@EVERY_CASE
def test_there_and_back_is_bit_exact(name: str, tmp_path: Path) -> None:
    """Also after our own files; heads of the trunk, which have no effect, come back as zeros."""
    case, model = golden(name), golden(name).model()
    heads = {key for key in case.weights if "._heads." in key}
    assert not model.training and heads <= set(model.config.conversion["ignored_keys"])
    model.save_pretrained(tmp_path)
    for ours in (model, type(model).from_pretrained(tmp_path)):
        config, tensors = genesplice_hf.to_original(ours)
        assert tensors.keys() == case.weights.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, torch.zeros_like(tensor) if key in heads else case.weights[key]), key
        again = genesplice_hf.from_original("tfbind", config, tensors)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in ours.state_dict().items())
        assert {key: config["adapter_kwargs"][key] for key in case.config["adapter_kwargs"]} == case.config[
            "adapter_kwargs"
        ]


def test_the_class_and_the_compatible_fields() -> None:
    track, binary = golden("film").model(), golden("binary").model()
    assert type(track) is TFBindForTrackPrediction and type(binary) is TFBindForSequenceClassification
    config = track.config
    found = (config.film_residual, config.se_scale, config.normalize_null, config.mse_on_logits)
    assert found == (False, 1.0, False, True)
    assert (config.norm_type, config.dna_config.pad_value, config.freeze_dna) == ("rmsnorm", 0.25, True)
    assert (binary.config.task, binary.config.read_value_features) == ("binary", "reference")
    assert golden("corr_loss").model().config.loss_type == "correlation"


def test_a_base_says_what_it_left_out() -> None:
    case = golden("binary")
    base = case.model(task="base")
    assert type(base) is TFBindModel
    heads = {key for key in case.weights if key.startswith(("to_pred", "to_read_value", "enformer._heads"))}
    assert set(base.config.conversion["ignored_keys"]) == heads
    headless = {key: tensor for key, tensor in case.weights.items() if key not in heads}
    assert type(genesplice_hf.from_original("tfbind", case.config, headless)) is TFBindModel


def test_older_releases_have_layer_norms() -> None:
    case = golden("tracks")
    weights = dict(case.weights)
    for side, size in (("norm", 24), ("context_norm", 16)):
        weights[f"joint_cross_attns.0.attn.{side}.bias"] = torch.zeros(size)
    model = genesplice_hf.from_original("tfbind", case.config, weights)
    assert model.config.norm_type == "layernorm"
    assert genesplice_hf.to_original(model)[1].keys() == weights.keys()


def test_all_faults_stand_in_one_error() -> None:
    case = golden("film")
    weights = {key: tensor for key, tensor in case.weights.items() if "._trunk." not in key}
    weights["stranger"] = weights.pop("norm_seq_embed.bias")
    weights["filip.to_latent_w"] = weights["filip.to_latent_w"][:, :-1]
    weights["enformer.odd"] = weights.pop("enformer.stem.0.bias")
    with pytest.raises(CheckpointError) as error:
        genesplice_hf.from_original("tfbind", case.config, weights)
    for part in (
        "missing: norm_seq_embed.bias",
        "unexpected: stranger",
        "filip.to_latent_w is (24, 23), needs (24, 24)",
        "missing: stem.0.bias",
        "unexpected: odd",
    ):
        assert part in str(error.value)


def test_incomplete_or_unknown_arguments(caplog: pytest.LogCaptureFixture) -> None:
    case = golden("tracks")
    with pytest.raises(CheckpointError, match="adapter_kwargs"):
        genesplice_hf.from_original("tfbind", {"enformer": {}}, {})
    config = {**case.config, "adapter_kwargs": case.config["adapter_kwargs"] | {"binary_targets": True}}
    with caplog.at_level("WARNING", logger="genesplice_hf"):
        model = genesplice_hf.from_original("tfbind", config, case.weights)
    assert "binary_targets" in caplog.text
    assert genesplice_hf.to_original(model)[0]["adapter_kwargs"]["binary_targets"] is True


def test_squeeze_excite_hides_film_as_in_the_reference() -> None:
    case = golden("squeeze_excite")
    config = {**case.config, "adapter_kwargs": case.config["adapter_kwargs"] | {"condition_film": True}}
    model = genesplice_hf.from_original("tfbind", config, case.weights)
    assert model.config.conditioning == ("squeeze_excite", "hypergrid")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize_null": True}, "normalize_null"),
        ({"filip_reduce": "max"}, "filip_reduce"),
        ({"interaction_similarity": "scaled_dot"}, "interaction_similarity"),
    ],
)
def test_what_the_reference_lacks_cannot_go_back(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        genesplice_hf.to_original(golden("tracks").model(**options))
    with pytest.raises(CheckpointError, match="genesplice"):
        genesplice_hf.to_original(TFBindModel(tiny_tfbind()))


def test_the_trunk_trains_where_the_reference_says_so() -> None:
    case = golden("tracks")
    model = genesplice_hf.from_original("tfbind", case.config | {"finetune_enformer": True}, case.weights)
    assert not model.config.freeze_dna
    assert genesplice_hf.to_original(model)[0]["finetune_enformer"] is True
    assert isinstance(TFBindSource.config(case.config, {})[0], TFBindConfig)
