"""Holds DESIGN's table of who may import whom, and the counted part of the house style.

Every rule is first shown to fail on its own bad examples and to stay silent on the good ones.
"""

from pathlib import Path
from statistics import median, quantiles

import pytest
from house_rules import (
    PACKAGE,
    Rule,
    Source,
    absolute,
    at_the_top,
    body_lines,
    bundle_ready,
    downward,
    edges,
    empty_doors,
    find_cycle,
    forbidden_third_parties,
    light,
    models_apart,
    no_blind_except,
    no_export_lists,
    no_forbidden_calls,
    nothing_above,
    reached,
    shape_of_files,
    tokenizers_without_torch,
)

FOLDER = Path(__file__).resolve().parent.parent / PACKAGE
SOURCES = [
    Source(path.relative_to(FOLDER).as_posix(), path.read_text(encoding="utf-8"))
    for path in sorted(FOLDER.rglob("*.py"))
]
# Published files stand alone, so these are held to the light-import rule even before something imports them.
ALWAYS_LIGHT = ("genome", "layers", "tokenization", "heads", "models")

RULES = [
    Rule(
        downward,
        bad=(
            ("layers/norm.py", "from genesplice_hf.models.genesplice.x import Y"),
            ("data/fasta.py", "import genesplice_hf.models.registry"),
            ("adaptation/lora.py", "from genesplice_hf.hub.card import Card"),
            ("genome/alphabet.py", "from genesplice_hf.tokenization import tokenization_kmer"),
            ("attic/old.py", "x = 1"),
        ),
        good=(
            ("heads/sequence.py", "from genesplice_hf.layers.norm import RMSNorm"),
            ("interpretation/mutagenesis.py", "from genesplice_hf.scoring.variants import score"),
            ("hub/card.py", "from genesplice_hf.version import __version__"),
            ("cli.py", "from genesplice_hf.hub.publish import publish"),
        ),
    ),
    Rule(
        models_apart,
        bad=(
            ("models/performer/modeling_performer.py", "from genesplice_hf.models.genesplice.x import Y"),
            ("models/performer/modeling_performer.py", "from genesplice_hf.models.registry import REGISTRY"),
            ("models/auto.py", "from genesplice_hf.models.genesplice.x import Y"),
        ),
        good=(
            ("models/performer/modeling_performer.py", "from genesplice_hf.models.performer.x import Y"),
            ("models/performer/modeling_performer.py", "from genesplice_hf.models.auto import AutoModelForX"),
            ("models/registry.py", "from genesplice_hf.models.genesplice.x import Y"),
        ),
    ),
    Rule(
        nothing_above,
        bad=(
            ("scoring/variants.py", "import genesplice_hf"),
            ("scoring/variants.py", "from genesplice_hf import version"),
            ("hub/card.py", "from genesplice_hf.cli import app"),
            ("hub/card.py", "from training.finetune import main"),
        ),
        good=(("hub/card.py", "from genesplice_hf.models.registry import REGISTRY"),),
    ),
    Rule(
        absolute,
        bad=(
            ("layers/norm.py", "from .attention import Attention"),
            ("layers/norm.py", "from .. import errors"),
            ("layers/norm.py", "from genesplice_hf.errors import *"),
        ),
        good=(("layers/norm.py", "from genesplice_hf.errors import SequenceError"),),
    ),
    Rule(
        at_the_top,
        bad=(
            ("scoring/variants.py", "def f():\n    from genesplice_hf.data.vcf import read_vcf"),
            ("scoring/variants.py", "if True:\n    from genesplice_hf.data.vcf import read_vcf"),
            ("scoring/variants.py", "import importlib as i\ni.import_module('genesplice_hf.data.vcf')"),
        ),
        good=(
            ("scoring/variants.py", "from genesplice_hf.data.vcf import read_vcf"),
            ("scoring/metrics.py", "def auroc():\n    from sklearn.metrics import roc_auc_score"),
        ),
    ),
    Rule(
        forbidden_third_parties,
        bad=(
            ("genome/interval.py", "import torch"),
            ("genome/interval.py", "def f():\n    from transformers import AutoModel"),
            ("genome/interval.py", "TABLE = open('table.tsv').read()"),
            ("models/genesplice/modeling_genesplice.py", "from peft import LoraConfig"),
            ("interpretation/attention.py", "def draw():\n    import matplotlib.pyplot as plt"),
        ),
        good=(
            ("genome/interval.py", "from dataclasses import dataclass"),
            ("interpretation/plots.py", "import matplotlib.pyplot as plt"),
            ("adaptation/lora.py", "from peft import LoraConfig"),
        ),
    ),
    Rule(
        tokenizers_without_torch,
        bad=(
            ("tokenization/tokenization_kmer.py", "import torch"),
            ("tokenization/tokenization_kmer.py", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ),
        good=(("tokenization/tokenization_kmer.py", "def tensors(ids):\n    import torch"),),
    ),
    Rule(
        light,
        bad=(
            ("layers/attention.py", "import triton"),
            ("layers/attention.py", "try:\n    import flash_attn\nexcept ImportError:\n    pass"),
            ("scoring/pipelines.py", "from sklearn.metrics import roc_auc_score"),
        ),
        good=(("scoring/pipelines.py", "def f():\n    from sklearn.metrics import roc_auc_score"),),
        reached_only=True,
    ),
    Rule(
        bundle_ready,
        bad=(
            ("layers/norm.py", "import importlib.util"),
            ("tokenization/tokenization_bpe.py", "from pathlib import Path\nMERGES = Path(__file__).parent"),
        ),
        good=(("hub/bundle.py", "import importlib"), ("models/registry.py", "import importlib")),
    ),
    Rule(
        no_forbidden_calls,
        bad=(
            ("data/fasta.py", "print('reading')"),
            ("models/genesplice/modeling_genesplice.py", "GeneSpliceModel.register_for_auto_class()"),
            ("scoring/variants.py", "torch.load('x.pt', weights_only=True)"),
            ("models/genesplice/conversion_genesplice.py", "torch.load('x.pt')"),
        ),
        good=(
            ("cli.py", "print('done')"),
            ("data/fasta.py", "logger.info('reading')"),
            ("models/genesplice/conversion_genesplice.py", "torch.load('x.pt', weights_only=True)"),
        ),
    ),
    Rule(
        no_blind_except,
        bad=(
            ("data/fasta.py", "try:\n    f()\nexcept:\n    pass"),
            ("data/fasta.py", "try:\n    f()\nexcept Exception as error:\n    log(error)"),
            ("data/fasta.py", "try:\n    f()\nexcept (OSError, BaseException):\n    pass"),
            ("data/fasta.py", "with contextlib.suppress(Exception):\n    f()"),
        ),
        good=(
            ("data/fasta.py", "try:\n    f()\nexcept OSError as error:\n    raise DataError('') from error"),
            ("hub/publish.py", "try:\n    f()\nexcept BaseException:\n    clean_up()\n    raise"),
        ),
    ),
    Rule(
        no_export_lists,
        bad=(("layers/norm.py", "__all__ = ['RMSNorm']"),),
        good=(("layers/norm.py", "class RMSNorm: ..."), ("__init__.py", "from a.version import v as v")),
    ),
    Rule(
        empty_doors,
        bad=(("layers/__init__.py", "from genesplice_hf.layers.norm import RMSNorm"),),
        good=(("layers/__init__.py", ""), ("__init__.py", "from genesplice_hf.version import __version__")),
    ),
    Rule(
        shape_of_files,
        bad=(
            ("layers/norm.py", "x = 1"),
            ("layers/norm.py", '"""Norms."""\n' + "\n" * 400),
            ("data/utils.py", '"""Odds and ends."""'),
            ("data/readers/fasta.py", '"""Reads FASTA."""'),
        ),
        good=(
            ("layers/norm.py", '"""Root mean square norm."""\nx = 1'),
            ("layers/__init__.py", ""),
            ("models/genesplice/modeling_genesplice.py", '"""The model."""'),
        ),
    ),
]  # fmt: skip


def names(rule: Rule) -> str:
    return rule.check.__name__


def examples(pairs: tuple[tuple[str, str], ...]) -> str:
    return "\n".join(f"    in {path}:  {code[:160]!r}" for path, code in pairs)


def advice(rule: Rule, complaints: list[str]) -> str:
    found = "\n".join(f"  {complaint}" for complaint in complaints)
    return f"{rule.check.__doc__}\n{found}\n  bad:\n{examples(rule.bad)}\n  good:\n{examples(rule.good)}"


def held_to(rule: Rule) -> list[Source]:
    """The files that `rule` applies to."""
    if not rule.reached_only:
        return SOURCES
    loaded = reached(edges(SOURCES), "__init__")
    return [source for source in SOURCES if source.module in loaded or source.room in ALWAYS_LIGHT]


@pytest.mark.parametrize("rule", RULES, ids=names)
def test_rule_knows_bad_from_good(rule: Rule) -> None:
    for path, code in rule.bad:
        assert rule.check(Source(path, code)), f"`{names(rule)}` overlooks, in {path}:\n{code}"
    for path, code in rule.good:
        assert rule.check(Source(path, code)) == [], f"`{names(rule)}` complains about, in {path}:\n{code}"


@pytest.mark.parametrize("rule", RULES, ids=names)
def test_package_keeps_rule(rule: Rule) -> None:
    complaints = [f"{PACKAGE}/{source.path}: {said}" for source in held_to(rule) for said in rule.check(source)]
    assert not complaints, advice(rule, complaints)


def test_the_package_is_what_is_read() -> None:
    paths = {source.path for source in SOURCES}
    assert {"__init__.py", "errors.py", "genome/alphabet.py", "models/registry.py"} <= paths


def test_every_room_has_a_door() -> None:
    folders = {source.path.rpartition("/")[0] for source in SOURCES}
    doors = {source.path.rpartition("/")[0] for source in SOURCES if source.path.endswith("__init__.py")}
    assert folders == doors, f"add an empty __init__.py to {sorted(folders - doors)}"


def test_no_import_cycles() -> None:
    cycle = find_cycle(edges(SOURCES))
    assert not cycle, f"import cycle {' -> '.join(cycle)}: move what both need into a room below"


def test_cycles_are_found() -> None:
    a = Source("layers/a.py", "from genesplice_hf.layers.b import B")
    b = Source("layers/b.py", "from genesplice_hf.layers import c")
    c = Source("layers/c.py", "import genesplice_hf.layers.a")
    assert find_cycle(edges([a, b, c])) == ["layers.a", "layers.b", "layers.c", "layers.a"]
    assert find_cycle(edges([a, b, Source("layers/c.py", "")])) == []


def test_what_an_import_reaches() -> None:
    root = Source("__init__.py", "from genesplice_hf.models.registry import REGISTRY")
    registry = Source("models/registry.py", "from genesplice_hf.layers.norm import RMSNorm")
    norm, alone = Source("layers/norm.py", ""), Source("data/fasta.py", "import pysam")
    found = reached(edges([root, registry, norm, alone]), "__init__")
    assert found == {"__init__", "models.registry", "layers.norm"}


def test_body_lines_do_not_count_docstrings() -> None:
    code = 'def f():\n    """Job.\n\n    More.\n    """\n    x = 1\n    return x\n\ndef g(): ...'
    assert body_lines(Source("layers/norm.py", code)) == [2, 1]


def test_functions_stay_small() -> None:
    lengths = [length for source in SOURCES for length in body_lines(source)]
    assert median(lengths) < 10, f"median function body {median(lengths)} lines: split the longest"
    longest = quantiles(lengths, n=10)[-1]
    assert longest < 40, f"nine in ten function bodies stay under 40 lines, not under {longest}"
