"""One small door to every way of adapting a pretrained model: adapters, head only, or all weights."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast, get_args

from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from genesplice_hf.adaptation.freezing import freeze, freeze_batch_norm, unfreeze, unfreeze_batch_norm
from genesplice_hf.adaptation.ia3 import freeze_ia3_parts, ia3_config
from genesplice_hf.adaptation.layer_norm import layer_norm_config, quiet_layer_norm_warning
from genesplice_hf.adaptation.lora import lora_config
from genesplice_hf.adaptation.targets import task_head_name
from genesplice_hf.errors import GeneSpliceError

AdapterKind = Literal["lora", "ia3", "layer_norm"]
AdaptationMethod = Literal["lora", "ia3", "layer_norm", "linear_probe", "full"]

_CONFIG_MAKERS: dict[str, Callable[..., PeftConfig]] = {
    "lora": lora_config,
    "ia3": ia3_config,
    "layer_norm": layer_norm_config,
}
_REFUSED = {
    "prompt_tuning": "it puts virtual tokens before the sequence, so that positions and per-base outputs shift",
    "prefix_tuning": "it feeds past keys and values, which encoders do not take",
}


class TrainableReport(NamedTuple):
    """What trains: `trainable` and `total` parameter counts and the `names` of the trainable parameters.

    `total` counts everything held in memory: an adapter's own parameters and the head's frozen original too.
    """

    trainable: int
    total: int
    names: list[str]

    @property
    def fraction(self) -> float:
        """Trainable parameters divided by all parameters."""
        return self.trainable / self.total


def get_peft_config(model: PreTrainedModel, kind: AdapterKind = "lora", **options: Any) -> PeftConfig:
    """The PEFT config of an adapter for `model`, with targets that are known to exist and the head saved.

    Args:
        model: The model to adapt; it is read, not changed.
        kind: "lora", "ia3" or "layer_norm".
        **options: Fields of the PEFT config class (`peft.LoraConfig`, `IA3Config`, `LNTuningConfig`).

    Returns:
        A config whose `modules_to_save` names the task head exactly when the model has one.

    Raises:
        CheckpointError: The targets match no module; lists the Linear modules.
        GeneSpliceError: An unknown `kind` or option, prompt or prefix tuning, no default targets, or IA3
            feed-forward modules outside the targets.
    """
    _check_kind(kind)
    return _CONFIG_MAKERS[kind](model, **options)


def adapt(model: PreTrainedModel, method: AdaptationMethod, **options: Any) -> PreTrainedModel | PeftModel:
    """Prepare `model` for training by one method; the model is changed in place.

    Args:
        model: A pretrained model, for a task head or without one.
        method: "lora", "ia3", "layer_norm" (adapters; the head trains too), "linear_probe" (only the head) or
            "full" (all weights).
        **options: Fields of the adapter's PEFT config; none for "linear_probe" and "full".

    Returns:
        A `PeftModel` around `model` for adapters, `model` itself otherwise. Batch normalisation outside the
        head keeps its stored statistics with every method but "full".

    Raises:
        CheckpointError, GeneSpliceError: As `get_peft_config`; also a model that already carries an adapter,
            "linear_probe" without a task head, or options for a method that has none.
    """
    _check_unadapted(model)
    if method not in ("linear_probe", "full"):
        return attach(model, get_peft_config(model, cast(AdapterKind, method), **options))
    if options:
        raise GeneSpliceError(f"`method` {method!r} takes no options, got {sorted(options)}; leave them out.")
    return _train_head_only(model) if method == "linear_probe" else _train_everything(model)


def attach(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Wrap `model` by the adapter that `config` describes."""
    head = task_head_name(model)
    freeze_batch_norm(model, skip=[head] if head else [])
    with quiet_layer_norm_warning():
        peft_model = get_peft_model(model, config)
    freeze_ia3_parts(peft_model)
    # PEFT's task classes append "classifier" and "score" to the list whether the model has them or not.
    if config.modules_to_save:
        present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        config.modules_to_save = [m for m in dict.fromkeys(config.modules_to_save) if m.rpartition(".")[2] in present]
    return peft_model


def merge(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Fold an adapter into its base, so that a plain transformers model remains.

    Args:
        model: A model from `adapt` or `load_adapter`. A model without an adapter is returned as it is.

    Returns:
        The base model with adapted weights and trained head; `save_pretrained` writes no adapter keys. In
        float32 the logits agree with the adapted model's to about 1e-5; in half precision the sum is rounded.
        All its parameters are trainable, as those of a model just loaded.
    """
    if not isinstance(model, PeftModel):
        return model
    _unwrap_saved_modules(model, trained=True)
    return _as_plain_model(model.merge_and_unload())


def trainable_report(model: nn.Module) -> TrainableReport:
    """Count the trainable and all parameters of `model` (shared ones once) and name the trainable ones."""
    parameters = list(model.named_parameters())
    trainable = [(name, p.numel()) for name, p in parameters if p.requires_grad]
    return TrainableReport(
        trainable=sum(count for _, count in trainable),
        total=sum(p.numel() for _, p in parameters),
        names=[name for name, _ in trainable],
    )


def detach(model: PeftModel) -> PreTrainedModel:
    """Take the adapter off again and throw it away; the base's weights are untouched."""
    _unwrap_saved_modules(model, trained=False)
    return _as_plain_model(model.unload())


def _train_head_only(model: PreTrainedModel) -> PreTrainedModel:
    head = task_head_name(model)
    if head is None:
        raise GeneSpliceError(
            f"`method` 'linear_probe' trains a task head (`classifier` or `score`), but {type(model).__name__} has "
            "none; load the model with AutoModelForSequenceClassification or another class with a head."
        )
    freeze(model)
    freeze_batch_norm(model, skip=[head])
    unfreeze(model.get_submodule(head))
    return model


def _train_everything(model: PreTrainedModel) -> PreTrainedModel:
    unfreeze_batch_norm(model)
    return unfreeze(model)


def _unwrap_saved_modules(model: PeftModel, trained: bool) -> None:
    # PEFT's LN tuning leaves these wrappers behind when it unloads, and IA3 fails on a head of several layers.
    base = model.get_base_model()
    wrappers = [(name, m) for name, m in base.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    for name, wrapper in wrappers:
        kept = wrapper.modules_to_save[wrapper.active_adapter] if trained else wrapper.original_module
        base.set_submodule(name, kept)


def _as_plain_model(model: PreTrainedModel) -> PreTrainedModel:
    unfreeze_batch_norm(model)
    return unfreeze(model)


def _check_kind(kind: str) -> None:
    if kind in _REFUSED:
        raise GeneSpliceError(f"`kind` {kind!r} is refused: {_REFUSED[kind]}. Use 'lora', 'ia3' or 'layer_norm'.")
    if kind not in _CONFIG_MAKERS:
        choices = ", ".join(repr(name) for name in get_args(AdaptationMethod))
        raise GeneSpliceError(f"Unknown adaptation method {kind!r}; must be one of {choices}.")


def _check_unadapted(model: nn.Module) -> None:
    if isinstance(model, PeftModel):
        raise GeneSpliceError("`model` already carries an adapter; call `merge(model)` first or start from the base.")
