"""`StrictPreTrainedModel` on a toy of a base and two heads: what is refused, what is excused, and what is said."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig

from genesplice_hf.errors import CheckpointError, GeneSpliceError
from genesplice_hf.layers.strict_loading import StrictPreTrainedModel

Edit = Callable[[dict[str, torch.Tensor]], object]


class ToyConfig(PreTrainedConfig):
    model_type = "strict_toy"

    def __init__(self, num_blocks: int = 2, has_norm: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.num_blocks, self.has_norm = num_blocks, has_norm


class ToyPreTrainedModel(StrictPreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"


class ToyModel(ToyPreTrainedModel):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(5, 3)
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(3) if config.has_norm else None
        self.register_buffer("scale", torch.ones(1))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


class ToyForLanguage(ToyPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "toy.embedding.weight"}

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.toy = ToyModel(config)
        self.lm_head = nn.Linear(3, 5, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class ToyForLabels(ToyPreTrainedModel):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.toy = ToyModel(config)
        self.classifier = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, config.num_labels))
        self.post_init()


HEAD = {"classifier.0.weight", "classifier.0.bias", "classifier.1.weight", "classifier.1.bias"}
CLASSES = [ToyModel, ToyForLanguage, ToyForLabels]


def save(model_class: type, folder: Path, edit: Edit | None = None, **fields: object) -> Path:
    """Saves a fresh toy, and edits its tensors and config.json afterwards (None removes an entry)."""
    model_class(ToyConfig(tie_word_embeddings=True)).save_pretrained(folder)
    if edit is not None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def drop(*keys: str) -> Edit:
    return lambda tensors: [tensors.pop(key) for key in keys]


def add(*keys: str) -> Edit:
    return lambda tensors: tensors.update({key: torch.ones(2) for key in keys})


def message(model_class: type, folder: Path, **options: object) -> str:
    with pytest.raises(CheckpointError) as error:
        model_class.from_pretrained(folder, **options)
    return str(error.value)


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("saved", CLASSES)
def test_every_class_reads_every_other_class(saved: type, model_class: type, tmp_path: Path) -> None:
    expected = saved(ToyConfig()).base_model.state_dict().keys()
    model, info = model_class.from_pretrained(save(saved, tmp_path), output_loading_info=True)
    source = load_file(tmp_path / "model.safetensors")
    for key in expected:
        stored = source[key if saved is ToyModel else f"toy.{key}"]
        assert torch.equal(model.base_model.state_dict()[key], stored)
    new_head = model_class is ToyForLabels and saved is not ToyForLabels
    assert info["missing_keys"] == (HEAD if new_head else set())
    assert info["unexpected_keys"] == (HEAD if saved is ToyForLabels and model_class is not saved else set())


def test_the_model_alone_is_returned_unless_the_report_is_asked_for(tmp_path: Path) -> None:
    assert isinstance(ToyModel.from_pretrained(save(ToyModel, tmp_path)), ToyModel)


def test_every_kind_of_misfit_is_listed_at_once(tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["toy.blocks.0.weight"], tensors["classifier.1.bias"]
        tensors["toy.blocks.1.bias"] = torch.ones(4)
        tensors["toy.blocks.2.bias"], tensors["elsewhere.weight"] = torch.ones(4), torch.ones(4)

    text = message(ToyForLabels, save(ToyForLabels, tmp_path, edit))
    assert "missing: classifier.1.bias, toy.blocks.0.weight;" in text
    assert "unexpected: elsewhere.weight, toy.blocks.2.bias;" in text
    assert "mis-shaped: toy.blocks.1.bias is (4,), needs (3,)." in text
    assert str(tmp_path) in text and "ToyForLabels" in text


@pytest.mark.parametrize(
    ("edit", "listed"),
    [
        (drop("blocks.0.weight"), "missing: toy.blocks.0.weight"),
        (drop("norm.weight", "norm.bias"), "missing: toy.norm.bias, toy.norm.weight"),
        (drop("scale"), "missing: toy.scale"),
        (add("blocks.2.weight"), "unexpected: blocks.2.weight"),
        (add("nothing.of.ours"), "unexpected: nothing.of.ours"),
        (
            lambda tensors: tensors.update({"norm.bias": torch.ones(4)}),
            "mis-shaped: toy.norm.bias is (4,), needs (3,)",
        ),
    ],
)
@pytest.mark.parametrize("model_class", [ToyForLanguage, ToyForLabels])
def test_a_misfit_of_the_base_file_does_not_pass_for_a_head(
    model_class: type, edit: Edit, listed: str, tmp_path: Path
) -> None:
    assert listed in message(model_class, save(ToyModel, tmp_path, edit))


@pytest.mark.parametrize(
    ("edit", "listed"),
    [
        (drop("toy.blocks.0.weight"), "missing: blocks.0.weight"),
        (add("toy.blocks.2.weight"), "unexpected: toy.blocks.2.weight"),
        (
            lambda tensors: tensors.update({"toy.norm.bias": torch.ones(4)}),
            "mis-shaped: norm.bias is (4,), needs (3,)",
        ),
    ],
)
def test_a_misfit_of_a_heads_file_is_seen_by_the_base(edit: Edit, listed: str, tmp_path: Path) -> None:
    assert listed in message(ToyModel, save(ToyForLabels, tmp_path, edit))


@pytest.mark.parametrize("architectures", [None, ["ToyForSomethingElse"]])
def test_the_base_is_known_by_its_keys_when_the_file_does_not_say_who_saved_it(
    architectures: list[str] | None, tmp_path: Path
) -> None:
    folder = save(ToyModel, tmp_path, add("blocks.2.weight", "other_head.weight"), architectures=architectures)
    text = message(ToyForLabels, folder)
    assert "unexpected: blocks.2.weight." in text and "missing" not in text


@pytest.mark.parametrize("saved", [ToyModel, ToyForLanguage])
@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("fields", [{"num_blocks": 1}, {"num_blocks": 0}, {"has_norm": False}], ids=str)
def test_a_part_that_this_config_leaves_out_is_unexpected(
    saved: type, model_class: type, fields: dict, tmp_path: Path
) -> None:
    """An empty list of blocks or an absent norm is the base's all the same, not another class's head."""
    prefix = "" if saved is ToyModel else "toy."
    text = message(model_class, save(saved, tmp_path), **fields)
    lost = "norm.weight" if "has_norm" in fields else "blocks.1.weight"
    assert f"{prefix}{lost}" in text.split("unexpected:")[1]


def test_the_same_class_without_its_head_is_refused(tmp_path: Path) -> None:
    text = message(ToyForLabels, save(ToyForLabels, tmp_path, drop(*HEAD)))
    assert all(key in text for key in HEAD)


def test_half_a_head_is_refused_from_any_class(tmp_path: Path) -> None:
    folder = save(ToyForLabels, tmp_path, drop("classifier.0.bias"), architectures=["ToyForLanguage"])
    assert "missing: classifier.0.bias" in message(ToyForLabels, folder)


def test_a_tied_weight_needs_no_tensor_of_its_own_but_its_partner_does(tmp_path: Path) -> None:
    assert "lm_head.weight" not in load_file(save(ToyForLanguage, tmp_path) / "model.safetensors")
    model = ToyForLanguage.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.toy.embedding.weight
    text = message(ToyForLanguage, save(ToyForLanguage, tmp_path, drop("toy.embedding.weight")))
    assert "toy.embedding.weight" in text


def test_mis_shaped_heads_are_drawn_anew_only_on_request_and_mis_shaped_bases_never(tmp_path: Path) -> None:
    folder = save(ToyForLabels, tmp_path)
    text = message(ToyForLabels, folder, num_labels=4)
    assert "classifier.1.weight is (2, 3), needs (4, 3)" in text and "`ignore_mismatched_sizes=True`" in text
    model = ToyForLabels.from_pretrained(folder, num_labels=4, ignore_mismatched_sizes=True)
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(model.classifier[0].weight, stored["classifier.0.weight"])
    assert model.classifier[1].weight.shape == (4, 3)
    save(ToyForLabels, folder, lambda tensors: tensors.update({"toy.norm.bias": torch.ones(4)}))
    assert "toy.norm.bias" in message(ToyForLabels, folder, ignore_mismatched_sizes=True)


def test_a_long_list_is_cut_and_counted(tmp_path: Path) -> None:
    text = message(ToyModel, save(ToyModel, tmp_path, add(*[f"blocks.{i}.weight" for i in range(10, 40)])))
    assert "blocks.29.weight and 10 more" in text and "blocks.30.weight" not in text


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_cut_file_is_advice(size: int, tmp_path: Path) -> None:
    path = save(ToyModel, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    text = message(ToyModel, tmp_path)
    assert "cut short or damaged" in text and str(tmp_path) in text


def test_a_folder_without_weights_stays_transformers_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        ToyModel.from_pretrained(tmp_path)


def test_tensors_in_memory_are_held_to_the_same(tmp_path: Path) -> None:
    state = ToyModel(ToyConfig()).state_dict()
    model = ToyModel.from_pretrained(None, config=ToyConfig(), state_dict=dict(state))
    assert torch.equal(model.embedding.weight, state["embedding.weight"])
    state.pop("norm.weight")
    with pytest.raises(CheckpointError, match=r"missing: norm\.weight"):
        ToyModel.from_pretrained(None, config=ToyConfig(), state_dict=dict(state))


def test_the_error_is_a_value_error() -> None:
    assert issubclass(CheckpointError, GeneSpliceError) and issubclass(CheckpointError, ValueError)
