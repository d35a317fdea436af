"""What a user gets from `pip install`: the wheel's content, its metadata, and that it works alone."""

import os
import re
import subprocess
import sys
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from house_rules import PLOTTING_FILE, Source
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "genesplice_hf"
MAX_MEGABYTES = 12
# Where the import's name is not the distribution's.
DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "PIL": "pillow"}
EXTRAS = {"flash", "rna", "tracks", "plots", "graph", "dev"}
BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the backend that pip would call."""
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    return message_from_string(read_info(wheel, "METADATA"))


def read_info(wheel: Path, file: str) -> str:
    """One file of the wheel's `.dist-info` folder."""
    with zipfile.ZipFile(wheel) as archive:
        found = next(name for name in archive.namelist() if name.endswith(f".dist-info/{file}"))
        return archive.read(found).decode()


def version() -> str:
    text = (PACKAGE / "version.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "([^"]+)"', text)[1]


def requirements(metadata: Message) -> list[Requirement]:
    return [Requirement(line) for line in metadata.get_all("Requires-Dist")]


def pins() -> dict[str, Requirement]:
    """The rows of constraints.txt by canonical name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    rows = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(row.name): row for row in rows}


def test_wheel_holds_the_package_and_nothing_else(names: set[str]) -> None:
    roots = {name.split("/")[0] for name in names}
    assert roots == {"genesplice_hf", f"genesplice_hf-{version()}.dist-info"}
    assert not [name for name in names if re.search(r"(^|/)(tests?|conftest|golden|__pycache__)(/|\.|$)", name)]


def test_wheel_holds_every_file_of_the_package(names: set[str]) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    expected = {file for file in files if "__pycache__" not in file}
    assert expected <= names, f"missing in the wheel: {sorted(expected - names)}"
    assert "genesplice_hf/py.typed" in names


def test_wheel_holds_the_licence_text(wheel: Path, metadata: Message) -> None:
    assert read_info(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert metadata["License-Expression"] == "Apache-2.0"


def test_wheel_holds_the_embedded_checkpoint(names: set[str]) -> None:
    weights = [name for name in names if re.fullmatch(r"genesplice_hf/checkpoints/.*\.safetensors", name)]
    assert weights, "the wheel must carry the embedded checkpoint (genesplice_hf/checkpoints/)"
    for name in weights:
        assert f"{name.rpartition('/')[0]}/config.json" in names


def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_MEGABYTES * 2**20


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "genesplice-hf"
    assert metadata["Version"] == version()
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS


def test_core_needs_no_optional_package(metadata: Message) -> None:
    core = {canonicalize_name(row.name) for row in requirements(metadata) if "extra ==" not in str(row.marker)}
    assert {"torch", "transformers", "peft"} <= core
    assert not core & {"flash-attn", "anndata", "scanpy", "matplotlib", "logomaker", "triton", "kernels"}


def imported(sources: list[Source], optional: bool) -> set[str]:
    """The distributions that the files import; `optional` adds those for types, in functions and in the plots."""
    found = {
        one.module.split(".")[0]
        for source in sources
        for one in source.imports
        if optional or not (one.in_function or one.for_types or source.path == PLOTTING_FILE)
    }
    return {DISTRIBUTIONS.get(name, canonicalize_name(name)) for name in found - sys.stdlib_module_names}


def test_every_import_is_declared(metadata: Message) -> None:
    sources = [
        Source(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8"))
        for path in PACKAGE.rglob("*.py")
    ]
    own = {"genesplice-hf"}
    core = {canonicalize_name(row.name) for row in requirements(metadata) if "extra ==" not in str(row.marker)}
    every = {canonicalize_name(row.name) for row in requirements(metadata)}
    assert {"torch", "transformers"} <= imported(sources, optional=False)
    assert imported(sources, optional=False) - own <= core
    assert imported(sources, optional=True) - own <= every


def test_constraints_pin_every_requirement_inside_its_range(metadata: Message) -> None:
    pinned = pins()
    needed = [row for row in requirements(metadata) if canonicalize_name(row.name) != "genesplice-hf"]
    assert {canonicalize_name(row.name) for row in needed} <= set(pinned)
    for row in needed:
        pin = str(pinned[canonicalize_name(row.name)].specifier)
        assert pin.startswith("=="), f"{row.name}: constraints.txt gives one version, not {pin!r}"
        assert row.specifier.contains(Version(pin[2:])), f"{row.name}: {pin} lies outside {row.specifier}"


def test_constraints_name_no_local_build() -> None:
    """`torch==2.13.0+cpu` would refuse the build with CUDA, and the other way round."""
    assert not [row for row in pins().values() if "+" in str(row.specifier)]


WORKS_ALONE = """
import sys
from importlib.metadata import distribution
import genesplice_hf
print(genesplice_hf.__file__)
(script,) = distribution("genesplice-hf").entry_points.select(group="console_scripts")
print(script.name, callable(script.load()))
"""


def test_wheel_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", WORKS_ALONE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    where, script = done.stdout.splitlines()[-2:]
    assert Path(where).is_relative_to(tmp_path)
    assert script == "genesplice True"
