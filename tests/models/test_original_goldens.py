"""Every golden DNA language model as the folder that its authors would publish, through every door, no remote code.

A case is written in the reference's own layout (config.json and model.safetensors under its names). What loads has the
golden logits; how the doors treat files of all kinds is in `test_original_folders.py`.
"""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from genesplice_hf.models.original import SOURCES
from genesplice_hf.models.registry import REGISTRY

GOLDEN = Path(__file__).parents[1] / "golden"
# What stands in a golden config.json beside the reference's own fields.
FACTS = {"case", "reference", "seed", "dtype", "grad_keys", "k_mers", "jax_config", "hf_config"}


class Published(NamedTuple):
    """One golden case.

    Attributes:
        source: of `from_original`.
        model_type: in the published config.json; None = it has none.
        auto: Auto class of its language model; None where config.json names no usable type.
        atol: of the case's README, float32.
        logits: name of the golden output.
        ids: name of the golden input that gave it.
    """

    source: str
    model_type: str | None
    auto: str | None
    atol: float
    logits: str = "logits"
    ids: str = "input_ids"


MLM = "AutoModelForMaskedLM"
CASES = {
    "nt_v1": Published("nt_v1", "esm", MLM, 2e-5, "eps1e-12.logits"),
    "nt_v2": Published("nt_v2", None, None, 2e-5, "eps1e-12.logits"),
    "dnabert1": Published("dnabert1", "bert", MLM, 2e-5),
    "dnabert2": Published("dnabert2", "bert", None, 2e-5),
    "gpn_convnet": Published("gpn_convnet", "ConvNet", MLM, 2e-5),
    "gpn_convnet2": Published("gpn", "GPN", MLM, 2e-5),
    "gpn_bytenet": Published("gpn", "GPN", MLM, 2e-5),
    "gpn_msa": Published("gpn_msa", "GPNRoFormer", MLM, 2e-5),
    "hyenadna": Published("hyenadna", "hyenadna", "AutoModelForCausalLM", 1e-4, "full.logits_tied", "input_ids_full"),
    "caduceus_ph": Published("caduceus", "caduceus", MLM, 3e-5),
    "caduceus_ps": Published("caduceus", "caduceus", MLM, 3e-5),
    "caduceus_ps_fused": Published("caduceus", "caduceus", MLM, 3e-5),
}
OTHER_INPUTS = ("attention_mask", "token_type_ids", "aux_features")
EVERY_CASE = pytest.mark.parametrize("name", CASES)


def tensors(name: str, part: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / name / f"{part}.safetensors")


def publish(name: str, folder: Path) -> Path:
    """Writes the case as its authors would."""
    facts = json.loads((GOLDEN / name / "config.json").read_text())
    config = facts.get("hf_config") or {key: value for key, value in facts.items() if key not in FACTS}
    config = {key: value for key, value in config.items() if key != "model_type"}
    if CASES[name].model_type is not None:
        config["model_type"] = CASES[name].model_type
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(name, "weights"), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def batch_of(name: str) -> dict[str, torch.Tensor]:
    inputs = tensors(name, "inputs")
    return {"input_ids": inputs[CASES[name].ids]} | {key: inputs[key] for key in OTHER_INPUTS if key in inputs}


def opened(name: str, folder: Path, task: str) -> PreTrainedModel:
    """Through the Auto class where one can know the type, otherwise through the class itself."""
    case = CASES[name]
    if case.auto is not None:
        auto = {"language": case.auto, "base": "AutoModel", "classifier": "AutoModelForSequenceClassification"}[task]
        return getattr(transformers, auto).from_pretrained(folder).eval()
    own = {"language": "masked_lm", "base": "base", "classifier": "sequence_classification"}[task]
    return SOURCES[case.source].classes[own].from_pretrained(folder).eval()


def assert_golden(name: str, model: PreTrainedModel) -> None:
    """The logits of all real positions."""
    batch, expected = batch_of(name), tensors(name, "outputs")[CASES[name].logits]
    with torch.no_grad():
        logits = model(**batch).logits
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    torch.testing.assert_close(logits[real], expected.view_as(logits)[real], rtol=0, atol=CASES[name].atol)


@EVERY_CASE
def test_the_language_model(name: str, tmp_path: Path) -> None:
    model = opened(name, publish(name, tmp_path), "language")
    assert_golden(name, model)
    model.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["model_type"] in ("esm", "bert", *REGISTRY)
    assert_golden(name, type(model).from_pretrained(tmp_path / "ours").eval())


@EVERY_CASE
def test_the_base_and_a_new_classifier_have_the_same_states(name: str, tmp_path: Path) -> None:
    publish(name, tmp_path)
    language, batch = opened(name, tmp_path, "language"), batch_of(name)
    for task in ("base", "classifier"):
        model = opened(name, tmp_path, task)
        with torch.no_grad():
            found = model.base_model(**batch).last_hidden_state
            expected = language.base_model(**batch).last_hidden_state
        assert torch.equal(found, expected)
