"""Translates state dicts between a reference's module names and ours, and names every fault in its names.

A map is {their module: our module}; the last part of a key (`weight`, `bias`) stays.
"""

from collections.abc import Mapping

import torch

from genesplice_hf.errors import CheckpointError

# What transformers calls the parts of a RoFormer layer -> ours (`layers/roformer.py`).
ROFORMER_LAYER = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.out_proj",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up_proj",
    "output.dense": "down_proj",
    "output.LayerNorm": "output_norm",
}


def renamed(tensors: Mapping[str, torch.Tensor], modules: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The tensors with the modules of their keys renamed; keys of other modules stay as they are."""
    return {rename(key, modules): tensor for key, tensor in tensors.items()}


def rename(key: str, modules: Mapping[str, str]) -> str:
    """One key with its module renamed."""
    module, _, name = key.rpartition(".")
    return f"{modules[module]}.{name}" if module in modules else key


def inverted(modules: Mapping[str, str]) -> dict[str, str]:
    """The way back."""
    return {ours: theirs for theirs, ours in modules.items()}


def demand_keys(
    tensors: Mapping[str, torch.Tensor], needed: Mapping[str, torch.Size | tuple[int, ...]], source: str
) -> None:
    """Raises unless the reference's keys are those that are needed, with their shapes.

    Raises:
        CheckpointError: lists all missing, unexpected and mis-shaped keys, as the reference calls them.
    """
    faults = {
        "missing": sorted(needed.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - needed.keys()),
        "mis-shaped": [
            f"{key} is {tuple(tensors[key].shape)}, needs {tuple(needed[key])}"
            for key in sorted(tensors.keys() & needed.keys())
            if tuple(tensors[key].shape) != tuple(needed[key])
        ],
    }
    lines = [f"{kind}: {', '.join(keys)}" for kind, keys in faults.items() if keys]
    if lines:
        raise CheckpointError(
            f"`state_dict` does not fit {source!r}; {'; '.join(lines)}. "
            "Check that `config` is the one that these tensors were trained with."
        )


def demand_table(key: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Raises unless a table that we compute holds the standard values (up to its own rounding).

    Raises:
        CheckpointError: it does not; the largest deviation is named.
    """
    deviation = (found.double() - expected.double()).abs().max().item()
    allowed = max(tolerance, torch.finfo(found.dtype).eps)
    if not deviation <= allowed:
        raise CheckpointError(
            f"`{key}` differs from the values that it is computed from by {deviation:.2g} (allowed {allowed:.2g}); "
            "the checkpoint was not trained with the standard table, or was saved before it was filled."
        )
