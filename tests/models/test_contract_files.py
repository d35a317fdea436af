"""The contract of every head's files: what is saved comes back, and nothing is dropped or drawn in silence."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from contract_cases import CASES, Batch, Case, cases_without, edit_json, head_keys, output
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from genesplice_hf.errors import CheckpointError

cases = cases_without("both_strands")

WEIGHTS = "model.safetensors"
# Heads that have layers of their own.
OWN_LAYERS = ("classifier.", "expression_head.", "zero_head.")


def has_own_head(case: Case) -> bool:
    return bool(head_keys(case.model())) if case.has_loss else False


def base_of(case: Case, seed: int = 0) -> PreTrainedModel:
    """The base model of a head's config, with other weights than the head's case has."""
    return case.beside("AutoModel").model(seed + 50, **config_overrides(case))


def config_overrides(case: Case) -> dict:
    return case.entry.causal_overrides if case.auto_class == "AutoModelForCausalLM" else {}


def edit_weights(folder: Path, edit: Callable[[Batch], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def spoil(tensors: Batch) -> list[str]:
    """Takes one tensor of the base away, adds one, and cuts one; says what the error must list."""
    layers = [key for key in tensors if ".0." in key and key.endswith(".weight") and not key.startswith(OWN_LAYERS)]
    missing, cut = layers[:2]
    extra = missing.replace(".0.", ".97.")
    tensors[extra] = tensors.pop(missing)
    tensors[cut] = tensors[cut][..., :-1]
    return [missing, extra, cut]


def last_parts(key: str) -> str:
    return ".".join(key.split(".")[-4:])


@cases("test_saved_and_loaded_is_identical")
@pytest.mark.parametrize("options", [{}, {"save_original_format": False}, {"max_shard_size": "8KB"}], ids=str)
def test_saved_and_loaded_is_identical(case: Case, options: dict, tmp_path: Path) -> None:
    model, batch = case.model(), case.batch()
    model.save_pretrained(tmp_path, **options)
    loaded, info = case.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded.training
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(output(loaded, batch), output(model, batch))
    expected, found = model.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert shared(loaded) == shared(model)


def shared(model: PreTrainedModel) -> set[str]:
    """Names in the state dict whose tensor has a second name."""
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
    return {key for key, tensor in model.state_dict().items() if pointers.count(tensor.data_ptr()) > 1}


@cases("test_bf16_file_is_identical")
def test_bf16_file_is_identical(case: Case, tmp_path: Path) -> None:
    model = case.model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = case.model_class.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    for name, parameter in wide.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).float())


@cases("test_a_base_lends_itself_to_every_head", lambda case: case.has_loss)
def test_a_base_lends_itself_to_every_head(case: Case, tmp_path: Path) -> None:
    """Exactly the head is reported missing, and drawn; the base is the file's."""
    base = base_of(case)
    base.save_pretrained(tmp_path)
    model, info = case.model_class.from_pretrained(tmp_path, output_loading_info=True, num_labels=3)
    assert info["missing_keys"] == head_keys(model)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    for key, tensor in base.state_dict().items():
        assert torch.equal(model.base_model.state_dict()[key], tensor), key
    assert output(model, case.batch()).isfinite().all()


@cases("test_a_head_gives_its_base_back", lambda case: case.has_loss)
def test_a_head_gives_its_base_back(case: Case, tmp_path: Path) -> None:
    model, batch = case.model(), case.batch()
    model.save_pretrained(tmp_path)
    base, info = base_of(case).__class__.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert {key for key in info["unexpected_keys"] if key in model.state_dict()} == head_keys(model)
    assert torch.equal(output(base, batch), output(model.base_model, batch))


@cases("test_a_head_lends_its_base_to_another_head", has_own_head)
def test_a_head_lends_its_base_to_another_head(case: Case, tmp_path: Path) -> None:
    others = [other for other in CASES if other.group == case.group and other.has_loss and other != case]
    assert others
    for other in others:
        saved = other.model(5)
        saved.save_pretrained(tmp_path / other.auto_class)
        found = case.model_class.from_pretrained(tmp_path / other.auto_class, num_labels=3)
        expected = saved.base_model.state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.base_model.state_dict().items())


@cases("test_the_same_class_without_its_head_is_refused", has_own_head)
def test_the_same_class_without_its_head_is_refused(case: Case, tmp_path: Path) -> None:
    model = case.model()
    keys = sorted(head_keys(model))
    model.save_pretrained(tmp_path)
    for lost in (keys, keys[:1]):
        model.save_pretrained(tmp_path)
        edit_weights(tmp_path, lambda tensors, lost=lost: [tensors.pop(key) for key in lost])
        with pytest.raises(CheckpointError) as error:
            case.model_class.from_pretrained(tmp_path)
        assert all(key in str(error.value) for key in lost)


@cases("test_a_part_of_a_head_is_refused", has_own_head)
def test_a_part_of_a_head_is_refused(case: Case, tmp_path: Path) -> None:
    """From a checkpoint of another class, a head may be absent, but not half absent."""
    keys = sorted(head_keys(case.model()))
    assert len(keys) > 1
    case.model().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.pop(keys[0]))
    edit_json(tmp_path / "config.json", architectures=["SomeOtherClass"])
    with pytest.raises(CheckpointError, match=keys[0]):
        case.model_class.from_pretrained(tmp_path)


@cases("test_misfits_of_the_base_are_all_listed")
def test_misfits_of_the_base_are_all_listed(case: Case, tmp_path: Path) -> None:
    case.model().save_pretrained(tmp_path)
    listed: list[str] = []
    edit_weights(tmp_path, lambda tensors: listed.extend(spoil(tensors)))
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(CheckpointError) as error:
            case.model_class.from_pretrained(tmp_path, **options)
        assert all(key in str(error.value) for key in listed), str(error.value)


@cases("test_misfits_of_a_lent_base_are_all_listed", lambda case: case.has_loss)
def test_misfits_of_a_lent_base_are_all_listed(case: Case, tmp_path: Path) -> None:
    """The file's keys have no prefix here, the model's have one; a lost tensor must not pass for a head."""
    base_of(case).save_pretrained(tmp_path)
    listed: list[str] = []
    edit_weights(tmp_path, lambda tensors: listed.extend(spoil(tensors)))
    with pytest.raises(CheckpointError) as error:
        case.model_class.from_pretrained(tmp_path)
    assert all(last_parts(key) in str(error.value) for key in listed), str(error.value)


@cases("test_misfits_of_a_heads_base_are_all_listed", lambda case: case.has_loss)
def test_misfits_of_a_heads_base_are_all_listed(case: Case, tmp_path: Path) -> None:
    """And the other way round: the file's keys have a prefix, the base model's have none."""
    case.model().save_pretrained(tmp_path)
    listed: list[str] = []
    edit_weights(tmp_path, lambda tensors: listed.extend(spoil(tensors)))
    with pytest.raises(CheckpointError) as error:
        type(base_of(case)).from_pretrained(tmp_path)
    assert all(last_parts(key) in str(error.value) for key in listed), str(error.value)


@cases("test_a_base_file_has_no_head_to_leave_over")
def test_a_base_file_has_no_head_to_leave_over(case: Case, tmp_path: Path) -> None:
    base_of(case).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update({"left_over.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match="unexpected: left_over"):
        case.model_class.from_pretrained(tmp_path)


@cases("test_another_number_of_labels", has_own_head)
def test_another_number_of_labels(case: Case, tmp_path: Path) -> None:
    """Refused, unless asked for; then the head is drawn anew and the base kept."""
    model = case.model()
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"mis-shaped.*ignore_mismatched_sizes"):
        case.model_class.from_pretrained(tmp_path, **case.sized(7))
    found = case.model_class.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **case.sized(7))
    assert output(found, case.batch()).shape[-1] == 7
    assert torch.equal(output(found.base_model, case.batch()), output(model.base_model, case.batch()))


@cases("test_a_damaged_file_is_refused")
@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_damaged_file_is_refused(case: Case, size: int, tmp_path: Path) -> None:
    case.model().save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:size])
    with pytest.raises(CheckpointError, match="cannot be read"):
        case.model_class.from_pretrained(tmp_path)


@cases("test_a_file_of_something_else_is_refused")
def test_a_file_of_something_else_is_refused(case: Case, tmp_path: Path) -> None:
    case.model().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"<!DOCTYPE html><html>Not found</html>" * 9)
    with pytest.raises(CheckpointError, match="cannot be read"):
        case.model_class.from_pretrained(tmp_path)


@cases("test_a_lost_shard_is_refused")
def test_a_lost_shard_is_refused(case: Case, tmp_path: Path) -> None:
    case.model().save_pretrained(tmp_path, max_shard_size="8KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises((OSError, CheckpointError)):
        case.model_class.from_pretrained(tmp_path)
