"""Variables of the original Enformer (google-deepmind/deepmind-research, TensorFlow and Sonnet) as tensors.

No TensorFlow is needed: the variables come from an `.npz` of {variable name: array}. Names are compared without the
`:0` at their end and with scopes that Sonnet writes twice in a row (`stem/stem`) written once.
"""

import re
from os import PathLike
from typing import NamedTuple

import numpy as np
import torch

from genesplice_hf.errors import CheckpointError

BATCH_NORM = {
    "weight": "scale",
    "bias": "offset",
    "running_mean": "moving_mean/average",
    "running_var": "moving_variance/average",
}
LAYER_NORM = {"weight": "scale", "bias": "offset"}
PRODUCT = {"weight": "w", "bias": "b"}
# What the moving averages keep beside the average.
COUNTERS = re.compile(r"/moving_(mean|variance)/(hidden|counter)$")


def read_variables(path: str | PathLike) -> dict[str, torch.Tensor]:
    """The arrays of an `.npz` as tensors under their names; nothing in it is executed."""
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


class TensorFlowNames(NamedTuple):
    """Key of enformer-pytorch -> variable, for all but the heads, whose species are in the variables' names."""

    variables: dict[str, str]

    @classmethod
    def of(cls, num_blocks: int, num_layers: int) -> "TensorFlowNames":
        trunk = "enformer/trunk/"
        modules: dict[str, tuple[str, dict[str, str]]] = {
            "stem.0": (f"{trunk}stem/conv1_d", PRODUCT),
            **_pointwise("stem", f"{trunk}stem"),
            "final_pointwise.1.0": (f"{trunk}final_pointwise/conv_block/batch_norm", BATCH_NORM),
            "final_pointwise.1.2": (f"{trunk}final_pointwise/conv_block/conv1_d", PRODUCT),
        }
        for index in range(num_blocks):
            scope, name = f"{trunk}conv_tower/conv_tower_block_{index}", f"conv_tower.{index}"
            modules[f"{name}.0.0"] = (f"{scope}/conv_block/batch_norm", BATCH_NORM)
            modules[f"{name}.0.2"] = (f"{scope}/conv_block/conv1_d", PRODUCT)
            modules |= _pointwise(name, scope)
        for index in range(num_layers):
            modules |= _layer(index, f"{trunk}transformer/transformer_block_{index}")
        return cls(
            {
                f"{module}.{part}": f"{scope}/{variable}"
                for module, (scope, parts) in modules.items()
                for part, variable in parts.items()
            }
        )

    def to_torch(self, variables: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """(tensors under enformer-pytorch's keys, names without an effect); unknown names stay as they are."""
        keys = {variable: key for key, variable in self.variables.items()}
        ignored = [name for name in variables if COUNTERS.search(_plain(name))]
        tensors: dict[str, torch.Tensor] = {}
        origin: dict[str, str] = {}
        for name in sorted(variables.keys() - set(ignored)):
            plain = _plain(name)
            key = keys.get(plain) or _head_key(plain) or name
            if key in tensors:
                raise CheckpointError(f"`{name}` and `{origin[key]}` name the same variable; leave out one.")
            tensors[key], origin[key] = _as_torch(key, variables[name]), name
        counts = {
            key.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
            for key in tensors
            if key.endswith("running_mean")
        }
        return tensors | counts, ignored

    def to_variables(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The way back."""
        found = {}
        for key, tensor in tensors.items():
            head = re.fullmatch(r"_heads\.(.+)\.0\.(weight|bias)", key)
            if key.endswith("num_batches_tracked"):
                continue
            name = f"enformer/heads/head_{head[1]}/linear/{PRODUCT[head[2]]}" if head else self.variables[key]
            found[name] = _as_variable(key, tensor)
        return found


def _pointwise(name: str, scope: str) -> dict[str, tuple[str, dict[str, str]]]:
    block = f"{scope}/pointwise_conv_block"
    return {
        f"{name}.1.fn.0": (f"{block}/batch_norm", BATCH_NORM),
        f"{name}.1.fn.2": (f"{block}/conv1_d", PRODUCT),
        f"{name}.2.to_attn_logits": (f"{scope}/softmax_pooling/linear", {"weight": "w"}),
    }


def _layer(index: int, scope: str) -> dict[str, tuple[str, dict[str, str]]]:
    name, attention = f"transformer.{index}", f"{scope}/mha/attention_{index}"
    projections = {"to_q": "q_layer", "to_k": "k_layer", "to_v": "v_layer", "to_rel_k": "r_k_layer"}
    return {
        f"{name}.0.fn.0": (f"{scope}/mha/layer_norm", LAYER_NORM),
        **{
            f"{name}.0.fn.1.{ours}": (f"{attention}/{theirs}", {"weight": "w"}) for ours, theirs in projections.items()
        },
        f"{name}.0.fn.1.to_out": (f"{attention}/embedding_layer", PRODUCT),
        f"{name}.0.fn.1": (attention, {"rel_content_bias": "r_w_bias", "rel_pos_bias": "r_r_bias"}),
        f"{name}.1.fn.0": (f"{scope}/mlp/layer_norm", LAYER_NORM),
        f"{name}.1.fn.1": (f"{scope}/mlp/project_in", PRODUCT),
        f"{name}.1.fn.4": (f"{scope}/mlp/project_out", PRODUCT),
    }


def _plain(name: str) -> str:
    parts = re.sub(r":\d+$", "", name).split("/")
    return "/".join(part for index, part in enumerate(parts) if index == 0 or part != parts[index - 1])


def _head_key(name: str) -> str | None:
    match = re.fullmatch(r"enformer/heads/head_(.+)/linear/([wb])", name)
    return None if match is None else f"_heads.{match[1]}.0.{'weight' if match[2] == 'w' else 'bias'}"


def _as_torch(key: str, array: torch.Tensor) -> torch.Tensor:
    """Kernels (k, in, out) -> (out, in, k), matrices (in, out) -> (out, in), statistics (1, 1, C) -> (C,)."""
    if key.endswith(("running_mean", "running_var")):
        return array.flatten()
    if key.endswith("to_attn_logits.weight"):
        return array.t()[..., None, None].contiguous()
    if key.endswith(".weight") and array.dim() in (2, 3):
        return array.permute(*reversed(range(array.dim()))).contiguous()
    return array


def _as_variable(key: str, tensor: torch.Tensor) -> torch.Tensor:
    if key.endswith(("running_mean", "running_var")):
        return tensor[None, None]
    if key.endswith("to_attn_logits.weight"):
        return tensor[..., 0, 0].t().contiguous()
    if key.endswith(".weight") and tensor.dim() in (2, 3):
        return tensor.permute(*reversed(range(tensor.dim()))).contiguous()
    return tensor
