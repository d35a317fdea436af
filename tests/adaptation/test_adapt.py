"""Every adaptation method on every family: what trains, how much, and that the merged model is the same."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForSequenceClassification, EsmConfig, EsmForMaskedLM

from genesplice_hf.adaptation.adapt import adapt, get_peft_config, merge, trainable_report
from genesplice_hf.errors import CheckpointError, GeneSpliceError

ADAPTERS = ["lora", "ia3", "layer_norm"]
METHODS = [*ADAPTERS, "linear_probe", "full"]
FAMILIES = ["esm", "bert", "genesplice"]

# Layers, hidden size, feed-forward size and labels of the tiny models; rank of the LoRA runs.
N, E, FF, K, R = 2, 16, 24, 3, 4
# The tiny GeneSplice: width, two heads of 16, feed-forward size.
GE, GA, GFF = 32, 2 * 16, 48

# Closed formulas. LoRA: r (in + out) a matrix (query and value; in GeneSplice q, k, v and o). IA3: one scale per
# output of k and v and per hidden unit. Norms: 2 E each (weight, bias), two a layer and one more; RMSNorm E.
ADAPTER_PARAMETERS = {
    "esm": {"lora": N * 2 * R * 2 * E, "ia3": N * (2 * E + FF), "layer_norm": (2 * N + 1) * 2 * E, "linear_probe": 0},
    "genesplice": {
        "lora": N * 4 * R * (GE + GA),
        "ia3": N * (2 * GA + GFF),
        "layer_norm": (2 * N + 1) * GE,
        "linear_probe": 0,
    },
}
ADAPTER_PARAMETERS["bert"] = ADAPTER_PARAMETERS["esm"]
HEAD_PARAMETERS = {"esm": (E * E + E) + (E * K + K), "bert": E * K + K, "genesplice": GE * K + K}


def options_for(method: str) -> dict:
    return {"r": R, "lora_dropout": 0.0} if method == "lora" else {}


def train_step(model, batch) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()


def logits_of(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_an_untrained_adaptation_changes_nothing(fresh_model, batch, family, method):
    before = logits_of(fresh_model(family), batch)
    after = logits_of(adapt(fresh_model(family), method, **options_for(method)).eval(), batch)
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_training_changes_the_trainable_tensors_and_no_other(fresh_model, batch, family, method):
    model = adapt(fresh_model(family), method, **options_for(method))
    before, trainable = snapshot(model), set(trainable_report(model).names)
    train_step(model, batch)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= trainable
    # These have no gradient: a key's bias shifts all scores of a query alike, the rest is off the way to the logits.
    idle = ("key.bias", "contact_head.regression.weight", "contact_head.regression.bias", "position_embeddings.weight")
    assert {name for name in trainable - changed if not name.endswith(idle)} == set()
    assert len(changed) > len(trainable) / 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [*ADAPTERS, "linear_probe"])
def test_number_of_trainable_parameters(fresh_model, family, method):
    report = trainable_report(adapt(fresh_model(family), method, **options_for(method)))
    assert report.trainable == ADAPTER_PARAMETERS[family][method] + HEAD_PARAMETERS[family]
    assert report.fraction == pytest.approx(report.trainable / report.total)


def test_full_trains_everything(fresh_model):
    model = fresh_model("esm")
    report = trainable_report(adapt(adapt(model, "linear_probe"), "full"))
    assert report.trainable == report.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_merged_model_is_plain_and_equal(fresh_model, batch, tmp_path, family, method):
    model = adapt(fresh_model(family), method, **options_for(method))
    train_step(model, batch)
    expected = logits_of(model, batch)
    merged = merge(model)
    torch.testing.assert_close(logits_of(merged, batch), expected, atol=1e-5, rtol=0)
    assert set(merged.state_dict()) == set(fresh_model(family).state_dict())
    merged.save_pretrained(tmp_path)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(reloaded, batch), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ADAPTERS)
def test_merged_model_can_be_adapted_again(fresh_model, method):
    again = adapt(merge(adapt(fresh_model("esm"), method)), method)
    assert trainable_report(again).trainable == trainable_report(adapt(fresh_model("esm"), method)).trainable


@pytest.mark.parametrize("method", ADAPTERS)
def test_head_is_saved_exactly_when_there_is_one(fresh_model, method):
    assert get_peft_config(fresh_model("esm"), method).modules_to_save == ["classifier"]
    assert adapt(fresh_model("esm"), method).peft_config["default"].modules_to_save == ["classifier"]
    assert get_peft_config(masked_lm(), method).modules_to_save is None


def test_esm_ia3_leaves_the_attention_output_alone(fresh_model):
    model = adapt(fresh_model("esm"), "ia3")
    scaled = {name for name in trainable_report(model).names if "ia3" in name}
    assert len(scaled) == N * 3
    assert not any("attention.output" in name for name in scaled)


def test_layer_norm_tuning_is_silent(fresh_model, recwarn):
    adapt(fresh_model("bert"), "layer_norm")
    assert not [w for w in recwarn if "Unsupported layer type" in str(w.message)]


def test_no_match_lists_the_linear_modules(fresh_model):
    with pytest.raises(CheckpointError, match=r"Wqkv.*attention\.self\.query"):
        get_peft_config(fresh_model("esm"), "lora", target_modules=["Wqkv"])


def test_unknown_model_type_lists_the_linear_modules(fresh_model):
    model = fresh_model("esm")
    model.config.__class__ = type("OtherConfig", (EsmConfig,), {"model_type": "never_heard_of"})
    with pytest.raises(GeneSpliceError, match=r"pass `target_modules`.*attention\.self\.query"):
        get_peft_config(model, "layer_norm")
    assert get_peft_config(model, "lora", target_modules=["query"]).target_modules == {"query"}


def test_targets_of_the_config_class_come_first(fresh_model):
    model = fresh_model("bert")
    model.config.__class__ = type("OwnConfig", (type(model.config),), {"lora_targets": ["key"]})
    assert get_peft_config(model).target_modules == {"key"}


def test_ia3_feedforward_outside_the_targets(fresh_model):
    with pytest.raises(GeneSpliceError, match="subset"):
        get_peft_config(
            fresh_model("bert"), "ia3", target_modules=r".*self\.key", feedforward_modules=r".*intermediate\.dense"
        )
    with pytest.raises(GeneSpliceError, match=r"refuses these options.*subset"):
        get_peft_config(fresh_model("bert"), "ia3", target_modules=["key"], feedforward_modules=["intermediate.dense"])


def test_ia3_feedforward_that_ends_another_name():
    toy = nn.ModuleDict({"wo": nn.Linear(2, 2), "two": nn.Linear(2, 2)})
    with pytest.raises(GeneSpliceError, match="'wo' also ends two"):
        get_peft_config(toy, "ia3", target_modules=["wo", "two"], feedforward_modules=["wo"])
    assert get_peft_config(toy, "ia3", target_modules=["wo"], feedforward_modules=["wo"]).feedforward_modules == {"wo"}


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning"])
def test_prompt_learning_is_refused_with_a_reason(fresh_model, kind):
    with pytest.raises(GeneSpliceError, match="is refused: it"):
        get_peft_config(fresh_model("esm"), kind)
    with pytest.raises(GeneSpliceError, match="is refused: it"):
        adapt(fresh_model("esm"), kind)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {"rank": 4}, "`rank` is not an option of LoraConfig"),
        ("lora", {"lora_alfa": 4}, "did you mean `lora_alpha`"),
        ("full", {"r": 4}, "takes no options"),
        ("adapters", {}, "Unknown adaptation method 'adapters'"),
    ],
)
def test_bad_calls(fresh_model, method, options, message):
    with pytest.raises(GeneSpliceError, match=message):
        adapt(fresh_model("esm"), method, **options)


def test_a_second_adapter_is_refused(fresh_model):
    with pytest.raises(GeneSpliceError, match="already carries an adapter"):
        adapt(adapt(fresh_model("esm"), "lora"), "ia3")


def test_linear_probe_needs_a_head():
    with pytest.raises(GeneSpliceError, match="EsmForMaskedLM has none"):
        adapt(masked_lm(), "linear_probe")


def test_options_reach_peft(fresh_model):
    config = get_peft_config(fresh_model("esm"), "lora", r=2, use_dora=True, modules_to_save=["embeddings"])
    assert (config.r, config.use_dora, config.modules_to_save) == (2, True, ["classifier", "embeddings"])
    assert isinstance(config, LoraConfig)
    config = get_peft_config(fresh_model("esm"), "lora", target_modules="all-linear")
    assert config.target_modules == "all-linear"


def masked_lm() -> EsmForMaskedLM:
    sizes = SimpleNamespace(hidden_size=E, num_hidden_layers=N, num_attention_heads=2, intermediate_size=FF)
    return EsmForMaskedLM(EsmConfig(vocab_size=16, mask_token_id=4, pad_token_id=0, **vars(sizes)))


@pytest.mark.parametrize("method", [*ADAPTERS, "linear_probe"])
def test_batch_norm_of_the_base_stands_still_until_all_weights_train(fresh_model, batch, method):
    model = adapt(fresh_model("toy"), method)
    before = snapshot(model)
    train_step(model, batch)
    statistics = [name for name in before if "batch_norm" in name]
    assert len(statistics) == 5
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in statistics)
    full = adapt(merge(model), "full")
    frozen_mean = full.trunk.batch_norm.running_mean.clone()
    train_step(full, batch)
    assert not torch.equal(full.trunk.batch_norm.running_mean, frozen_mean)
