"""The contract of every config: what it refuses, what it writes, and that models refuse what it refuses."""

import json
import logging
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from contract_cases import Case, cases, rows
from contract_rows import CONTRADICTIONS
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError

from genesplice_hf.models.registry import REGISTRY, ModelEntry

OUR_LOGGER = "genesplice_hf"
BAD_CONFIGS = [
    pytest.param(REGISTRY[row], bad, words, id=f"{row}-{'-'.join(bad)}-{number}")
    for row, contradictions in CONTRADICTIONS.items()
    for number, (bad, words) in enumerate(contradictions)
]


def own_fields(entry: ModelEntry) -> dict[str, Any]:
    """The fields that the config class and bases of ours declare, with their types."""
    return {
        name: hint
        for base in reversed(own_bases(entry))
        for name, hint in vars(base).get("__annotations__", {}).items()
    }


def own_bases(entry: ModelEntry) -> list[type]:
    """The config class, and the ones of ours that it inherits from."""
    return [base for base in entry.config_class.__mro__ if base.__module__.startswith(OUR_LOGGER)]


def choices(hint: Any) -> tuple[str, ...] | None:
    """The options of a `Literal` type, also inside a list or beside None."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((found for inner in get_args(hint) if (found := choices(inner))), None)


def broken(entry: ModelEntry, bad: dict[str, Any]) -> Any:
    """A config that was good when it was made."""
    config = entry.tiny_config()
    for name, value in bad.items():
        setattr(config, name, value)
    return config


@rows("test_a_wrong_type_is_refused_in_every_field")
def test_a_wrong_type_is_refused_in_every_field(entry: ModelEntry) -> None:
    for name in own_fields(entry):
        with pytest.raises(StrictDataclassFieldValidationError, match=name):
            entry.tiny_config(**{name: b"8"})


@rows("test_an_unknown_choice_is_refused_and_the_choices_are_listed")
def test_an_unknown_choice_is_refused_and_the_choices_are_listed(entry: ModelEntry) -> None:
    for name, hint in own_fields(entry).items():
        if options := choices(hint):
            with pytest.raises(StrictDataclassFieldValidationError, match=name) as error:
                entry.tiny_config(**{name: ["nonsense"] if "list" in str(hint) else "nonsense"})
            assert all(option in str(error.value) for option in options)


@pytest.mark.parametrize(("entry", "bad", "words"), BAD_CONFIGS)
def test_contradicting_fields_are_refused_everywhere(
    entry: ModelEntry, bad: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=words):
        entry.tiny_config(**bad)
    with pytest.raises(StrictDataclassClassValidationError, match=words):
        broken(entry, bad).save_pretrained(tmp_path / "bad")
    entry.auto_classes["AutoModel"](entry.tiny_config()).save_pretrained(tmp_path)
    for name, model_class in entry.auto_classes.items():
        causal = entry.causal_overrides if name == "AutoModelForCausalLM" else {}
        with pytest.raises(StrictDataclassClassValidationError, match=words):
            model_class(broken(entry, causal | bad))
        with pytest.raises(StrictDataclassClassValidationError, match=words):
            model_class.from_pretrained(tmp_path, **causal, **bad)


@rows("test_every_rule_of_the_config_is_broken_by_a_listed_contradiction")
def test_every_rule_of_the_config_is_broken_by_a_listed_contradiction(entry: ModelEntry) -> None:
    rules = [name for base in own_bases(entry) for name in vars(base) if name.startswith("validate_")]
    assert rules
    unbroken = [
        rule for rule in rules if not any(breaks(entry, bad, rule) for bad, _ in CONTRADICTIONS[entry.model_type])
    ]
    assert unbroken == [], "add a contradiction for these rules to CONTRADICTIONS in contract_cases.py"


def breaks(entry: ModelEntry, bad: dict[str, Any], rule: str) -> bool:
    try:
        getattr(broken(entry, bad), rule)()
    except ValueError:
        return True
    return False


@cases("test_the_saved_config_gives_the_same_config")
def test_the_saved_config_gives_the_same_config(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also after a second round; nothing that transformers writes by itself is taken for a typing error."""
    names = {0: "closed", 1: "open", 2: "bent"}
    config = case.config(id2label=names, attn_implementation="eager", name_or_path="somewhere", dtype="bfloat16")
    config.save_pretrained(tmp_path / "one")
    with caplog.at_level(logging.WARNING, logger=OUR_LOGGER):
        again = case.entry.config_class.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one/config.json").read_text() == (tmp_path / "two/config.json").read_text()
    assert {name: getattr(again, name) for name in own_fields(case.entry)} == {
        name: getattr(config, name) for name in own_fields(case.entry)
    }
    assert again.id2label == names
    assert caplog.records == []


@cases("test_the_attention_implementation_is_not_saved")
def test_the_attention_implementation_is_not_saved(case: Case, tmp_path: Path) -> None:
    model = case.model(attn_implementation="eager")
    model.save_pretrained(tmp_path)
    assert not [key for key in json.loads((tmp_path / "config.json").read_text()) if "attn_impl" in key]
    assert case.model_class.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@rows("test_an_unknown_key_warns_and_says_what_was_meant")
def test_an_unknown_key_warns_and_says_what_was_meant(
    entry: ModelEntry, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    field = max(own_fields(entry), key=len)
    typo = field[:-1] + "xx"
    with caplog.at_level(logging.WARNING, logger=OUR_LOGGER):
        entry.tiny_config(**{typo: 3})
    assert f"`{typo}`" in caplog.text and f"`{field}`" in caplog.text
    caplog.clear()
    content = entry.tiny_config().to_dict() | {"strange_key": 3}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, logger=OUR_LOGGER):
        entry.config_class.from_pretrained(tmp_path)
    assert "`strange_key`" in caplog.text


@rows("test_positional_arguments_are_refused")
def test_positional_arguments_are_refused(entry: ModelEntry) -> None:
    with pytest.raises((TypeError, ValueError)):
        entry.config_class(16)


@cases("test_the_callers_config_is_left_alone")
def test_the_callers_config_is_left_alone(case: Case) -> None:
    config = case.config()
    before = config.to_dict()
    case.model_class(config)
    assert config.to_dict() == before
