"""The contract of every head under adapters: one step trains adapter and head only, and the file brings it back."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from contract_cases import Batch, Case, cases_without, head_keys, objective, output, randomized
from peft import PeftModel
from transformers import PreTrainedModel

import genesplice_hf  # noqa: F401, registers the adapter targets
from genesplice_hf.adaptation.adapt import adapt, merge
from genesplice_hf.adaptation.adapter_files import load_adapter, save_adapter
from genesplice_hf.adaptation.targets import task_head_name
from genesplice_hf.errors import CheckpointError

cases = cases_without("both_strands")

METHODS = ["lora", "ia3", "layer_norm"]
both = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def only_methods_with_targets(request: pytest.FixtureRequest) -> None:
    """A config class that names no module for a method says that PEFT's has none to change; `adapt` then refuses."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if "case" in parameters and "method" in parameters:
        config_class, method = parameters["case"].entry.config_class, parameters["method"]
        if not getattr(config_class, f"{method}_targets"):
            with pytest.raises(CheckpointError, match="match no module"):
                adapt(parameters["case"].model(), method)
            pytest.skip(f"{config_class.__name__} has no `{method}_targets`; that `adapt` refuses was seen")


def fresh(case: Case, head_seed: int) -> PreTrainedModel:
    """The same base in every call; a head of its own."""
    model = case.model()
    head = task_head_name(model)
    if head is not None:
        randomized(model.get_submodule(head), head_seed)
    return model


def step(model: PeftModel, batch: Batch) -> None:
    model.train()
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    # A second step, for the first one moves only half of LoRA's matrices: the other half starts at zero.
    for _ in range(2):
        optimizer.zero_grad()
        objective(model, batch).backward()
        optimizer.step()
    model.eval()


def snapshot(model: PeftModel) -> Batch:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def is_adapter_or_head(name: str, method: str) -> bool:
    marks = {"lora": "lora_", "ia3": "ia3_", "layer_norm": "ln_tuning_layers"}
    return marks[method] in name or "modules_to_save" in name


def changed(model: PeftModel, before: Batch) -> Iterator[str]:
    return (name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name]))


@cases("test_the_head_is_where_peft_looks_for_it")
def test_the_head_is_where_peft_looks_for_it(case: Case) -> None:
    """Every parameter that is not the base's stands below `classifier` or `score`, or is tied to the base."""
    model = case.model()
    if case.has_loss:
        outside = {key for key in head_keys(model) if key.split(".")[0] != task_head_name(model)}
        assert outside == set()


@both
@cases("test_a_step_changes_adapter_and_head_only")
def test_a_step_changes_adapter_and_head_only(case: Case, method: str) -> None:
    model, batch = fresh(case, 1), case.batch(labels=True)
    expected = output(model, batch)
    model = adapt(model, method)
    torch.testing.assert_close(output(model.eval(), batch), expected)
    before = snapshot(model)
    step(model, batch)
    moved = set(changed(model, before))
    assert [name for name in moved if not is_adapter_or_head(name, method)] == []
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == moved
    assert any("modules_to_save" in name for name in moved) == (task_head_name(case.model()) is not None)
    assert (output(model, batch) - expected).abs().max() > 1e-4


@both
@cases("test_the_file_brings_it_back_on_a_fresh_base")
def test_the_file_brings_it_back_on_a_fresh_base(case: Case, method: str, tmp_path: Path) -> None:
    batch = case.batch(labels=True)
    model = adapt(fresh(case, 1), method)
    step(model, batch)
    expected = output(model, batch)
    save_adapter(model, tmp_path)
    base = fresh(case, 2)
    assert not torch.equal(output(base, batch), expected)
    assert torch.equal(output(load_adapter(base, tmp_path), batch), expected)
    stock = PeftModel.from_pretrained(fresh(case, 3), tmp_path).eval()
    assert torch.equal(output(stock, batch), expected)


@both
@cases("test_the_auto_class_loads_an_adapter_folder")
def test_the_auto_class_loads_an_adapter_folder(case: Case, method: str, tmp_path: Path) -> None:
    """What users call: `from_pretrained(adapter_folder)` finds the base by its path."""
    batch = case.batch(labels=True)
    fresh(case, 1).save_pretrained(tmp_path / "base")
    model = adapt(case.model_class.from_pretrained(tmp_path / "base"), method)
    step(model, batch)
    save_adapter(model, tmp_path / "adapter")
    loaded = case.model_class.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(output(loaded, batch), output(model, batch))


@both
@cases("test_merged_is_equal_and_plain")
def test_merged_is_equal_and_plain(case: Case, method: str, tmp_path: Path) -> None:
    batch = case.batch(labels=True)
    model = adapt(fresh(case, 1), method)
    step(model, batch)
    expected = output(model, batch)
    merged = merge(model)
    torch.testing.assert_close(output(merged, batch), expected, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == case.model().state_dict().keys()
    assert torch.equal(output(loaded, batch), output(merged, batch))


@both
@cases("test_an_adapter_trains_under_gradient_checkpointing")
def test_an_adapter_trains_under_gradient_checkpointing(case: Case, method: str) -> None:
    """As Trainer does it: without input gradients a frozen base would give the adapter none."""
    batch, found = case.batch(labels=True), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapt(fresh(case, 1), method, **({"lora_dropout": 0.0} if method == "lora" else {})).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        objective(model, batch).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)
