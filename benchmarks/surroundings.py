"""What a benchmark was measured on, so that a number can be judged later."""

import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from benchmarks.measuring import available_gib
from genesplice_hf.version import __version__


def environment(seed: int, threads: int) -> dict[str, Any]:
    """Seed, versions, hardware and how busy the machine was."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = {module.__name__: module.__version__ for module in (np, tokenizers, torch, transformers)}
    return {
        "seed": seed,
        "versions": versions | {"python": platform.python_version(), "genesplice_hf": __version__},
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_available_gib": round(available_gib(), 1),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "load_average": os.getloadavg(),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
