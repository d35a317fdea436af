"""Find, in a model, the task head and the modules that an adapter shall change, and check that they exist."""

import difflib
from dataclasses import fields
from typing import Any

import peft.utils.constants as peft_tables
from peft import PeftConfig, TaskType
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from genesplice_hf.errors import CheckpointError, GeneSpliceError

HEAD_NAMES = ("classifier", "score")

_ESM_FEEDFORWARD = r".*layer\.\d+\.output\.dense"
_ESM_IA3 = r".*(attention\.self\.(key|value)|layer\.\d+\.output\.dense)"
# transformers' own types have no class attributes of ours. `output.dense` alone would also match
# `attention.output.dense`, hence the regexes (215,040 instead of 184,320 parameters on NT-500M).
_FOREIGN_TARGETS: dict[str, dict[str, list[str] | str]] = {
    "esm": {
        "lora_targets": ["query", "value"],
        "ia3_targets": _ESM_IA3,
        "ia3_feedforward": _ESM_FEEDFORWARD,
        "layer_norm_targets": ["LayerNorm", "layer_norm", "emb_layer_norm_after"],
    },
    "bert": {
        "lora_targets": ["query", "value"],
        "ia3_targets": _ESM_IA3,
        "ia3_feedforward": _ESM_FEEDFORWARD,
        "layer_norm_targets": ["LayerNorm"],
    },
}
_PEFT_TABLES = {
    "lora_targets": peft_tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "ia3_targets": peft_tables.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    "ia3_feedforward": peft_tables.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    "layer_norm_targets": peft_tables.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING,
}
_TASK_TYPES = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForCausalLM": TaskType.CAUSAL_LM,
}


def task_head_name(model: nn.Module) -> str | None:
    """The name of the model's task head, `classifier` or `score`; None where it has neither."""
    children = dict(model.named_children())
    return next((name for name in HEAD_NAMES if name in children), None)


def linear_names(model: nn.Module) -> list[str]:
    """The names of all `Linear` modules outside the task head, in the model's order."""
    head = task_head_name(model)
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.split(".")[0] != head
    ]


def default_targets(model: PreTrainedModel, attribute: str) -> list[str] | str:
    """What an adapter changes by default: the config class's own list, ours for esm and bert, then PEFT's.

    Args:
        model: The model to adapt.
        attribute: `lora_targets`, `ia3_targets`, `ia3_feedforward` or `layer_norm_targets`.

    Raises:
        GeneSpliceError: Nobody knows defaults for this model type; the message lists the Linear modules.
    """
    model_type = model.config.model_type
    own = getattr(type(model.config), attribute, None)
    if own is not None:
        return _existing(model, [*own, *_of_inner_models(model, attribute)], attribute)
    foreign = _FOREIGN_TARGETS.get(model_type, {}).get(attribute)
    for targets in (foreign, _PEFT_TABLES[attribute].get(model_type)):
        if targets is not None:
            return targets
    option = "feedforward_modules" if attribute == "ia3_feedforward" else "target_modules"
    raise GeneSpliceError(
        f"No default `{attribute}` exist for model type {model_type!r}: pass `{option}`. {_linear_listing(model)}"
    )


def _of_inner_models(model: PreTrainedModel, attribute: str) -> list[str]:
    """What the models inside a composite one have adapted by default, as far as they train at all."""
    names: list[str] = []
    for module in model.modules():
        is_inner = isinstance(module, PreTrainedModel) and module.config.model_type != model.config.model_type
        if is_inner and any(parameter.requires_grad for parameter in module.parameters()):
            foreign = _FOREIGN_TARGETS.get(module.config.model_type, {})
            known = getattr(type(module.config), attribute, None) or foreign.get(attribute)
            # A regular expression cannot stand in a list of names.
            names += [] if known is None or isinstance(known, str) else known
    return list(dict.fromkeys(names))


def _existing(model: PreTrainedModel, names: list[str], attribute: str) -> list[str]:
    """The names that some module has: a config class with a choice of layers lists the names of all of them."""
    endings = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    found = [name for name in names if name.rpartition(".")[2] in endings]
    return found if found or attribute == "ia3_feedforward" else names


def task_type(model: PreTrainedModel) -> TaskType | None:
    """PEFT's task type of the model class, None where PEFT has none (masked language models, base models)."""
    name = type(model).__name__
    return next((kind for suffix, kind in _TASK_TYPES.items() if name.endswith(suffix)), None)


def build_config(
    config_class: type[PeftConfig], model: PreTrainedModel, defaults: dict[str, Any], options: dict[str, Any]
) -> PeftConfig:
    """Make a PEFT config from defaults and the caller's options, with the task head in `modules_to_save`.

    Raises:
        GeneSpliceError: An option is not a field of `config_class`, or PEFT refuses its value.
    """
    _check_options(config_class, options)
    settings = {"task_type": task_type(model), **defaults, **options}
    settings["modules_to_save"] = _with_head(model, settings.get("modules_to_save"))
    try:
        return config_class(**settings)
    except ValueError as error:
        raise GeneSpliceError(f"{config_class.__name__} refuses these options: {error}") from error


def matched_names(model: nn.Module, config: PeftConfig) -> list[str]:
    """The names of the modules that PEFT will adapt under `config`."""
    if config.target_modules == "all-linear":
        return linear_names(model)
    names = [name for name, _ in model.named_modules() if name]
    # PEFT answers with a falsy-by-type object for excluded modules, hence the comparison by truth value.
    return [name for name in names if check_target_module_exists(config, name)]


def require_matches(model: nn.Module, config: PeftConfig) -> list[str]:
    """`matched_names`, which must not be empty.

    Raises:
        CheckpointError: No module matches; the message lists the Linear modules of the model.
    """
    names = matched_names(model, config)
    if not names:
        raise CheckpointError(
            f"`target_modules` ({_readable(config.target_modules)}) match no module of {type(model).__name__}. "
            f"{_linear_listing(model)}"
        )
    return names


def _check_options(config_class: type[PeftConfig], options: dict[str, Any]) -> None:
    known = [field.name for field in fields(config_class) if field.init]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"the options are: {', '.join(known)}."
            raise GeneSpliceError(f"`{name}` is not an option of {config_class.__name__}; {hint}")


def _with_head(model: nn.Module, modules_to_save: list[str] | None) -> list[str] | None:
    head = task_head_name(model)
    names = list(modules_to_save or [])
    if head and head not in names:
        names.insert(0, head)
        # What a composite model trains whole beside its head.
        names += getattr(type(model.config), "adapter_modules_to_save", [])
    return names or None


def _linear_listing(model: nn.Module) -> str:
    names = linear_names(model)
    return f"Its Linear modules are: {', '.join(names)}." if names else "It has no Linear modules."


def _readable(targets: Any) -> str:
    return repr(targets) if isinstance(targets, str) else ", ".join(sorted(targets))
