"""Write a config class's adapter targets into PEFT's default tables, so that `LoraConfig()` alone is enough.

PEFT has no public call for this: its defaults are module-level dicts, one per method, keyed by `model_type`. It takes
a seventh of a second to import, so it is imported when the tables are written.
"""

from collections.abc import Sequence

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from genesplice_hf.errors import GeneSpliceError

# Which class attribute feeds which of PEFT's tables; a table that the installed PEFT lacks is skipped.
_TABLES = {
    "lora_targets": ("LORA", "ADALORA", "VERA", "LOHA", "LOKR", "OFT", "BOFT", "FOURIERFT"),
    "ia3_targets": ("IA3",),
    "ia3_feedforward": ("IA3_FEEDFORWARD",),
    "layer_norm_targets": ("LNTUNING",),
}


def register_peft_targets(config_class: type) -> None:
    """Make PEFT know which modules of a model type to adapt; calling it twice changes nothing.

    Args:
        config_class: A config class of this package. Read are its `model_type` and, where present, the lists
            of module-name suffixes `lora_targets`, `ia3_targets`, `ia3_feedforward`, `layer_norm_targets`.

    Raises:
        GeneSpliceError: The `model_type` is missing or belongs to transformers, an attribute is not a list of
            names, or `ia3_feedforward` is not a subset of `ia3_targets`.
    """
    model_type = _own_model_type(config_class)
    targets = {attribute: _names(config_class, attribute) for attribute in _TABLES}
    _check_feedforward(config_class, targets)
    for attribute, names in targets.items():
        if names is not None:
            _write(model_type, _TABLES[attribute], names)


def _own_model_type(config_class: type) -> str:
    model_type = getattr(config_class, "model_type", "")
    if not model_type:
        raise GeneSpliceError(f"`config_class` ({config_class.__name__}) needs a non-empty `model_type`.")
    if model_type in CONFIG_MAPPING_NAMES:
        raise GeneSpliceError(
            f"`model_type` {model_type!r} of {config_class.__name__} belongs to transformers: its PEFT defaults are "
            "not ours to write. Pass the targets through `get_peft_config(model, ...)` instead."
        )
    return model_type


def _names(config_class: type, attribute: str) -> list[str] | None:
    names = getattr(config_class, attribute, None)
    if names is None:
        return None
    # A regex would be split into letters by PEFT's IA3, which reads its table as set(value).
    is_list = isinstance(names, Sequence) and not isinstance(names, str)
    if not is_list or not all(isinstance(name, str) and name for name in names):
        raise GeneSpliceError(
            f"`{config_class.__name__}.{attribute}` must be a list of module-name suffixes, got {names!r}."
        )
    return list(names)


def _check_feedforward(config_class: type, targets: dict[str, list[str] | None]) -> None:
    extra = set(targets["ia3_feedforward"] or ()) - set(targets["ia3_targets"] or ())
    if extra:
        raise GeneSpliceError(
            f"`{config_class.__name__}.ia3_feedforward` must be a subset of `ia3_targets`; not among them: "
            f"{sorted(extra)}."
        )


def _write(model_type: str, methods: tuple[str, ...], names: list[str]) -> None:
    import peft.utils.constants as peft_tables

    for method in methods:
        # "FEEDFORWARD" is the one table whose name does not say TARGET.
        middle = "" if method.endswith("FEEDFORWARD") else "TARGET_"
        table = getattr(peft_tables, f"TRANSFORMERS_MODELS_TO_{method}_{middle}MODULES_MAPPING", None)
        if table is not None:
            table[model_type] = list(names)
