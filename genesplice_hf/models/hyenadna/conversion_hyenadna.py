"""The past of HyenaDNA: configs and state dicts of HazyResearch's code and of the `-hf` repositories, both ways.

Two layouts are read. That of the code keeps a `layer` of its own in the config and says `backbone.`, in its
checkpoints `model.backbone.`, before the keys; the `-hf` repositories have flat configs and say `hyena.backbone.`.
How a state dict was written down is kept in `config.conversion`, for the way back.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from genesplice_hf.errors import CheckpointError
from genesplice_hf.models.hyenadna.configuration_hyenadna import HyenaDNAConfig
from genesplice_hf.models.hyenadna.modeling_hyenadna import (
    HyenaDNAForCausalLM,
    HyenaDNAForSequenceClassification,
    HyenaDNAForTokenClassification,
)
from genesplice_hf.models.hyenadna.modeling_hyenadna_base import HyenaDNAModel
from genesplice_hf.models.hyenadna.modeling_hyenadna_layer import decay_rates, filter_positions

# Fields of `layer` -> ours, with the default of the class that takes them.
LAYER_FIELDS: dict[str, tuple[str, Any]] = {
    "l_max": ("max_seq_len", None),
    "order": ("hyena_order", 2),
    "filter_order": ("filter_order", 64),
    "short_filter_order": ("short_filter_order", 3),
    "emb_dim": ("emb_dim", 3),
    "num_inner_mlps": ("num_inner_mlps", 2),
    "w": ("activation_freq", 1),
    "bias": ("use_bias", True),
    "modulate": ("modulate", True),
    "fast_decay_pct": ("fast_decay_pct", 0.3),
    "slow_decay_pct": ("slow_decay_pct", 1.5),
    "target": ("decay_target", 1e-2),
    "shift": ("modulation_shift", 0.05),
    "dropout": ("hyena_dropout", 0.0),
    "filter_dropout": ("hyena_filter_dropout", 0.0),
}
# The same of what stands beside `layer`; names are ours already.
OUTER_FIELDS: dict[str, Any] = {
    "vocab_size": None,
    "d_model": None,
    "n_layer": None,
    "pad_vocab_size_multiple": 1,
    "d_inner": None,
    "embed_dropout": 0.1,
    "resid_dropout": 0.0,
    "layer_norm_epsilon": 1e-5,
}
RECORDS = {"conversion", "upstream_config"}
NEEDED = ("vocab_size", "d_model", "n_layer", "max_seq_len")
POSITION_RATE = "lr_pos_emb"
DEFAULT_POSITION_RATE = 1e-5
NUM_LABELS = "n_classes"
# What the two layouts put before the keys, longest first.
PREFIXES = ("hyena.backbone.", "model.backbone.", "backbone.")
# Gradient checkpointing of the original wraps these modules in a `layer`.
WRAPPED = ("mixer", "mlp")
HEAD = "head.output_transform."
CLASSIFIER = "classifier.out_proj."
POSITIONS = {"pos_emb.z": "positions", "pos_emb.t": "times", "modulation.deltas": "decay"}
# Positions and decay rates this near to the rule are the rule's, rounded on another machine.
SAME_POSITIONS = 1e-6
_FILTER = re.compile(r"layers\.(\d+)\.mixer\.filter_fn\.(.+)")
_INNER = re.compile(r"implicit_filter\.(\d+)\.(weight|bias|freq)")


class HyenaDNASource:
    """Source `hyenadna` of `from_original`; without `lm_head.weight` the head is the embedding."""

    name = "hyenadna"
    model_type = HyenaDNAConfig.model_type
    classes: dict[str, type[PreTrainedModel]] = {
        "base": HyenaDNAModel,
        "causal_lm": HyenaDNAForCausalLM,
        "sequence_classification": HyenaDNAForSequenceClassification,
        "token_classification": HyenaDNAForTokenClassification,
    }
    inputs: tuple[str, ...] = ()
    original_types: tuple[str, ...] = ("hyenadna",)

    @staticmethod
    def task(state_dict: dict[str, torch.Tensor]) -> str:
        """Always the causal LM, whose head may be the embedding."""
        return "causal_lm"

    @staticmethod
    def config(original: dict[str, Any], options: dict[str, Any]) -> tuple[HyenaDNAConfig, set[str]]:
        """Our config, and the names of theirs that were understood; `options` are fields of ours."""
        if original.get("attn_layer_idx"):
            raise CheckpointError("`attn_layer_idx`: layers with attention are not part of this HyenaDNA.")
        own = {name for name in HyenaDNAConfig.__annotations__ if name in original} - RECORDS
        fields, record = _layer_fields(original["layer"]) if "layer" in original else ({}, {"layered": False})
        fields |= {name: original[name] for name in own}
        if NUM_LABELS in original:
            fields["num_labels"] = original[NUM_LABELS]
        missing = [name for name in NEEDED if name not in fields | options]
        if missing:
            raise CheckpointError(
                f"`config` lacks {', '.join(missing)}; pass the original's whole config, with its `layer` where it "
                "has one."
            )
        known = own | {"layer", NUM_LABELS}
        record |= {"vocab_size": fields.get("vocab_size"), "fields": sorted(known & original.keys() - {"layer"})}
        return HyenaDNAConfig(**(fields | {"conversion": record} | options)), known

    @staticmethod
    def tensors(
        state_dict: dict[str, Any], config: HyenaDNAConfig, task: str
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """(our tensors, keys without effect on `task`); whether it is tied, and how filters are kept, is written
        into `config`, for only the tensors tell."""
        if isinstance(state_dict.get("state_dict"), dict):  # the file of a training run
            state_dict = state_dict["state_dict"]
        layout = _layout_of(state_dict)
        plain = {_plain(key, layout): tensor for key, tensor in state_dict.items()}
        ignored = _foreign_heads(plain, task)
        kept = {key: tensor for key, tensor in plain.items() if key not in ignored}
        config.tie_word_embeddings = _is_tied(plain, layout, config)
        if config.tie_word_embeddings and task == "causal_lm" and "word_embeddings.weight" in kept:
            kept["lm_head.weight"] = kept["word_embeddings.weight"]
        unused = _unused(kept, config)
        record = layout | _settle_positions(kept, config) | _settle_frequencies(kept, config)
        config.conversion = (config.conversion or {}) | record
        prefix = "" if task == "base" else "hyenadna."
        ours = {_our_name(key, prefix): tensor for key, tensor in kept.items()}
        originals = {_plain(key, layout): key for key in state_dict}
        return ours, sorted(originals[key] for key in (*ignored, *unused))

    @staticmethod
    def original(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Their config and state dict, in the layout that was read, or that of HazyResearch's code."""
        config = model.config
        record = {"frequencies": range(1, 2 * config.num_inner_mlps + 2, 2)} | (config.conversion or {})
        _demand_published(model, record)
        tensors: dict[str, torch.Tensor] = {}
        for key, tensor in model.state_dict().items():
            plain = key.removeprefix("hyenadna.")
            if plain == "lm_head.weight" and config.tie_word_embeddings and not record.get("lm_head"):
                continue
            for name in _their_names(plain, record):
                tensors[name] = tensor.detach().clone()
        tensors |= _generated(config, record, next(model.parameters()))
        return _their_config(config, record), tensors


def _demand_published(model: PreTrainedModel, record: dict[str, Any]) -> None:
    if isinstance(model, HyenaDNAForTokenClassification):
        raise CheckpointError("the original has no head with a label per base; convert the causal LM, or the base.")
    if record.get("layered", True) and not model.config.train_freq:
        raise CheckpointError("`train_freq` is always True in HazyResearch's code; convert a model that has it so.")


def _layer_fields(layer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(our fields of the nested layout, what the way back must know)."""
    fields = {name: default for name, default in OUTER_FIELDS.items() if default is not None}
    given = {ours: layer.get(theirs, default) for theirs, (ours, default) in LAYER_FIELDS.items()}
    if "local_order" in layer:
        given["short_filter_order"] = layer["local_order"]
    fields |= {name: value for name, value in given.items() if value is not None}
    if layer.get(POSITION_RATE, DEFAULT_POSITION_RATE) > 0:
        fields["filter_positions"] = "trained"
    extras = {name: value for name, value in layer.items() if name not in LAYER_FIELDS}
    return fields, {"layered": True, "layer": sorted(layer.keys() - extras.keys()), "layer_extras": extras}


def _layout_of(keys: Iterable[str]) -> dict[str, Any]:
    """How these keys are written: what stands before them, and which modules are wrapped."""
    keys = list(keys)
    prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in keys)), PREFIXES[-1])
    wrapped = [name for name in WRAPPED if any(f".{name}.layer." in key for key in keys)]
    return {"prefix": prefix, "wrapped": wrapped, "lm_head": any(key.endswith("lm_head.weight") for key in keys)}


def _outside(layout: dict[str, Any]) -> str:
    """What stands before the keys of heads: the `-hf` layout has nothing there."""
    return "model." if layout["prefix"].startswith("model.") else ""


def _plain(key: str, layout: dict[str, Any]) -> str:
    """The key without its layout's decoration; the embedding is not nested."""
    for name in layout["wrapped"]:
        key = key.replace(f".{name}.layer.", f".{name}.")
    if key.startswith(layout["prefix"]):
        return key.removeprefix(layout["prefix"]).removeprefix("embeddings.")
    return key.removeprefix(_outside(layout))


def _foreign_heads(plain: Iterable[str], task: str) -> set[str]:
    own = {"causal_lm": "lm_head.", "sequence_classification": HEAD}.get(task)
    return {key for key in plain if key.startswith(("lm_head.", HEAD)) and not (own and key.startswith(own))}


def _is_tied(plain: dict[str, torch.Tensor], layout: dict[str, Any], config: HyenaDNAConfig) -> bool:
    """Files without a head are tied, and those of HazyResearch's code, which write the one matrix twice."""
    head, embedding = plain.get("lm_head.weight"), plain.get("word_embeddings.weight")
    if head is None or embedding is None:
        return head is None
    is_shared = layout["prefix"] != "hyena.backbone." or config.tie_word_embeddings
    return is_shared and head.shape == embedding.shape and torch.equal(head, embedding)


def _unused(kept: dict[str, torch.Tensor], config: HyenaDNAConfig) -> list[str]:
    """Takes out what the original holds and never reads."""
    names = [] if config.use_bias else ["bias"]
    names += [] if config.modulate else ["modulation.deltas"]
    found = [key for key in kept if (match := _FILTER.fullmatch(key)) and match[2] in names]
    for key in found:
        del kept[key]
    return found


def _settle_positions(kept: dict[str, torch.Tensor], config: HyenaDNAConfig) -> dict[str, Any]:
    """Drops positions and decay rates that follow the rule; all are kept where one does not, or where they train."""
    found = {key: match[2] for key in kept if (match := _FILTER.fullmatch(key)) and match[2] in POSITIONS}
    rule = _rule(config)
    if config.filter_positions != "trained" or not found:
        is_whole = len(found) in (0, len(rule) * config.n_layer)
        is_rule = is_whole and all(_near(kept[key], rule[name]) for key, name in found.items())
        config.filter_positions = "computed" if is_rule else "stored"
    if config.filter_positions != "computed":
        return {"generated": []}
    for key in found:
        del kept[key]
    return {"generated": sorted(set(found.values()))}


def _near(tensor: torch.Tensor, rule: torch.Tensor) -> bool:
    return tensor.shape == rule.shape and torch.allclose(
        tensor.to(rule), rule, rtol=SAME_POSITIONS, atol=SAME_POSITIONS
    )


def _settle_frequencies(kept: dict[str, torch.Tensor], config: HyenaDNAConfig) -> dict[str, Any]:
    """Leaves one of the equal frequencies of each filter, and tells which were there.

    Files in which a shared tensor has one name only, as those of `-hf` repositories, hold the first.
    """
    places = range(1, 2 * config.num_inner_mlps + 2, 2)
    present: set[int] = set()
    for layer in range(config.n_layer if config.train_freq else 0):
        tensors = {place: kept[key] for place in places if (key := _frequency_key(layer, place)) in kept}
        if len(tensors) > 1 or 1 not in tensors:
            _demand_one_frequency(tensors, layer, places)
        for place in places[1:]:
            kept.pop(_frequency_key(layer, place), None)
        present |= tensors.keys()
    return {"frequencies": sorted(present)}


def _demand_one_frequency(tensors: dict[int, torch.Tensor], layer: int, places: range) -> None:
    absent = [_frequency_key(layer, place) for place in places if place not in tensors]
    if absent:
        raise CheckpointError(f"`state_dict` lacks {', '.join(absent)}; download it again.")
    first = tensors[places[0]]
    wrong = [_frequency_key(layer, place) for place in places if not _equal(tensors[place], first)]
    if wrong:
        raise CheckpointError(
            f"`state_dict`: {', '.join(wrong)} must equal {_frequency_key(layer, places[0])}, for one parameter is "
            "behind them; these are not the weights of a HyenaDNA."
        )


def _frequency_key(layer: int, place: int) -> str:
    return f"layers.{layer}.mixer.filter_fn.implicit_filter.{place}.freq"


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _our_name(key: str, prefix: str) -> str:
    if key.startswith(HEAD):
        return CLASSIFIER + key.removeprefix(HEAD)
    if key.startswith("lm_head."):
        return key
    match = _FILTER.fullmatch(key)
    if match is None:
        return prefix + key
    layer, name = match.groups()
    inner = _INNER.fullmatch(name)
    if inner is not None:
        place = int(inner[1])
        is_linear = place % 2 == 0 and inner[2] != "freq"
        name = f"linears.{place // 2}.{inner[2]}" if is_linear else "freq" if place == 1 else name
    return f"{prefix}layers.{layer}.mixer.filter.{POSITIONS.get(name, name)}"


def _their_names(plain: str, record: dict[str, Any]) -> list[str]:
    """The keys of the original that hold this tensor, in the recorded layout."""
    layout: dict[str, Any] = {"prefix": PREFIXES[-1], "wrapped": []} | record
    if plain.startswith(CLASSIFIER):
        return [_outside(layout) + HEAD + plain.removeprefix(CLASSIFIER)]
    if plain.startswith("lm_head."):
        return [_outside(layout) + plain]
    if plain.startswith("word_embeddings."):
        return [f"{layout['prefix']}embeddings.{plain}"]
    names = _filter_names(plain, record)
    for name in layout["wrapped"]:
        names = [key.replace(f".{name}.", f".{name}.layer.", 1) for key in names]
    return [layout["prefix"] + key for key in names]


def _filter_names(plain: str, record: dict[str, Any]) -> list[str]:
    before, is_filter, name = plain.partition(".mixer.filter.")
    if not is_filter:
        return [plain]
    before += ".mixer.filter_fn."
    if name == "freq":
        return [f"{before}implicit_filter.{place}.freq" for place in record["frequencies"]]
    if name.startswith("linears."):
        _, index, kind = name.split(".")
        return [f"{before}implicit_filter.{2 * int(index)}.{kind}"]
    theirs = {ours: theirs for theirs, ours in POSITIONS.items()}
    return [before + theirs.get(name, name)]


def _generated(config: HyenaDNAConfig, record: dict[str, Any], like: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the original stores and ours computes (positions, decay rates) or lacks (zeros for what is never read)."""
    names = record.get("generated", list(POSITIONS)) if config.filter_positions == "computed" else []
    rule = _rule(config)
    made = {
        key: rule[name].to(like.dtype)
        for layer in range(config.n_layer)
        for name in names
        for key in _their_names(f"layers.{layer}.mixer.filter.{POSITIONS[name]}", record)
    }
    unread = {".filter_fn.bias": (config.filter_width,), ".modulation.deltas": (1, 1, config.filter_width)}
    zeros = {
        key: like.new_zeros(shape)
        for key in record.get("ignored_keys", ())
        for ending, shape in unread.items()
        if key.endswith(ending)
    }
    return made | zeros


def _rule(config: HyenaDNAConfig) -> dict[str, torch.Tensor]:
    """Positions and decay rates as the original makes them, by its names."""
    positions, times = filter_positions(config)
    rule = {"pos_emb.z": positions, "pos_emb.t": times, "modulation.deltas": decay_rates(config)}
    return rule if config.modulate else {name: rule[name] for name in ("pos_emb.z", "pos_emb.t")}


def _their_config(config: HyenaDNAConfig, record: dict[str, Any]) -> dict[str, Any]:
    """The fields that were given, and those that differ from what their absence means."""
    given = record.get("fields", [])
    if record.get("layered", True):
        defaults = OUTER_FIELDS
    else:
        names = (*OUTER_FIELDS, *(ours for ours, _ in LAYER_FIELDS.values()), "train_freq", *given)
        defaults = {name: getattr(HyenaDNAConfig(), name) for name in names if name != NUM_LABELS}
    theirs = {
        name: getattr(config, name)
        for name, default in defaults.items()
        if name in given or getattr(config, name) != default
    }
    theirs["vocab_size"] = _their_vocabulary(config, record)
    if NUM_LABELS in given:
        theirs[NUM_LABELS] = config.num_labels
    return theirs | ({"layer": _their_layer(config, record)} if record.get("layered", True) else {})


def _their_layer(config: HyenaDNAConfig, record: dict[str, Any]) -> dict[str, Any]:
    rate = DEFAULT_POSITION_RATE if config.filter_positions == "trained" else 0.0
    layer = {
        theirs: getattr(config, ours)
        for theirs, (ours, default) in LAYER_FIELDS.items()
        if theirs in record.get("layer", ()) or getattr(config, ours) != default
    }
    return layer | record.get("layer_extras", {POSITION_RATE: rate})


def _their_vocabulary(config: HyenaDNAConfig, record: dict[str, Any]) -> int:
    """The number of tokens that was given, where its padded form is still what the model has."""
    given = record.get("vocab_size", config.vocab_size)
    return given if given + -given % config.pad_vocab_size_multiple == config.vocab_size else config.vocab_size


SOURCES = (HyenaDNASource,)
