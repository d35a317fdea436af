"""PEFT finds our targets by model type alone, and types of transformers stay as they are."""

import copy

import peft.utils.constants as tables
import pytest
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from genesplice_hf.adaptation.peft_targets import register_peft_targets
from genesplice_hf.errors import GeneSpliceError

NAMES = [name for name in dir(tables) if name.endswith("_MODULES_MAPPING")]


class OwnConfig(BertConfig):
    model_type = "genesplice_target_test"
    lora_targets = ["query", "value"]
    ia3_targets = ["key", "value", "intermediate.dense"]
    ia3_feedforward = ["intermediate.dense"]
    layer_norm_targets = ["LayerNorm"]


@pytest.fixture(autouse=True)
def tables_restored():
    live = {name: getattr(tables, name) for name in NAMES}
    saved = copy.deepcopy(live)
    yield
    for name, table in saved.items():
        live[name].clear()
        live[name].update(table)


def tiny() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        OwnConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    )


def test_every_method_gets_its_own_list():
    register_peft_targets(OwnConfig)
    register_peft_targets(OwnConfig)
    for method in ("LORA", "ADALORA", "VERA", "LOHA", "LOKR", "OFT", "BOFT", "FOURIERFT"):
        table = getattr(tables, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING")
        assert table["genesplice_target_test"] == ["query", "value"]
    assert tables.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[OwnConfig.model_type] == OwnConfig.ia3_targets
    feedforward = tables.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert feedforward[OwnConfig.model_type] == ["intermediate.dense"]
    assert tables.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING[OwnConfig.model_type] == ["LayerNorm"]


@pytest.mark.parametrize("config_class", [LoraConfig, IA3Config, LNTuningConfig])
def test_peft_needs_no_target_modules_any_more(config_class):
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(tiny(), config_class(task_type="SEQ_CLS"))
    register_peft_targets(OwnConfig)
    get_peft_model(tiny(), config_class(task_type="SEQ_CLS"))


def test_a_missing_table_is_skipped(monkeypatch):
    monkeypatch.delattr(tables, "TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING")
    register_peft_targets(OwnConfig)
    assert OwnConfig.model_type in tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def test_absent_attributes_write_nothing():
    register_peft_targets(type("Bare", (), {"model_type": "genesplice_bare_test", "lora_targets": ["conv"]}))
    assert "genesplice_bare_test" in tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert "genesplice_bare_test" not in tables.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"model_type": "bert"}, "belongs to transformers"),
        ({"model_type": ""}, "non-empty `model_type`"),
        ({"ia3_targets": r".*key"}, "must be a list of module-name suffixes"),
        ({"lora_targets": [1]}, "must be a list of module-name suffixes"),
        ({"ia3_feedforward": ["other"]}, "subset of `ia3_targets`"),
    ],
)
def test_bad_config_classes(attributes, message):
    before = {name: copy.deepcopy(getattr(tables, name)) for name in NAMES}
    with pytest.raises(GeneSpliceError, match=message):
        register_peft_targets(type("Bad", (OwnConfig,), attributes))
    assert before == {name: getattr(tables, name) for name in NAMES}
