"""scGPT and BioFormer against their references: states, predictions, losses, gradients, the way back, and faults.

The golden cases hold float64 results of bowang-lab/scGPT and giacomo-ciro/240316_bio-llms, stored as float32; their
READMEs say how they were made.

Shapes: B cells, r genes of a cell, E hidden size.
"""

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import genesplice_hf
from genesplice_hf.errors import CheckpointError
from genesplice_hf.models.auto import AutoModelForMaskedExpression
from genesplice_hf.models.bioformer import conversion_bioformer
from genesplice_hf.models.bioformer.modeling_bioformer import BioFormerForMaskedExpression, BioFormerModel
from genesplice_hf.models.original import load_original
from genesplice_hf.models.scgpt import conversion_scgpt
from genesplice_hf.models.scgpt.modeling_scgpt import (
    ScGPTForMaskedExpression,
    ScGPTForSequenceClassification,
    ScGPTModel,
)

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 2e-5
SCGPT = ("scgpt_upstream", "scgpt_upstream_category", "scgpt_upstream_scaling", "scgpt_upstream_batch",
         "scgpt_upstream_batchnorm", "scgpt_seed_baseline")  # fmt: skip
BIOFORMER = ("bioformer_head", "bioformer_ablated", "bioformer_2024_09", "bioformer_2024_09_gated")
EVERY_SCGPT = pytest.mark.parametrize("name", SCGPT)
EVERY_BIOFORMER = pytest.mark.parametrize("name", BIOFORMER)
EVERY_CASE = pytest.mark.parametrize("name", [*SCGPT, *BIOFORMER])
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
EVERY_IMPLEMENTATION = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
SCGPT_FACTS = ("mask_value", "forward_flags")
LOSSES = ("loss", "loss_mse", "loss_zero", "loss_mvc", "loss_mvc_zero", "loss_cls", "loss_ecs", "loss_cce", "loss_dab")


class Golden(NamedTuple):
    """One case: the reference's arguments, its tensors, inputs and outputs."""

    source: str
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def model(self, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        return genesplice_hf.from_original(self.source, self.config, self.weights, dtype=dtype, **options)


@cache
def golden(name: str) -> Golden:
    folder = GOLDEN / name
    facts = json.loads((folder / "config.json").read_text())
    config = facts["args"] | {key: facts[key] for key in SCGPT_FACTS if key in facts}
    parts = (load_file(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    return Golden(name.split("_")[0], config, *parts)


def near(found: torch.Tensor, expected: torch.Tensor, where: torch.Tensor | None = None) -> None:
    """At most the tolerance of the READMEs away, where it counts."""
    assert found.shape == expected.shape
    gap = (found.detach().float() - expected).abs()
    gap = gap if where is None else gap[where]
    assert gap.max() <= TOLERANCE * max(1.0, expected.abs().max().item())


def arguments(case: Golden, model: PreTrainedModel) -> dict[str, Any]:
    """The case's inputs under our names; what knows no padding mask gets a mask of ones."""
    given, dtype = case.inputs, model.dtype
    ids = given["src"] if "src" in given else given["gene_ids"]
    padding = given.get("src_key_padding_mask", torch.zeros_like(ids).bool())
    masked = given["values"] == model.config.mask_value
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "values": given["values"].to(dtype),
        "attention_mask": (~padding).long(),
        "labels": given["target_values"].to(dtype).masked_fill(~masked, -100),
        "cell_type_labels": given.get("celltype_labels"),
        "batch_labels": given.get("batch_labels"),
    }
    if "z" in given:
        inputs["pair_values"] = given["z"].clone().to(dtype).requires_grad_()
    return inputs


def gradient_of(model: PreTrainedModel, key: str) -> torch.Tensor:
    """The gradient of one of the reference's tensors, joined where it joins several of ours."""
    conversion = conversion_bioformer if "bioformer" in type(model).__name__.lower() else conversion_scgpt
    theirs_to_ours = {theirs: ours for ours, theirs in conversion.module_map(model.config).items()}
    module, _, name = key.rpartition(".")
    parts = [f"{theirs_to_ours[module]}.{name}"]
    if name.startswith("in_proj_"):
        stem = theirs_to_ours[module]
        parts = [f"{stem}.{part}_proj.{name.removeprefix('in_proj_')}" for part in "qkv"]
    found = dict(model.named_parameters())
    prefix = model.base_model_prefix
    return torch.cat([found.get(part, found.get(f"{prefix}.{part}")).grad for part in parts])


def assert_gradients(case: Golden, model: PreTrainedModel) -> None:
    keys = [key.removeprefix("grad.") for key in case.outputs if key.startswith("grad.")]
    assert len(keys) >= 5
    for key in keys:
        near(gradient_of(model, key), case.outputs[f"grad.{key}"])


@EVERY_SCGPT
@EVERY_DTYPE
@EVERY_IMPLEMENTATION
def test_scgpt_golden(name: str, dtype: torch.dtype, attn_implementation: str) -> None:
    case = golden(name)
    model = case.model(dtype)
    assert type(model) is ScGPTForMaskedExpression and not model.training
    model.set_attn_implementation(attn_implementation)
    inputs = arguments(case, model)
    real = inputs["attention_mask"].bool()
    outputs = model(**inputs, output_hidden_states=True)
    outputs.loss.backward()
    near(outputs.hidden_states[0], case.outputs["embeddings"], real)
    for layer, state in enumerate(outputs.hidden_states[1:]):
        near(state, case.outputs[f"layer{layer}.hidden"], real)
    assert_predictions(case, outputs, real)
    assert_gradients(case, model)
    compared = [key for key in case.outputs if key in LOSSES]
    assert len(compared) >= 3
    for key in compared:
        near(getattr(outputs, key), case.outputs[key])


def assert_predictions(case: Golden, outputs: Any, real: torch.Tensor, prefix: str = "") -> None:
    found = {"mlm_output": outputs.logits, "cell_emb": outputs.cell_embedding, "cls_output": outputs.cls_logits}
    found |= {"mlm_zero_probs": outputs.zero_logits, "mvc_output": outputs.mvc_logits}
    found |= {"mvc_zero_probs": outputs.mvc_zero_logits, "dab_output": outputs.batch_logits}
    for key, tensor in found.items():
        if prefix + key not in case.outputs:
            continue
        tensor = tensor.sigmoid() if key.endswith("probs") else tensor
        near(tensor, case.outputs[prefix + key], real if key.startswith("mlm") else None)


def test_scgpt_golden_of_another_batch() -> None:
    case = golden("scgpt_upstream_batch")
    model = case.model(torch.float64)
    inputs = arguments(case, model) | {"batch_labels": case.inputs["batch_labels_2"]}
    outputs = model(**inputs, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    near(outputs.hidden_states[0], case.outputs["b2.embeddings"], real)
    assert_predictions(case, outputs, real, "b2.")
    near(outputs.loss, case.outputs["b2.loss"])


@EVERY_BIOFORMER
@EVERY_DTYPE
@EVERY_IMPLEMENTATION
def test_bioformer_golden(name: str, dtype: torch.dtype, attn_implementation: str) -> None:
    case = golden(name)
    model = case.model(dtype)
    assert type(model) is BioFormerForMaskedExpression
    model.set_attn_implementation(attn_implementation)
    states: dict[str, torch.Tensor] = {}
    for layer, block in enumerate(model.bioformer.encoder.layer):
        block.register_forward_hook(lambda module, given, out, layer=layer: states.update({f"block{layer}": out}))
    inputs = arguments(case, model)
    outputs = model(**inputs, output_hidden_states=True, output_pair_states=True)
    outputs.loss.backward()
    near(outputs.hidden_states[0], case.outputs["embeddings.m"])
    for layer in range(model.config.num_hidden_layers):
        m, z = states[f"block{layer}"]
        near(m, case.outputs[f"block{layer}.m"])
        if f"block{layer}.z" in case.outputs:
            near(z.transpose(2, 3), case.outputs[f"block{layer}.z"])
    assert (outputs.pair_states is None) == ("z_final" not in case.outputs)
    if outputs.pair_states is not None:
        near(outputs.pair_states, case.outputs["z_final"])
        near(inputs["pair_values"].grad, case.outputs["grad_input.z"])
    near(outputs.logits, case.outputs["mlm_output"])
    near(outputs.zero_logits.sigmoid(), case.outputs["mlm_zero_probs"])
    for key in ("loss", "loss_mse", "loss_zero"):
        near(getattr(outputs, key), case.outputs[key])
    assert_gradients(case, model)


def test_the_ablated_bioformer_is_an_scgpt_with_its_switches() -> None:
    """The same tensors in the other class, whose queries have biases of zero."""
    case = golden("bioformer_ablated")
    theirs = case.model(torch.float64)
    config = genesplice_hf.models.scgpt.configuration_scgpt.ScGPTConfig(
        vocab_size=40, pad_token_id=38, cls_token_id=39, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128, norm_first=True, attention_bias=False, explicit_zero_prob=True,
    )  # fmt: skip
    model = ScGPTForMaskedExpression(config).double().eval()
    model.load_state_dict({key.replace("bioformer.", "scgpt."): tensor for key, tensor in theirs.state_dict().items()})
    inputs = arguments(case, model)
    outputs = model(**inputs)
    assert torch.equal(outputs.logits, theirs(**inputs).logits)
    near(outputs.logits, case.outputs["mlm_output"])
    near(outputs.loss, case.outputs["loss"])


@EVERY_CASE
def test_there_and_back_is_bit_exact(name: str, tmp_path: Path) -> None:
    case, model = golden(name), golden(name).model()
    model.save_pretrained(tmp_path)
    ignored = set(model.config.conversion["ignored_keys"])
    for ours in (model, AutoModelForMaskedExpression.from_pretrained(tmp_path)):
        config, tensors = genesplice_hf.to_original(ours)
        assert config == case.config
        assert tensors.keys() == case.weights.keys()
        assert all(torch.equal(tensors[key], case.weights[key]) for key in tensors if key not in ignored)
        assert not any(tensors[key].any() for key in ignored)
        again = genesplice_hf.from_original(case.source, config, tensors)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in ours.state_dict().items())


def test_what_never_has_an_effect_is_said() -> None:
    ignored = golden("bioformer_2024_09").model().config.conversion["ignored_keys"]
    assert len([key for key in ignored if key.endswith("layer_norm_z.bias")]) == 3
    assert len([key for key in ignored if key.startswith("mvc_decoder.")]) == 5 and len(ignored) == 8


def test_three_spellings_are_one_model() -> None:
    case = golden("scgpt_upstream")
    plain = case.model().state_dict()
    flash = load_file(GOLDEN / "scgpt_upstream" / "weights_flash_spelling.safetensors")
    fast = {key.replace("self_attn.", "self_attn._impl."): tensor for key, tensor in flash.items()}
    parallel = {f"module.{key}": tensor for key, tensor in fast.items()}
    assert not (flash.keys() & {key for key in case.weights if "in_proj" in key})
    for spelled in (flash, fast, parallel):
        found = genesplice_hf.from_original("scgpt", case.config, spelled).state_dict()
        assert found.keys() == plain.keys() and all(torch.equal(found[key], plain[key]) for key in plain)
    back = genesplice_hf.to_original(case.model(), qkv_spelling="Wqkv")[1]
    assert back.keys() == flash.keys() and all(torch.equal(back[key], flash[key]) for key in flash)
    with pytest.raises(CheckpointError, match="qkv_spelling"):
        genesplice_hf.to_original(case.model(), qkv_spelling="qkv")


@EVERY_CASE
def test_every_fault_is_named(name: str) -> None:
    case = golden(name)
    key = next(key for key in case.weights if "layers.1" in key or "blocks.1" in key)
    for edit, listed in (
        (lambda tensors: tensors.pop(key), f"missing: .*{key}"),
        (lambda tensors: tensors.update({"stranger.weight": torch.ones(2)}), "unexpected: .*stranger.weight"),
        (lambda tensors: tensors.update({key: torch.ones(2, 3)}), rf"mis-shaped: .*{key} is \(2, 3\), needs"),
    ):
        weights = dict(case.weights)
        edit(weights)
        with pytest.raises(CheckpointError, match=listed):
            genesplice_hf.from_original(case.source, case.config, weights)


def test_the_generative_projection_is_dropped_only_by_name() -> None:
    case = golden("scgpt_upstream")
    extra = {f"transformer_encoder.layers.0.self_attn.cross_attn.{part}": torch.ones(3) for part in ("a", "b")}
    with pytest.raises(CheckpointError, match="cross_attn"):
        genesplice_hf.from_original("scgpt", case.config, case.weights | extra)
    model = genesplice_hf.from_original("scgpt", case.config, case.weights | extra, drop=["cross_attn"])
    assert set(extra) <= set(model.config.conversion["ignored_keys"])
    with pytest.raises(CheckpointError, match="only cross_attn"):
        case.model(drop=["heads"])
    with pytest.raises(CheckpointError, match="no families"):
        golden("bioformer_head").model(drop=["cross_attn"])


def test_another_placing_of_norms_is_refused() -> None:
    case = golden("scgpt_upstream")
    with pytest.raises(CheckpointError, match="pre_norm"):
        genesplice_hf.from_original("scgpt", case.config | {"pre_norm": True}, case.weights)


def test_the_keys_decide_where_arguments_are_silent() -> None:
    case = golden("scgpt_upstream_batch")
    silent = ("explicit_zero_prob", "do_mvc", "do_dab", "use_batch_labels", "n_cls", "nlayers_cls")
    config = {name: value for name, value in case.config.items() if name not in silent}
    model = genesplice_hf.from_original("scgpt", config, case.weights)
    expected = case.model().state_dict()
    assert model.config.num_labels == 5 and model.config.do_cls and not model.config.use_generation_flag
    assert all(torch.equal(model.state_dict()[key], expected[key]) for key in expected)
    flagged = case.weights | {"flag_encoder.weight": torch.ones(2, 32)}
    assert genesplice_hf.from_original("scgpt", case.config, flagged).config.use_generation_flag


def test_tasks_share_the_base() -> None:
    case = golden("scgpt_upstream")
    whole, base = case.model(), case.model(task="base")
    cells = case.model(task="sequence_classification")
    assert type(base) is ScGPTModel and type(cells) is ScGPTForSequenceClassification
    assert len(base.config.conversion["ignored_keys"]) == len([key for key in case.weights if "decoder" in key])
    inputs = {key: value for key, value in arguments(case, whole).items() if "labels" not in key}
    outputs = whole(**inputs)
    near(cells(**inputs).logits, case.outputs["cls_output"])
    torch.testing.assert_close(base(**inputs).last_hidden_state[:, 0], outputs.cell_embedding)
    assert type(golden("bioformer_head").model(task="base")) is BioFormerModel


def published(folder: Path, vocabulary_size: int) -> Path:
    """A folder as scGPT's authors publish it, with names for its genes."""
    case = golden("scgpt_upstream")
    names = {
        "ntoken": None,
        "d_model": "embsize",
        "nhead": "nheads",
        "do_mvc": "MVC",
        "pad_id": None,
        "nlayers_cls": None,
    }
    settings = {names.get(name, name): value for name, value in case.config.items() if names.get(name, name)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "args.json").write_text(json.dumps(settings | {"lr": 1e-4, "mask_ratio": [0.25, 0.5]}))
    genes = {f"GENE{index}": index for index in range(vocabulary_size)}
    special = {token: index for token, index in (("<pad>", 42), ("<cls>", 43), ("<eoc>", 44)) if vocabulary_size > 42}
    names_42 = {name: index for name, index in genes.items() if index < 42}
    (folder / "vocab.json").write_text(json.dumps(names_42 | special))
    torch.save(case.weights, folder / "best_model.pt")
    return folder


@pytest.mark.parametrize("vocabulary_size", [42, 45], ids=["without special tokens", "with special tokens"])
def test_a_published_folder_loads(vocabulary_size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = published(tmp_path / "whole-human", vocabulary_size)
    with caplog.at_level(logging.WARNING, logger="genesplice_hf"):
        model = ScGPTForMaskedExpression.from_pretrained(folder)
    assert "lr, mask_ratio" in caplog.text
    assert (model.config.vocab_size, model.config.pad_token_id, model.config.cls_token_id) == (45, 42, 43)
    expected = golden("scgpt_upstream").model()
    for ours in (model, load_original("scgpt", folder)):
        assert type(ours) is ScGPTForMaskedExpression
        assert all(torch.equal(ours.state_dict()[key], value) for key, value in expected.state_dict().items())
    assert type(ScGPTModel.from_pretrained(folder)) is ScGPTModel
    cells = ScGPTForSequenceClassification.from_pretrained(folder)
    assert torch.equal(cells.classifier.out.weight, expected.classifier.out.weight)


def test_a_folder_with_a_fault_is_refused(tmp_path: Path) -> None:
    folder = published(tmp_path, 45)
    weights = golden("scgpt_upstream").weights
    torch.save(
        {key: tensor for key, tensor in weights.items() if key != "encoder.enc_norm.bias"}, folder / "best_model.pt"
    )
    with pytest.raises(CheckpointError, match=r"missing: .*encoder\.enc_norm\.bias"):
        ScGPTForMaskedExpression.from_pretrained(folder)


def test_what_the_references_lack_cannot_go_back() -> None:
    sizes: dict[str, Any] = {"vocab_size": 9, "pad_token_id": 0, "cls_token_id": 1, "hidden_size": 8}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    scgpt, bioformer = ScGPTForMaskedExpression.config_class, BioFormerForMaskedExpression.config_class
    for config, message in (
        (scgpt(**sizes, norm_first=True), "norm_first"),
        (scgpt(**sizes, attention_scaling="hidden_size"), "attention_scaling"),
        (bioformer(**sizes, pair_update="hadamard"), "pair_update"),
        (bioformer(**sizes | {"intermediate_size": 32}, pair_init="gene"), r"pair_embedding\.gene"),
        (bioformer(**sizes), "intermediate_size"),
    ):
        kind = ScGPTForMaskedExpression if isinstance(config, scgpt) else BioFormerForMaskedExpression
        with pytest.raises(CheckpointError, match=message):
            genesplice_hf.to_original(kind(config))
    sizes.pop("intermediate_size")
    there = genesplice_hf.to_original(BioFormerForMaskedExpression(bioformer.seed("head", **sizes)))
    assert type(genesplice_hf.from_original("bioformer", *there)) is BioFormerForMaskedExpression


@pytest.mark.parametrize("source", ["scgpt", "bioformer"])
def test_an_incomplete_config_is_advice(source: str) -> None:
    with pytest.raises(CheckpointError, match="d_model"):
        genesplice_hf.from_original(source, {"ntoken": 4}, {})
