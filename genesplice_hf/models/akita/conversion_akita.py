"""The past of Akita: Basenji's `params.json` and Keras weights (github.com/calico/basenji), both ways.

Keras numbers its layers by how many a process made before (`conv1d_57`), so that names say nothing: layers are matched
by their order and by what they hold.
"""

from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from genesplice_hf.errors import CheckpointError
from genesplice_hf.models.akita.configuration_akita import AkitaConfig
from genesplice_hf.models.akita.keras_akita import layer_of, read_keras_weights, weight_of
from genesplice_hf.models.akita.modeling_akita import AkitaForContactPrediction
from genesplice_hf.models.akita.modeling_akita_base import AkitaModel

# Our name of each Keras weight, per kind of layer.
_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_WEIGHTS = {
    "conv1d": {"kernel": "weight"},
    "conv2d": {"kernel": "weight"},
    "batch_normalization": _NORM,
    "dense": {"kernel": "weight", "bias": "bias"},
}
_KINDS_BY_DIMENSION = {2: "dense", 3: "conv1d", 4: "conv2d"}
_RECORD = "keras_layers"


class _Slot(NamedTuple):
    """A place in the forward order: the kind of layer that Keras has there, and our module."""

    kind: str
    module: str


class AkitaSource:
    """Source `akita` of `from_original`: params.json, and {Keras name: array} in forward order."""

    name = "akita"
    model_type = AkitaConfig.model_type
    original_types: tuple[str, ...] = ()
    classes: dict[str, type[PreTrainedModel]] = {"base": AkitaModel, "contact_prediction": AkitaForContactPrediction}
    inputs: tuple[str, ...] = ()

    @staticmethod
    def task(state_dict: dict[str, Any]) -> str:
        """The task whose head the arrays hold: kernels of two dimensions belong to the map."""
        return "contact_prediction" if any(np.ndim(array) == 4 for array in state_dict.values()) else "base"

    @staticmethod
    def config(original: dict[str, Any], options: dict[str, Any]) -> tuple[AkitaConfig, set[str]]:
        """Our config, and the names of theirs that were understood; `options` are fields of ours."""
        return AkitaConfig.from_params_json(original, **options), set(original)

    @classmethod
    def tensors(
        cls, state_dict: dict[str, Any], config: AkitaConfig, task: str
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """(our tensors, names of the head where the trunk alone is wanted).

        Raises:
            CheckpointError: a layer too many, too few, of another kind or shape; all are listed.
        """
        layers = _layers(state_dict)
        slots = forward_order(config, cls.task(state_dict))
        _demand_layers(layers, slots, _shapes(config))
        ours: dict[str, torch.Tensor] = {}
        for (layer, arrays), slot in zip(layers.items(), slots, strict=True):
            ours |= _convert_layer(layer, arrays, slot)
        config.conversion = (config.conversion or {}) | {_RECORD: list(layers)}
        if task == "base":
            trunk = {key.removeprefix("akita."): tensor for key, tensor in ours.items() if key.startswith("akita.")}
            head = [layer for layer, slot in zip(layers, slots, strict=True) if slot.module.startswith("classifier")]
            return trunk, [name for name in state_dict if layer_of(name) in head]
        return ours, []

    @classmethod
    def original(cls, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """params.json and {Keras name: tensor}, under the layer names that the weights came with.

        Raises:
            CheckpointError: the reference has no such head.
        """
        task = next((task for task, kind in cls.classes.items() if type(model) is kind), None)
        if task is None:
            raise CheckpointError(f"{cls.name!r} has no head like {type(model).__name__}.")
        config: Any = model.config
        slots = forward_order(config, task)
        recorded = (config.conversion or {}).get(_RECORD) or []
        names = recorded[: len(slots)] if len(recorded) >= len(slots) else _keras_names(slots)
        tensors = model.state_dict()
        prefix = "akita." if task == "base" else ""
        theirs: dict[str, torch.Tensor] = {}
        for layer, slot in zip(names, slots, strict=True):
            for weight, ours in _WEIGHTS[slot.kind].items():
                tensor = tensors[f"{slot.module}.{ours}".removeprefix(prefix)]
                theirs[f"{layer}/{weight}:0"] = _transposed(tensor.detach(), weight).contiguous().clone()
        return config.to_params_json(), theirs


def from_keras_files(
    weights: str | PathLike, params: str | PathLike | Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> AkitaForContactPrediction:
    """Our model of a published `model_best.h5` (or `.npz`) and its `params.json`, in evaluation mode.

    Raises:
        CheckpointError: a layer that does not fit; h5py is missing.
    """
    config = AkitaConfig.from_params_json(dict(params) if isinstance(params, Mapping) else params)
    tensors, _ = AkitaSource.tensors(read_keras_weights(weights), config, "contact_prediction")
    model = AkitaForContactPrediction(config).to(dtype)
    model.load_state_dict(tensors)
    return model.eval()


def forward_order(config: AkitaConfig, task: str) -> list[_Slot]:
    """The layers with weights as the network uses them."""
    blocks = ["stem", *(f"conv_tower.{i}" for i in range(config.tower_repeat))]
    pairs = [("conv1d", f"akita.{block}", "") for block in blocks]
    pairs += [("conv1d", f"akita.dilated.{i}", n) for i in range(config.dilated_repeat) for n in ("1", "2")]
    pairs.append(("conv1d", "akita.trunk_out", ""))
    if task != "base":
        pairs.append(("conv2d", "classifier", ""))
        pairs += [("conv2d", f"classifier.dilated.{i}", n) for i in range(config.dilated2d_repeat) for n in ("1", "2")]
    slots = []
    for kind, block, number in pairs:
        slots += [_Slot(kind, f"{block}.conv{number}"), _Slot("batch_normalization", f"{block}.norm{number}")]
    return slots if task == "base" else [*slots, _Slot("dense", "classifier.final")]


def _shapes(config: AkitaConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AkitaForContactPrediction(config)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _layers(state_dict: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """{layer: {weight: array}} in the given order."""
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, array in state_dict.items():
        layers.setdefault(layer_of(name), {})[weight_of(name)] = np.asarray(array)
    return layers


def _kind(arrays: Mapping[str, np.ndarray]) -> str:
    if "gamma" in arrays or "moving_mean" in arrays:
        return "batch_normalization"
    return _KINDS_BY_DIMENSION.get(arrays["kernel"].ndim, "unknown") if "kernel" in arrays else "unknown"


def _demand_layers(
    layers: Mapping[str, Mapping[str, np.ndarray]], slots: list[_Slot], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    faults = [
        fault
        for (layer, arrays), slot in zip(layers.items(), slots, strict=False)
        if (fault := _misfit(layer, arrays, slot, shapes))
    ]
    names = list(layers)
    faults += [f"surplus: {layer} ({_kind(layers[layer])})" for layer in names[len(slots) :]]
    faults += [f"missing: a {slot.kind} for {slot.module}" for slot in slots[len(names) :]]
    if faults:
        more = f"; and {len(faults) - 12} more" if len(faults) > 12 else ""
        raise CheckpointError(
            f"`state_dict` holds {len(names)} layers with weights and does not fit an Akita of {len(slots)}: "
            f"{'; '.join(faults[:12])}{more}. Check that `config` is the params.json of these weights; models of "
            "several species or heads (2021) have another architecture."
        )


def _misfit(
    layer: str, arrays: Mapping[str, np.ndarray], slot: _Slot, shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    if _kind(arrays) != slot.kind:
        return f"{layer} is a {_kind(arrays)}, needs a {slot.kind} for {slot.module}"
    wanted = _WEIGHTS[slot.kind]
    if arrays.keys() != wanted.keys():
        return f"{layer} holds {sorted(arrays)}, needs {sorted(wanted)} for {slot.module}"
    for weight, ours in wanted.items():
        needed = _keras_shape(shapes[f"{slot.module}.{ours}"], weight)
        if arrays[weight].shape != needed:
            return f"{layer}/{weight} is {arrays[weight].shape}, needs {needed} for {slot.module}"
    return None


def _keras_shape(shape: tuple[int, ...], weight: str) -> tuple[int, ...]:
    return (*shape[2:], shape[1], shape[0]) if weight == "kernel" else shape


def _convert_layer(layer: str, arrays: Mapping[str, np.ndarray], slot: _Slot) -> dict[str, torch.Tensor]:
    found = {
        f"{slot.module}.{ours}": _untransposed(torch.from_numpy(np.array(arrays[weight])), weight).contiguous()
        for weight, ours in _WEIGHTS[slot.kind].items()
    }
    if slot.kind == "batch_normalization":
        # Keras does not count batches; torch's count has no effect with a fixed momentum.
        found[f"{slot.module}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    return found


def _transposed(tensor: torch.Tensor, weight: str) -> torch.Tensor:
    """(out, in, ...) -> (..., in, out), for kernels."""
    return tensor.permute(*range(2, tensor.dim()), 1, 0) if weight == "kernel" else tensor


def _untransposed(tensor: torch.Tensor, weight: str) -> torch.Tensor:
    """(..., in, out) -> (out, in, ...), for kernels."""
    return tensor.permute(-1, -2, *range(tensor.dim() - 2)) if weight == "kernel" else tensor


def _keras_names(slots: list[_Slot]) -> list[str]:
    """conv1d, conv1d_1, ...: what a fresh Keras process calls them."""
    seen: dict[str, int] = {}
    names = []
    for slot in slots:
        number = seen.get(slot.kind, 0)
        seen[slot.kind] = number + 1
        names.append(f"{slot.kind}_{number}" if number else slot.kind)
    return names


SOURCES = (AkitaSource,)
