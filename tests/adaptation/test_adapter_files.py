"""An adapter folder on a fresh base: equal logits when it fits, a list of faults when it does not."""

import json
import os

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertForTokenClassification

from genesplice_hf.adaptation.adapt import adapt, merge, trainable_report
from genesplice_hf.adaptation.adapter_files import base_weight_hash, load_adapter, read_adapter_info, save_adapter
from genesplice_hf.errors import CheckpointError

ADAPTERS = ["lora", "ia3", "layer_norm"]
WITH_FILE = [*ADAPTERS, "linear_probe"]
FAMILIES = ["esm", "bert", "genesplice", "toy"]


def logits_of(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def trained(model, method, batch):
    """An adapted model after two steps, so that its adapter and head differ from every fresh one."""
    model = adapt(model, method).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def lora_folder(fresh_model, batch, tmp_path):
    return save_adapter(trained(fresh_model("esm"), "lora", batch), tmp_path / "lora", base_model_name="some/base")


def rewrite(folder, change) -> None:
    """Applies `change(tensors)` to the adapter's tensors on disk."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", WITH_FILE)
def test_reload_on_a_fresh_base(fresh_model, batch, tmp_path, recwarn, family, method):
    model = trained(fresh_model(family), method, batch)
    expected = logits_of(model, batch)
    save_adapter(model, tmp_path)
    fresh = fresh_model(family, head_seed=9)
    assert not torch.allclose(logits_of(fresh, batch), expected, atol=1e-3)
    again = load_adapter(fresh, tmp_path)
    torch.testing.assert_close(logits_of(again, batch), expected, atol=1e-6, rtol=0)
    assert not trainable_report(again).names
    torch.testing.assert_close(logits_of(merge(again), batch), expected, atol=1e-5, rtol=0)
    assert not [w for w in recwarn if "base" in str(w.message)]


@pytest.mark.parametrize("method", WITH_FILE)
def test_reload_to_go_on_training(fresh_model, batch, tmp_path, method):
    model = trained(fresh_model("esm"), method, batch)
    save_adapter(model, tmp_path)
    again = load_adapter(fresh_model("esm", head_seed=9), tmp_path, is_trainable=True)
    assert trainable_report(again).names == trainable_report(model).names


@pytest.mark.parametrize("family", ["esm", "genesplice"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_stock_peft_and_transformers_read_the_folder(fresh_model, batch, tmp_path, family, method):
    fresh_model(family, head_seed=9).save_pretrained(tmp_path / "base")
    model = trained(fresh_model(family), method, batch)
    expected = logits_of(model, batch)
    save_adapter(model, tmp_path / "adapter", base_model_name=str(tmp_path / "base"))
    stock = PeftModel.from_pretrained(fresh_model(family, head_seed=9), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(stock, batch), expected, atol=1e-6, rtol=0)
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(auto, batch), expected, atol=1e-6, rtol=0)


def test_the_folder_holds_the_adapter_only(lora_folder):
    assert sorted(os.listdir(lora_folder)) == [
        "adapter_config.json",
        "adapter_info.json",
        "adapter_model.safetensors",
    ]
    names = list(load_file(lora_folder / "adapter_model.safetensors"))
    assert len(names) == 2 * 2 * 2 + 4
    assert all("lora_" in name or "classifier" in name for name in names)


def test_a_model_card_is_left_alone(fresh_model, tmp_path):
    (tmp_path / "README.md").write_text("my card")
    save_adapter(adapt(fresh_model("esm"), "lora"), tmp_path)
    assert (tmp_path / "README.md").read_text() == "my card"


def test_info_tells_what_the_base_was(fresh_model, tmp_path):
    model = fresh_model("bert")
    model.config.id2label = {0: "promoter", 1: "enhancer", 2: "neither"}
    save_adapter(
        adapt(model, "ia3"),
        tmp_path,
        base_model_name="some/base",
        base_model_revision="abc",
        tokenizer_name="some/tokenizer",
        window_bp=150,
    )
    info = read_adapter_info(tmp_path)
    assert info["base_weight_sha256"] == base_weight_hash(fresh_model("bert", head_seed=3))
    assert (info["method"], info["base_model_type"], info["head"]) == ("ia3", "bert", "classifier")
    assert (info["base_model_name"], info["base_model_revision"]) == ("some/base", "abc")
    assert (info["tokenizer_name"], info["window_bp"], info["pooling"]) == ("some/tokenizer", 150, None)
    peft_config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (peft_config["base_model_name_or_path"], peft_config["modules_to_save"]) == ("some/base", ["classifier"])
    again = load_adapter(fresh_model("bert"), tmp_path)
    assert again.config.id2label == {0: "promoter", 1: "enhancer", 2: "neither"}
    assert again.config.label2id["enhancer"] == 1


def test_hash_sees_the_base_and_nothing_else(fresh_model, batch):
    plain = base_weight_hash(fresh_model("esm"))
    assert plain == base_weight_hash(fresh_model("esm", head_seed=5))
    for method in WITH_FILE:
        assert base_weight_hash(trained(fresh_model("esm"), method, batch)) == plain
    one_bit = fresh_model("esm")
    with torch.no_grad():
        one_bit.esm.encoder.layer[1].attention.self.key.bias[3] += 1e-6
    assert base_weight_hash(one_bit) != plain


def test_hash_is_the_same_for_bfloat16_and_its_float32_copy(fresh_model):
    half = fresh_model("esm").to(torch.bfloat16)
    expected = base_weight_hash(half)
    assert base_weight_hash(half.to(torch.float32)) == expected


def test_other_base_weights_warn(lora_folder, fresh_model):
    with pytest.warns(UserWarning, match="not those that the adapter.*some/base"):
        load_adapter(fresh_model("esm", trunk_seed=2), lora_folder)


def test_without_info_the_base_cannot_be_verified(lora_folder, fresh_model):
    (lora_folder / "adapter_info.json").unlink()
    with pytest.warns(UserWarning, match="cannot be verified"):
        load_adapter(fresh_model("esm"), lora_folder)


def test_another_model_type_raises(lora_folder, fresh_model):
    with pytest.raises(CheckpointError, match="base_model_type is 'bert', the adapter's is 'esm'"):
        load_adapter(fresh_model("bert"), lora_folder)


def test_another_task_raises(fresh_model, tmp_path):
    save_adapter(adapt(fresh_model("bert"), "lora"), tmp_path)
    other = BertForTokenClassification(fresh_model("bert").config)
    with pytest.raises(CheckpointError, match="base_model_class is 'BertForTokenClassification'"):
        load_adapter(other, tmp_path)


def test_another_pooling_raises(fresh_model, tmp_path):
    model = fresh_model("bert")
    model.config.classifier_pooling = "mean"
    save_adapter(adapt(model, "lora"), tmp_path)
    other = fresh_model("bert")
    other.config.classifier_pooling = "max"
    with pytest.raises(CheckpointError, match="pooling is 'max', the adapter's is 'mean'"):
        load_adapter(other, tmp_path)


HEAD_KEY = "base_model.model.classifier.out_proj.weight"
LORA_KEY = "base_model.model.esm.encoder.layer.1.attention.self.query.lora_B.weight"


@pytest.mark.parametrize("key", [HEAD_KEY, LORA_KEY])
def test_missing_tensor_is_listed(lora_folder, fresh_model, batch, key):
    rewrite(lora_folder, lambda tensors: tensors.pop(key))
    base = fresh_model("esm")
    before = logits_of(base, batch)
    with pytest.raises(CheckpointError, match=rf"missing \(1\): {key}"):
        load_adapter(base, lora_folder)
    # The base is plain again and can take another adapter.
    torch.testing.assert_close(logits_of(base, batch), before, atol=0, rtol=0)
    assert set(base.state_dict()) == set(fresh_model("esm").state_dict())


def test_unexpected_tensor_is_listed(lora_folder, fresh_model):
    extra = LORA_KEY.replace("layer.1", "layer.2")
    rewrite(lora_folder, lambda tensors: tensors.update({extra: torch.zeros(16, 8)}))
    with pytest.raises(CheckpointError, match=rf"unexpected \(1\): {extra}"):
        load_adapter(fresh_model("esm"), lora_folder)


def test_misshaped_tensor_is_listed(lora_folder, fresh_model):
    rewrite(lora_folder, lambda tensors: tensors.update({HEAD_KEY: torch.zeros(5, 16)}))
    with pytest.raises(CheckpointError, match=r"mis-shaped \(1\): .*\(5, 16\) in the file, \(3, 16\) in the model"):
        load_adapter(fresh_model("esm"), lora_folder)


def test_missing_head_tensor_of_a_probe_is_listed(fresh_model, tmp_path):
    save_adapter(adapt(fresh_model("bert"), "linear_probe"), tmp_path)
    tensors = load_file(tmp_path / "head.safetensors")
    save_file({"classifier.weight": tensors["classifier.weight"]}, tmp_path / "head.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \(1\): classifier.bias"):
        load_adapter(fresh_model("bert"), tmp_path)


def test_corrupt_and_absent_files(lora_folder, fresh_model, tmp_path):
    weights = lora_folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        load_adapter(fresh_model("esm"), lora_folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors does not exist"):
        load_adapter(fresh_model("esm"), lora_folder)
    (lora_folder / "adapter_info.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_adapter(fresh_model("esm"), lora_folder)


def test_full_fine_tuning_has_no_adapter_file(fresh_model, tmp_path):
    with pytest.raises(CheckpointError, match="save_pretrained"):
        save_adapter(adapt(fresh_model("esm"), "full"), tmp_path)


def test_a_merged_adapter_is_not_saved(fresh_model, tmp_path):
    model = adapt(fresh_model("esm"), "lora")
    model.merge_adapter()
    with pytest.raises(CheckpointError, match="unmerge_adapter"):
        save_adapter(model, tmp_path)


def test_a_trained_but_unsaved_parameter_warns(fresh_model, tmp_path):
    model = adapt(fresh_model("esm"), "lora")
    model.get_base_model().esm.embeddings.word_embeddings.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"not in the adapter file: .*word_embeddings\.weight"):
        save_adapter(model, tmp_path)


def test_extra_modules_to_save_come_back(fresh_model, batch, tmp_path, recwarn):
    model = adapt(fresh_model("esm"), "lora", modules_to_save=["word_embeddings"])
    with torch.no_grad():
        model.get_base_model().esm.embeddings.word_embeddings.weight.add_(0.3)
    save_adapter(model, tmp_path)
    again = load_adapter(fresh_model("esm", head_seed=4), tmp_path)
    torch.testing.assert_close(logits_of(again, batch), logits_of(model.eval(), batch), atol=1e-6, rtol=0)
    assert not [w for w in recwarn if "adapter" in str(w.message)]
