"""Akita's past: params.json, and Keras weights in files that are written here in Keras' layout.

Shapes: as `akita_twin.py`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from akita_twin import bases, small, twin
from safetensors.torch import save_file

import genesplice_hf
from genesplice_hf.errors import CheckpointError
from genesplice_hf.models.akita.configuration_akita import AkitaConfig
from genesplice_hf.models.akita.conversion_akita import forward_order, from_keras_files
from genesplice_hf.models.akita.keras_akita import read_keras_weights, write_keras_weights
from genesplice_hf.models.akita.modeling_akita import AkitaForContactPrediction
from genesplice_hf.models.akita.modeling_akita_base import AkitaModel
from genesplice_hf.models.tiny_configs import tiny_akita

Arrays = dict[str, np.ndarray]


def published() -> dict[str, Any]:
    """The blocks of the published params.json."""
    return {
        "train": {"batch_size": 2, "optimizer": "sgd", "learning_rate": 0.0065, "momentum": 0.99575, "loss": "mse"},
        "model": {
            "seq_length": 1_048_576, "target_length": 512, "target_crop": 32, "diagonal_offset": 2,
            "augment_rc": True, "augment_shift": 11, "activation": "relu", "batch_norm": True, "bn_momentum": 0.9265,
            "trunk": [
                {"name": "conv_block", "filters": 96, "kernel_size": 11, "pool_size": 2},
                {"name": "conv_tower", "filters_init": 96, "filters_mult": 1.0, "kernel_size": 5, "pool_size": 2,
                 "repeat": 10},
                {"name": "dilated_residual", "filters": 48, "rate_mult": 1.75, "repeat": 8, "dropout": 0.4},
                {"name": "conv_block", "filters": 64, "kernel_size": 5},
            ],
            "head_hic": [
                {"name": "one_to_two", "operation": "mean"},
                {"name": "concat_dist_2d"},
                {"name": "conv_block_2d", "filters": 48, "kernel_size": 3},
                {"name": "symmetrize_2d"},
                {"name": "dilated_residual_2d", "filters": 24, "kernel_size": 3, "rate_mult": 1.75, "repeat": 6,
                 "dropout": 0.1},
                {"name": "cropping_2d", "cropping": 32},
                {"name": "upper_tri", "diagonal_offset": 2},
                {"name": "final", "units": 5, "activation": "linear"},
            ],
        },
    }  # fmt: skip


def keras_weights(model: AkitaForContactPrediction, first: int = 57) -> Arrays:
    """The model's weights as Keras has them, with counters that a busy process would have reached."""
    tensors, arrays = model.state_dict(), {}
    counters = {"conv1d": first, "conv2d": 3, "batch_normalization": 101, "dense": 8}
    for kind, module in forward_order(model.config, "contact_prediction"):
        layer, counters[kind] = f"{kind}_{counters[kind]}", counters[kind] + 1
        weight = tensors[f"{module}.weight"].numpy()
        if kind == "batch_normalization":
            arrays[f"{layer}/gamma:0"], arrays[f"{layer}/beta:0"] = weight, tensors[f"{module}.bias"].numpy()
            arrays[f"{layer}/moving_mean:0"] = tensors[f"{module}.running_mean"].numpy()
            arrays[f"{layer}/moving_variance:0"] = tensors[f"{module}.running_var"].numpy()
            continue
        arrays[f"{layer}/kernel:0"] = {2: lambda w: w.T, 3: lambda w: w.transpose(2, 1, 0),
                                       4: lambda w: w.transpose(2, 3, 1, 0)}[weight.ndim](weight)  # fmt: skip
        if kind == "dense":
            arrays[f"{layer}/bias:0"] = tensors[f"{module}.bias"].numpy()
    return arrays


@pytest.fixture(scope="module")
def original() -> tuple[AkitaForContactPrediction, dict[str, Any], Arrays]:
    model = small(dtype=torch.float32)
    return model, model.config.to_params_json(), keras_weights(model)


def test_published_params_are_the_defaults() -> None:
    found, expected = AkitaConfig.from_params_json(published()).to_dict(), AkitaConfig().to_dict()
    assert found == expected


def test_params_from_a_file_and_back(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(published()))
    config = AkitaConfig.from_params_json(tmp_path / "params.json", num_targets=3)
    assert config.num_targets == 3 and config.target_names is None
    for config in (AkitaConfig(), tiny_akita(concat_distance=False, one_to_two="max", hidden_act="quick_gelu")):
        again = AkitaConfig.from_params_json(json.loads(json.dumps(config.to_params_json())))
        assert again.to_dict() == config.to_dict() | {"target_names": again.target_names}


def changed(part: str, place: int, **keys: Any) -> dict[str, Any]:
    params = published()
    params["model"][part][place] |= keys
    return params


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (changed("trunk", 1, name="res_tower"), "'res_tower'"),
        (changed("trunk", 0, stride=2), "stride"),
        (changed("head_hic", 6, diagonal_offset=3), "diagonal_offset"),
        ({"model": {"trunk": [], "head_mouse": []}}, "head_hic"),
        ({"model": published()["model"] | {"activation": "selu"}}, "selu"),
        ({"model": published()["model"] | {"batch_norm": False}}, "batch_norm"),
        ({"model": published()["model"] | {"mystery": 1}}, "mystery"),
        ({"model": published()["model"] | {"head_hic": published()["model"]["head_hic"][:-1]}}, "'final'"),
        (
            {"model": published()["model"] | {"trunk": [*published()["model"]["trunk"], {"name": "dense"}]}},
            "after Akita's last",
        ),
    ],
)
def test_params_of_another_network_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        AkitaConfig.from_params_json(params)


def test_published_layers() -> None:
    kinds = [slot.kind for slot in forward_order(AkitaConfig(), "contact_prediction")]
    assert kinds == ["conv1d", "batch_normalization"] * 28 + ["conv2d", "batch_normalization"] * 13 + ["dense"]


def test_from_original_gives_the_same_outputs(original: Any) -> None:
    """Against the plain twin, which knows the layers and none of our modules."""
    model, params, arrays = original
    found = genesplice_hf.from_original("akita", params, arrays)
    assert type(found) is AkitaForContactPrediction and not found.training
    with torch.no_grad():
        assert torch.equal(found(bases()).logits, model(bases()).logits)
    twice = genesplice_hf.from_original("akita", params, arrays, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(twice(bases()).logits, twin(twice, bases())[1], atol=1e-9, rtol=1e-12)


def test_there_and_back_is_bit_exact(original: Any) -> None:
    _, params, arrays = original
    model = genesplice_hf.from_original("akita", params, {name: torch.tensor(array) for name, array in arrays.items()})
    config, back = genesplice_hf.to_original(model)
    assert config == params
    assert list(back) == list(arrays)
    assert all(np.array_equal(back[name].numpy(), array) for name, array in arrays.items())


def test_a_model_of_ours_gets_the_names_of_a_fresh_process() -> None:
    config, back = genesplice_hf.to_original(small(dtype=torch.float32))
    names = list(back)
    assert names[0] == "conv1d/kernel:0" and names[1] == "batch_normalization/gamma:0"
    assert "conv1d_1/kernel:0" in names and "conv2d/kernel:0" in names and names[-1] == "dense/bias:0"
    again = genesplice_hf.from_original("akita", config, back)
    with torch.no_grad():
        assert torch.equal(again(bases()).logits, small(dtype=torch.float32)(bases()).logits)


def test_the_trunk_alone(original: Any) -> None:
    model, params, arrays = original
    trunk = genesplice_hf.from_original("akita", params, arrays, task="base")
    assert type(trunk) is AkitaModel
    assert {name.split("/")[0] for name in trunk.config.conversion["ignored_keys"]} >= {"conv2d_3", "dense_8"}
    with torch.no_grad():
        assert torch.equal(trunk(bases()).last_hidden_state, model.akita(bases()).last_hidden_state)
    _, back = genesplice_hf.to_original(trunk)
    assert all(np.array_equal(back[name].numpy(), arrays[name]) for name in back)
    again = genesplice_hf.from_original("akita", params, back)
    assert type(again) is AkitaModel


def spoilt(arrays: Arrays, fault: str) -> Arrays:
    """One wrong layer."""
    names = list(arrays)
    norm = [name for name in names if name.startswith("batch_normalization_103/")]
    if fault == "missing":
        return {name: array for name, array in arrays.items() if name not in norm}
    if fault == "surplus":
        return arrays | {"dense_9/kernel:0": np.zeros((3, 3)), "dense_9/bias:0": np.zeros(3)}
    if fault == "shape":
        return arrays | {names[0]: arrays[names[0]][:-1]}
    return {name: array for name, array in arrays.items() if name != norm[1]}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "needs a batch_normalization"),
        ("surplus", "surplus: dense_9"),
        ("shape", r"conv1d_57/kernel is \(4, 4, 12\), needs \(5, 4, 12\)"),
        ("weight", "batch_normalization_103 holds"),
    ],
)
def test_one_wrong_layer_raises(original: Any, fault: str, message: str) -> None:
    _, params, arrays = original
    with pytest.raises(CheckpointError, match=message):
        genesplice_hf.from_original("akita", params, spoilt(arrays, fault))


def test_another_architecture_is_refused(original: Any) -> None:
    _, params, arrays = original
    with pytest.raises(CheckpointError, match="several species"):
        genesplice_hf.from_original("akita", published(), arrays)
    with pytest.raises(CheckpointError, match="no name of a Keras weight"):
        genesplice_hf.from_original("akita", params, {"kernel": np.zeros((5, 4, 12))})


@pytest.mark.parametrize("name", ["weights.h5", "weights.npz"])
def test_files_there_and_back(original: Any, name: str, tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    model, params, arrays = original
    write_keras_weights(tmp_path / name, arrays)
    found = read_keras_weights(tmp_path / name)
    assert list(found) == list(arrays)
    assert all(np.array_equal(found[key], arrays[key]) and found[key].dtype == arrays[key].dtype for key in arrays)
    (tmp_path / "params.json").write_text(json.dumps(params))
    loaded = from_keras_files(tmp_path / name, tmp_path / "params.json")
    with torch.no_grad():
        assert torch.equal(loaded(bases()).logits, model(bases()).logits)


@pytest.mark.parametrize("style", ["keras2", "keras3"])
def test_a_whole_model_is_read_in_forward_order(original: Any, style: str, tmp_path: Path) -> None:
    """`layer_names` upside down; what feeds what stands in `model_config`."""
    h5py = pytest.importorskip("h5py")
    _, _, arrays = original
    write_keras_weights(tmp_path / "weights.h5", arrays)
    layers = list(dict.fromkeys(name.split("/")[0] for name in arrays))
    chain = ["input_1"]
    for layer in layers:
        chain += [layer, f"relu_of_{layer}"]
    described = [
        {"name": layer, "config": {"name": layer}, "inbound_nodes": inbound(chain[max(place - 1, 0)], place, style)}
        for place, layer in enumerate(chain)
    ]
    with h5py.File(tmp_path / "weights.h5", "r") as weights, h5py.File(tmp_path / "model.h5", "w") as model:
        model.attrs["model_config"] = json.dumps({"config": {"layers": described[::-1]}})
        group = model.create_group("model_weights")
        group.attrs["layer_names"] = [name.encode() for name in sorted(chain)]
        for layer in chain:
            if layer in weights:
                weights.copy(layer, group)
            else:
                group.create_group(layer).attrs["weight_names"] = np.array([], dtype="S1")
    assert list(read_keras_weights(tmp_path / "model.h5")) == list(arrays)


def inbound(source: str, place: int, style: str) -> list[Any]:
    if place == 0:
        return []
    if style == "keras2":
        return [[[source, 0, 0, {}]]]
    tensor = {"class_name": "__keras_tensor__", "config": {"keras_history": [source, 0, 0]}}
    return [{"args": [tensor], "kwargs": {}}]


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="HDF5 or npz"):
        read_keras_weights(tmp_path / "model.safetensors")
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.h5", "w") as opened:
        opened["layers/conv1d/vars/0"] = np.zeros(3)
    with pytest.raises(CheckpointError, match="layer_names"):
        read_keras_weights(tmp_path / "other.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(CheckpointError, match=r"genesplice-hf\[tracks\]"):
        read_keras_weights(tmp_path / "other.h5")
