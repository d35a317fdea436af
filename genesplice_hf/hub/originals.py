"""`load_dna_lm`: a published DNA language model with the tokenizer and the facts that belong to it, in one call.

It takes the original repositories and the folders that `convert` or `save_pretrained` wrote. Which model it is, is
told from config.json and the header of the weight file.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from genesplice_hf.errors import CheckpointError
from genesplice_hf.hub.original_tokenizers import TokenizerFiles, make_tokenizer
from genesplice_hf.models.detection import detect_dna_lm
from genesplice_hf.models.original import SOURCES, load_original
from genesplice_hf.models.original_files import (
    HUB_KEYWORDS,
    find_file,
    find_weights,
    read_config,
    read_shapes,
    sha256,
)
from genesplice_hf.tokenization.dna_lm_spec import DnaLMSpec, dna_lm_spec

logger = logging.getLogger(__name__)

_AUTO_CLASSES = {
    "base": AutoModel,
    "masked_lm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
}
_NON_COMMERCIAL = "weights under CC-BY-NC-SA 4.0: non-commercial use, share alike"
_LICENCES = {
    "nt_v1": f"Nucleotide Transformer and AgroNT: {_NON_COMMERCIAL}",
    "nt_v2": f"Nucleotide Transformer v2: {_NON_COMMERCIAL}",
}
_FIXES = {
    "nt_v1": (
        "tokenizer: cut to the embedded tokens (no <eos>, <bos>)",
        "tokenizer: lower case is folded, ambiguity codes become N",
    ),
    "nt_v2": ("tokenizer: lower case is folded, ambiguity codes become N",),
    "dnabert1": ("tokenizer: do_lower_case is not followed",),
    "dnabert2": ("config: pad_token_id is the tokenizer's",),
    "hyenadna": ("tokenizer: [SEP] behind the sequence only, padding on the right",),
    "caduceus": ("tokenizer: padding on the right",),
}
# Windows of pre-training in bp, where the config does not say.
_TRAINED_BP = {"gpn_convnet": 512, "gpn": 512, "gpn_msa": 128, "caduceus": 131_072}
# PEFT defaults of transformers' own types, which have no class attributes of ours; the same as in `adaptation`.
_TARGETS = {
    "lora_targets": ("query", "value"),
    "ia3_targets": (r".*(attention\.self\.(key|value)|layer\.\d+\.output\.dense)",),
    "ia3_feedforward": (r".*layer\.\d+\.output\.dense",),
}


class DnaLM(NamedTuple):
    """A model with what belongs to it.

    Attributes:
        model: in evaluation mode.
        tokenizer: with the ids of the model.
        spec: facts for scoring and adapters, and the audit record of the import.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: DnaLMSpec


def load_dna_lm(
    path_or_repo: str | PathLike,
    task: str = "auto",
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    layer_norm_eps: str | float = "config",
    strict: bool = True,
    num_labels: int | None = None,
    problem_type: str | None = None,
    id2label: dict[int, str] | None = None,
    **hub: Any,
) -> DnaLM:
    """Loads a published DNA language model, or one of ours, without remote code.

    Args:
        path_or_repo: folder or Hub id, in the original layout or in ours.
        task: "base", "masked_lm", "causal_lm", "sequence_classification" or "token_classification"; "auto" = the head
            that the weights hold. A classifier that they do not hold is drawn anew.
        revision: branch, tag or commit of a Hub repository.
        dtype, device_map, attn_implementation: as `from_pretrained`; dtype None = that of the weights.
        layer_norm_eps: "config" keeps the value of config.json, "original" that of the training code (Nucleotide
            Transformer), or a number.
        strict: False lets tensors be missing or left over, with a warning that lists them.
        num_labels, problem_type, id2label: of a classifier.
        **hub: `token`, `cache_dir`, `local_files_only`, `force_download`, `proxies`, `subfolder`.

    Raises:
        UnknownCheckpointError: no architecture of the package has these tensors.
        CheckpointError: they do not fit, the vocabulary is in another order, or the task does not exist.
    """
    unknown = sorted(set(hub) - set(HUB_KEYWORDS))
    if unknown:
        raise TypeError(f"load_dna_lm has no argument `{unknown[0]}`")
    where = {name: value for name, value in (hub | {"revision": revision}).items() if value is not None}
    given = {
        "num_labels": num_labels,
        "problem_type": problem_type,
        "id2label": id2label,
        "layer_norm_eps": None if layer_norm_eps == "config" else layer_norm_eps,
    }
    fields = {name: value for name, value in given.items() if value is not None}
    loading = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
    options = {name: value for name, value in loading.items() if value is not None}
    config = _read_config(path_or_repo, where)
    if _is_ours(config):
        return _load_ours(path_or_repo, task, config, where, fields | options)
    source, shapes = _identify(path_or_repo, config, where)
    _show_licence(source)
    model = load_original(source, path_or_repo, task, hub=where, fields=fields, strict=strict, **options)
    tokenizer = make_tokenizer(source, _tokenizer_files(path_or_repo, where), model.config)
    if source == "dnabert2":
        model.config.pad_token_id = tokenizer.pad_token_id
    return DnaLM(model, tokenizer, _spec(source, model.config, tokenizer, tuple(shapes)))


def convert(
    path_or_repo: str | PathLike, out: str | PathLike, task: str = "auto", revision: str | None = None
) -> DnaLM:
    """Writes a published DNA language model in our layout: config, safetensors and tokenizer.

    The config keeps the record of the import: source, repository, revision, SHA-256 of every weight file, version of
    the converter, keys without an effect.

    Args:
        path_or_repo, task, revision: as `load_dna_lm`.
        out: a folder that does not exist yet or is empty.

    Raises:
        CheckpointError: as `load_dna_lm`; also `out` holds files, or the source is in our layout already.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"`out` ({out}) must be a new or empty folder, and it holds files; choose another one.")
    where = {} if revision is None else {"revision": revision}
    if _is_ours(_read_config(path_or_repo, where)):
        raise CheckpointError(f"`{path_or_repo}` is in our layout already; load it with `from_pretrained`.")
    loaded = load_dna_lm(path_or_repo, task, revision=revision)
    name = Path(path_or_repo).resolve().name if Path(path_or_repo).exists() else str(path_or_repo)
    hashes = {Path(file).name: sha256(file) for file in find_weights(path_or_repo, where)}
    loaded.model.config.conversion |= {"repository": name, "revision": revision, "sha256": hashes}
    # True would write the names of another layout back where transformers keeps a mapping for it (ESM's norms).
    loaded.model.save_pretrained(out, save_original_format=False)
    loaded.tokenizer.save_pretrained(out)
    return loaded


def _read_config(path: str | PathLike, where: Mapping[str, Any]) -> dict[str, Any]:
    config = read_config(path, where)
    if config is None:
        raise CheckpointError(f"`{path}` holds no config.json, by which its weights could be understood.")
    return config


def _is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a folder has one of the package's types; types of transformers look the same before and after."""
    return str(config.get("model_type")).startswith("genesplice")


def _identify(
    path: str | PathLike, config: dict[str, Any], where: dict[str, Any]
) -> tuple[str, dict[str, tuple[int, ...]]]:
    shapes = read_shapes(find_weights(path, where))
    source = detect_dna_lm(config, shapes)
    if source not in SOURCES:
        raise CheckpointError(f"`{path}` is a {source!r} checkpoint, for which this version has no model.")
    return source, shapes


def _load_ours(
    path: str | PathLike, task: str, config: dict[str, Any], where: dict[str, Any], options: dict[str, Any]
) -> DnaLM:
    if task != "auto" and task not in _AUTO_CLASSES:
        raise CheckpointError(f"`task` must be auto or one of {', '.join(_AUTO_CLASSES)}, got {task!r}.")
    auto = AutoModel if task == "auto" else _AUTO_CLASSES[task]
    if task == "auto":
        saved = (config.get("architectures") or [""])[0]
        auto = next((found for name, found in _AUTO_CLASSES.items() if saved.endswith(_suffix(name))), AutoModel)
    model = auto.from_pretrained(path, **where, **options)
    tokenizer = AutoTokenizer.from_pretrained(path, **where)
    source = (config.get("conversion") or {}).get("source") or config["model_type"]
    return DnaLM(model, tokenizer, _spec(source, model.config, tokenizer, ()))


def _suffix(task: str) -> str:
    return {"base": "Model", "masked_lm": "ForMaskedLM", "causal_lm": "ForCausalLM"}.get(
        task, f"For{task.title().replace('_', '')}"
    )


def _tokenizer_files(path: str | PathLike, where: dict[str, Any]) -> TokenizerFiles:
    return TokenizerFiles(find_file(path, "vocab.txt", where), find_file(path, "tokenizer.json", where))


def _spec(source: str, config: PreTrainedConfig, tokenizer: Any, source_keys: tuple[str, ...]) -> DnaLMSpec:
    spec = dna_lm_spec(config, tokenizer)
    facts: dict[str, Any] = {"source_keys": source_keys, "fixes": _FIXES.get(source, ())}
    if config.model_type in ("esm", "bert"):
        facts |= _TARGETS
    if spec.soft_max_bp is None:
        facts["soft_max_bp"] = _TRAINED_BP.get(source, spec.max_bp)
    # Caduceus without built-in equivariance was trained to be averaged over both strands.
    if source == "caduceus" and spec.rc == "none":
        facts["rc"] = "post_hoc"
    return replace(spec, **facts)


@cache
def _show_licence(source: str) -> None:
    """Says once per process what the weights may be used for, where that is less than everything."""
    if source in _LICENCES:
        logger.warning(_LICENCES[source])
