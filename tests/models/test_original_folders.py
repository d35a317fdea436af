"""Folders and repositories in a reference's own layout, through `from_pretrained` of our classes and the Auto classes.

The reference is a made-up one whose tensors are those of google-research's SLiMPerformer and whose config.json says
`toy_original`; what holds for it holds for every source.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants, save_torch_state_dict
from local_hub import LocalHub
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    EsmForMaskedLM,
    PreTrainedModel,
)

import genesplice_hf
from genesplice_hf.adaptation.adapt import adapt
from genesplice_hf.errors import CheckpointError
from genesplice_hf.layers.strict_loading import ORIGINAL_READERS
from genesplice_hf.models import original
from genesplice_hf.models.original import SOURCES, load_original, register_source
from genesplice_hf.models.performer.configuration_performer import PerformerConfig
from genesplice_hf.models.performer.conversion_performer import SlimPerformerSource
from genesplice_hf.models.performer.modeling_performer import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
)
from genesplice_hf.models.performer.modeling_performer_base import PerformerModel

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
CASE = GOLDEN / "slim_performer_elu"
TYPE = "toy_original"
HEAD = {"output_logit_map.weight", "output_logit_map.bias"}
Edit = Callable[[dict[str, torch.Tensor]], object]


class ToySource(SlimPerformerSource):
    name = "toy"
    original_types = (TYPE,)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the toy reference known for one test."""
    readers = dict(ORIGINAL_READERS)
    monkeypatch.setitem(SOURCES, "toy", ToySource())
    register_source(SOURCES["toy"])
    yield
    ORIGINAL_READERS.clear()
    ORIGINAL_READERS.update(readers)
    CONFIG_MAPPING._extra_content.pop(TYPE)


def golden_config() -> dict[str, Any]:
    return json.loads((CASE / "config.json").read_text())["model"]


def golden_weights() -> dict[str, torch.Tensor]:
    return load_file(CASE / "weights.safetensors")


def expected(**options: Any) -> PreTrainedModel:
    return genesplice_hf.from_original("toy", golden_config(), golden_weights(), **options)


def write(folder: Path, edit: Edit | None = None, **fields: Any) -> Path:
    """A folder in the reference's layout; None removes a field."""
    folder.mkdir(parents=True, exist_ok=True)
    config = golden_config() | {"model_type": TYPE, "architectures": ["SLiMPerformer"]} | fields
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )
    tensors = golden_weights()
    if edit is not None:
        edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = load_file(CASE / "inputs.safetensors")["input_ids"]
    with torch.no_grad():
        return model(ids).logits


def same_tensors(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, PerformerForCausalLM])
def test_every_door_gives_the_same_model(loader: Any, tmp_path: Path) -> None:
    model = loader.from_pretrained(write(tmp_path / "original"))
    assert type(model) is PerformerForCausalLM and not model.training
    assert same_tensors(model, expected())
    assert torch.equal(logits(model), logits(expected()))
    loaded = load_original("toy", tmp_path / "original")
    assert type(loaded) is PerformerForCausalLM and same_tensors(loaded, model)
    assert model.name_or_path == model.config.name_or_path == str(tmp_path / "original")
    assert model.config.conversion == expected().config.conversion
    assert model.generate(torch.full((1, 3), 5), max_new_tokens=2, do_sample=False).shape == (1, 5)


def test_saving_writes_our_layout(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write(tmp_path / "original"))
    model.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (PerformerConfig.model_type, ["PerformerForCausalLM"])
    assert config["conversion"]["source"] == "toy"
    assert same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), model)


def test_the_files_are_not_written_through(tmp_path: Path) -> None:
    model = PerformerForCausalLM.from_pretrained(write(tmp_path))
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_auto_config_gives_our_config(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write(tmp_path), slim_chunk_size=16, num_labels=3)
    assert type(config) is PerformerConfig and config.model_type == PerformerConfig.model_type
    assert (config.slim_chunk_size, config.num_labels, config.hidden_size) == (16, 3, golden_config()["hidden_dim"])


def test_the_base_leaves_the_head_behind(tmp_path: Path) -> None:
    base, info = AutoModel.from_pretrained(write(tmp_path), output_loading_info=True)
    assert type(base) is PerformerModel
    assert set(base.config.conversion["ignored_keys"]) == HEAD
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same_tensors(base, expected().performer)


@pytest.mark.parametrize("loader", [AutoModelForSequenceClassification, PerformerForSequenceClassification])
def test_a_class_that_the_reference_lacks_gets_a_new_head(loader: Any, tmp_path: Path) -> None:
    options = {"num_labels": 5, "slim_chunk_size": -1}
    model, info = loader.from_pretrained(write(tmp_path), output_loading_info=True, **options)
    assert type(model) is PerformerForSequenceClassification
    assert info["missing_keys"] == {key for key in model.state_dict() if not key.startswith("performer.")}
    assert model.config.num_labels == 5 and model.config.slim_chunk_size == -1
    assert same_tensors(model.performer, expected().performer)


def test_a_config_of_the_caller_is_used_and_not_changed(tmp_path: Path) -> None:
    folder = write(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    config.num_labels, config.slim_chunk_size = 4, 8
    before = config.to_dict()
    model = AutoModelForSequenceClassification.from_pretrained(folder, config=config)
    assert (model.config.num_labels, model.config.slim_chunk_size) == (4, 8)
    assert config.to_dict() == before


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, PerformerForCausalLM])
def test_options_of_loading(loader: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, torch_dtype="float16")
    assert loader.from_pretrained(folder).dtype == torch.float32, "the type of the weights, not that of config.json"
    assert loader.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert loader.from_pretrained(folder, dtype="auto").dtype == torch.float32
    on_device = loader.from_pretrained(folder, device_map="cpu", attn_implementation="eager")
    assert on_device.config._attn_implementation == "eager" and same_tensors(on_device, expected())
    assert loader.from_pretrained(folder, trust_remote_code=True).__module__.startswith("genesplice_hf.")
    with pytest.raises(TypeError, match="slim_chunks"):
        loader.from_pretrained(folder, slim_chunks=3)


@pytest.mark.parametrize("model_type", [None, "bert", "somebody_elses"])
def test_a_config_without_a_usable_type_loads_through_our_class(
    model_type: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of the tensors decide; the toy's are told by a stand-in for the detection."""
    folder = write(tmp_path, model_type=model_type)
    seen = []
    monkeypatch.setattr(original, "detect_dna_lm", lambda config, shapes: seen.append(shapes) or "toy")
    assert same_tensors(PerformerForCausalLM.from_pretrained(folder), expected())
    assert seen == [{key: tuple(tensor.shape) for key, tensor in golden_weights().items()}]
    monkeypatch.undo()


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, model_type="bert")
    with pytest.raises(CheckpointError, match=r"missing: .*performer\.layers"):
        PerformerForCausalLM.from_pretrained(folder, hidden_size=64)


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(golden_weights(), folder, max_shard_size=40_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def pickled(folder: Path, legacy: bool, name: str = "pytorch_model.bin", **wrapped: Any) -> None:
    (folder / "model.safetensors").unlink()
    found = {"state_dict": golden_weights()} | wrapped if wrapped else golden_weights()
    torch.save(found, folder / name, _use_new_zipfile_serialization=not legacy)


LAYOUTS = {
    "sharded": sharded,
    "zipped": lambda folder: pickled(folder, legacy=False),
    "legacy": lambda folder: pickled(folder, legacy=True),
    "training run": lambda folder: pickled(folder, False, "weights.ckpt", epoch=3),
    "variant": lambda folder: (folder / "model.safetensors").rename(folder / "model.fp16.safetensors"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loader", [AutoModelForCausalLM, PerformerForCausalLM])
def test_layouts_of_weights(layout: str, loader: Any, tmp_path: Path) -> None:
    LAYOUTS[layout](write(tmp_path))
    options = {"variant": "fp16"} if layout == "variant" else {}
    assert same_tensors(loader.from_pretrained(tmp_path, **options), expected())


def test_safetensors_come_first_and_the_kind_can_be_demanded(tmp_path: Path) -> None:
    folder = write(tmp_path)
    torch.save({key: tensor + 1 for key, tensor in golden_weights().items()}, folder / "pytorch_model.bin")
    assert same_tensors(PerformerForCausalLM.from_pretrained(folder), expected())
    other = PerformerForCausalLM.from_pretrained(folder, use_safetensors=False)
    assert torch.equal(other.performer.input_map.weight, golden_weights()["input_map.weight"] + 1)


class Harmful:
    def __reduce__(self) -> tuple:
        return (print, ("unpickled",))


@pytest.mark.parametrize("content", [{"a": Harmful()}, {"a": 3}, [torch.ones(2)]], ids=["code", "number", "list"])
def test_pickles_of_more_than_tensors_are_refused(content: Any, tmp_path: Path, capsys: Any) -> None:
    folder = write(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*from_original"):
        PerformerForCausalLM.from_pretrained(folder)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_cut_file_is_advice(size: int, tmp_path: Path) -> None:
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="cut short"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    sharded(write(tmp_path))
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("edit", "listed"),
    [
        (
            lambda tensors: tensors.pop("layers.0.attention.k_map.bias"),
            r"missing: .*layers\.0\.attention\.k_map\.bias",
        ),
        (lambda tensors: tensors.update({"layers.9.stranger": torch.ones(2)}), r"unexpected: .*layers\.9\.stranger"),
        (lambda tensors: tensors.update({"stranger": torch.ones(2)}), r"unexpected: .*stranger"),
        (lambda tensors: tensors.update({"layers.1.U_map.bias": torch.ones(2)}), r"U_map\.bias is \(2,\), needs"),
    ],
)
@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification])
def test_every_misfit_is_refused_whatever_the_class(edit: Edit, listed: str, loader: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=listed):
        loader.from_pretrained(write(tmp_path, edit), slim_chunk_size=-1)


class DemandingSource(ToySource):
    """Has a classifier, and refuses by itself where it is missing."""

    classes = ToySource.classes | {"sequence_classification": PerformerForSequenceClassification}

    @staticmethod
    def task(state_dict: dict[str, torch.Tensor]) -> str:
        has_classifier = any(key.startswith("classifier.") for key in state_dict)
        is_language = any(key.startswith("output_logit_map") for key in state_dict)
        return "causal_lm" if is_language else "sequence_classification" if has_classifier else "base"

    @staticmethod
    def tensors(state_dict: Any, config: Any, task: str, features: Any = None) -> Any:
        head = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith("classifier.")}
        if task != "sequence_classification":
            found, ignored = ToySource.tensors(state_dict, config, task, features)
            return found, [*ignored, *head]
        if "classifier.out_proj.weight" not in head:
            raise CheckpointError("missing: classifier.out_proj.weight")
        found, ignored = ToySource.tensors(state_dict, config, "base", features)
        return {f"performer.{key}": tensor for key, tensor in found.items()} | head, ignored


def test_a_source_may_demand_its_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a head is new where nothing of it is there, taken where it is whole, and refused in between."""
    monkeypatch.setitem(SOURCES, "toy", DemandingSource())
    options = {"num_labels": 3, "slim_chunk_size": -1}
    model = PerformerForSequenceClassification.from_pretrained(write(tmp_path / "none"), **options)
    assert model.config.num_labels == 3 and same_tensors(model.performer, expected().performer)
    width = model.config.hidden_size
    head = {"classifier.out_proj.weight": torch.ones(3, width), "classifier.out_proj.bias": torch.ones(3)}
    folder = write(tmp_path / "whole", lambda tensors: tensors.update(head))
    model = PerformerForSequenceClassification.from_pretrained(folder, **options)
    assert torch.equal(model.classifier.out_proj.weight, head["classifier.out_proj.weight"])
    head.pop("classifier.out_proj.weight")
    folder = write(tmp_path / "half", lambda tensors: tensors.update(head))
    with pytest.raises(CheckpointError, match=r"missing: classifier\.out_proj\.weight"):
        PerformerForSequenceClassification.from_pretrained(folder, **options)


def test_half_a_head_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, lambda tensors: tensors.pop("output_logit_map.bias"))
    with pytest.raises(CheckpointError, match=r"missing: output_logit_map\.bias"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, PerformerForCausalLM])
def test_subfolder(loader: Any, tmp_path: Path) -> None:
    write(tmp_path / "deep")
    assert same_tensors(loader.from_pretrained(tmp_path, subfolder="deep"), expected())


# What a fresh process does with the repository; the Hub's address is read when huggingface_hub is imported.
LOAD_FROM_HUB = """
import test_original_folders as tests
from genesplice_hf.models.original import SOURCES, register_source

SOURCES["toy"] = tests.ToySource()
register_source(SOURCES["toy"])
for loader in (tests.AutoModelForCausalLM, tests.PerformerForCausalLM):
    options = {"revision": REVISION, "token": "t", "cache_dir": "cache"}
    model = loader.from_pretrained("me/original", **options)
    assert tests.same_tensors(model, tests.expected()) and model.name_or_path == "me/original"
    again = loader.from_pretrained("me/original", local_files_only=True, **options)
    assert tests.same_tensors(again, model)
"""


def test_a_repository_by_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_python: Any) -> None:
    """The first commit is sharded and the one asked for, the second has other weights."""
    with LocalHub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        api = HfApi(endpoint=hub.url, token="t")
        api.create_repo("me/original")
        sharded(write(tmp_path / "first"))
        write(tmp_path / "second", lambda tensors: tensors["input_map.weight"].zero_())
        first = api.upload_folder(repo_id="me/original", folder_path=tmp_path / "first").oid
        api.upload_folder(repo_id="me/original", folder_path=tmp_path / "second")
        folders = (ROOT, ROOT / "tests", ROOT / "tests" / "models")
        environment = hub.environment | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
        run_python(LOAD_FROM_HUB.replace("REVISION", repr(first)), **environment)


def test_an_adapter_finds_its_original_base(tmp_path: Path) -> None:
    folder = write(tmp_path / "original")
    options = {"num_labels": 3, "slim_chunk_size": -1}
    model = adapt(AutoModelForSequenceClassification.from_pretrained(folder, **options), "lora", r=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.1 if "lora" in name else 1.0))
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter", **options)
    assert torch.allclose(logits(again), logits(model.eval()), atol=1e-6)


@pytest.mark.parametrize("source", [name for name in SOURCES if SOURCES[name].model_type in ("esm", "bert")])
def test_types_of_transformers_are_untouched(source: str, tmp_path: Path) -> None:
    """Their folders load through transformers' own classes and configs, as without this package."""
    entry = SOURCES[source]
    assert entry.original_types == () and entry.model_type not in ORIGINAL_READERS
    assert entry.model_type not in CONFIG_MAPPING._extra_content
    assert CONFIG_MAPPING[entry.model_type].__module__.startswith("transformers.")
    classes = {"nt_v1": EsmForMaskedLM, "dnabert1": BertForMaskedLM}
    config = CONFIG_MAPPING[entry.model_type](
        vocab_size=69, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, pad_token_id=0
    )
    classes[source](config).save_pretrained(tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(model) is classes[source] and getattr(model.config, "conversion", None) is None


def test_a_type_that_is_taken_is_refused() -> None:
    class Greedy(ToySource):
        original_types = ("bert",)

    with pytest.raises(ValueError, match="already used"):
        register_source(Greedy())
    assert CONFIG_MAPPING["bert"].__module__.startswith("transformers.")


def test_published_code_has_no_reader(run_python: Callable[..., str]) -> None:
    """A bundle holds `strict_loading` without the door; nothing but the door fills the table."""
    code = "from genesplice_hf.layers.strict_loading import ORIGINAL_READERS; print(len(ORIGINAL_READERS))"
    with_door = "import genesplice_hf.models.original\n" + code
    assert int(run_python(with_door).split()[-1]) >= 1
    bare = "import sys, types\n" + "\n".join(
        (
            "root = types.ModuleType('genesplice_hf')",
            f"root.__path__ = [{str(Path(genesplice_hf.__file__).parent)!r}]",
            "sys.modules['genesplice_hf'] = root",
            code,
        )
    )
    assert int(run_python(bare).split()[-1]) == 0


def test_every_original_type_has_one_source_and_gives_its_config() -> None:
    types = [name for entry in SOURCES.values() for name in entry.original_types]
    assert len(types) == len(set(types))
    for entry in SOURCES.values():
        for name in entry.original_types:
            alias = CONFIG_MAPPING[name]
            assert alias.model_type == name and not alias.__module__.startswith("transformers.")


def test_masked_models_are_made_of_a_causal_file_only_on_request(tmp_path: Path) -> None:
    """A causal config does not pass for a masked one; the caller says so, and the head is new."""
    folder = write(tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(folder, is_decoder=False, slim_chunk_size=-1)
    assert type(model) is PerformerForMaskedLM
    assert same_tensors(model.performer, expected().performer)
