"""What the bundler carries must load where the package does not exist; what it cannot carry it must refuse."""

import ast
import hashlib
import json
import sys

import pytest
import torch
import toy_composite
import transformers
from contract_cases import companions
from contract_rows import TABLES
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from genesplice_hf.errors import PublishError
from genesplice_hf.hub import bundle
from genesplice_hf.hub.bundle import check_bundle, write_bundle
from genesplice_hf.hub.flatten import flat_name, flatten_modules, rewrite_module
from genesplice_hf.models.registry import REGISTRY, ModelEntry

START = "toy.models.ape.modeling_ape"
HEADS = [(row, auto_class) for row, entry in REGISTRY.items() for auto_class in entry.auto_classes]

LOAD_AND_SAVE_AGAIN = """
import json, pathlib, sys
import torch, transformers
from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

jobs, found = json.loads(pathlib.Path(sys.argv[1]).read_text()), {}
torch.set_num_threads(1)
for key, job in jobs.items():
    auto_class = getattr(transformers, job["auto_class"], None)
    def load(folder):
        if auto_class is not None:
            return auto_class.from_pretrained(folder, trust_remote_code=True).eval()
        return get_class_from_dynamic_module(job["reference"], folder).from_pretrained(folder).eval()
    model = load(job["folder"])
    ids = torch.tensor(job["input_ids"])
    beside = {name: torch.tensor(values) for name, values in job["beside"].items()}
    with torch.no_grad():
        found[key] = model(ids, **beside)[0].contiguous()
    if auto_class is None:
        continue  # transformers copies the code of classes that one of its own Auto classes has loaded, only
    again = "saved_again_" + key.replace("/", "_")
    model.save_pretrained(again)
    with torch.no_grad():
        found[key + "/again"] = load(again)(ids, **beside)[0].contiguous()
    copied = {path.name for path in pathlib.Path(again).glob("*.py")}
    needed = set(job["needed"])
    assert needed <= copied, needed - copied
save_file(found, sys.argv[2])
assert not [name for name in sys.modules if name.split(".")[0] in ("genesplice_hf", "toygenes")]
"""


def write_toy(tmp_path, **files):
    """A package `toy`; keys are paths with `__` for `/`."""
    for name, text in files.items():
        path = tmp_path / "toy" / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "toy"


def flatten(root, *starts):
    return flatten_modules(starts or [START], package="toy", root=root)


# The pure walk


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("toy.layers.norm", "layers_norm.py"),
        ("toy.errors", "errors.py"),
        ("toy.models.auto", "models_auto.py"),
        ("toy.models.ape.modeling_ape", "modeling_ape.py"),
        ("toy.models.ape.configuration_ape", "configuration_ape.py"),
        ("toy.models.ape.conversion_ape", "models_ape_conversion_ape.py"),
        ("toy.tokenization.tokenization_kmer", "tokenization_kmer.py"),
        ("toy.models.ape.processing_ape", "processing_ape.py"),
    ],
)
def test_flat_names(module, name):
    assert flat_name(module, "toy") == name


def test_the_walk_reaches_every_file_once_and_nothing_else(tmp_path):
    root = write_toy(
        tmp_path,
        models__ape__modeling_ape="from toy.layers.norm import Norm\nfrom toy.errors import ToyError\n",
        layers__norm="from toy.errors import ToyError\n\n\ndef f():\n    from toy.layers.deep import D\n",
        layers__deep="from toy.layers.norm import Norm\n",
        layers__unused="from nowhere import nothing\n",
        errors="class ToyError(ValueError):\n    pass\n",
    )
    texts = flatten(root)
    assert set(texts) == {"modeling_ape.py", "layers_norm.py", "layers_deep.py", "errors.py"}
    assert texts["modeling_ape.py"] == "from .layers_norm import Norm\nfrom .errors import ToyError\n"
    assert "    from .layers_deep import D\n" in texts["layers_norm.py"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from toy.a.b import C\n", "from .a_b import C\n"),
        ("from toy.a.b import C as D, E\n", "from .a_b import C as D, E\n"),
        ("from  toy.a.b  import C\n", "from .a_b  import C\n"),
        ("from toy.a.b import (\n    C,  # why\n    D,\n)\n", "from .a_b import (\n    C,  # why\n    D,\n)\n"),
        ("try:\n    from toy.a.b import C\nexcept ImportError:\n    C = None\n", None),
        ("s = 'from toy.a.b import C'\nfrom toy.a.b import C\n", "s = 'from toy.a.b import C'\nfrom .a_b import C\n"),
        ("from toy.a.b import C\nfrom toy.a.bb import D\n", "from .a_b import C\nfrom .a_bb import D\n"),
        ("from toyota.a import C\n", "refused"),
        ("from toy.a.b import C; from toy.a.b import D\n", "from .a_b import C; from .a_b import D\n"),
        ("x = 1\n\x0c\nfrom toy.a.b import C\n", "x = 1\n\x0c\nfrom .a_b import C\n"),
        ("if 1:\n\tfrom toy.a.b import ä\n", "if 1:\n\tfrom .a_b import ä\n"),
    ],
)
def test_rewriting_touches_the_import_only(source, expected):
    if expected == "refused":
        with pytest.raises(PublishError, match="toyota"):
            rewrite_module(source, module="toy.x", package="toy")
        return
    text, _ = rewrite_module(source, module="toy.x", package="toy")
    assert text == (expected or source.replace("toy.a.b", ".a_b"))


def test_everything_but_first_party_imports_stays_byte_for_byte():
    """On our own files: the syntax trees differ in `ImportFrom` nodes of the package and nowhere else."""

    class Neutral(ast.NodeTransformer):
        def visit_ImportFrom(self, node):
            return ast.Pass() if node.level or node.module.startswith("genesplice_hf.") else node

    starts = [cls.__module__ for entry in REGISTRY.values() for cls in entry.auto_classes.values()]
    texts = flatten_modules(starts, package="genesplice_hf", root=bundle.PACKAGE_ROOT)
    assert len(texts) > 3
    originals = {flat_name(name, "genesplice_hf"): module for name, module in sys.modules.items()}
    for name, text in texts.items():
        with open(originals[name].__file__, encoding="utf-8") as file:
            original = file.read()
        before, after = (ast.dump(Neutral().visit(ast.parse(source))) for source in (original, text))
        assert before == after
        assert len(original.splitlines()) == len(text.splitlines())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from .sibling import x\n", "relative imports"),
        ("from . import sibling\n", "relative imports"),
        ("def f():\n    from ..layers.norm import Norm\n", "line 2: relative imports"),
        ("import toy.layers.norm\n", "import toy.layers.norm"),
        ("import toy\n", "import toy"),
        ("import numpy, toy.layers.norm as n\n", "import toy.layers.norm"),
        ("from toy import errors\n", "the root of toy"),
        ("from toy.layers.norm import *\n", "wildcard"),
        ("from torch import *\n", "wildcard"),
        ("import importlib\n", "importlib"),
        ("from importlib import import_module\n", "importlib"),
        ("try:\n    import importlib.util\nexcept ImportError:\n    pass\n", "importlib"),
        ("x = __import__('os')\n", "__import__"),
        ("HERE = __file__\n", "__file__"),
        ("TABLE = open('table.txt').read()\n", "`open` reads a file"),
        ("import pathlib\nTABLE = pathlib.Path('t').read_text()\n", "`read_text` reads a file"),
        ("class A:\n    table = open('t')\n", "`open` reads a file"),
        ("import pandas\n", "`pandas` would be demanded"),
        ("def f():\n    import pandas\n", "`pandas` would be demanded"),
        ("from scipy.special import erf\n", "`scipy` would be demanded"),
        ("from toy.layers import norm\n", "is a room, not a file"),
        ("from toy.layers.absent import x\n", "does not exist"),
        ('"""Prose\nfrom .somewhere import trouble\n"""\n', "reword that line"),
        ("import torch; from toy.layers.norm import Norm\n", "would not see the import"),
        ("from toy.layers.norm \\\n    import Norm\n", "would not see the import"),
    ],
)
def test_code_that_cannot_travel_is_refused(tmp_path, source, message):
    root = write_toy(tmp_path, models__ape__modeling_ape=source, layers__norm="Norm = 1\n")
    with pytest.raises(PublishError, match=message):
        flatten(root)


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    import flash_attn\nexcept ImportError:\n    flash_attn = None\n",
        "import math\nimport numpy as np\nfrom huggingface_hub.dataclasses import strict\n",
        "def f(path):\n    return open(path)\n",
        "from __future__ import annotations\n",
    ],
)
def test_code_that_can_travel_is_not_refused(tmp_path, source):
    root = write_toy(tmp_path, models__ape__modeling_ape=source)
    assert flatten(root) == {"modeling_ape.py": source}


def test_two_files_with_one_flat_name_are_refused(tmp_path):
    root = write_toy(
        tmp_path,
        models__ape__modeling_ape="from toy.a.b_c import x\nfrom toy.a_b.c import y\n",
        a__b_c="x = 1\n",
        a_b__c="y = 1\n",
    )
    with pytest.raises(PublishError, match=r"`toy\.a\.b_c` and `toy\.a_b\.c`.*a_b_c\.py"):
        flatten(root)


# Whole models


@pytest.fixture(scope="module")
def toy_models(tmp_path_factory):
    """The registry rows of the composite toy package, and its root."""
    folder = tmp_path_factory.mktemp("package")
    root = toy_composite.write_package(folder)
    sys.path.insert(0, str(folder))
    inner, inner_config = (
        toy_composite.load(f"models.inner.{n}")
        for n in ("modeling_inner.InnerModel", "configuration_inner.InnerConfig")
    )
    outer, outer_config = (
        toy_composite.load(f"models.outer.{n}")
        for n in ("modeling_outer.OuterModel", "configuration_outer.OuterConfig")
    )
    AutoConfig.register("toygenes_inner", inner_config)
    AutoModel.register(inner_config, inner)
    rest = ("", "", {}, "")
    yield (
        {
            "toygenes_inner": ModelEntry("toygenes_inner", inner_config, {"AutoModel": inner}, inner_config, *rest),
            "toygenes_outer": ModelEntry("toygenes_outer", outer_config, {"AutoModel": outer}, outer_config, *rest),
        },
        root,
    )
    sys.path.remove(str(folder))


def save_with_bundle(model, folder):
    model.save_pretrained(folder, save_original_format=False)
    return write_bundle(folder, model)


def tiny(entry, auto_class):
    torch.manual_seed(5)
    overrides = entry.causal_overrides if auto_class == "AutoModelForCausalLM" else {}
    model = entry.auto_classes[auto_class](entry.tiny_config(**overrides)).eval()
    if entry.model_type in TABLES:
        TABLES[entry.model_type](model)
    return model


@pytest.fixture(scope="module")
def round_trips(toy_models, tmp_path_factory, run_isolated):
    """Every head of every row, and the composite toy: outputs here, and in one process without the packages."""
    folder = tmp_path_factory.mktemp("bundles")
    models = {f"{row}/{auto_class}": tiny(REGISTRY[row], auto_class) for row, auto_class in HEADS}
    jobs, expected = {}, {}
    rows, root = toy_models
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "PACKAGE", "toygenes")
        patch.setattr(bundle, "PACKAGE_ROOT", root)
        patch.setattr(bundle, "REGISTRY", rows)
        for name in ("toygenes_1/AutoModel", "toygenes_2/AutoModel"):
            torch.manual_seed(len(jobs))
            trunk = rows["toygenes_inner"].config_class(hidden_size=4 + len(jobs))
            models[name] = (
                rows["toygenes_outer"]
                .auto_classes["AutoModel"](rows["toygenes_outer"].config_class(trunk=trunk))
                .eval()
            )
            report = save_with_bundle(models[name], folder / name)
            jobs[name] = job_for(name, folder / name, models[name], report)
    for name in (f"{row}/{auto_class}" for row, auto_class in HEADS):
        report = save_with_bundle(models[name], folder / name)
        jobs[name] = job_for(name, folder / name, models[name], report)
    for name, model in models.items():
        with torch.no_grad():
            beside = {key: torch.tensor(values) for key, values in jobs[name]["beside"].items()}
            expected[name] = model(torch.tensor(jobs[name]["input_ids"]), **beside)[0]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_isolated(
        LOAD_AND_SAVE_AGAIN,
        folder / "jobs.json",
        folder / "found.safetensors",
        blocked=("genesplice_hf", "toygenes"),
    )
    return expected, load_file(folder / "found.safetensors"), folder


def job_for(name, folder, model, report):
    generator = torch.Generator().manual_seed(3)
    # Ids of bases, in a vocabulary or as the four channels of a network without one.
    lowest, end = (5, model.config.vocab_size) if hasattr(model.config, "vocab_size") else (0, 4)
    ids = torch.randint(lowest, end, (2, 24), generator=generator)
    auto_class = name.split("/")[1]
    needed = [file for file in report.files if not file.startswith("tokenization")]
    return {
        "folder": str(folder),
        "auto_class": auto_class,
        "reference": report.auto_map[auto_class],
        "input_ids": ids.tolist(),
        "beside": {key: tensor.tolist() for key, tensor in companions(name.split("/")[0], len(ids)).items()},
        "needed": needed,
    }


@pytest.mark.parametrize(
    "name", [*(f"{row}/{auto}" for row, auto in HEADS), "toygenes_1/AutoModel", "toygenes_2/AutoModel"]
)
def test_without_the_package_the_outputs_are_identical_also_when_saved_again(round_trips, name):
    expected, found, _ = round_trips
    assert torch.equal(found[name], expected[name])
    if hasattr(transformers, name.split("/")[1]):
        assert torch.equal(found[f"{name}/again"], expected[name])


@pytest.mark.parametrize(("row", "auto_class"), HEADS)
def test_auto_map_is_complete_and_points_into_the_bundle(round_trips, row, auto_class):
    folder = round_trips[2] / row / auto_class
    entry = REGISTRY[row]
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", *entry.auto_classes}
    for reference in auto_map.values():
        module, cls = reference.split(".")
        tree = ast.parse((folder / f"{module}.py").read_text())
        assert cls in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_bundle_json_holds_version_and_sha256_of_every_python_file(round_trips):
    row, auto_class = HEADS[0]
    folder = round_trips[2] / row / auto_class
    stamp = json.loads((folder / "bundle.json").read_text())
    assert (stamp["package"], stamp["version"]) == ("genesplice_hf", bundle.__version__)
    assert stamp["files"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))
    }


def test_a_changed_or_missing_file_is_noticed(tmp_path):
    entry = REGISTRY["genesplice"]
    report = save_with_bundle(tiny(entry, "AutoModel"), tmp_path)
    assert check_bundle(tmp_path) == report
    with open(tmp_path / "errors.py", "a") as file:
        file.write("# changed\n")
    (tmp_path / "configuration_genesplice.py").unlink()
    with pytest.raises(PublishError, match=r"configuration_genesplice\.py, errors\.py"):
        check_bundle(tmp_path)


def test_a_folder_that_was_not_saved_is_refused(tmp_path):
    with pytest.raises(PublishError, match="save_pretrained"):
        write_bundle(tmp_path, REGISTRY["genesplice"].tiny_config())
    with pytest.raises(PublishError, match=r"bundle\.json"):
        check_bundle(tmp_path)


def test_a_model_of_transformers_is_refused(tmp_path):
    config = AutoConfig.for_model("bert")
    config.save_pretrained(tmp_path)
    with pytest.raises(PublishError, match="`bert`"):
        write_bundle(tmp_path, config)
