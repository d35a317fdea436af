"""Published Enformers through `from_original`: values, losses, gradients, batch statistics, the way back, faults.

The golden cases come from enformer-pytorch 0.8.12 in float64 (stored as float32), its gamma functions normalised over
positions as TensorFlow's (`legacy.*`: over features, as its own); their READMEs say how. The tolerance in float32 is
ten times what the reference itself deviates in float32, relative to a tensor's maximum; in float64 it is the rounding
of the stored numbers.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel

import genesplice_hf
from genesplice_hf.errors import CheckpointError
from genesplice_hf.heads.tracks import track_loss
from genesplice_hf.models.auto import AutoModelForTrackPrediction
from genesplice_hf.models.enformer.conversion_enformer import EnformerSource, module_map, their_key, without_aliases
from genesplice_hf.models.enformer.conversion_enformer_tf import read_variables
from genesplice_hf.models.enformer.modeling_enformer import (
    EnformerForSequenceClassification,
    EnformerForTrackPrediction,
)
from genesplice_hf.models.enformer.modeling_enformer_adaptation import (
    EnformerForContextAttentionAdaptation,
    EnformerForHeadAdaptation,
)
from genesplice_hf.models.enformer.modeling_enformer_base import EnformerModel

Tensors = dict[str, torch.Tensor]
GOLDEN = Path(__file__).parents[1] / "golden"
# Ten times the relative figure of each README.
TOLERANCES = {
    "enformer": 2.6e-4,
    "enformer_trunk_aliases": 1.4e-4,
    "enformer_adapter_head": 7.0e-5,
    "enformer_adapter_head_post_transformer": 4.6e-5,
    "enformer_adapter_context": 4.2e-5,
    "enformer_adapter_context_attention": 1.7e-4,
}
# Stored values are float32, whose rounding is 6e-8 relative.
ROUNDING = 1e-7
TRUNKS = pytest.mark.parametrize("name", ["enformer", "enformer_trunk_aliases"])
ADAPTERS = pytest.mark.parametrize("name", [name for name in TOLERANCES if "adapter" in name])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
TASKS = {
    "HeadAdapterWrapper": "head_adaptation",
    "ContextAdapterWrapper": "context_adaptation",
    "ContextAttentionAdapterWrapper": "context_attention_adaptation",
}


class Golden(NamedTuple):
    """One case: the reference's config and tensors, the batch, and what came out."""

    name: str
    config: dict[str, Any]
    weights: Tensors
    inputs: Tensors
    outputs: Tensors

    def model(self, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        return genesplice_hf.from_original("enformer", self.config, self.weights, dtype=dtype, **options)

    def floats(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self.inputs[name].to(dtype)

    def check(self, found: torch.Tensor, name: str) -> None:
        """Equality with the golden output `name`, relative to its largest number."""
        expected = self.outputs[name]
        relative = ROUNDING if found.dtype == torch.float64 else TOLERANCES[self.name]
        atol = relative * float(expected.abs().max())
        torch.testing.assert_close(found.detach().double(), expected.double(), rtol=0, atol=atol, msg=name)

    def check_gradients(self, model: PreTrainedModel, prefix: str) -> None:
        """Every stored gradient `prefix`<their key> against that of our parameter."""
        modules = module_map(model.config, task_of(self.config), "enformer." if "wrapper" in self.config else "")
        named = dict(model.named_parameters())
        ours = {their_key(key, modules): key for key in named}
        wanted = [key for key in self.outputs if key.startswith(prefix)]
        assert wanted
        for key in wanted:
            parameter = named[ours[key.removeprefix(prefix)]]
            self.check(parameter.grad.reshape(self.outputs[key].shape), key)


def task_of(config: dict[str, Any]) -> str:
    return TASKS[config["wrapper"]] if "wrapper" in config else "track_prediction"


@cache
def golden(name: str) -> Golden:
    folder = GOLDEN / name
    facts = json.loads((folder / "config.json").read_text())
    if "wrapper" in facts:
        trunk = {key: value for key, value in facts["enformer"].items() if key != "filter_list"}
        config = {"enformer": trunk, "wrapper": facts["wrapper"], "wrapper_kwargs": facts["wrapper_kwargs"]}
    else:
        about = ("reference", "seed", "dtype", "gamma_normalization", "with_legacy", "state_dict_keys", "filter_list",
                 "grad_params")  # fmt: skip
        config = {key: value for key, value in facts.items() if key not in about}
    parts = (load_file(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    return Golden(name, config, *parts)


def run(case: Golden, model: EnformerForTrackPrediction, prefix: str) -> None:
    """All species, states and gradients of one forward and backward pass."""
    dtype = model.dtype
    labels = {species: case.floats(f"target_{species}", dtype) for species in ("human", "mouse")}
    outputs = model(case.inputs["input_ids"], species="all", labels=labels, output_hidden_states=True)
    for index, state in enumerate(outputs.hidden_states):
        case.check(state, f"{prefix}hidden_states.{index}")
    case.check(outputs.last_hidden_state, f"{prefix}embeddings")
    losses = {}
    for species, values in outputs.predictions.items():
        case.check(values, f"{prefix}{species}")
        losses[species] = track_loss(values, labels[species], None, "poisson", model.config.log_eps)
        case.check(losses[species], f"{prefix}loss_{species}")
    torch.testing.assert_close(outputs.loss, (losses["human"] + losses["mouse"]) / 2)
    losses["human"].backward()
    case.check_gradients(model, f"{prefix}grad.")


@TRUNKS
@DTYPES
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_values_losses_and_gradients(name: str, dtype: torch.dtype, implementation: str) -> None:
    case = golden(name)
    model = case.model(dtype)
    model.set_attn_implementation(implementation)
    run(case, model, "")


@TRUNKS
@DTYPES
def test_the_basis_of_the_reference_on_request(name: str, dtype: torch.dtype) -> None:
    case = golden(name)
    run(case, case.model(dtype, gamma_normalization="feature"), "legacy.")


@TRUNKS
@DTYPES
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_and_its_batch_statistics(name: str, dtype: torch.dtype, checkpointing: bool) -> None:
    """Also with checkpointing, which computes each block twice and must count its batch once."""
    case = golden(name)
    model = case.model(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    run(case, model, "train.")
    modules = module_map(model.config, "track_prediction")
    ours = {their_key(key, modules): buffer for key, buffer in model.named_buffers()}
    wanted = [key for key in case.outputs if key.startswith("train.buffer.")]
    assert wanted
    for key in wanted:
        case.check(ours[key.removeprefix("train.buffer.")].reshape(case.outputs[key].shape).to(dtype), key)


@TRUNKS
@DTYPES
@pytest.mark.parametrize("grad", [False, True])
def test_stem_and_tower(name: str, dtype: torch.dtype, grad: bool) -> None:
    """Both ways through a block: with the activations kept, and overwriting them."""
    case = golden(name)
    trunk = case.model(dtype).enformer
    with torch.set_grad_enabled(grad):
        x = trunk.stem(trunk.embeddings(case.inputs["input_ids"]).to(dtype))
        case.check(x[:, :64].transpose(1, 2), "stem_first64")
        for index, block in enumerate(trunk.conv_tower):
            x = block(x)
            if f"conv_tower.{index}" in case.outputs:
                case.check(x.transpose(1, 2), f"conv_tower.{index}")


@DTYPES
def test_odd_lengths_and_real_valued_channels(dtype: torch.dtype) -> None:
    case = golden("enformer")
    model = case.model(dtype)
    with torch.no_grad():
        odd = model(case.inputs["input_ids_odd"])
    case.check(odd.logits, "odd.human")
    case.check(odd.last_hidden_state, "odd.embeddings")
    soft = case.floats("inputs_soft", dtype).clone().requires_grad_()
    outputs = model(inputs_embeds=soft, species="all")
    case.check(outputs.predictions["mouse"], "soft.mouse")
    case.check(outputs.predictions["human"], "soft.human")
    outputs.predictions["human"].sum().backward()
    case.check(soft.grad, "soft.grad_input")


def adapter_inputs(case: Golden, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    given = {"input_ids": case.inputs["input_ids"]}
    return given | ({"context": case.floats("context", dtype)} if "context" in case.inputs else {})


@ADAPTERS
@DTYPES
def test_adapters(name: str, dtype: torch.dtype) -> None:
    case = golden(name)
    model = case.model(dtype)
    inputs = adapter_inputs(case, dtype)
    outputs = model(**inputs, labels=case.floats("target", dtype))
    case.check(outputs.last_hidden_state, "embeddings")
    case.check(outputs.logits, "pred")
    case.check(outputs.loss, "loss")
    outputs.loss.backward()
    case.check_gradients(model, "grad.")
    if "target_short" in case.inputs:
        case.check(model(**inputs, labels=case.floats("target_short", dtype)).loss, "loss_short")
        # Unlike the reference, the next call is not cropped.
        case.check(model(**inputs).logits, "pred")


@DTYPES
def test_context_tokens_may_be_masked_or_single(dtype: torch.dtype) -> None:
    case = golden("enformer_adapter_context_attention")
    model = case.model(dtype)
    inputs = adapter_inputs(case, dtype)
    case.check(model(**(inputs | {"context": inputs["context"][:, 0]})).logits, "pred_context_2d")
    outputs = model(**inputs, context_mask=case.inputs["context_mask"], labels=case.floats("target", dtype))
    case.check(outputs.logits, "pred_mask_per_context")
    case.check(outputs.loss, "loss_mask_per_context")
    outputs.loss.backward()
    case.check_gradients(model, "grad_mask_per_context.")


def variants(name: str) -> dict[str, Tensors]:
    """The same weights with both names of each trunk tensor, with one, with the other, and with one or the other."""
    both = golden(name).weights
    aliases = {key: tensor for key, tensor in both.items() if "_trunk." in key}
    canonical = {key: tensor for key, tensor in both.items() if key not in aliases}
    heads = {
        key: tensor for key, tensor in canonical.items() if not key.startswith(("stem", "conv", "trans", "final"))
    }
    even = {key: tensor for index, (key, tensor) in enumerate(sorted(aliases.items())) if index % 2}
    mixed = {key: tensor for key, tensor in canonical.items() if key in heads or key not in without_aliases(even)}
    return {"both": both, "canonical": canonical, "aliases": heads | aliases, "mixed": even | mixed}


def test_one_name_of_each_tensor_is_enough() -> None:
    name = "enformer_trunk_aliases"
    case, expected = golden(name), golden(name).model().state_dict()
    folder = GOLDEN / name
    published = {part: load_file(folder / f"weights_{part}.safetensors") for part in ("canonical", "trunk_only")}
    for kind, weights in (variants(name) | published).items():
        found = case._replace(weights=weights).model().state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), kind


def test_two_names_with_different_numbers_are_refused() -> None:
    case = golden("enformer_trunk_aliases")
    wrong = case.weights | {"_trunk.1.0.bias": case.weights["stem.0.bias"] + 1}
    with pytest.raises(CheckpointError, match=r"_trunk\.1\.0\.bias and stem\.0\.bias"):
        case._replace(weights=wrong).model()


@pytest.mark.parametrize("name", TOLERANCES)
def test_the_way_back_is_bit_exact(name: str) -> None:
    case = golden(name)
    config, tensors = genesplice_hf.to_original(case.model())
    assert tensors.keys() == case.weights.keys()
    ignored = set(case.model().config.conversion["ignored_keys"])
    for key, tensor in case.weights.items():
        assert torch.equal(tensors[key], torch.zeros_like(tensor) if key in ignored else tensor), key
    if "wrapper" not in case.config:
        assert {key: config[key] for key in EnformerSource.config(case.config, {})[1] if key in config} == {
            key: value for key, value in case.config.items() if key in config
        }
    else:
        assert config["wrapper"] == case.config["wrapper"]
        assert case.config["wrapper_kwargs"].items() <= config["wrapper_kwargs"].items()
    again = genesplice_hf.from_original("enformer", config, tensors)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in case.model().state_dict().items())


@pytest.mark.parametrize("name", ["enformer", "enformer_adapter_head", "enformer_adapter_context_attention"])
def test_faults_are_all_listed(name: str) -> None:
    case = golden(name)
    tower = next(key for key in case.weights if key.endswith("conv_tower.0.0.2.weight"))
    lost = next(key for key in case.weights if key.endswith("transformer.0.1.fn.1.bias"))
    weights = {key: tensor for key, tensor in case.weights.items() if key != lost and "_trunk." not in key} | {
        tower: case.weights[tower][..., :3],
        "strange.weight": torch.ones(1),
    }
    with pytest.raises(CheckpointError) as error:
        case._replace(weights=weights).model()
    for words in (f"missing: {lost}", "unexpected: strange.weight", f"mis-shaped: {tower} is"):
        assert words in str(error.value)


def test_heads_are_those_of_the_weights(caplog: pytest.LogCaptureFixture) -> None:
    case = golden("enformer")
    config = case.config | {"output_heads": {"mouse": 9, "fly": 4}}
    model = case._replace(config=config).model(default_species="fly")
    assert model.config.output_heads == {"mouse": 5, "human": 7}
    assert model.config.default_species is None
    assert "the weights have" in caplog.text
    case.check(model(case.inputs["input_ids"], species="human").logits, "human")


def test_an_unknown_argument_is_kept_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    case = golden("enformer_adapter_head")
    trunk = case.config["enformer"] | {"filter_list": [1], "use_convnext": False, "use_tf_gamma": True}
    model = case._replace(config=case.config | {"enformer": trunk}).model()
    assert model.config.upstream_config == {"filter_list": [1]}
    assert "filter_list" in caplog.text and "use_" not in caplog.text
    assert model.config.gamma_normalization == "position"


def publish(case: Golden, folder: Path, pickled: bool, weights: Tensors | None = None) -> Path:
    """Writes the case as EleutherAI published theirs."""
    config = case.config | {"model_type": "enformer", "architectures": ["Enformer"], "use_tf_gamma": False}
    (folder / "config.json").write_text(json.dumps(config))
    weights = case.weights if weights is None else weights
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kind", ["both", "mixed"])
def test_a_published_folder_through_the_auto_classes(kind: str, pickled: bool, tmp_path: Path) -> None:
    case = golden("enformer_trunk_aliases")
    publish(case, tmp_path, pickled, variants(case.name)[kind])
    tracks = AutoModelForTrackPrediction.from_pretrained(tmp_path).eval()
    assert isinstance(tracks, EnformerForTrackPrediction)
    assert tracks.config.pad_value == 0.25
    trunk = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(trunk, EnformerModel)
    classes = EnformerForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    tuned = EnformerForHeadAdaptation.from_pretrained(tmp_path, num_tracks=2).eval()
    with torch.no_grad():
        found = tracks(case.inputs["input_ids"], species="all")
        case.check(found.predictions["mouse"], "mouse")
        for base in (trunk, classes.base_model, tuned.base_model):
            assert torch.equal(base(case.inputs["input_ids"]).last_hidden_state, found.last_hidden_state)
    tracks.save_pretrained(tmp_path / "ours")
    again = AutoModelForTrackPrediction.from_pretrained(tmp_path / "ours").eval()
    assert json.loads((tmp_path / "ours/config.json").read_text())["model_type"] == "genesplice_enformer"
    with torch.no_grad():
        assert torch.equal(again(case.inputs["input_ids"]).logits, found.predictions["human"])


def test_a_trunk_without_its_last_block_takes_the_whole_trunks_file(tmp_path: Path) -> None:
    case = golden("enformer")
    whole = case.model()
    publish(case, tmp_path, pickled=False)
    whole.save_pretrained(tmp_path / "ours")
    ids = case.inputs["input_ids"]
    with torch.no_grad():
        expected = whole(ids, output_hidden_states=True).hidden_states[-1][:, 7:17]
        for folder in (tmp_path, tmp_path / "ours"):
            model = EnformerForHeadAdaptation.from_pretrained(folder, num_tracks=2, post_transformer=True).eval()
            assert torch.equal(model(ids).last_hidden_state, expected)


def test_a_published_folder_with_a_fault_is_refused(tmp_path: Path) -> None:
    case = golden("enformer")
    weights = {key: tensor for key, tensor in case.weights.items() if key != "stem.0.bias"}
    publish(case, tmp_path, False, weights)
    for auto in (AutoModel, AutoModelForTrackPrediction):
        with pytest.raises(CheckpointError, match=r"missing: stem\.0\.bias"):
            auto.from_pretrained(tmp_path)


def test_a_wrapper_keeps_its_class_through_its_own_file(tmp_path: Path) -> None:
    case = golden("enformer_adapter_context_attention")
    model = case.model()
    model.save_pretrained(tmp_path)
    loaded = EnformerForContextAttentionAdaptation.from_pretrained(tmp_path).eval()
    inputs = adapter_inputs(case, torch.float32)
    with torch.no_grad():
        # Products with a vector round by where a file's tensors lie in memory.
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-6, atol=1e-6)


def tensorflow_variables(case: Golden) -> dict[str, np.ndarray]:
    """The case as Sonnet would name and lay it out, written here from the layout's description."""
    found = {}
    block = {"0.0": "conv_block/conv_block/batch_norm", "0.2": "conv_block/conv_block/conv1_d"}
    point = {
        "1.fn.0": "pointwise_conv_block/pointwise_conv_block/batch_norm",
        "1.fn.2": "pointwise_conv_block/pointwise_conv_block/conv1_d",
        "2.to_attn_logits": "softmax_pooling/linear",
    }
    scopes = {"stem.0": "enformer/trunk/stem/stem/conv1_d"}
    scopes |= {f"stem.{ours}": f"enformer/trunk/stem/stem/{theirs}" for ours, theirs in point.items()}
    for index in range(case.config["num_downsamples"] - 1):
        one = f"conv_tower_block_{index}"
        for ours, theirs in (block | point).items():
            scopes[f"conv_tower.{index}.{ours}"] = f"enformer/trunk/conv_tower/conv_tower/{one}/{one}/{theirs}"
    for index in range(case.config["depth"]):
        one = f"enformer/trunk/transformer/transformer/transformer_block_{index}/transformer_block_{index}"
        attention = f"{one}/mha/mha/attention_{index}"
        scopes[f"transformer.{index}.0.fn.0"] = f"{one}/mha/mha/layer_norm"
        scopes[f"transformer.{index}.0.fn.1.rel_content_bias"] = f"{attention}/r_w_bias"
        scopes[f"transformer.{index}.0.fn.1.rel_pos_bias"] = f"{attention}/r_r_bias"
        for ours, theirs in {"q": "q", "k": "k", "v": "v", "rel_k": "r_k"}.items():
            scopes[f"transformer.{index}.0.fn.1.to_{ours}"] = f"{attention}/{theirs}_layer"
        scopes[f"transformer.{index}.0.fn.1.to_out"] = f"{attention}/embedding_layer"
        scopes[f"transformer.{index}.1.fn.0"] = f"{one}/mlp/mlp/layer_norm"
        scopes[f"transformer.{index}.1.fn.1"] = f"{one}/mlp/mlp/project_in"
        scopes[f"transformer.{index}.1.fn.4"] = f"{one}/mlp/mlp/project_out"
    final = "enformer/trunk/final_pointwise/final_pointwise/conv_block/conv_block"
    scopes |= {"final_pointwise.1.0": f"{final}/batch_norm", "final_pointwise.1.2": f"{final}/conv1_d"}
    for species in case.config["output_heads"]:
        scopes[f"_heads.{species}.0"] = f"enformer/heads/head_{species}/head_{species}/linear"
    for key, tensor in case.weights.items():
        module, _, part = key.rpartition(".")
        array = tensor.numpy()
        if part == "num_batches_tracked":
            continue
        if key in scopes:
            found[f"{scopes[key]}:0"] = array
        elif part.startswith("running"):
            moving = "moving_mean" if part == "running_mean" else "moving_variance"
            found[f"{scopes[module]}/{moving}/average:0"] = array[None, None]
            found[f"{scopes[module]}/{moving}/hidden:0"] = array[None, None] * 0.5
        elif array.ndim == 1:
            norm = "norm" in scopes[module]
            found[f"{scopes[module]}/{('scale' if part == 'weight' else 'offset') if norm else 'b'}:0"] = array
        elif array.ndim == 4:
            found[f"{scopes[module]}/w:0"] = array[..., 0, 0].T
        else:
            found[f"{scopes[module]}/w:0"] = array.transpose(*reversed(range(array.ndim)))
    return found


def test_variables_of_tensorflow(tmp_path: Path) -> None:
    case = golden("enformer")
    np.savez(tmp_path / "enformer.npz", **tensorflow_variables(case))
    variables = read_variables(tmp_path / "enformer.npz")
    model = genesplice_hf.from_original("enformer_tf", case.config, variables)
    expected = case.model(pad_value=0.0)
    assert model.config.pad_value == 0.0
    for key, tensor in expected.state_dict().items():
        if "num_batches_tracked" not in key:
            assert torch.equal(model.state_dict()[key], tensor), key
    config, again = genesplice_hf.to_original(model)
    plain = {
        name.removesuffix(":0"): array for name, array in tensorflow_variables(case).items() if "hidden" not in name
    }
    assert {"/".join(dict.fromkeys(name.split("/"))) for name in plain} == again.keys()
    model_again = genesplice_hf.from_original("enformer_tf", config, again)
    assert all(torch.equal(tensor, model_again.state_dict()[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match="unexpected: enformer/trunk/strange/w:0"):
        genesplice_hf.from_original("enformer_tf", config, again | {"enformer/trunk/strange/w:0": torch.ones(1)})
