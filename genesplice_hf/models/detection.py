"""Which published DNA language model a checkpoint is, told from its config and the names and shapes of its tensors.

Names of tensors decide before `model_type`, for some published configs have none or name another architecture.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from genesplice_hf.errors import UnknownCheckpointError

Shapes = Mapping[str, Sequence[int]]
# 5 special tokens and 4^k k-mers, k = 3, 4, 5, 6.
DNABERT_VOCABULARIES = {69, 261, 1029, 4101}
_MAX_LISTED = 20
_GPN_KEYS = ("model.encoder.layer.0.conv.2.weight", "model.encoder.layer.0.layer.6.weight", "model.ln_f.weight")


def detect_dna_lm(config: Mapping[str, Any], key_shapes: Shapes) -> str:
    """The `source` of `from_original` that a checkpoint belongs to; reads no weights.

    Args:
        config: the checkpoint's config.json; `model_type` may be missing or wrong.
        key_shapes: shape of every tensor by its name in the checkpoint.

    Returns:
        The first source in the order of `_RULES` whose rule holds.

    Raises:
        UnknownCheckpointError: no rule holds; the message lists the first tensor names.
    """
    for source, holds in _RULES.items():
        if holds(config, key_shapes):
            return source
    keys = list(key_shapes)
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    raise UnknownCheckpointError(
        f"the checkpoint (`model_type` {config.get('model_type')!r}) is none of {', '.join(_RULES)}; its tensors are "
        f"{', '.join(keys[:_MAX_LISTED]) or 'none'}{more}. Name its architecture through `from_original`, or load it "
        "with the code that it came with."
    )


def _has(shapes: Shapes, pattern: str) -> bool:
    return any(re.search(pattern, key) for key in shapes)


def _is_dnabert2(config: Mapping[str, Any], shapes: Shapes) -> bool:
    return _has(shapes, r"\bWqkv\.weight$") and _has(shapes, r"\bmlp\.gated_layers\.weight$")


def _is_caduceus(config: Mapping[str, Any], shapes: Shapes) -> bool:
    return _has(shapes, r"\bmixer\.(submodule\.)?mamba_fwd\b")


def _is_hyenadna(config: Mapping[str, Any], shapes: Shapes) -> bool:
    # Checkpoints trained with gradient checkpointing say `mixer.layer` for `mixer`.
    return _has(shapes, r"\bmixer\.(layer\.)?filter_fn\.implicit_filter\b")


def _is_gpn_convnet(config: Mapping[str, Any], shapes: Shapes) -> bool:
    return config.get("model_type") == "ConvNet" or "model.encoder.0.conv.1.weight" in shapes


def _is_gpn(config: Mapping[str, Any], shapes: Shapes) -> bool:
    return config.get("model_type") == "GPN" or any(key in shapes for key in _GPN_KEYS)


def _is_gpn_msa(config: Mapping[str, Any], shapes: Shapes) -> bool:
    by_keys = "model.encoder.embed_positions.weight" in shapes and _has(shapes, r"^cls\.predictions\.")
    return config.get("model_type") == "GPNRoFormer" or by_keys


def _is_nt_v2(config: Mapping[str, Any], shapes: Shapes) -> bool:
    if not _is_nt_v1(config, shapes):
        return False
    width = config.get("intermediate_size")
    gated = [shape for key, shape in shapes.items() if key.endswith(".intermediate.dense.weight")]
    return "add_bias_fnn" in config or (width is not None and any(shape[0] == 2 * width for shape in gated))


def _is_nt_v1(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """The names of ESM; its last norm tells a base model without the prefix from BERT."""
    return _has(shapes, r"^esm\.encoder\.layer\.") or _has(shapes, r"^encoder\.emb_layer_norm_after\.")


def _is_dnabert1(config: Mapping[str, Any], shapes: Shapes) -> bool:
    table = next((shapes[key] for key in shapes if key.endswith("embeddings.word_embeddings.weight")), None)
    size = config.get("vocab_size") if table is None else table[0]
    named = _has(shapes, r"^(bert\.)?encoder\.layer\.\d+\.attention\.self\.query\.")
    return named and size in DNABERT_VOCABULARIES


# First match wins: a rule may rely on those above it having failed.
_RULES: dict[str, Callable[[Mapping[str, Any], Shapes], bool]] = {
    "dnabert2": _is_dnabert2,
    "caduceus": _is_caduceus,
    "hyenadna": _is_hyenadna,
    "gpn_convnet": _is_gpn_convnet,
    "gpn": _is_gpn,
    "gpn_msa": _is_gpn_msa,
    "nt_v2": _is_nt_v2,
    "nt_v1": _is_nt_v1,
    "dnabert1": _is_dnabert1,
}
