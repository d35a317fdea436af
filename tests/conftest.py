"""What every test shares: no network, one thread, fixed seeds, caches of their own, fresh interpreters."""

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
_CACHE = tempfile.mkdtemp(prefix="genesplice_hf_tests_")

# Set before torch, transformers or datasets are imported, because they read these once. Every pytest worker
# has a cache of its own, so that two workers never write the same remote-code module at the same time.
os.environ.update(
    HF_HOME=_CACHE,
    HF_MODULES_CACHE=f"{_CACHE}/modules",
    HF_DATASETS_CACHE=f"{_CACHE}/datasets",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
# numba, which scanpy runs on, sets the number of threads of the whole process, torch's too, to its own.
for _threads in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")

# The same examples in every run: a failure seen once can be seen again.
settings.register_profile("genesplice", deadline=None, derandomize=True, database=None)
settings.load_profile("genesplice")

_LOCAL_HOSTS = {"127.0.0.1", "::1", "localhost", ""}


def pytest_unconfigure() -> None:
    """Removes the caches of this worker."""
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Starts every test from the same random state; torch is seeded where a test has imported it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets sockets reach this machine only, so that a test cannot depend on the internet unnoticed."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in _LOCAL_HOSTS:
            raise OSError(f"tests reach this machine only, not {address[0]}: use the `local_hub` double")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def run_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Gives `run_python(code, **environment) -> stdout`: runs `code` in a fresh interpreter, in a new folder.

    The repository root is on `PYTHONPATH`, unless `PYTHONPATH=` says otherwise. A non-zero exit fails the
    test with the interpreter's standard error in the message.
    """

    def run(code: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path_factory.mktemp("run_python"),
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-4000:]}"
        return done.stdout

    return run
