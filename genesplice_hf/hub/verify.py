"""Prove that a published folder gives the logits of the model it was made from, with and without the package."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from genesplice_hf.errors import PublishError
from genesplice_hf.models.registry import REGISTRY

# Two different lengths, so that padding is part of what must be equal.
PROBE_SEQUENCES = (
    "ATGGCGTACCTTGAACGGTTTATATCCGGATTACAGGCATTTTACGATTTAACCGGTACGCTAGCTTAGGCATCGTTAACCGGATATCGCGAATTCA",
    "TTGACAATTAATCATCGGCTCGTATAATGTGTGGAATTGTGAGCGGATAACAATTTCACACAGGAAACAG",
)
# Long enough for a large model on a slow disk; a hanging process must still end.
CHILD_TIMEOUT_S = 1800

# Runs in a process of its own, where importing the package fails as if it had never been installed.
_CHILD = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "genesplice_hf":
            raise ModuleNotFoundError("No module named 'genesplice_hf' (blocked on purpose)", name=name)

sys.meta_path.insert(0, Blocked())
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

job = json.load(sys.stdin)
torch.set_num_threads(job["threads"])
auto_class = getattr(transformers, job["auto_class"], None)
if auto_class is not None:
    model = auto_class.from_pretrained(job["folder"], trust_remote_code=True)
else:
    model = get_class_from_dynamic_module(job["reference"], job["folder"]).from_pretrained(job["folder"])
probe = load_file(job["probe"])
with torch.no_grad():
    outputs = model.eval()(**probe)
found = {"output": outputs[0].contiguous()}
if job["sequences"]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"], trust_remote_code=True)
    padding = tokenizer.pad_token_id is not None
    encoded = tokenizer(job["sequences"], padding=padding, return_tensors="pt")
    found["input_ids"] = encoded["input_ids"].contiguous()
save_file(found, job["found"])
assert "genesplice_hf" not in sys.modules
"""


def make_probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, torch.Tensor]:
    """A small batch for a model that reads `input_ids`.

    Returns:
        `input_ids` (B, L), int64, and what else the tokenizer returns that the model takes.

    Raises:
        PublishError: the model reads something else; its own probe must be passed.
    """
    if model.main_input_name != "input_ids":
        raise PublishError(
            f"`probe` must be given for {type(model).__name__}, which reads `{model.main_input_name}`; pass a "
            "dictionary of the tensors that its `forward` takes."
        )
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return {"input_ids": torch.randint(model.config.vocab_size, (2, 64), generator=generator)}
    encoded = tokenizer(_sequences_for(tokenizer), padding=_pads(tokenizer), return_tensors="pt")
    return {key: value for key, value in encoded.items() if key != "token_type_ids"}


def _pads(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.pad_token_id is not None


def _sequences_for(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return list(PROBE_SEQUENCES if _pads(tokenizer) else PROBE_SEQUENCES[:1])


def first_output(model: PreTrainedModel, probe: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or the last hidden state of a base model, in eval mode; the model is left as it was."""
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            return model(**{key: value.to(device) for key, value in probe.items()})[0]
    finally:
        model.train(training)


def verify_with_package(folder: str | Path, model: PreTrainedModel, probe: Mapping[str, torch.Tensor]) -> None:
    """Reload the folder strictly through the package and demand the outputs of `model`, bit for bit.

    Raises:
        PublishError: the folder does not load, or the outputs differ.
    """
    implementation = model.config._attn_implementation
    try:
        reloaded = type(model).from_pretrained(folder, attn_implementation=implementation)
    except (ValueError, OSError, RuntimeError) as error:
        raise PublishError(f"The folder does not load through the package: {error}") from error
    expected = first_output(model, probe)
    found = first_output(reloaded.to(expected.device), probe)
    _demand_equal(found, expected, "through the package")


def verify_without_package(
    folder: str | Path,
    *,
    probe: Mapping[str, torch.Tensor] | None = None,
    auto_class: str | None = None,
) -> None:
    """Load the folder with `trust_remote_code=True` where the package cannot be imported, and compare.

    A process of its own, in another working directory, offline, with the package blocked, loads model and
    tokenizer; this process loads them through the package. Outputs and token ids must be equal bit for bit.

    Args:
        folder: a folder with weights, `config.json`, a bundle and, where there is one, the tokenizer.
        probe: tensors for `forward`; made from the tokenizer or the vocabulary size when absent.
        auto_class: which entry of `auto_map` to load; the one of the saved class when absent.

    Raises:
        PublishError: the folder does not load without the package, or gives something else there.
    """
    folder = Path(folder).resolve()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto_class = auto_class or auto_class_of(config)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    model = _load_with_package(folder, config, auto_class)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if has_tokenizer else None
    probe = dict(probe) if probe is not None else make_probe(model, tokenizer)
    job = {
        "folder": str(folder),
        "auto_class": auto_class,
        "reference": config.get("auto_map", {}).get(auto_class),
        "sequences": _sequences_for(tokenizer) if tokenizer is not None else [],
        "threads": torch.get_num_threads(),
    }
    found = _run_child(job, probe)
    _demand_equal(found["output"], first_output(model, probe), "without the package")
    if tokenizer is not None:
        encoded = tokenizer(_sequences_for(tokenizer), padding=_pads(tokenizer), return_tensors="pt")
        _demand_equal(found["input_ids"], encoded["input_ids"], "without the package, for the token ids,")


def auto_class_of(config: Mapping[str, Any]) -> str:
    """What loads the class saved in a `config.json`: its Auto class, or a class of transformers itself.

    Raises:
        PublishError: the saved class has no entry in `auto_map` and is none of transformers.
    """
    saved = (config.get("architectures") or [""])[0]
    for name, reference in config.get("auto_map", {}).items():
        if isinstance(reference, str) and reference.split(".")[-1] == saved:
            return name
    if saved and hasattr(transformers, saved):
        return saved
    raise PublishError(f"`auto_map` in config.json must name the saved class `{saved}`; call `write_bundle`.")


def _load_with_package(folder: Path, config: Mapping[str, Any], auto_class: str) -> PreTrainedModel:
    rows = {entry.model_type: entry for entry in REGISTRY.values()}
    entry = rows.get(config["model_type"])
    model_class = entry.auto_classes[auto_class] if entry else getattr(transformers, auto_class)
    try:
        return model_class.from_pretrained(folder)
    except (ValueError, OSError, RuntimeError) as error:
        raise PublishError(f"The folder does not load through the package: {error}") from error


def _run_child(job: dict[str, Any], probe: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory(prefix="genesplice-verify-") as scratch:
        job |= {"probe": f"{scratch}/probe.safetensors", "found": f"{scratch}/found.safetensors"}
        save_file({key: value.cpu().contiguous() for key, value in probe.items()}, job["probe"])
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": f"{scratch}/modules",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        child = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=json.dumps(job),
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
            timeout=CHILD_TIMEOUT_S,
        )
        if child.returncode:
            raise PublishError(f"The folder does not load without the package:\n{child.stderr[-3000:]}")
        return load_file(job["found"])


def _demand_equal(found: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    if found.shape != expected.shape:
        raise PublishError(
            f"Loaded {where} the outputs have shape {tuple(found.shape)} instead of {tuple(expected.shape)}."
        )
    if not torch.equal(found.cpu(), expected.cpu()):
        gap = (found.cpu().double() - expected.cpu().double()).abs().max().item()
        raise PublishError(f"Loaded {where} the outputs differ by up to {gap:.3g}; they must be equal.")
