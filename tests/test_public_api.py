"""What `import genesplice_hf` promises: it is light, it registers every model, and its own code wins."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

import genesplice_hf
from genesplice_hf.models import auto
from genesplice_hf.models.registry import REGISTRY, ModelEntry

BASELINE = "from transformers import AutoModel, AutoTokenizer, PreTrainedModel"
HEAVY = {
    "anndata", "datasets", "flash_attn", "h5py", "logomaker", "mamba_ssm", "matplotlib", "networkx",
    "pandas", "pysam", "scanpy", "scipy", "sklearn", "triton",
}  # fmt: skip
ENTRIES = [pytest.param(entry, id=model_type) for model_type, entry in REGISTRY.items()]
HEADS = [
    pytest.param(entry, name, id=f"{model_type}-{name}")
    for model_type, entry in REGISTRY.items()
    for name in entry.auto_classes
]

# Looks at a fresh interpreter before and after the import, and after one that is known to be heavy.
OBSERVE = f"""
import json, sys
{BASELINE}
from transformers import CONFIG_MAPPING

def packages():
    return {{name.split('.')[0] for name in sys.modules}}

def known():
    return [name for name in {list(REGISTRY)!r} if name in CONFIG_MAPPING]

start, known_before = packages(), known()
import genesplice_hf
ours, known_after = packages(), known()
import pysam
report = dict(ours=ours - start, probe=packages() - ours, before=known_before, after=known_after)
print(json.dumps({{name: sorted(values) for name, values in report.items()}}))
"""


@pytest.fixture(scope="module")
def observed(run_python: Callable[..., str]) -> dict[str, list[str]]:
    return json.loads(run_python(OBSERVE).splitlines()[-1])


def tiny_config(entry: ModelEntry, name: str) -> PreTrainedConfig:
    """The entry's tiny config, in the form that the Auto class `name` accepts."""
    return entry.tiny_config(**(entry.causal_overrides if name == "AutoModelForCausalLM" else {}))


def auto_class(name: str) -> type:
    """transformers' own, or ours for tasks that it has none for."""
    return getattr(transformers, name, None) or getattr(auto, name)


def tokenizer_of(entry: ModelEntry) -> transformers.PreTrainedTokenizerBase:
    tokenizer_class = getattr(import_module(entry.tokenizer_module), entry.tokenizer_class)
    return tokenizer_class(**entry.tokenizer_kwargs)


def test_import_is_light(observed: dict[str, list[str]]) -> None:
    assert "genesplice_hf" in observed["ours"]
    heavy = HEAVY & set(observed["ours"])
    assert not heavy, f"`import genesplice_hf` loads {sorted(heavy)}: import them in the function that needs them"


def test_a_heavy_import_would_be_seen(observed: dict[str, list[str]]) -> None:
    assert "pysam" in observed["probe"]


def test_model_types_appear_with_the_import_only(observed: dict[str, list[str]]) -> None:
    assert observed["before"] == [], "transformers itself knows these model types: choose others"
    assert observed["after"] == sorted(REGISTRY)


def test_version_is_the_one_of_the_version_file() -> None:
    text = (Path(genesplice_hf.__file__).parent / "version.py").read_text(encoding="utf-8")
    assert f'"{genesplice_hf.__version__}"' in text


def fields(config: PreTrainedConfig) -> dict[str, object]:
    """The config's values, without those that say where and by which transformers it was loaded."""
    provenance = {"_name_or_path", "transformers_version"}
    return {name: value for name, value in config.to_dict().items() if name not in provenance}


@pytest.mark.parametrize("entry", ENTRIES)
def test_config_resolves(entry: ModelEntry, tmp_path: Path) -> None:
    entry.tiny_config().save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is entry.config_class
    assert loaded.model_type == entry.model_type
    assert fields(loaded) == fields(entry.tiny_config())


@pytest.mark.parametrize(("entry", "name"), HEADS)
def test_auto_class_builds_and_loads(entry: ModelEntry, name: str, tmp_path: Path) -> None:
    model = auto_class(name).from_config(tiny_config(entry, name))
    assert type(model) is entry.auto_classes[name]
    model.save_pretrained(tmp_path)
    loaded = auto_class(name).from_pretrained(tmp_path)
    assert type(loaded) is entry.auto_classes[name]
    assert same_weights(model, loaded)


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(bool((left[key] == right[key]).all()) for key in left)


@pytest.mark.parametrize("entry", ENTRIES)
def test_tokenizer_resolves(entry: ModelEntry, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(entry)
    entry.tiny_config().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab()


def write_intruder(folder: Path, entry: ModelEntry, name: str) -> Path:
    """Saves a tiny model whose `auto_map` points at code that must never run; returns what it would write."""
    trace = folder / "intruder_ran"
    entry.auto_classes[name](tiny_config(entry, name)).save_pretrained(folder)
    tokenizer_of(entry).save_pretrained(folder)
    (folder / "intruder.py").write_text(f"open({str(trace)!r}, 'w').close()\nraise ImportError('the intruder ran')\n")
    add_json(folder / "config.json", auto_map={"AutoConfig": "intruder.Config", name: "intruder.Model"})
    add_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["intruder.Tokenizer", None]})
    return trace


def add_json(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize("entry", ENTRIES)
def test_installed_code_wins_over_remote_code(entry: ModelEntry, tmp_path: Path) -> None:
    name = next(iter(entry.auto_classes))
    trace = write_intruder(tmp_path, entry, name)
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    model = getattr(transformers, name).from_pretrained(tmp_path, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(config) is entry.config_class
    assert type(model) is entry.auto_classes[name]
    assert type(tokenizer).__name__ == entry.tokenizer_class
    assert not trace.exists(), "code from the checkpoint's folder was executed"


def test_an_unregistered_type_would_run_the_intruder(run_python: Callable[..., str], tmp_path: Path) -> None:
    """The check above can fail: without the package the same folder does execute its own code."""
    entry = next(iter(REGISTRY.values()))
    trace = write_intruder(tmp_path, entry, next(iter(entry.auto_classes)))
    code = f"""
from transformers import AutoConfig
try:
    AutoConfig.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
except ImportError as error:
    print(error)
"""
    assert "the intruder ran" in run_python(code)
    assert trace.exists()


@pytest.mark.parametrize("entry", ENTRIES)
def test_peft_knows_the_targets(entry: ModelEntry) -> None:
    constants = import_module("peft.utils.constants")
    tables = {
        "lora_targets": constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
        "ia3_targets": constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
        "ia3_feedforward": constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
        "layer_norm_targets": constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING,
    }
    known = {name: table[entry.model_type] for name, table in tables.items()}
    assert known == {name: getattr(entry.config_class, name) for name in tables}


def test_entries_are_what_they_say() -> None:
    for model_type, entry in REGISTRY.items():
        assert entry.model_type == model_type == entry.config_class.model_type
        assert issubclass(entry.config_class, PreTrainedConfig)
        assert all(issubclass(model, PreTrainedModel) for model in entry.auto_classes.values())
