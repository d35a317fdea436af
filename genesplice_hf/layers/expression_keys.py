"""What references of expression models call their modules, and tensors of theirs that join several of ours.

Maps are {our module: their module}; ours are named without the base model's prefix.
"""

from collections.abc import Iterable, Mapping

import torch

from genesplice_hf.errors import CheckpointError

# The embeddings of the first BioFormer and of its scGPT-like baseline.
SEED_EMBEDDINGS = {
    "embeddings.gene": "emb_g.embedding",
    "embeddings.gene_norm": "emb_g.enc_norm",
    **{f"embeddings.value.{part}": f"emb_x.{part}" for part in ("linear1", "linear2", "norm")},
}
DECODERS = {
    **{f"expression_head.{place}": f"decoder.fc.{place}" for place in (0, 2, 4)},
    **{f"zero_head.{place}": f"decoder.zero_logit.{place}" for place in (0, 2, 4)},
}
# Prefixes of a data-parallel wrapper.
_WRAPPERS = ("module.",)


def unwrapped(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without the prefix that data-parallel training puts before every name."""
    found = dict(tensors)
    for wrapper in _WRAPPERS:
        if found and all(key.startswith(wrapper) for key in found):
            found = {key.removeprefix(wrapper): tensor for key, tensor in found.items()}
    return found


def starting(keys: Iterable[str], *prefixes: str) -> list[str]:
    """The keys with one of the prefixes, sorted."""
    return sorted(key for key in keys if key.startswith(prefixes))


def without_base(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Our tensors without the base model's prefix."""
    return {key.removeprefix(f"{prefix}."): tensor for key, tensor in tensors.items()}


def with_base(
    tensors: Mapping[str, torch.Tensor], prefix: str, heads: Iterable[str], task: str
) -> dict[str, torch.Tensor]:
    """Our tensors with the base model's prefix before all but the heads', unless they are a base model's."""
    own = tuple(f"{head}." for head in heads)
    return {
        key if task == "base" or key.startswith(own) else f"{prefix}.{key}": tensor for key, tensor in tensors.items()
    }


def demand_known(tensors: Mapping[str, torch.Tensor], modules: Mapping[str, str], source: str) -> None:
    """Raises where a tensor of ours has no name in the reference.

    Raises:
        CheckpointError: lists them.
    """
    strange = sorted(key for key in tensors if key.rpartition(".")[0] not in modules)
    if strange:
        raise CheckpointError(f"{source!r} has nothing like {', '.join(strange)}; the model cannot go back.")
