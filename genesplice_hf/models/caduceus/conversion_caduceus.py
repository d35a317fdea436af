"""The past of Caduceus: configs and state dicts of kuleshov-group/caduceus (and of PlantCaduceus), both ways.

Published tensors of tied projections stand under both directions' names, or under one; the vocabulary is padded to a
multiple when a model is built; the equivariant form wraps its modules (`submodule`), its embedding and its head.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from genesplice_hf.errors import CheckpointError
from genesplice_hf.models.caduceus.configuration_caduceus import CaduceusConfig, default_complement_map
from genesplice_hf.models.caduceus.modeling_caduceus import (
    CaduceusForMaskedLM,
    CaduceusForSequenceClassification,
    CaduceusForTokenClassification,
)
from genesplice_hf.models.caduceus.modeling_caduceus_base import CaduceusModel

# Published fields and the published defaults; those without one must be given.
DEFAULTS: dict[str, Any] = {
    "ssm_cfg": None, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    "norm_epsilon": 1e-5, "initializer_cfg": None, "bidirectional": True, "bidirectional_strategy": "add",
    "bidirectional_weight_tie": True, "rcps": False, "complement_map": None, "pad_token_id": None,
}  # fmt: skip
NEEDED = ("d_model", "n_layer", "vocab_size")
FIELDS = (*NEEDED, *DEFAULTS)
# Options of a mixer that choose among kernels of the same function.
KERNEL_OPTIONS = {"use_fast_path"}
# Ids of padding and mask: of the published tokenizer, and of PlantCaduceus with its 8 ids.
SPECIAL, PLANT_SPECIAL = (4, 3), (0, 1)
MASK_EVERY = 7


class CaduceusSource:
    """Source `caduceus` of `from_original`; option `verify_text`: DNA that shows if `rcps_half_order` is right."""

    name = "caduceus"
    model_type = CaduceusConfig.model_type
    original_types: tuple[str, ...] = ("caduceus",)
    classes: dict[str, type[PreTrainedModel]] = {
        "base": CaduceusModel,
        "masked_lm": CaduceusForMaskedLM,
        "sequence_classification": CaduceusForSequenceClassification,
        "token_classification": CaduceusForTokenClassification,
    }
    inputs: tuple[str, ...] = ("verify_text",)

    @staticmethod
    def task(state_dict: dict[str, torch.Tensor]) -> str:
        """The task whose head the tensors hold; a tied head may be stored as the embedding alone."""
        if any(key.startswith("score.") for key in state_dict):
            return "sequence_classification"
        whole = any(key.startswith(("lm_head.", "caduceus.")) for key in state_dict)
        return "masked_lm" if whole else "base"

    @staticmethod
    def config(original: dict[str, Any], options: dict[str, Any]) -> tuple[CaduceusConfig, set[str]]:
        """Our config, and the names of theirs that were understood; `options` are fields of ours."""
        given = {name: original[name] for name in FIELDS if name in original}
        return CaduceusConfig(**(fields_of(given) | {"conversion": {"config": given}} | options)), set(FIELDS)

    @staticmethod
    def tensors(
        state_dict: dict[str, torch.Tensor], config: CaduceusConfig, task: str, verify_text: str | None = None
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """(our tensors, keys that another task's head owns)."""
        _demand_complements(state_dict, config)
        prefix = "caduceus.backbone." if any(key.startswith("caduceus.") for key in state_dict) else "backbone."
        names = {prefix + theirs: "caduceus." + ours for theirs, ours in backbone_keys(config, config.fused_add_norm)}
        names |= {f"{_head(config)}.weight": "lm_head.weight", "score.weight": "classifier.out_proj.weight"}
        found: dict[str, torch.Tensor] = {}
        for key, tensor in state_dict.items():
            if not key.endswith("complement_map"):
                _add(found, key, names.get(key, key), tensor)
        _tie(found, config)
        if verify_text is not None:
            verify_half_order(found, config, verify_text)
        return _for_task(found, task)

    @staticmethod
    def original(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Their config and state dict.

        Raises:
            CheckpointError: a head that the published code lacks.
        """
        if isinstance(model, CaduceusForTokenClassification):
            raise CheckpointError("the published Caduceus has no head for tokens; convert `model.caduceus`.")
        config, tensors = model.config, model.state_dict()
        published = _their_config(config)
        keys = backbone_keys(config, published.get("fused_add_norm", DEFAULTS["fused_add_norm"]))
        is_base = isinstance(model, CaduceusModel)
        prefix, own = ("backbone.", "") if is_base else ("caduceus.backbone.", "caduceus.")
        found = {prefix + theirs: tensors[own + ours].clone() for theirs, ours in keys}
        heads = {key: tensor for key, tensor in tensors.items() if not is_base and not key.startswith(own)}
        found |= _their_head(heads, config)
        if config.rcps:
            owners = [f"{prefix}embeddings.word_embeddings", *(["lm_head"] if "lm_head.weight" in heads else [])]
            found |= {f"{owner}.complement_map": torch.tensor(config.complement_map) for owner in owners}
        return published, found


def fields_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of our config from published ones: padded vocabulary, and complements in the order of the ids."""
    missing = [name for name in NEEDED if name not in given]
    if missing:
        raise CheckpointError(f"`config` lacks {', '.join(missing)}; pass the whole config.json of the model.")
    fields = DEFAULTS | dict(given)
    multiple = fields["pad_vocab_size_multiple"]
    size = -(-fields["vocab_size"] // multiple) * multiple
    special = PLANT_SPECIAL if size == 8 else SPECIAL
    mixer, known = fields["ssm_cfg"] or {}, CaduceusConfig().ssm_cfg
    strange = sorted(set(mixer) - set(known) - KERNEL_OPTIONS)
    if strange:
        raise CheckpointError(f"`ssm_cfg` of `config` holds {', '.join(strange)}, which these Mamba mixers lack.")
    return fields | {
        "vocab_size": size,
        "ssm_cfg": known | {name: value for name, value in mixer.items() if name in known},
        "initializer_cfg": CaduceusConfig().initializer_cfg | (fields["initializer_cfg"] or {}),
        "bidirectional_strategy": fields["bidirectional_strategy"] or "add",
        "complement_map": _padded_complements(fields["complement_map"], size, fields["rcps"]),
        "pad_token_id": special[0] if fields["pad_token_id"] is None else fields["pad_token_id"],
        "mask_token_id": special[1],
    }


def _padded_complements(given: Mapping[Any, int] | Iterable[int] | None, size: int, rcps: bool) -> list[int]:
    if given is None:
        if rcps:
            raise CheckpointError("`config` has `rcps` but no `complement_map`; pass the id of every id's complement.")
        return default_complement_map(size)
    pairs = {int(own): other for own, other in (given.items() if isinstance(given, Mapping) else enumerate(given))}
    return [pairs.get(own, own) for own in range(max([size - 1, *pairs]) + 1)]


def backbone_keys(config: CaduceusConfig, fused_add_norm: bool) -> list[tuple[str, str]]:
    """(their key below the backbone, our key below the base model); a tied tensor of ours has two of theirs."""
    wrap = ".submodule" if config.rcps else ""
    norm_wrap = "" if fused_add_norm else wrap
    embedding = "embeddings.word_embeddings.embedding" if config.rcps else "embeddings.word_embeddings"
    keys = [(f"{embedding}.weight", "embeddings.weight"), *_norm_keys("norm_f", norm_wrap, config)]
    for layer in range(config.n_layer):
        keys += _norm_keys(f"layers.{layer}.norm", norm_wrap, config)
        mixer = f"layers.{layer}.mixer"
        keys += [(f"{mixer}{wrap}.{theirs}", f"{mixer}.{ours}") for theirs, ours in _mixer_keys(config)]
    return keys


def _norm_keys(norm: str, wrap: str, config: CaduceusConfig) -> list[tuple[str, str]]:
    return [(f"{norm}{wrap}.{part}", f"{norm}.{part}") for part in ("weight", *([] if config.rms_norm else ["bias"]))]


def _mixer_keys(config: CaduceusConfig) -> list[tuple[str, str]]:
    parts = ["conv1d.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D"]
    parts += ["conv1d.bias"] if config.ssm_cfg["conv_bias"] else []
    around = [f"{name}.weight" for name in ("in_proj", "out_proj")]
    around += [f"{name}.bias" for name in ("in_proj", "out_proj")] if config.ssm_cfg["bias"] else []
    reverse = "" if config.bidirectional_weight_tie else "reverse_ssm."
    keys = [(f"mamba_fwd.{part}", f"forward_ssm.{part}") for part in parts]
    keys += [(f"mamba_fwd.{part}", part) for part in around]
    if config.bidirectional:
        keys += [(f"mamba_rev.{part}", f"reverse_ssm.{part}") for part in parts]
        keys += [(f"mamba_rev.{part}", f"{reverse}{part}") for part in around]
    return keys


def _head(config: CaduceusConfig) -> str:
    return "lm_head.lm_head" if config.rcps else "lm_head"


def _add(found: dict[str, torch.Tensor], theirs: str, ours: str, tensor: torch.Tensor) -> None:
    if ours in found and not _same(found[ours], tensor):
        raise CheckpointError(
            f"`state_dict`: {theirs} differs from its twin, and `config` says that the directions are tied "
            "(`bidirectional_weight_tie`); check that both belong to one model."
        )
    found[ours] = tensor


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _tie(found: dict[str, torch.Tensor], config: CaduceusConfig) -> None:
    """The head's matrix is the embedding, stored or not."""
    embedding = found.get("caduceus.embeddings.weight")
    if embedding is None or not config.tie_word_embeddings:
        return
    if not _same(found.setdefault("lm_head.weight", embedding), embedding):
        raise CheckpointError(
            f"`state_dict`: {_head(config)}.weight differs from the embedding, to which it is tied; pass "
            "`tie_word_embeddings=False` to keep both."
        )


def _for_task(found: dict[str, torch.Tensor], task: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of one task, and the other tasks' heads as their keys."""
    heads = {"lm_head.weight": "masked_lm", "classifier.out_proj.weight": "sequence_classification"}
    ignored = sorted(key for key, owner in heads.items() if key in found and owner != task)
    tensors = {key: tensor for key, tensor in found.items() if key not in ignored}
    weight = tensors.get("classifier.out_proj.weight")
    if weight is not None:
        # The published head has no bias.
        tensors["classifier.out_proj.bias"] = weight.new_zeros(len(weight))
    if task == "base":
        tensors = {key.removeprefix("caduceus."): tensor for key, tensor in tensors.items()}
    return tensors, ignored


def _demand_complements(state_dict: dict[str, torch.Tensor], config: CaduceusConfig) -> None:
    for key in (key for key in state_dict if key.endswith("complement_map")):
        found = state_dict[key].tolist()
        if found != config.complement_map:
            raise CheckpointError(
                f"`state_dict`: {key} is {found}, and `complement_map` of `config` says {config.complement_map}; "
                "one of the two belongs to another vocabulary."
            )


def _their_head(heads: dict[str, torch.Tensor], config: CaduceusConfig) -> dict[str, torch.Tensor]:
    """The head under their name: a tied matrix, or a classifier without bias."""
    if "lm_head.weight" in heads:
        return {f"{_head(config)}.weight": heads["lm_head.weight"].clone()}
    if not heads:
        return {}
    if bool(heads["classifier.out_proj.bias"].any()):
        raise CheckpointError("the published classifier has no bias, and `classifier.out_proj.bias` is not 0 here.")
    return {"score.weight": heads["classifier.out_proj.weight"].clone()}


def _their_config(config: CaduceusConfig) -> dict[str, Any]:
    """Fields as they were read where they still say what the config says, and otherwise as they are now."""
    now = {name: getattr(config, name) for name in FIELDS}
    if config.rcps:
        now["fused_add_norm"] = config.rcps_half_order == "exchange"
    recorded = (config.conversion or {}).get("config")
    if recorded is None:
        recorded, read = {}, {}
    else:
        read = fields_of(recorded)
    changed = {name: value for name, value in now.items() if name not in read or read[name] != value}
    if "vocab_size" in changed and config.vocab_size % config.pad_vocab_size_multiple:
        changed["pad_vocab_size_multiple"] = 1
    return recorded | changed


def verify_half_order(tensors: dict[str, torch.Tensor], config: CaduceusConfig, text: str) -> None:
    """Raises unless `rcps_half_order` of the config predicts masked letters of `text` better than the other order.

    Args:
        tensors: under our names, with the masked LM's head. text: some hundred bases of real DNA, letters ACGTN.

    Raises:
        CheckpointError: the other order is better; there is no choice (`rcps=False`); a letter that is no base.
    """
    if not config.rcps or "lm_head.weight" not in tensors:
        raise CheckpointError("`verify_text` needs a masked LM with `rcps=True`; leave it out.")
    needed = {key: tensor for key, tensor in tensors.items() if key.startswith(("caduceus.", "lm_head."))}
    losses = {}
    for order in ("exchange", "straight"):
        trial = CaduceusConfig(**(config.to_diff_dict() | {"rcps_half_order": order}))
        model = CaduceusForMaskedLM(trial)
        model.load_state_dict(needed)
        losses[order] = _masked_loss(model.eval(), text)
    if min(losses, key=losses.__getitem__) != config.rcps_half_order:
        found = ", ".join(f"{order} {loss:.4f}" for order, loss in losses.items())
        raise CheckpointError(
            f"`rcps_half_order`={config.rcps_half_order!r} is not the order that these weights were trained with: "
            f"losses of `verify_text` are {found} nats. Pass the other one."
        )


@torch.no_grad()
def _masked_loss(model: CaduceusForMaskedLM, text: str) -> float:
    # The four bases are the ids that are not their own complement, in the order ACGT; N follows.
    own = [token for token, other in enumerate(model.config.complement_map or []) if other != token]
    letters = dict(zip("ACGT", own, strict=True)) | {"N": own[-1] + 1}
    strange = sorted(set(text.upper()) - set(letters))
    if strange or not text:
        raise CheckpointError(f"`verify_text` must be letters of ACGTN, got {''.join(strange) or 'nothing'}.")
    ids = torch.tensor([[letters[letter] for letter in text.upper()]])
    masked = (torch.arange(len(text)) % MASK_EVERY == MASK_EVERY // 2)[None]
    asked = ids.masked_fill(masked, model.config.mask_token_id)
    return model(asked, labels=ids.masked_fill(~masked, -100)).loss.item()


SOURCES = (CaduceusSource,)
