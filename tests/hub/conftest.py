"""A Hub on this machine, and processes in which the package cannot be imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import LocalHub

ROOT = Path(__file__).resolve().parents[2]
BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def local_hub():
    """A running, empty `LocalHub`."""
    with LocalHub() as hub:
        yield hub


@pytest.fixture(scope="session")
def run_isolated(tmp_path_factory):
    """Run a script in a fresh process, in another folder; `blocked` packages cannot be imported there."""

    def run(script, *arguments, environment=None, blocked=()):
        folder = tmp_path_factory.mktemp("child")
        prefix = BLOCK.format(blocked=set(blocked)) if blocked else ""
        child_environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(folder / "hf"),
            "HF_MODULES_CACHE": str(folder / "modules"),
            "HF_HUB_OFFLINE": "1",
            **(environment or {}),
        }
        child = subprocess.run(
            [sys.executable, "-c", prefix + script, *map(str, arguments)],
            cwd=folder,
            env=child_environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert child.returncode == 0, child.stderr[-4000:]
        return child.stdout

    return run
